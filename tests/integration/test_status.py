"""Lines of `minter status` that no running system of the other tests has."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec import structs

from minter import status
from minter.heartbeats import Heartbeat
from minter.sections import FTSEventsSettings
from minter.service import Service
from minter.status import Line


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
