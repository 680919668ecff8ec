"""Metrics come from the engine's observations and have a bounded number of labels."""

import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from platform import python_version
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from minter import __version__, metrics
from minter.contract.messages import FileRequest, MintRequest
from minter.database import counts, processes
from minter.database.connection import transaction
from minter.database.live_tokens import count_live
from minter.errors import SettingsError
from minter.heartbeats import Heartbeat
from minter.policy.requests import from_mint
from minter.sections import MetricsSettings
from minter.service import Service
from minter.tokens import clock
from minter.tokens.outcomes import Submission
from tests.conftest import load_settings, rows
from tests.integration.test_mint import SE, mint, submission


def scrape(port: int) -> dict[tuple[Any, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return {
            (s.name, *sorted(s.labels.items())): s.value
            for family in text_string_to_metric_families(answer.read().decode())
            for s in family.samples
        }


@pytest.fixture
def observed(dsn: str) -> Iterator[tuple[Service, metrics.Metrics]]:
    made = metrics.Metrics()
    service = Service(load_settings(dsn), made.observe)
    yield service, made
    service.pool.dispose()


def test_tokens_requests_and_refusals_are_counted(observed: tuple[Service, metrics.Metrics]) -> None:
    service, made = observed
    bad = FileRequest(sources=(SE + "x",), destinations=("davs://nowhere.example.org/f",))
    half = Submission(from_mint(MintRequest(request_id=clock.new_uuid7(), files=(bad,))), "rucio-alpen")
    one = submission("a", "b")
    mint(service, one, half)
    mint(service, one, submission("c", client="nobody"))
    made.http("/health", 200)
    port = metrics.serve(made.registry, "worker", "127.0.0.1", range(21_400, 21_500))
    seen = scrape(port)

    def value(name: str, **labels: str) -> float:
        return seen[(name, *sorted(labels.items()))]

    source = {"vo": "alpen", "mode": "mint", "operation": "read", "storage": "BOREAS-T2_DATADISK"}
    assert value("minter_tokens_total", outcome="issued", **source) == 2
    assert value("minter_tokens_total", outcome="repeated", **source) == 2
    assert value("minter_requests_total", vo="alpen", kind="mint", outcome="granted") == 2
    assert value("minter_requests_total", vo="alpen", kind="mint", outcome="repeated") == 1
    assert value("minter_requests_total", vo="", kind="mint", outcome="refused") == 1
    assert value("minter_refusals_total", vo="alpen", reason="unknown_storage", storage="") == 1
    assert value("minter_refusals_total", vo="", reason="unknown_client", storage="") == 1
    assert value("minter_batch_requests_count") == 2
    assert value("minter_request_age_seconds_count") == 4
    for stage in ("decided", "inserted", "copied", "committed", "answered"):
        assert value("minter_stage_seconds_count", stage=stage) == 2
    names = {name for name, *_ in seen}
    assert {s.name + "_total" for s in metrics.SPECS if s.kind == "counter"} - {
        "minter_follow_ups_total",
        "minter_fts_jobs_total",
        "minter_provider_requests_total",
        "minter_fts_events_total",
    } <= names
    assert not any(word in str(seen) for word in ("jti", "sub", "01a"))


def test_beat_tells_of_keys_partitions_living_tokens_and_queues(service: Service, tmp_path: Path) -> None:
    import kombu

    from minter.broker.publisher import declare
    from minter.local.servers import Valkey

    mint(service, submission("a", "b", lifetime_seconds=3000))
    broker = Valkey(tmp_path / "valkey")
    broker.start()
    try:
        with kombu.Connection(broker.url) as connection:
            declare(connection)
        collector = metrics.StateCollector(
            service.pool,
            lambda: kombu.Connection(broker.url),
            lambda: ["minter.requests"],
            service.engine.rotation,
            service.clock,
        )
        found = {(s.name, *s.labels.values()): s.value for f in collector.collect() for s in f.samples}
        assert found["minter_tokens_alive", "alpen"] == found["minter_tokens_expiring", "alpen"] == 4
        assert found["minter_queue_messages", "minter.requests"] == 0
        assert found[("minter_partitions_ahead_days",)] == 7
        assert (
            found["minter_key_signs_until_timestamp_seconds", "alpen", "RS256"] > service.clock().timestamp()
        )
        assert ("minter_key_standby_ready_timestamp_seconds", "alpen", "RS256") not in found
        assert {f.name for f in collector.describe()} == {s.name for s in metrics.OF_BEAT}
    finally:
        broker.stop()


def test_a_token_whose_provider_gave_it_more_than_our_longest_life_is_alive_until_its_end(
    service: Service,
) -> None:
    mint(service, submission("late"))
    with transaction(service.pool) as connection:
        connection.execute("UPDATE tokens SET expires_at = now() + interval '192 h 8 min'")
    later = service.clock() + timedelta(hours=192, minutes=5)
    (alive, expiring) = count_live(service.pool, later, timedelta(hours=1))["alpen"]
    assert alive == expiring > 0
    assert count_live(service.pool, later + timedelta(minutes=5), timedelta(hours=1)) == {}


def test_each_process_takes_a_port_of_its_own(observed: tuple[Service, metrics.Metrics]) -> None:
    _, made = observed
    first = metrics.serve(made.registry, "worker", "127.0.0.1", range(21_500, 21_600))
    assert scrape(first)[
        "minter_build_info", ("python", python_version()), ("role", "worker"), ("version", __version__)
    ]
    assert metrics.serve(CollectorRegistry(), "worker", "127.0.0.1", range(first, 21_600)) > first
    with pytest.raises(SettingsError, match="no free port for metrics of worker"):
        metrics.serve(CollectorRegistry(), "worker", "127.0.0.1", range(first, first + 1))


def test_ports_of_two_roles_never_meet() -> None:
    wanted = MetricsSettings(first_port=9400, ports=70)
    ports = [p for role in processes.ROLES if role != "console" for p in metrics.ports_of(role, wanted)]
    assert len(ports) == len(set(ports)) == 100
    assert set(ports) == set(range(9400, 9500))


def test_a_heartbeat_brings_what_the_process_counted_since_the_last_one(
    observed: tuple[Service, metrics.Metrics],
) -> None:
    service, made = observed
    heartbeat = Heartbeat("worker", service, made.counted, lambda: {"last_events": {}})
    mint(service, submission("a", "b"))
    heartbeat.beat()
    mint(service, submission("a"), submission("c", client="nobody"))
    heartbeat.beat()
    heartbeat.beat()
    kinds, hour = ("tokens", "requests", "refusals", "ages"), timedelta(hours=1)
    seen = counts.amounts(service.pool, kinds, service.clock() - hour, hour)
    totals: Counter[tuple[str, str, str]] = Counter()
    for _, vo, kind, label, amount in seen:  # the hour may end during the test
        totals[vo, kind, label] += amount
    assert totals == {
        ("alpen", "tokens", "mint"): 6,
        ("alpen", "requests", "granted"): 2,
        ("", "requests", "refused"): 1,
        ("", "refusals", "unknown_client"): 1,
        ("", "ages", ""): 3,
    }
    counts.compact(service.pool)
    assert counts.amounts(service.pool, kinds, service.clock() - hour, hour) == seen
    heartbeat.stop()


def test_old_counts_are_summed_up_and_charts_stay_the_same(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with transaction(service.pool) as connection:
        connection.execute(
            "INSERT INTO counts SELECT date_trunc('minute', now()) - m * interval '1 minute', p::uuid, 'alpen', 'tokens', l,"
            " m FROM generate_series(1, 400) AS m, unnest(%s::uuid[]) AS p, unnest('{mint,exchange}'::text[]) AS l",
            ([clock.new_uuid7(), clock.new_uuid7()],),
        )
    monkeypatch.setattr(counts, "AT_ONCE", 100)

    def seen() -> list[tuple[datetime, str, str, str, int]]:
        return counts.amounts(
            service.pool, ["tokens"], service.clock() - timedelta(days=1), timedelta(minutes=15)
        )

    (before,), old = rows(service, "SELECT count(*) FROM counts"), seen()
    both = [threading.Thread(target=counts.compact, args=(service.pool,)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert seen() == old
    counts.compact(service.pool)
    assert seen() == old
    (after,) = rows(service, "SELECT count(*) FROM counts")
    assert before == (1600,)
    assert after < (600,)  # two hours by minute of each process, the rest by quarter
