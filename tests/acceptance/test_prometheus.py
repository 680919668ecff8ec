"""A real Prometheus (Debian) scrapes workers and beat."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minter import metrics
from minter.client import FileRequest
from minter.local.servers import Valkey
from minter.sections import MetricsSettings
from tests.acceptance.conftest import Running
from tests.acceptance.test_workers import files
from tests.conftest import EXAMPLES, ROOT
from tests.servers import RabbitMQ, free_ports, lacking

pytestmark = pytest.mark.slow
PORTS = 8


@pytest.fixture
def scraped(broker: Valkey | RabbitMQ, database_dsn: str, tmp_path: Path) -> Iterator[tuple[Running, int]]:
    """An engine with metrics on, and a Prometheus that scrapes it."""
    if shutil.which("prometheus") is None:
        lacking("Prometheus is not installed (apt-get install prometheus)")
    first, port = 24_000 + os.getpid() % 200 * 40, free_ports(1)[0]
    text = (EXAMPLES / "settings.toml").read_text()
    text = text.replace('export = "', f'export = "{EXAMPLES}/')
    path = tmp_path / "settings.toml"
    path.write_text(f"{text}\n[metrics]\nfirst_port = {first}\nports = {PORTS}\n")
    engine = Running(broker, database_dsn, tmp_path, settings=path)
    engine.start_worker()
    engine.start_worker()
    beat = engine.start_beat()
    wanted = MetricsSettings(first_port=first, ports=PORTS)
    targets = [f"127.0.0.1:{p}" for role in ("worker", "beat") for p in metrics.ports_of(role, wanted)]
    config = {
        "scrape_configs": [
            {"job_name": "minter", "scrape_interval": "1s", "static_configs": [{"targets": targets}]}
        ]
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with (tmp_path / "prometheus.out").open("wb") as out:
        prometheus = subprocess.Popen(
            ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
             f"--web.listen-address=127.0.0.1:{port}"], stdout=out, stderr=out,
        )  # fmt: skip
    yield engine, port
    for process in (prometheus, beat):
        process.terminate()
        process.wait(30)
    engine.close()


def query(port: int, expression: str) -> dict[tuple[str, ...], float]:
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=5) as answer:
        found = json.load(answer)["data"]["result"]
    return {
        tuple(v for k, v in sorted(r["metric"].items()) if k != "job"): float(r["value"][1]) for r in found
    }


def wait_for(
    port: int,
    expression: str,
    condition: Callable[[dict[tuple[str, ...], float]], object],
    seconds: float = 40,
) -> dict[tuple[str, ...], float]:
    deadline = time.monotonic() + seconds
    seen = None
    while time.monotonic() < deadline:
        try:
            if condition(seen := query(port, expression)):
                return seen
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{expression}: {seen}")


def test_prometheus_sees_the_rates_of_all_processes(scraped: tuple[Running, int]) -> None:
    engine, port = scraped
    # Two workers and beat. A request that waits for a worker's start is sent again, and counts twice.
    wait_for(port, 'count(up{job="minter"} == 1)', lambda r: sum(r.values()) == 3)
    with engine.client() as client:
        made = client.mint(files(20, "prom"))
        client.fetch(made.request_ids[0])
    wait_for(port, "sum(minter_tokens_total)", lambda r: sum(r.values()) == 40)
    by_storage = query(port, "sum by (storage, operation) (minter_tokens_total)")
    assert by_storage == {("read", "BOREAS-T2_DATADISK"): 20, ("write", "FJORD-T1_DATADISK"): 20}
    wait_for(port, "minter_tokens_alive", lambda r: sum(r.values()) >= 40)
    assert wait_for(port, "minter_partitions_ahead_days", bool)
    served = query(port, "sum by (__name__) ({__name__=~'minter_.*'})")
    names = {name for (name,) in served}
    elsewhere = {metrics.HTTP, metrics.FTS_JOBS, metrics.EVENTS, metrics.LAST_EVENT}
    elsewhere |= {metrics.WAITED, metrics.LIFE_LEFT, metrics.PROVIDER, metrics.PROVIDER_SECONDS}
    for spec in metrics.SPECS:
        if spec in elsewhere | {metrics.REFUSALS, metrics.STANDBY}:
            continue  # no refusal, no standby key yet, or a process that does not run here
        suffix = {"counter": "_total", "histogram": "_count", "gauge": ""}[spec.kind]
        assert spec.name + suffix in names


ELSEWHERE = ("minter_http_", "minter_provider_", "minter_fts_", "minter_transfer_")
"""Metrics of processes that do not run in this module's engine."""


def test_every_panel_of_the_dashboard_has_a_series(scraped: tuple[Running, int]) -> None:
    engine, port = scraped
    dashboard = json.loads((ROOT / "deploy/grafana/minter.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    known = {spec.name for spec in metrics.SPECS}
    for expression in expressions:
        for name in re.findall(r"minter_[a-z_]+", expression):
            assert re.sub("_(total|bucket|sum|count)$", "", name) in known, name
    seen = dict.fromkeys((e for e in expressions if not any(name in e for name in ELSEWHERE)), 0)
    with engine.client() as client:
        deadline = (
            time.monotonic() + 100
        )  # beat asks for the state of each part at its start, and in a minute
        while not all(seen.values()):
            assert time.monotonic() < deadline, [e for e, count in seen.items() if not count]
            client.mint(files(2, "grafana"))
            client.mint([FileRequest(sources=("davs://nowhere.example.org/x",))])
            for expression in (e for e, count in seen.items() if not count):
                seen[expression] = len(query(port, expression.replace("[5m]", "[20s]")))
            time.sleep(1)


def test_every_alert_fires_and_clears() -> None:
    if shutil.which("promtool") is None:
        lacking("promtool is not installed")
    deploy = ROOT / "deploy"
    rules = (deploy / "prometheus-rules.yml").read_text()
    tested = (deploy / "prometheus-rules-test.yml").read_text()
    for alert in re.findall(r"alert: (\w+)", rules):
        assert tested.count(f"alertname: {alert}") == 2, f"{alert} is not tested to fire and to clear"
    for what in (["check", "rules", "prometheus-rules.yml"], ["test", "rules", "prometheus-rules-test.yml"]):
        done = subprocess.run(["promtool", *what], cwd=deploy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
