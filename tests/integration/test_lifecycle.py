"""Issued tokens are renewed, fetched, reported and cancelled."""

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import pytest

from minter.contract.followups import (
    CancelRequest,
    FetchRequest,
    FileReport,
    JobReport,
    RenewRequest,
    ReportRequest,
    decode_cancel,
    decode_renew,
    decode_report,
)
from minter.contract.messages import FileOperation, FileRequest, FillRequest, MintRequest
from minter.database import connection, control_changes
from minter.database import states as states_of
from minter.errors import Banned, Expired, InvalidRequest, UnknownClient, UnknownRequest, UnknownStorage
from minter.fts.jobs import from_fill
from minter.local import stack
from minter.policy.clients import Ban
from minter.policy.explain import asked_scopes
from minter.policy.requests import from_mint
from minter.policy.transfers import Policy
from minter.service import Service
from minter.storages.directory import Directory
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock
from minter.tokens.claims import unverified_claims
from minter.tokens.outcomes import Outcome, Submission
from tests.conftest import EXAMPLES, rows
from tests.integration.test_mint import OTHER, SE, mint, submission, tokens

ME = "rucio-alpen"


def renewed(service: Service, lifecycle: Lifecycle, **wire: Any) -> Outcome:
    request = lifecycle.renewal(ME, RenewRequest(request_id=clock.new_uuid7(), **wire))
    (outcome,) = mint(service, Submission(request, ME))
    return outcome


def states(service: Service) -> dict[tuple[str, str], str]:
    found = rows(
        service,
        "SELECT t.external_id, t.side, coalesce(s.state, t.state)::text FROM tokens t"
        " LEFT JOIN token_states s USING (jti) ORDER BY t.jti",
    )
    return {(name, side): state for name, side, state in found}


@pytest.mark.parametrize("analyzed", [True, False])
def test_a_report_by_external_ids_reads_a_large_day_by_its_index(service: Service, analyzed: bool) -> None:
    mint(service, submission("a"))
    with connection.transaction(service.pool) as open_:
        open_.execute(
            "INSERT INTO tokens SELECT (jsonb_populate_record(t, jsonb_build_object('jti',"
            " left(t.jti::text, 24) || lpad(to_hex(n), 12, '0'), 'external_id', 'file ' || n))).*"
            " FROM tokens t, generate_series(1, 20000) AS n WHERE t.side = 'source'"
        )
        if analyzed:
            open_.execute("ANALYZE tokens")
        wanted = [f"file {n}" for n in range(1, 101)]

        class Explained:
            """The connection, which explains what it should execute."""

            def execute(self, query: str, values: dict[str, object] | None = None) -> Any:
                return open_.execute(query if query.startswith("SET") else f"EXPLAIN {query}", values)

        asked: Any = Explained()
        plan = "\n".join(str(row) for row in states_of.by_external_id(asked, [1], wanted, clock.now()))
        assert "_hashtextextended_idx" in plan
        assert f"Seq Scan on tokens_{clock.now():%Y%m%d}" not in plan
        assert f"tokens_{clock.now():%Y%m%d}_pkey" not in plan
        assert open_.execute("SHOW enable_bitmapscan").fetchone() == ("on",)
        found = states_of.by_external_id(open_, [1], [*wanted, wanted[0]], clock.now())
    assert sorted(name for name, _ in found) == sorted(wanted)


# ── fetch ────────────────────────────────────────────────────────────────────────────────────


def test_a_fetch_gives_the_same_bytes_and_refusals(service: Service, lifecycle: Lifecycle) -> None:
    bad = FileRequest(sources=(SE + "x",), destinations=("davs://nowhere.example.org/f",))
    good = FileRequest(sources=(SE + "a",), destinations=(OTHER + "a",), size=10**9)
    made = from_mint(MintRequest(request_id=clock.new_uuid7(), files=(good, bad)))
    (outcome,) = mint(service, Submission(made, ME))
    answer = lifecycle.fetch(ME, FetchRequest(made.request_id), clock.now())
    assert [t.token.encode() for t in answer.tokens] == tokens(outcome) != []
    assert [r.error["reason"] for r in answer.refusals] == [r["error"]["reason"] for r in outcome.refusals]


def test_a_filled_jobs_tokens_can_be_fetched(service: Service, lifecycle: Lifecycle) -> None:
    job = json.loads(min((EXAMPLES / "rucio-41.5/jobs").glob("*.json")).read_text())
    made = from_fill(FillRequest(request_id=clock.new_uuid7(), job=job))
    (outcome,) = mint(service, Submission(made, ME))
    answer = lifecycle.fetch(ME, FetchRequest(made.request_id), clock.now())
    assert [t.token.encode() for t in answer.tokens] == tokens(outcome)
    assert answer.job is None


def test_nobody_fetches_what_another_client_was_granted(service: Service, lifecycle: Lifecycle) -> None:
    stack.add_client(service, "dirac", "alpen", "tests")
    one = submission("a")
    mint(service, one)
    with pytest.raises(UnknownRequest, match="has made no request"):
        lifecycle.fetch("dirac", FetchRequest(one.request.request_id), clock.now())
    with pytest.raises(UnknownClient):
        lifecycle.fetch("mallory", FetchRequest(one.request.request_id), clock.now())


def test_a_fetch_after_a_ban_gives_nothing(service: Service, lifecycle: Lifecycle) -> None:
    one = submission("a", activity="Production Input")
    mint(service, one)
    with control_changes.controlling(service.pool, "tests", "ban", "x", {}) as tx:
        tx.execute("INSERT INTO bans (kind, value, reason) VALUES ('activity', 'Production Input', 'test')")
    with pytest.raises(Banned):
        lifecycle.fetch(ME, FetchRequest(one.request.request_id), clock.now())


# ── renew ────────────────────────────────────────────────────────────────────────────────────


def test_a_renewal_grants_the_same_scopes_anew(service: Service, lifecycle: Lifecycle) -> None:
    first = submission("a", "b c", "d")
    later = clock.now() + timedelta(minutes=10)
    (old,) = mint(service, first)
    request = lifecycle.renewal(
        ME, RenewRequest(request_id=clock.new_uuid7(), renews=first.request.request_id)
    )
    (new,) = mint(service, Submission(request, ME), now=later)
    assert [(i.slot, i.storage, i.scope) for i in new.issued] == [
        (i.slot, i.storage, i.scope) for i in old.issued
    ]
    assert {i.jti for i in new.issued}.isdisjoint(i.jti for i in old.issued)
    assert all(
        n.exp - o.exp == 600 for n, o in zip(new.issued, old.issued, strict=True)
    )  # the same lifetime, starting 10 min later
    assert rows(service, "SELECT renews FROM requests WHERE kind = 'renew'") == [(first.request.request_id,)]
    assert rows(service, "SELECT DISTINCT external_id FROM tokens ORDER BY 1") == [("a",), ("b c",), ("d",)]


def test_a_renewal_sent_twice_gives_the_same_tokens(service: Service, lifecycle: Lifecycle) -> None:
    first = submission("a")
    mint(service, first)
    wire = RenewRequest(request_id=clock.new_uuid7(), renews=first.request.request_id)
    (one,) = mint(service, Submission(lifecycle.renewal(ME, wire), ME))
    (two,) = mint(service, Submission(lifecycle.renewal(ME, wire), ME))
    assert tokens(one) == tokens(two) != []


def test_only_the_files_named_are_renewed_and_a_renewal_can_be_renewed(
    service: Service, lifecycle: Lifecycle
) -> None:
    first = submission("a", "b", "c")
    mint(service, first)
    once = renewed(service, lifecycle, renews=first.request.request_id, files=(1,))
    again = renewed(service, lifecycle, renews=once.submission.request.request_id)
    assert {i.slot[0] for i in once.issued} == {i.slot[0] for i in again.issued} == {1}
    assert [i.scope for i in once.issued] == [i.scope for i in again.issued]


def test_every_filled_job_of_rucios_can_be_renewed_with_equal_scopes(
    service: Service, lifecycle: Lifecycle
) -> None:
    for path in sorted((EXAMPLES / "rucio-41.5/jobs").glob("*.json"))[::9]:
        made = from_fill(FillRequest(request_id=clock.new_uuid7(), job=json.loads(path.read_text())))
        (old,) = mint(service, Submission(made, ME))
        if not old.issued:
            continue
        new = renewed(service, lifecycle, renews=made.request_id)
        assert new.error is None
        assert not new.refusals
        assert [(i.slot, i.scope) for i in new.issued] == [(i.slot, i.scope) for i in old.issued]
        assert new.decision is not None
        assert all(asked_scopes(g) for g in new.decision.planned_tokens)


def test_what_was_asked_for_as_a_whole_is_renewed_as_a_whole(service: Service, lifecycle: Lifecycle) -> None:
    asked = submission("d/a", "e/b", all_or_nothing=True)
    mint(service, asked)
    control_changes.add_ban(service.pool, Ban("path", "/atlas/atlasdatadisk/rucio/data/e"), "leak", "test")
    outcome = renewed(service, lifecycle, renews=asked.request.request_id)
    assert outcome.issued == []
    assert {r["error"]["reason"] for r in outcome.refusals} == {"banned", "neighbour_refused"}


def test_operations_outside_a_copy_are_renewed(service: Service, lifecycle: Lifecycle) -> None:
    operations = tuple(FileOperation(o, OTHER + "a") for o in ("delete", "upload", "download", "stat"))
    made = from_mint(MintRequest(request_id=clock.new_uuid7(), files=(FileRequest(operations=operations),)))
    (old,) = mint(service, Submission(made, ME))
    new = renewed(service, lifecycle, renews=made.request_id)
    assert len(old.issued) == 4
    assert [(i.slot, i.scope) for i in new.issued] == [(i.slot, i.scope) for i in old.issued]


def test_renewing_again_and_again_widens_nothing_and_lives_no_longer(
    service: Service, lifecycle: Lifecycle
) -> None:
    first = submission("a", lifetime_seconds=1500)
    (old,) = mint(service, first)
    request_id = first.request.request_id
    for _ in range(4):
        new = renewed(service, lifecycle, renews=request_id)
        request_id = new.submission.request.request_id
        assert [(i.slot, i.scope) for i in new.issued] == [(i.slot, i.scope) for i in old.issued]
    lives_of = {exp - iat for exp, iat in _times(new)}
    assert lives_of == {exp - iat for exp, iat in _times(old)} == {1500}


def _times(outcome: Outcome) -> Iterator[tuple[int, int]]:
    for issued in outcome.issued:
        claims = unverified_claims(issued.token)[1]
        yield claims["exp"], claims["iat"]


def test_what_only_names_a_directory_is_not_renewed_by_guessing(
    service: Service, lifecycle: Lifecycle
) -> None:
    operation = FileOperation("make_parents", "davs://granit.example.org/f")
    area = next(
        a for a in service.engine.policy.directories["alpen"].areas() if a.dialect.name == "xrootd-5.5"
    )
    url = service.engine.policy.directories["alpen"].url(
        area.storage, area.relative(area.prefix) + "/run1/sub/f", area.audience
    )
    assert url is not None
    files = (FileRequest(operations=(FileOperation(operation.operation, url),)),)
    made = from_mint(MintRequest(request_id=clock.new_uuid7(), files=files))
    (old,) = mint(service, Submission(made, ME))
    assert old.issued
    with pytest.raises(UnknownRequest, match="ask anew"):
        renewed(service, lifecycle, renews=made.request_id)


def test_a_request_of_several_activities_is_not_renewed_past_a_ban(
    service: Service, lifecycle: Lifecycle
) -> None:
    entries = [
        {"sources": [SE + n], "destinations": [OTHER + n], "filesize": 10, "activity": n}
        for n in ("Good", "Evil")
    ]
    made = from_fill(FillRequest(request_id=clock.new_uuid7(), job={"files": entries}))
    mint(service, Submission(made, ME))
    with pytest.raises(UnknownRequest, match="several activities"):
        renewed(service, lifecycle, renews=made.request_id)
    lifecycle.fetch(ME, FetchRequest(made.request_id), clock.now())
    control_changes.add_ban(service.pool, Ban("activity", "Evil"), "test", "me")
    with pytest.raises(Banned):
        lifecycle.fetch(ME, FetchRequest(made.request_id), clock.now())


def test_what_an_earlier_release_recorded_is_refused_not_broken(
    service: Service, lifecycle: Lifecycle
) -> None:
    first = submission("a")
    mint(service, first)
    with connection.transaction(service.pool) as tx:
        tx.execute("UPDATE tokens SET rule_id = NULL")
    with pytest.raises(UnknownRequest, match="ask anew"):
        renewed(service, lifecycle, renews=first.request.request_id)


def test_odd_names_in_a_report_are_unknown_not_an_error(service: Service, lifecycle: Lifecycle) -> None:
    wire = ReportRequest(files=(FileReport(state="active", external_id="a\x00b"),))
    assert lifecycle.report(ME, wire, clock.now()).unknown == ["files[0]"]


def test_what_cannot_be_renewed_is_refused(service: Service, lifecycle: Lifecycle) -> None:
    first = submission("a")
    mint(service, first)
    with pytest.raises(UnknownRequest, match="ask anew"):
        renewed(service, lifecycle, renews=clock.new_uuid7())
    with pytest.raises(UnknownRequest, match="no token for these files"):
        renewed(service, lifecycle, renews=first.request.request_id, files=(7,))
    policy = service.engine.policy
    service.engine.policy = Policy({"alpen": Directory([])}, policy.routes)
    with pytest.raises(UnknownStorage, match="has no endpoint"):
        renewed(service, lifecycle, renews=first.request.request_id)
    service.engine.policy = policy
    with control_changes.controlling(service.pool, "tests", "ban", "x", {}) as tx:
        tx.execute("INSERT INTO bans (kind, value, reason) VALUES ('client', %s, 'test')", (ME,))
    assert isinstance(renewed(service, lifecycle, renews=first.request.request_id).error, Banned)


def test_a_renewal_that_renews_itself_is_refused() -> None:
    same = str(clock.new_uuid7())
    with pytest.raises(InvalidRequest, match="needs a new request_id"):
        decode_renew(json.dumps({"request_id": same, "renews": same}).encode())


# ── report ───────────────────────────────────────────────────────────────────────────────────


def test_files_are_reported_by_any_of_their_names(service: Service, lifecycle: Lifecycle) -> None:
    one, two = submission("a", "b", "c"), submission("d", "e")
    (first, _) = mint(service, one, two)
    job = clock.new_uuid7()
    (jti,) = [UUID(i.jti) for i in first.issued if i.slot == (2, "source", 0)]
    wire = ReportRequest(
        (JobReport(job, two.request.request_id, (1, 0), (501, 502)),),
        (
            FileReport(state="active", external_id="a"),
            FileReport(state="finished", request_id=one.request.request_id, file=1),
            FileReport(state="active", jti=jti),
            FileReport(state="finished", job_id=job, file_id=501),
            FileReport(state="active", job_id=job, file=1),
        ),
    )
    answer = lifecycle.report(ME, wire, clock.now())
    assert (answer.changed, answer.unknown) == (9, [])
    assert states(service) == {
        ("a", "source"): "active", ("a", "destination"): "active",
        ("b", "source"): "finished", ("b", "destination"): "finished",
        ("c", "source"): "active", ("c", "destination"): "issued",
        ("d", "source"): "active", ("d", "destination"): "active",
        ("e", "source"): "finished", ("e", "destination"): "finished",
    }  # fmt: skip
    assert lifecycle.report(ME, wire, clock.now()).changed == 0  # once more changes nothing


def test_states_go_forward_only(service: Service, lifecycle: Lifecycle) -> None:
    mint(service, submission("a", "b"))
    steps: list[tuple[Literal["active", "finished"], str]]
    steps = [("active", "active"), ("finished", "finished"), ("active", "finished")]
    for state, expected in steps:
        lifecycle.report(ME, ReportRequest(files=(FileReport(state=state, external_id="a"),)), clock.now())
        assert states(service)["a", "source"] == expected
    lifecycle.cancel(ME, CancelRequest(external_ids=("a", "b")), clock.now())
    lifecycle.report(ME, ReportRequest(files=(FileReport(state="finished", external_id="b"),)), clock.now())
    assert states(service)["a", "source"] == "finished"
    assert states(service)["b", "source"] == "cancelled"


def test_active_and_finished_in_one_report_keep_both_instants(service: Service, lifecycle: Lifecycle) -> None:
    mint(service, submission("a"))
    wire = ReportRequest(
        files=(FileReport(state="finished", external_id="a"), FileReport(state="active", external_id="a"))
    )
    assert lifecycle.report(ME, wire, clock.now()).changed == 4
    assert rows(
        service, "SELECT DISTINCT state::text, active_at IS NOT NULL, ended_at IS NOT NULL FROM token_states"
    ) == [("finished", True, True)]


def test_what_a_report_names_and_nobody_knows_is_said(service: Service, lifecycle: Lifecycle) -> None:
    stack.add_client(service, "dirac", "alpen", "tests")
    mint(service, submission("a", client="rucio-alpen"))
    unknown = clock.new_uuid7()
    wire = ReportRequest(
        (JobReport(unknown, unknown, (0,)),),
        (
            FileReport(state="active", external_id="a"),
            FileReport(state="active", jti=unknown),
            FileReport(state="active", job_id=unknown, file=0),
        ),
    )
    answer = lifecycle.report("dirac", wire, clock.now())  # the other client's file is unknown to this client
    assert (answer.changed, answer.unknown) == (0, ["jobs[0]", "files[0]", "files[1]", "files[2]"])
    assert states(service)["a", "source"] == "issued"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"state": "active"}, "named by nothing"),
        ({"state": "active", "external_id": "a", "file": 1}, "named by external_id, file"),
        ({"state": "active", "job_id": "01a20118-9ddb-7538-9909-d9caefa00001"}, "named by job_id"),
        ({"state": "lost", "external_id": "a"}, "Invalid enum value 'lost'"),
        ({"state": "active", "external_id": ""}, "length >= 1"),
    ],
)
def test_a_report_without_a_clear_name_is_refused(file: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        decode_report(json.dumps({"files": [file]}).encode())


def test_a_job_with_other_numbers_of_ids_is_refused() -> None:
    job = {
        "job_id": str(clock.new_uuid7()),
        "request_id": str(clock.new_uuid7()),
        "files": [0, 1],
        "file_ids": [7],
    }
    with pytest.raises(InvalidRequest, match=r"file_ids has 1 entries and files 2.*jobs\[0\]"):
        decode_report(json.dumps({"jobs": [job]}).encode())


@pytest.mark.slow
def test_a_thousand_files_are_reported_and_cancelled_in_a_few_statements(
    service: Service, lifecycle: Lifecycle
) -> None:
    """The goal is under 100 ms, which benchmarks/ measures; this test only checks the order of magnitude."""
    names = [f"f{n}" for n in range(1000)]
    mint(service, submission(*names))
    for state in ("active", "finished"):
        wire = ReportRequest(files=tuple(FileReport(state=state, external_id=n) for n in names))
        started = time.perf_counter()
        assert lifecycle.report(ME, wire, clock.now()).changed == 2000
        assert time.perf_counter() - started < 5


# ── cancel ───────────────────────────────────────────────────────────────────────────────────


def test_a_cancelled_file_is_not_given_again_and_what_works_on_is_listed(
    service: Service, lifecycle: Lifecycle
) -> None:
    one = submission("a", "b")
    (outcome,) = mint(service, one)
    answer = lifecycle.cancel(ME, CancelRequest(one.request.request_id, (1,)), clock.now())
    assert answer.changed == 2
    assert {a.jti for a in answer.alive} == {i.jti for i in outcome.issued if i.slot[0] == 1}
    with pytest.raises(Expired, match="was cancelled"):
        lifecycle.fetch(ME, FetchRequest(one.request.request_id), clock.now())
    (again,) = mint(service, one)
    assert isinstance(again.error, Expired)
    assert again.issued == []
    assert lifecycle.cancel(ME, CancelRequest(one.request.request_id, (1, 5)), clock.now()).unknown == [
        "files[1]"
    ]


def test_cancelling_what_nobody_knows_is_said(service: Service, lifecycle: Lifecycle) -> None:
    with pytest.raises(UnknownRequest):
        lifecycle.cancel(ME, CancelRequest(clock.new_uuid7()), clock.now())
    answer = lifecycle.cancel(ME, CancelRequest(external_ids=("nothing",)), clock.now())
    assert (answer.changed, answer.unknown, answer.alive) == (0, ["external_ids[0]"], [])


@pytest.mark.parametrize(
    "wire",
    [{}, {"request_id": "01a20118-9ddb-7538-9909-d9caefa00001", "external_ids": ["a"]}, {"files": [1]}],
)
def test_a_cancellation_names_one_thing(wire: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="expected either request_id"):
        decode_cancel(json.dumps(wire).encode())


# ── rules (I8) ───────────────────────────────────────────────────────────────────────────────


def test_every_token_names_the_rule_that_made_it(service: Service) -> None:
    mint(service, submission("a", "b"), submission("c"))
    found = rows(
        service,
        "SELECT t.side::text, r.route, r.storage, r.operations, r.steps FROM tokens t JOIN rules r USING (rule_id)"
        " GROUP BY 1, 2, 3, 4, 5 ORDER BY 1 DESC",
    )
    assert [(side, operations) for side, _, _, operations, _ in found] == [
        ("source", ["read"]), ("destination", ["write"]),
    ]  # fmt: skip
    assert all(any(rule.startswith("route") for rule, _ in steps) for *_, steps in found)
    assert rows(service, "SELECT count(*) FROM rules") == [(2,)]


def test_two_processes_agree_on_a_rule(service: Service, dsn: str) -> None:
    from tests.conftest import load_settings

    other = Service(load_settings(dsn))
    mint(service, submission("a"))
    mint(other, submission("b"))
    mint(service, submission("c"))
    assert rows(service, "SELECT count(*) FROM rules") == [(2,)]
    other.pool.dispose()
