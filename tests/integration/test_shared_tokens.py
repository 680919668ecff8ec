"""Shared tokens: one signature for the files of a directory or storage, and one row for each use."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Never
from uuid import UUID

import pytest
from msgspec import structs

from minter.contract.followups import (
    CancelRequest,
    FetchRequest,
    FileReport,
    JobReport,
    RenewRequest,
    ReportRequest,
)
from minter.contract.messages import FileOperation, FileRequest, MintRequest
from minter.contract.operations import Operation
from minter.database import archive, control_changes, live_tokens, recording, traces
from minter.database.connection import instant, transaction
from minter.database.control import read_keys
from minter.database.traces import TraceRecord
from minter.errors import Banned, Expired, Unavailable
from minter.local import stack
from minter.policy.clients import Ban, Bans
from minter.policy.requests import from_mint
from minter.policy.routes import Granularity, Route
from minter.policy.transfers import Policy
from minter.service import Service
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock, keys
from minter.tokens.outcomes import Submission
from tests.conftest import load_settings, rows
from tests.integration.test_mint import SE, count, mint, tokens
from tests.integration.test_repeats import rotate

ME = "rucio-alpen"
DIR = "/atlas/atlasdatadisk/rucio/data"
READ_WRITE: tuple[Operation, ...] = ("read", "write", "overwrite", "retry")


def share(service: Service, granularity: Granularity = "directory", **route: Any) -> Service:
    """Give the engine one route, on which a file needs 1.5 hours of the 6 that a token lives."""
    one = Route(name="shared", operations=READ_WRITE, granularity=granularity, wait_seconds=1200, **route)
    old = service.engine.policy
    service.engine.policy = Policy(old.directories, (one,), ())
    return service


@pytest.fixture
def shared(service: Service) -> Service:
    return share(service)


def downloads(
    *names: str,
    client: str = ME,
    operation: Operation | Literal["download", "upload"] = "download",
    **options: Any,
) -> Submission:
    files = tuple(
        FileRequest(operations=(FileOperation(operation, SE + name),), external_id=name) for name in names
    )
    request_id = options.pop("request_id", None) or clock.new_uuid7()
    return Submission(from_mint(MintRequest(request_id=request_id, files=files, **options)), client)


@pytest.fixture
def signatures(service: Service, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the signatures, without the test signature at the loading of a key."""
    with transaction(service.pool) as connection:
        for key in read_keys(connection):
            service.engine.unlock(key)
    signed: Counter[str] = Counter()
    sign = keys.Signer.sign

    def counted(self: keys.Signer, payload: bytes) -> bytes:
        signed["signatures"] += 1
        return sign(self, payload)

    monkeypatch.setattr(keys.Signer, "sign", counted)
    return signed


def test_a_second_file_costs_one_use_row_and_no_signature(shared: Service, signatures: Counter[str]) -> None:
    (first,) = mint(shared, downloads("d/a"))
    assert (count(shared), count(shared, "uses"), signatures["signatures"]) == (1, 1, 1)
    (second,) = mint(shared, downloads("d/b"))
    assert tokens(second) == tokens(first)
    assert (count(shared), count(shared, "uses"), signatures["signatures"]) == (1, 2, 1)
    claims = json.loads(rows(shared, "SELECT payload FROM tokens")[0][0])
    assert claims["scope"] == f"storage.read:{DIR}/d"
    assert claims["exp"] - claims["iat"] == 6 * 3600


def test_requests_of_one_batch_and_files_of_one_request_share(
    shared: Service, signatures: Counter[str]
) -> None:
    one, two = mint(shared, downloads("d/a", "d/b"), downloads("d/c", "e/d"))
    assert len({*tokens(one), *tokens(two)}) == 2
    assert tokens(one) == [tokens(two)[0]] * 2
    assert (count(shared), count(shared, "uses"), signatures["signatures"]) == (2, 4, 2)


def test_a_storage_wide_token_ends_at_the_storages_prefix(service: Service) -> None:
    (one,), (two,) = (mint(share(service, "storage"), downloads(n)) for n in ("d/a", "e/f/b"))
    assert tokens(one) == tokens(two)
    assert one.issued[0].scope == "storage.read:/atlas/atlasdatadisk/rucio"


def test_only_within_one_client_and_one_kind_of_need(shared: Service) -> None:
    stack.add_client(shared, "other", "alpen", "tests")
    (mine,) = mint(shared, downloads("d/a"))
    for asked in (
        downloads("d/b", client="other"),
        downloads("d/b", operation="upload"),
        downloads("d/b", lifetime_seconds=3600),
        downloads("e/b"),
    ):
        (outcome,) = mint(shared, asked)
        assert tokens(outcome)[0] not in tokens(mine)


def test_only_while_the_life_left_covers_the_need(shared: Service) -> None:
    (first,) = mint(shared, downloads("d/a"))
    assert first.client is not None
    need = (
        shared.engine.policy.decide(downloads("d/a").request, first.client, Bans()).planned_tokens[0].lifetime
    )
    at = first.issued[0].exp - need.seconds + 60
    (last,) = mint(shared, downloads("d/b"), now=instant(at))
    (later,) = mint(shared, downloads("d/c"), now=instant(at + 1))
    assert tokens(last) == tokens(first) != tokens(later)
    assert later.issued[0].exp >= at + need.seconds


def test_another_process_finds_it_and_makes_the_same_bytes(shared: Service, dsn: str) -> None:
    (first,) = mint(shared, downloads("d/a"))
    other = share(Service(load_settings(dsn)))
    (second,) = mint(other, downloads("d/b"))
    other.pool.dispose()
    assert tokens(second) == tokens(first)
    assert count(shared) == 1


def test_asked_twice_or_fetched_same_bytes(shared: Service, dsn: str) -> None:
    asked = downloads("d/a", "e/b")
    first, twin = mint(shared, asked, asked)
    (again,) = mint(shared, asked)
    assert tokens(first) == tokens(twin) == tokens(again)
    assert [i.slot for i in first.issued] == [i.slot for i in again.issued]
    lifecycle = Lifecycle(shared.engine, shared.store)
    fetched = lifecycle.fetch(ME, FetchRequest(asked.request.request_id), clock.now())
    assert [t.token.encode() for t in fetched.tokens] == tokens(first)
    assert (count(shared), count(shared, "uses")) == (2, 2)


def test_a_use_that_was_not_committed_is_not_kept(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:

        def fail(*_: object) -> Never:
            raise Unavailable("Postgres failed")

        broken.setattr(recording.PostgresRecording, "add_uses", fail)
        with pytest.raises(Unavailable):
            mint(shared, downloads("d/a"))
    (outcome,) = mint(shared, downloads("d/a"))
    assert rows(shared, "SELECT jti::text FROM tokens") == [(outcome.issued[0].jti,)]


def test_a_ban_inside_the_directory_ends_the_sharing(shared: Service) -> None:
    asked = downloads("d/a")
    (first,) = mint(shared, asked)
    control_changes.add_ban(shared.pool, Ban("path", f"{DIR}/d/secret"), "leak", "test")
    (narrow,) = mint(shared, downloads("d/b"))
    assert narrow.issued[0].scope == f"storage.read:{DIR}/d/b"
    (again,) = mint(shared, asked)  # the recorded token allows more than the client may get now
    assert isinstance(again.error, Banned)
    (refused,) = mint(shared, downloads("d/secret/x"))
    assert refused.refusals[0]["error"]["reason"] == "banned"
    assert tokens(first)[0] not in tokens(narrow)


def test_a_key_that_is_not_active_any_more_serves_no_new_use(shared: Service) -> None:
    (first,) = mint(shared, downloads("d/a"))
    rotate(shared, "ES256")
    (second,) = mint(shared, downloads("d/b"))
    assert tokens(second) != tokens(first)
    assert count(shared) == 2


def test_narrow_mitigations_do_not_hold_for_a_shared_token(service: Service) -> None:
    long: dict[str, Any] = {
        "max_lifetime_seconds": 48 * 3600,
        "mitigations": ("narrow_read", "narrow_write"),
        "risk_assessment": "docs/r",
    }
    (outcome,) = mint(share(service, **long), downloads("d/a"))
    assert outcome.decision is not None
    (plan,) = {g.plan for g in outcome.decision.planned_tokens}
    assert plan.cap_seconds == 6 * 3600
    (alone,) = mint(share(service, "file", **long), downloads("d/a"))
    assert alone.decision is not None
    assert alone.decision.planned_tokens[0].plan.cap_seconds == 48 * 3600


# ── the life of uses ─────────────────────────────────────────────────────────────────────────


def test_each_use_has_a_state_of_its_own(shared: Service) -> None:
    lifecycle = Lifecycle(shared.engine, shared.store)
    asked, other = downloads("d/a", "d/b"), downloads("d/c")
    made, _ = mint(shared, asked, other)
    id_, job = asked.request.request_id, clock.new_uuid7()
    reports = (
        FileReport(state="active", external_id="d/a"),
        FileReport(state="finished", request_id=id_, file=1),
        FileReport(state="active", job_id=job, file=0),
        FileReport(state="active", jti=UUID(made.issued[0].jti)),  # the report names no file
    )
    told = lifecycle.report(ME, ReportRequest((JobReport(job, id_, (0, 1)),), reports), clock.now())
    assert (told.changed, told.unknown) == (2, ["files[3]"])
    cancelled = lifecycle.cancel(ME, CancelRequest(request_id=id_), clock.now())
    assert cancelled.changed == 1
    assert [a.jti for a in cancelled.alive] == [made.issued[0].jti]
    (again,) = mint(shared, asked)
    assert isinstance(again.error, Expired)
    (untouched,) = mint(shared, other)
    assert tokens(untouched) == tokens(made)[:1]
    (new,) = mint(shared, downloads("d/d"))  # the shared token itself is not ended
    assert tokens(new) == tokens(made)[:1]


def test_a_renewal_of_a_use_is_decided_anew(shared: Service) -> None:
    asked = downloads("d/a", "d/b")
    (made,) = mint(shared, asked)
    lifecycle = Lifecycle(shared.engine, shared.store)
    wire = RenewRequest(request_id=clock.new_uuid7(), renews=asked.request.request_id, files=(1,))
    (renewed,) = mint(shared, Submission(lifecycle.renewal(ME, wire), ME))
    assert tokens(renewed) == tokens(made)[:1]
    assert rows(shared, "SELECT path, external_id FROM uses ORDER BY use_id DESC LIMIT 1") == [
        (f"{DIR}/d/b", "d/b")
    ]
    share(shared, "file")
    later = clock.now() + timedelta(seconds=1)
    (narrow,) = mint(
        shared,
        Submission(lifecycle.renewal(ME, structs.replace(wire, request_id=clock.new_uuid7())), ME),
        now=later,
    )
    assert narrow.issued[0].scope == f"storage.read:{DIR}/d/b"


def test_every_question_leads_to_the_uses_in_the_database_and_in_archives(
    shared: Service, tmp_path: Path
) -> None:
    asked = downloads("d/a", "d/b", on_behalf_of="alice")
    (made,) = mint(shared, asked)
    (later,) = mint(shared, downloads("d/c", on_behalf_of="bob"))
    Lifecycle(shared.engine, shared.store).report(
        ME, ReportRequest((), (FileReport(state="finished", external_id="d/b"),)), clock.now()
    )
    ((jti, fts_id, kid),) = rows(
        shared, "SELECT jti, fts_token_id, kid FROM tokens JOIN signing_keys USING (key_id)"
    )
    (storage,) = {i.storage for i in made.issued}
    since, until = clock.now() - timedelta(days=1), clock.now() + timedelta(days=1)
    everything = {"d/a", "d/b", "d/c"}
    questions = {
        "jti": (jti, everything),
        "path": (f"{DIR}/d/b", {"d/b"}),
        "external_id": ("d/c", {"d/c"}),
        "fts_token_id": (fts_id, everything),
        "client": (ME, everything),
        "storage": (storage, everything),
        "key": (kid, everything),
    }

    def ask(find: Callable[[str, Any], list[TraceRecord]]) -> None:
        for by, (value, expected) in questions.items():
            found = find(by, value)
            assert {s.external_id for s in found} == expected, by
            assert {s.jti for s in found} == {jti}
            told = {s.external_id: (s.path, s.state, s.on_behalf_of) for s in found}
            if by == "jti":
                assert told == {
                    "d/a": (f"{DIR}/d/a", "issued", "alice"),
                    "d/b": (f"{DIR}/d/b", "finished", "alice"),
                    "d/c": (f"{DIR}/d/c", "issued", "bob"),
                }

    ask(lambda by, value: traces.find(shared.pool, by, value, since, until))
    of_request, _ = traces.find_request(shared.pool, asked.request.request_id)
    assert [s.external_id for s in of_request] == ["d/a", "d/b"]
    assert len(traces.find(shared.pool, "jti", jti, since, until, limit=2)) == 2

    for kind, day in archive.due(shared.pool, clock.now() + timedelta(days=39), 30):
        archive.archive_day(shared.pool, tmp_path, kind, day)
    assert not [name for (name,) in rows(shared, "SELECT relname FROM pg_class WHERE relname ~ '^uses_'")
                if name.endswith(f"{clock.now():%Y%m%d}")]  # fmt: skip
    ask(lambda by, value: archive.find(tmp_path, by, value, since, until))
    archived, _ = archive.find_request(tmp_path, later.submission.request.request_id, until)
    assert [s.external_id for s in archived] == ["d/c"]


def test_what_is_alive_under_a_ban_counts_every_user_of_a_shared_token(shared: Service) -> None:
    mint(shared, downloads("d/a", on_behalf_of="alice", activity="one"))
    (made,) = mint(shared, downloads("d/b", on_behalf_of="bob", activity="two"))
    for kind, value in (("on_behalf_of", "bob"), ("activity", "one"), ("path", f"{DIR}/d/b"), ("client", ME)):
        assert [
            t.jti
            for t in live_tokens.under(
                shared.pool, kind, value, None, clock.now(), shared.loaded.policy.matching_of
            )
        ] == [made.issued[0].jti]
    assert not list(
        live_tokens.under(
            shared.pool, "on_behalf_of", "carol", None, clock.now(), shared.loaded.policy.matching_of
        )
    )


def test_each_use_has_the_line_of_its_transfer(shared: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "minter.transfers")
    asked = downloads("d/a", "d/b")
    (outcome,) = mint(shared, asked)
    assert len({i.jti for i in outcome.issued}) == 1
    files = tuple(FileReport(request_id=asked.request.request_id, file=n, state="finished") for n in range(2))
    Lifecycle(shared.engine, shared.store).report(ME, ReportRequest(files=files), clock.now())
    first, second = (vars(record)["event"] for record in caplog.records)
    assert [first["file"], second["file"]] == [0, 1]
    (one,), (other,) = first["tokens"], second["tokens"]
    assert one["jti"] == other["jti"] == outcome.issued[0].jti
    assert one["handle"] != other["handle"]
    assert one["left_at_end_seconds"] > 0
    assert "waited_seconds" not in one  # nobody told when it began
