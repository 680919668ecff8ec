"""Retention: past days are moved to files that a trace still reads, and nothing is lost."""

import gzip
import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy.engine import Engine as Pool

from minter.contract.followups import FileReport, JobReport, ReportRequest
from minter.contract.messages import FileRequest, MintRequest
from minter.database import archive, connection, traces
from minter.errors import SettingsError, Unavailable
from minter.policy.requests import from_mint
from minter.service import Service
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock
from minter.tokens.outcomes import Outcome, Submission
from minter.tokens.records import fts_token_id
from tests.conftest import load_settings, rows
from tests.integration.test_mint import SE, mint, submission

ME = "rucio-alpen"
PATH = "/atlas/atlasdatadisk/rucio/data/"


@pytest.fixture
def later(service: Service, dsn: str) -> Callable[[int], datetime]:
    """Return the time at which today is past retention: in 39 days for tokens, in 69 for requests."""

    def at(days: int) -> datetime:
        return clock.now() + timedelta(days=days)

    return at


def tables(service: Service) -> set[str]:
    found = rows(
        service,
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ '^(tokens|uses|token_states|requests)_[0-9]{8}$'",
    )
    return {name for (name,) in found}


def run(service: Service, folder: Path, now: datetime) -> list[tuple[Path, int]]:
    return [
        archive.archive_day(service.pool, folder, kind, day)
        for kind, day in archive.due(service.pool, now, 30)
    ]


def stocked(service: Service) -> tuple[Outcome, Outcome, UUID]:
    """Record a day with reported, refused and renewed requests; return its outcomes."""
    bad = FileRequest(sources=(SE + "x",), destinations=("davs://nowhere.example.org/f",))
    half = Submission(
        from_mint(MintRequest(request_id=clock.new_uuid7(), files=(FileRequest(sources=(SE + "h",)), bad))),
        ME,
    )
    one, two = mint(service, submission("a", "b", on_behalf_of="alice", activity="Production"), half)
    job = clock.new_uuid7()
    Lifecycle(service.engine, service.store).report(
        ME,
        ReportRequest(
            (JobReport(job, one.submission.request.request_id, (0, 1)),),
            (FileReport(state="active", external_id="a"), FileReport(state="finished", external_id="a")),
        ),
        clock.now(),
    )
    return one, two, job


def questions(one: Outcome) -> dict[str, Any]:
    issued = one.issued[0]
    return {
        "jti": uuid.UUID(issued.jti), "path": PATH + "a", "external_id": "a", "client": ME,
        "fts_token_id": fts_token_id(issued.token), "storage": "BOREAS-T2_DATADISK",
    }  # fmt: skip


def test_what_is_archived_tells_the_same_story(
    service: Service, tmp_path: Path, later: Callable[[int], datetime]
) -> None:
    one, two, job = stocked(service)
    since, until = clock.now() - timedelta(days=1), clock.now() + timedelta(days=1)
    asked = questions(one)
    before = {by: traces.find(service.pool, by, value, since, until) for by, value in asked.items()}
    request_id = two.submission.request.request_id
    tokens_before, refusals_before = traces.find_request(service.pool, request_id)
    (first,) = [s for s in before["external_id"] if s.side == "source"]
    assert (first.on_behalf_of, first.activity, first.state, first.job_id) == (
        "alice",
        "Production",
        "finished",
        job,
    )
    assert first.operations == ["read"]
    assert first.active_at
    assert first.ended_at

    done = run(service, tmp_path, later(40))
    assert [count for path, count in done if path.name.startswith("tokens") and count] == [5]
    for by, value in asked.items():
        assert traces.find(service.pool, by, value, since, until) == []
        found = archive.find(tmp_path, by, value, since, until)
        assert traces.newest(found, 100) == before[by] != []
    run(service, tmp_path, later(70))
    assert traces.find_request(service.pool, request_id) == ([], [])
    tokens_after, refusals_after = archive.find_request(tmp_path, request_id, until)
    assert (tokens_after, refusals_after) == (tokens_before, refusals_before)


def test_only_days_that_are_over_go(
    service: Service, tmp_path: Path, later: Callable[[int], datetime]
) -> None:
    stocked(service)
    before = tables(service)
    assert archive.due(service.pool, later(0), 30) == []
    run(service, tmp_path, later(38))
    today = f"{clock.now():%Y%m%d}"
    assert {t for t in before if t.endswith(today)} <= tables(service)
    run(service, tmp_path, later(40))
    assert tables(service) & {f"tokens_{today}", f"token_states_{today}"} == set()
    assert f"requests_{today}" in tables(service)  # its request_id may get tokens for 30 days more
    run(service, tmp_path, later(70))
    assert f"requests_{today}" not in tables(service)


def test_a_crash_at_any_point_is_finished_by_the_next_run(
    service: Service, tmp_path: Path, later: Callable[[int], datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(service)
    remove = archive._remove

    def killed(pool: Pool, table: str, partition: str, *, attached: bool) -> None:
        if partition.endswith(f"{clock.now():%Y%m%d}"):
            raise KeyboardInterrupt
        remove(pool, table, partition, attached=attached)

    monkeypatch.setattr(archive, "_remove", killed)  # after writing the file, before removing the partitions
    with pytest.raises(KeyboardInterrupt):
        run(service, tmp_path, later(40))
    monkeypatch.setattr(archive, "_remove", remove)
    (tmp_path / "tokens-20200101.jsonl.partial").write_bytes(b"half")  # left by a killed run
    today = f"{clock.now():%Y%m%d}"
    with connection.transaction(service.pool) as tx:  # left by a run that was killed between detach and drop
        tx.execute(f"ALTER TABLE token_states DETACH PARTITION token_states_{today}")
    run(service, tmp_path, later(40))
    assert not {t for t in tables(service) if t.endswith(today) and t.startswith("token")}
    since = clock.now() - timedelta(days=1)
    (newest, *_) = archive.find(tmp_path, "external_id", "a", since, since + timedelta(days=2))
    before = archive.find(tmp_path, "external_id", "a", since, newest.issued_at)
    assert all(one.issued_at < newest.issued_at for one in before), "tokens after `until` are left out"
    assert run(service, tmp_path, later(40)) == []


def test_a_reader_delays_the_removal_and_loses_nothing(
    service: Service, tmp_path: Path, later: Callable[[int], datetime], dsn: str
) -> None:
    stocked(service)
    with psycopg.connect(dsn) as reader:
        reader.execute("SELECT count(*) FROM tokens")  # the reader's transaction stays open
        with connection.transaction(service.pool) as tx:
            connected: Any = service.pool.raw_connection().driver_connection
            tx.execute("ALTER DATABASE " + connected.info.dbname + " SET lock_timeout = '1s'")
        hurried = Service(load_settings(dsn))
        with pytest.raises(Unavailable, match="in use"):
            run(hurried, tmp_path, later(40))
    run(hurried, tmp_path, later(40))
    assert not {t for t in tables(service) if t == f"tokens_{clock.now():%Y%m%d}"}
    hurried.pool.dispose()


def test_a_folder_that_cannot_be_written_changes_nothing(
    service: Service, tmp_path: Path, later: Callable[[int], datetime]
) -> None:
    stocked(service)
    before = tables(service)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be written"):
        run(service, tmp_path / "file", later(40))
    assert tables(service) == before


def test_no_token_and_no_secret_is_in_an_archive(
    service: Service, tmp_path: Path, later: Callable[[int], datetime]
) -> None:
    one, _, _ = stocked(service)
    run(service, tmp_path, later(40))
    text = b"".join(gzip.decompress(p.read_bytes()) for p in tmp_path.glob("*.gz"))
    assert text
    assert all(json.loads(line) for line in text.splitlines())
    for issued in one.issued:
        assert issued.token.rpartition(b".")[2] not in text


def test_what_somebody_else_detached_is_not_dropped(
    service: Service, tmp_path: Path, later: Callable[[int], datetime]
) -> None:
    stocked(service)
    today = f"{clock.now():%Y%m%d}"
    with connection.transaction(service.pool) as tx:
        tx.execute(f"ALTER TABLE tokens DETACH PARTITION tokens_{today}")
    with pytest.raises(Unavailable, match="attach it again"):
        run(service, tmp_path, later(40))
    assert rows(service, f"SELECT count(*) FROM tokens_{today}") == [(5,)]


def test_an_archived_day_that_comes_back_empty_keeps_its_file(
    service: Service, tmp_path: Path, later: Callable[[int], datetime]
) -> None:
    _, two, _ = stocked(service)
    run(service, tmp_path, later(70))
    today = f"{clock.now():%Y%m%d}"
    before = (tmp_path / f"requests-{today}.jsonl.gz").read_bytes()
    assert service.make_partitions()  # a longer retention time would do the same
    run(service, tmp_path, later(70))
    assert (tmp_path / f"requests-{today}.jsonl.gz").read_bytes() == before
    assert archive.find_request(tmp_path, two.submission.request.request_id, later(1))[1]


def test_two_runs_do_not_meet(service: Service, tmp_path: Path, later: Callable[[int], datetime]) -> None:
    stocked(service)
    with archive._alone(tmp_path), pytest.raises(Unavailable, match="another run"):
        run(service, tmp_path, later(40))


def test_files_are_looked_at_by_their_day(tmp_path: Path) -> None:
    for day in ("20261001", "20261002", "20261003"):
        (tmp_path / f"tokens-{day}.jsonl.gz").write_bytes(b"")
    since = datetime(2026, 10, 2, tzinfo=UTC)
    assert [p.name for p in archive._files(tmp_path, "tokens", since, since)] == ["tokens-20261002.jsonl.gz"]
