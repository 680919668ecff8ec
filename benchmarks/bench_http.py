"""Measure tokens/s over HTTP: `python -m benchmarks.bench_http [--seconds N] [--rounds N] [--json FILE]`.

One run measures `/token` with client_credentials in two processes, recorded in Postgres with durability on;
discovery and JWKS; and, under the same load, npm oidc-provider, which records nothing. wrk makes the load
(apt-get install wrk) on the same two cores. Then latencies are measured at half of the maximum rate.
"""

import argparse
import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.engine import report, settings_text, versions
from minter import settings
from minter.database import migrations
from minter.local import stack
from minter.local.servers import Postgres
from minter.service import Service
from minter.tokens import keystore
from minter.tokens.keystore import new_master_key
from tests.servers import free_ports

ROOT = Path(__file__).parents[1]
OIDC = Path(__file__).parent / "oidc-provider"
FORM = (
    "grant_type=client_credentials&scope=storage.read:/vo/mc23_13p6TeV&{audience}=https://se3.example.org:443"
)
POST = """
wrk.method = "POST"
wrk.body = "{body}"
wrk.headers["Content-Type"] = "application/x-www-form-urlencoded"
wrk.headers["Authorization"] = "Basic {basic}"
done = function(summary, latency, requests)
  io.write(string.format("errors %d p50 %d p99 %d\\n", summary.errors.status + summary.errors.connect +
    summary.errors.read + summary.errors.timeout, latency:percentile(50), latency:percentile(99)))
end
"""


def wrk(url: str, seconds: int, connections: int, script: Path | None = None) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", url]
    said = subprocess.run(
        command + (["-s", str(script)] if script else []), capture_output=True, text=True, check=True
    ).stdout
    found = {"per_s": float(re.search(r"Requests/sec:\s+([\d.]+)", said).group(1))}
    if told := re.search(r"errors (\d+) p50 (\d+) p99 (\d+)", said):
        found |= {"errors": int(told[1]), "p50_ms": int(told[2]) / 1000, "p99_ms": int(told[3]) / 1000}
    return found


def script(folder: Path, name: str, form: str, client: str, secret: str) -> Path:
    basic = base64.b64encode(f"{client}:{secret}".encode()).decode()
    path = folder / f"{name}.lua"
    path.write_text(POST.format(body=form, basic=basic))
    return path


@contextlib.contextmanager
def minter(folder: Path, processes: int) -> Iterator[tuple[str, Path, Service]]:
    """Yield the base URL of a running HTTP service, the load's script, and the service object."""
    (port,) = free_ports(1)
    postgres = Postgres(folder / "postgres")
    postgres.start()
    (folder / "settings.toml").write_text(
        settings_text() + f"[http]\nport = {port}\nprocesses = {processes}\nrequests_per_second = 1000000\n"
    )
    environ = {
        **os.environ, "MINTER_SETTINGS": str(folder / "settings.toml"), "MINTER_DSN": postgres.dsn,
        "MINTER_MASTER_KEY_VO": new_master_key(), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    service = Service(settings.load(folder / "settings.toml", environ))
    migrations.upgrade(service.pool)
    service.prepare()
    service.create_keys("vo", ("ES256", "RS256"), "bench")
    secret = keystore.new_secret()
    service.set_secret(stack.add_client(service, "load", "vo", "bench"), secret, "bench")
    log = (folder / "serve.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "minter.cli", "serve"], env=environ, stdout=log, stderr=log
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait(f"{url}/ready")
        yield url, script(folder, "minter", FORM.format(audience="audience"), "load", secret), service
    finally:
        process.terminate()
        process.wait(30)
        log.close()
        service.pool.dispose()
        postgres.stop()


@contextlib.contextmanager
def oidc_provider(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the base URL of npm oidc-provider, which signs ES256 in memory, and the load's script."""
    (port,) = free_ports(1)
    for name in ("package.json", "server.mjs"):
        (folder / name).write_bytes((OIDC / name).read_bytes())
    subprocess.run(
        ["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True, capture_output=True
    )
    with (folder / "oidc.log").open("ab") as log:
        process = subprocess.Popen(["node", "server.mjs", str(port)], cwd=folder, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait(f"{url}/.well-known/openid-configuration")
        yield url, script(folder, "oidc", FORM.format(audience="resource"), "load", "secret")
    finally:
        process.terminate()
        process.wait(30)


def wait(url: str) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=1).close()
            return
        time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


def paced(url: str, secret_script: Path, rate: float, seconds: int) -> dict[str, float]:
    """Return the latencies at a rate; trial runs set the pause between the requests of a connection."""
    connections = 64
    path = secret_script.with_suffix(".paced.lua")
    pause = connections / rate * 1000

    def run(pause: float, seconds: int) -> dict[str, float]:
        delay = f"\nfunction delay() return math.random(0, {max(0, 2 * pause):.0f}) end\n"
        path.write_text(secret_script.read_text() + delay)
        return wrk(url, seconds, connections, path)

    for _ in range(3):
        pause += (connections / rate - connections / run(pause, 2)["per_s"]) * 1000
    return run(pause, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = []
    with (
        tempfile.TemporaryDirectory(prefix="minter-bench-") as one,
        tempfile.TemporaryDirectory(prefix="minter-bench-") as two,
        minter(Path(one), options.processes) as (url, load, service),
        oidc_provider(Path(two)) as (other, other_load),
    ):
        wrk(f"{url}/vo/token", 2, options.connections, load)
        wrk(f"{other}/token", 2, options.connections, other_load)
        for _ in range(options.rounds):
            entry = {
                "token": wrk(f"{url}/vo/token", options.seconds, options.connections, load),
                "oidc_provider": wrk(f"{other}/token", options.seconds, options.connections, other_load),
                "jwks": wrk(f"{url}/vo/jwks.json", 3, options.connections),
                "discovery": wrk(f"{url}/vo/.well-known/openid-configuration", 3, options.connections),
            }
            entry["half"] = paced(f"{url}/vo/token", load, entry["token"]["per_s"] / 2, options.seconds)
            entry["ratio"] = round(entry["token"]["per_s"] / entry["oidc_provider"]["per_s"], 2)
            rounds.append(entry)
            print(json.dumps(entry), flush=True)
        with service.pool.connect() as connection:
            recorded = connection.exec_driver_sql("SELECT count(*) FROM tokens").scalar()
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "versions": {**versions(), "node": node},
        "processes": options.processes,
        "connections": options.connections,
        "recorded": recorded,
        "rounds": rounds,
        "median": {
            "token_per_s": median(r["token"]["per_s"] for r in rounds),
            "ratio_to_oidc_provider": median(r["ratio"] for r in rounds),
            "jwks_per_s": median(r["jwks"]["per_s"] for r in rounds),
            "discovery_per_s": median(r["discovery"]["per_s"] for r in rounds),
            "p99_ms_at_half": median(r["half"]["p99_ms"] for r in rounds),
        },
    }
    report(result, options.json)


if __name__ == "__main__":
    main()
