"""Lines of `minter status` that no running system of the other tests has."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import kombu
import pytest
from msgspec import structs

from minter import key_status, status
from minter.database import keyring
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.heartbeats import Heartbeat
from minter.lines import Line
from minter.metrics import StateCollector
from minter.sections import FTSEventsSettings
from minter.service import Service
from minter.tokens import keys


def test_ftss_silence_is_told_by_broker(service: Service) -> None:
    loaded = service.loaded
    wanted = FTSEventsSettings(vo="alpen", brokers=("mb1:61613", "mb2:61613", "mb3:61613"))
    loaded.settings = structs.replace(loaded.settings, fts_events=(wanted,))
    now = datetime.now(UTC)
    facts = {
        "last_events": {"mb1:61613": now.isoformat(), "mb2:61613": (now - timedelta(hours=3)).isoformat()}
    }
    heartbeat = Heartbeat("events", service, facts=lambda: facts)
    heartbeat.beat()
    found = list(status._events(service.pool, loaded))
    assert [line.level for line in found] == ["ok", "warning", "warning"]
    assert "mb2:61613 3:00:0" in found[1].text
    assert "no message of mb3:61613" in found[2].text
    heartbeat.stop()


class Disk(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(("free", "level"), [(15, "ok"), (14, "warning"), (3, "warning"), (2, "failed")])
def test_a_disk_that_fills_is_told(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(100 << 30, 0, free << 30))
    found = list(status._disk(service.pool, service.loaded))
    assert {line.level for line in found} == {level}
    assert any("for postgres at /" in line.text for line in found), "the tests' Postgres is on this machine"


def test_the_worst_line_of_a_part_counts() -> None:
    lines = [Line("ok", "a", ""), Line("failed", "a", ""), Line("warning", "b", ""), Line("ok", "a", "")]
    assert status.by_part(lines) == {"a": "failed", "b": "warning"}
    assert status.worst(lines) == "failed"
    assert status.worst(lines[2:]) == "warning"
    assert status.worst([]) == "ok"


def test_a_revoked_key_is_told_until_nobody_trusts_it(service: Service) -> None:
    with transaction(service.pool) as connection:
        key = next(k for k in read_keys(connection) if k.state == "active")
    service.ensure_standby(key.kid, "tests")
    at = service.clock()
    keyring.revoke(service.pool, key.kid, at, keys.RotationPolicy(0), "tests", "leak")

    def told() -> list[str]:
        return [line.text for line in key_status.key_lines(service.pool, service) if key.kid in line.text]

    service.clock = lambda: at + timedelta(hours=11)
    (text,) = told()
    assert "XRootD" not in text
    assert "Rucio 1:00:00" in text
    assert "FTS and DIRAC 13:00:00" in text
    assert f"minter keys recover {key.kid}" in text
    service.clock = lambda: at + timedelta(hours=24, seconds=1)
    assert told() == []


def test_of_two_beats_one_acts_until_it_ends(service: Service) -> None:
    first, second = Heartbeat("beat", service), Heartbeat("beat", service)
    worker = Heartbeat("worker", service)
    assert first.acts()  # before anyone's first heartbeat: better twice than not at all
    for one in (worker, first, second):
        one.beat()
    assert (first.acts(), second.acts()) == (True, False)
    first.stop()
    assert second.acts()
    second.stop()
    worker.stop()


def test_a_beat_that_waits_exports_no_gauge(service: Service) -> None:
    def never() -> kombu.Connection:
        raise AssertionError("asked")

    waiting = StateCollector(service.pool, never, list, service.engine.rotation, service.clock, lambda: False)
    assert list(waiting.collect()) == []
