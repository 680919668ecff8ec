"""Managed tokens from a fake provider: they are recorded, obtained, refreshed, or replaced by a fallback."""

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Never

import jwt
import pytest
import urllib3
from msgspec import structs

from minter.contract.followups import CancelRequest, FetchRequest, FileReport, ReportRequest
from minter.contract.messages import Answer, FileOperation, FileRequest, MintRequest
from minter.contract.operations import Operation
from minter.database import control_changes, keyring, leases, live_tokens, managed, partitions, traces
from minter.database.connection import transaction
from minter.database.control import read_keys, read_private_key
from minter.database.fallbacks import fall_back, live_uses
from minter.errors import InvalidGrant, NoUsableKey
from minter.local.fake_iam import Behaviour, FakeIAM, Fault, OAuthRefusal
from minter.policy.clients import Ban
from minter.policy.requests import from_mint
from minter.policy.routes import Route
from minter.policy.transfers import Policy
from minter.providers.dialects import Provider, Reuse
from minter.providers.iam import IAM
from minter.refresher import refresher
from minter.refresher.discovery import SharedDocuments
from minter.refresher.notifications import Push
from minter.refresher.refresher import Refresher
from minter.service import Service
from minter.tasks.lifecycle import Lifecycle
from minter.tasks.recovery import Recovery
from minter.tokens import clock, keys
from minter.tokens.outcomes import Outcome, Submission
from minter.tokens.records import fts_token_id
from tests.conftest import rows
from tests.integration.test_mint import SE

ME = "rucio-alpen"
OPERATIONS: tuple[Operation, ...] = ("read", "write", "overwrite", "retry", "stat")
MINTED = Route(name="minted", operations=OPERATIONS)


class Clock:
    """The clock of the engine and refresher, which a test may put forward."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Bench:
    """An engine and a refresher with one provider, on the clock of the test."""

    def __init__(self, service: Service, iam: FakeIAM, *routes: Route, **provider: Any) -> None:
        self.clock = Clock()
        self.service = service
        self.fake = iam
        self.provider = Provider(
            name="iam", issuer=iam.issuer, client_id="minter", secret_file="-",
            **{"requests_per_second": 500.0, "timeout_seconds": 10.0} | provider,
        )  # fmt: skip
        self.routes = routes
        old = service.engine.policy
        service.engine.policy = Policy(old.directories, routes, ())
        service.store.clock = lambda: datetime.now(UTC)  # Postgres's time, not the test's
        control_changes.sync_providers(service.pool, ["iam"])
        self.lifecycle = Lifecycle(service.engine, service.store)
        known = SharedDocuments(service.pool, self.provider, self.clock)
        known.iam = self.iam = IAM(self.provider, "minter-secret", known, self.clock)
        self.iam.documents()  # the documents were fetched before the outage
        self.asked: list[tuple[str, str]] = []
        self.refresher = Refresher(
            service.pool, service.keystore, self.lifecycle, {"iam": self.iam}, self.clock,
            lambda *asked: self.asked.append(asked[1:3]), jitter=lambda bound: bound / 2, checks_clock=False,
        )  # fmt: skip

    def ask(
        self,
        *names: str,
        subject: str | None = None,
        client: str = ME,
        operation: Operation | Literal["download", "upload"] = "download",
        **options: Any,
    ) -> Outcome:
        files = tuple(
            FileRequest(operations=(FileOperation(operation, SE + n),), external_id=n) for n in names
        )
        request = from_mint(
            MintRequest(
                request_id=options.pop("request_id", None) or clock.new_uuid7(), files=files, **options
            )
        )
        if subject:
            from minter.policy.token_requests import SubjectToken

            request = structs.replace(request, subject=SubjectToken(subject, "iam"))
        (outcome,) = self.service.engine.mint_many([Submission(request, client)], self.clock())
        return outcome

    def subject(self, **claims: object) -> str:
        told = {"sub": "atlas-user", "aud": "minter", "scope": "storage.read:/", **claims}
        return self.fake.sign(told)

    def run_once(self, seconds: float = 30.0, until: Callable[..., object] | None = None) -> None:
        """Let the refresher do what is due now, or whatever it takes until something has happened."""
        end = time.monotonic() + seconds
        quiet = 0
        while time.monotonic() < end and (not until() if until else quiet < 3):
            self.refresher._maintained_at = float("-inf")
            quiet = 0 if self.refresher.run_once() or self.refresher._out.total() else quiet + 1
            time.sleep(0.005)
        assert quiet >= 3 or (until and until()), f"not done within {seconds} s"

    def fetch(self, outcome: Outcome, client: str = ME) -> Answer:
        return self.lifecycle.fetch(client, FetchRequest(outcome.submission.request.request_id), self.clock())

    def forward(self, **by: float) -> None:
        self.clock.ahead += timedelta(**by)
        self.fake.behaviour = structs.replace(
            self.fake.behaviour, skew_seconds=int(self.clock.ahead.total_seconds())
        )

    def row(self) -> dict[str, Any]:
        (found,) = rows(
            self.service, "SELECT state::text, tries, spent, lead_seconds, error, uses FROM managed"
        )
        return dict(zip(("state", "tries", "spent", "lead", "error", "uses"), found, strict=True))


@pytest.fixture
def iam() -> Iterator[FakeIAM]:
    server = FakeIAM(0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def exchange(**route: Any) -> Route:
    return Route(
        name="asked", operations=OPERATIONS, mode="exchange", provider="iam",
        **{"transfer_seconds": 12 * 3600} | route,
    )  # fmt: skip


def own(**route: Any) -> Route:
    return Route(name="own", operations=OPERATIONS, mode="client_credentials", provider="iam", **route)


def test_client_credentials_are_asked_for_and_shared(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, own(granularity="directory"))
    first = bench.ask("data/a", "data/b")
    assert len(first.pending) == 2
    assert not first.issued
    assert bench.fetch(first).pending
    bench.run_once()
    assert bench.asked == [("client_credentials", "ok")]
    given = bench.fetch(first).tokens
    assert len(given) == 2
    assert given[0].token == given[1].token
    assert {t.handle for t in given} == {a.handle for a in first.pending}
    claims = jwt.decode(given[0].token, options={"verify_signature": False})
    assert claims["scope"] == given[0].scope == "storage.read:/atlas/atlasdatadisk/rucio/data/data"
    second = bench.ask("data/c")  # the third file costs no request
    assert [i.token.decode() for i in second.issued] == [given[0].token]
    assert bench.row()["uses"] == 3
    again = bench.ask("data/c", request_id=second.submission.request.request_id)
    assert again.repeated
    assert [i.handle for i in again.issued] == [i.handle for i in second.issued]
    bench.run_once()
    assert len(bench.asked) == 1


def test_an_exchanged_token_is_kept_fresh_until_its_transfer_ends(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, exchange(), outage_margin_seconds=300)
    outcome = bench.ask("a", subject=bench.subject())
    bench.run_once()
    first = bench.fetch(outcome).tokens[0]
    bench.forward(minutes=35)
    bench.run_once()
    assert bench.fetch(outcome).tokens[0].token == first.token  # 25 minutes left: more than the margin
    bench.forward(minutes=10)
    bench.run_once()
    second = bench.fetch(outcome).tokens[0]
    assert second.token != first.token
    assert bench.asked == [("token_exchange", "ok"), ("refresh_token", "ok")]
    done = bench.lifecycle.report(
        ME, ReportRequest(files=(FileReport(state="finished", external_id="a"),)), bench.clock()
    )
    assert done.changed == 1
    assert bench.row()["state"] == "finished"
    (secrets,) = rows(service, "SELECT access, refresh, subject FROM managed")
    assert secrets == (None, None, None)
    bench.forward(minutes=45)
    bench.run_once()
    assert len(bench.asked) == 2
    assert bench.fetch(outcome).refusals[0].error["reason"] == "expired"


def test_nothing_is_refreshed_after_the_deadline(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, exchange(transfer_seconds=3600, wait_seconds=600))
    bench.ask("a", subject=bench.subject())
    bench.run_once()
    bench.forward(hours=1, minutes=35)
    bench.run_once()
    assert bench.row()["state"] == "finished"
    assert len(bench.asked) <= 2


def test_secrets_lie_encrypted(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, exchange())
    subject = bench.subject()
    outcome = bench.ask("a", subject=subject)
    assert "eyJ" not in repr(outcome.submission.request)
    bench.run_once()
    token = bench.fetch(outcome).tokens[0].token
    with transaction(service.pool) as connection:
        dump = json.dumps(
            [str(r) for r in connection.execute("SELECT m.*, t.* FROM managed m, tokens t").fetchall()]
        )
    for secret in (subject, token, *bench.fake._refresh):
        assert secret not in dump
        assert secret[:20] not in dump or secret[:20] == token[:20]
        assert secret.encode().hex() not in dump


def test_who_may_fetch_a_handle(service: Service, iam: FakeIAM) -> None:
    from minter.local import stack

    stack.add_client(service, "consumer", "alpen", "test")
    stack.add_client(service, "thief", "alpen", "test")
    bench = Bench(service, iam, own())
    outcome = bench.ask("a", consumer="consumer")
    bench.run_once()
    handle = uuid.UUID(outcome.pending[0].handle)
    for name, gets in ((ME, True), ("consumer", True), ("thief", False)):
        answer = bench.lifecycle.fetch(name, FetchRequest(handles=(handle, clock.new_uuid7())), bench.clock())
        assert bool(answer.tokens) is gets
        assert answer.unknown == (["handles[1]"] if gets else ["handles[0]", "handles[1]"])
    control_changes.add_ban(service.pool, Ban("client", ME, "alpen"), "test", "test")
    answer = bench.lifecycle.fetch("consumer", FetchRequest(handles=(handle,)), bench.clock())
    assert [r.error["reason"] for r in answer.refusals] == ["banned"]
    assert not answer.tokens


def test_no_subject_token_no_exchange(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, exchange())
    outcome = bench.ask("a")
    assert outcome.refusals[0]["error"]["reason"] == "invalid_grant"
    assert "no valid subject token" in outcome.refusals[0]["error"]["error_description"]


def test_the_stored_subject_token_serves(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, exchange())
    sealed = service.keystore.seal_token("alpen", ME, "client_subject", bench.subject())
    until = bench.clock() + timedelta(days=1)
    control_changes.set_subject(
        service.pool, ME,
        {"subject_token": sealed, "subject_provider": "iam", "subject_scope": "storage.read:/", "subject_expires_at": until},
        "test",
    )  # fmt: skip
    outcome = bench.ask("a")
    bench.run_once()
    assert bench.fetch(outcome).tokens
    assert bench.asked == [("token_exchange", "ok")]
    bench.forward(days=1)
    late = bench.ask("b")
    assert "no valid subject token" in late.refusals[0]["error"]["error_description"]


@pytest.mark.parametrize(("extra", "given"), [((), False), (("account",), True), (("other",), False)])
def test_an_audience_that_the_iam_adds_is_taken_if_its_settings_say_so(
    service: Service, iam: FakeIAM, extra: tuple[str, ...], given: bool
) -> None:
    bench = Bench(service, iam, own(), extra_audiences=extra)
    iam.behaviour = Behaviour(fault="extra_audience")
    outcome = bench.ask("a")
    bench.run_once(until=lambda: bench.asked)
    assert bool(bench.fetch(outcome).tokens) is given


REJECTED = {
    "wrong_key": "does not verify", "wrong_issuer": "its iss is", "wrong_audience": "audience",
    "wider_scope": "was not asked for", "no_expiry": "does not verify", "long_life": "at most",
    "short_life": "at least", "future": "not valid now", "opaque": "does not verify", "fat": "at most 8000",
}  # fmt: skip


@pytest.mark.parametrize("fault", REJECTED)
def test_what_was_not_asked_for_is_destroyed(service: Service, iam: FakeIAM, fault: Fault) -> None:
    bench = Bench(service, iam, own())
    iam.behaviour = Behaviour(fault=fault)
    outcome = bench.ask("a")
    bench.run_once(until=lambda: len(bench.asked) >= 2)
    assert bench.fetch(outcome).pending  # the provider may be repaired before the token is needed
    assert bench.row()["error"]["reason"] == "provider_token_rejected"
    bench.forward(minutes=16)
    bench.run_once(until=lambda: bench.row()["state"] == "failed")
    answer = bench.fetch(outcome)
    assert not answer.tokens
    assert answer.refusals[0].error["reason"] == "provider_token_rejected"
    assert REJECTED[fault] in answer.refusals[0].error["error_description"]
    assert rows(service, "SELECT access FROM managed") == [(None,)]


@pytest.mark.parametrize(
    "fault",
    [
        "down",
        "error_500",
        "busy_429",
        "garbage",
        "html",
        "huge",
        "redirect",
        "lost_answer",
        "trickle",
        "trickle_head",
        "slow",
    ],
)
def test_an_answer_that_is_none_is_waited_for(service: Service, iam: FakeIAM, fault: Fault) -> None:
    bench = Bench(service, iam, own(), timeout_seconds=0.3)
    iam.behaviour = Behaviour(fault=fault, slow_seconds=1.0)
    outcome = bench.ask("a")
    bench.run_once(until=lambda: len(bench.asked) >= 2)
    assert {o for _, o in bench.asked} <= {"provider_away", "lost", "misconfigured"}
    assert bench.fetch(outcome).pending
    assert "eyJ" not in json.dumps(bench.row()["error"])
    iam.behaviour = Behaviour()
    bench.forward(minutes=5)
    bench.run_once(until=lambda: bench.row()["state"] == "issued")
    assert bench.fetch(outcome).tokens


def test_a_wrong_secret_is_waited_for_and_shown(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, own())
    iam.behaviour = Behaviour(fault="invalid_client")
    outcome = bench.ask("a")
    bench.run_once(until=lambda: len(bench.asked) >= 5)
    assert bench.fetch(outcome).pending
    assert bench.row()["error"]["reason"] == "misconfigured"
    iam.behaviour = Behaviour()
    bench.forward(minutes=5)
    bench.run_once(until=lambda: bench.row()["state"] == "issued")
    assert bench.fetch(outcome).tokens


def test_dropped_scopes_are_reported(
    service: Service, iam: FakeIAM, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(service, iam, own())
    iam.behaviour = Behaviour(fault="narrow_scope")
    granit = "davs://xrd.granit.example.org:1095/atlas/rucio/user/akowalsk/41/8b/"  # XRootD 5.5 needs two scopes to write
    files = (FileRequest(destinations=(granit + "a", granit + "b"), overwrite=True),)
    request = from_mint(MintRequest(request_id=clock.new_uuid7(), files=files))
    (outcome,) = service.engine.mint_many([Submission(request, ME)], bench.clock())
    with caplog.at_level(logging.INFO, "minter.refresher"):
        bench.run_once()
    wide = {a.handle: a.scope for a in outcome.pending}
    tokens = bench.fetch(outcome).tokens
    dropped = set()
    for token in tokens:
        claims = jwt.decode(token.token, options={"verify_signature": False})
        assert claims["scope"] == token.scope
        asked, given = set(wide[token.handle].split()), set(token.scope.split())
        assert given <= asked
        dropped |= asked - given
    assert dropped
    told = [r.event for r in caplog.records if r.message == "provider asked"]  # type: ignore[attr-defined] # logs.event
    assert {scope for event in told for scope in event.get("dropped", "").split()} == dropped


def test_a_lost_refresh_is_exchanged_again(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, exchange(), timeout_seconds=1.0, outage_margin_seconds=300)
    outcome = bench.ask("a", subject=bench.subject())
    bench.run_once()
    iam.behaviour = Behaviour(fault="lost_answer")
    bench.forward(minutes=45)
    bench.run_once(until=lambda: len(bench.asked) == 2)
    assert bench.asked[-1] == ("refresh_token", "lost")
    assert bench.row()["spent"]
    iam.behaviour = structs.replace(iam.behaviour, fault="")
    bench.forward(seconds=30)
    bench.run_once(until=lambda: len(bench.asked) == 3)
    assert bench.asked[-1] == ("token_exchange", "ok")
    assert bench.fetch(outcome).tokens[0].exp > bench.clock().timestamp() + 3000


@pytest.mark.parametrize("reuse", ["safe", "spent"])
def test_a_lost_refresh_without_a_subject(service: Service, iam: FakeIAM, reuse: Reuse) -> None:
    bench = Bench(service, iam, exchange(), timeout_seconds=1.0, reuse=reuse, outage_margin_seconds=300)
    outcome = bench.ask("a", subject=bench.subject())
    bench.run_once()
    with transaction(service.pool) as connection:
        connection.execute("UPDATE managed SET subject = NULL")
    iam.behaviour = Behaviour(fault="lost_answer", reuse=True)
    bench.forward(minutes=45)
    bench.run_once(until=lambda: len(bench.asked) == 2)
    iam.behaviour = structs.replace(iam.behaviour, fault="")
    bench.forward(seconds=30)
    bench.run_once(until=lambda: bench.row()["state"] == "failed" or len(bench.asked) == 3)
    answer = bench.fetch(outcome)
    assert answer.tokens  # the last access token is still valid
    if reuse == "safe":
        assert bench.asked[-1] == ("refresh_token", "ok")
        return
    assert bench.row()["error"]["reason"] == "refresh_token_lost"
    bench.forward(minutes=30)
    assert bench.fetch(outcome).refusals[0].error["reason"] == "refresh_token_lost"


def test_a_worker_that_died_with_a_refresh_token(service: Service, iam: FakeIAM) -> None:
    """After a lease ran out, a refresh token that may be spent is not presented again."""
    bench = Bench(service, iam, exchange(), outage_margin_seconds=300)
    outcome = bench.ask("a", subject=bench.subject())
    bench.run_once()
    bench.forward(minutes=45)
    dead = leases.take(service.pool, bench.provider, uuid.uuid4(), 5, bench.clock(), 30.0)
    assert dead is not None
    assert len(dead.tokens) == 1
    assert not dead.tokens[0].spent
    bench.run_once(seconds=0.3)
    assert len(bench.asked) == 1  # the lease is still valid
    bench.forward(seconds=31)
    bench.run_once()
    assert bench.asked[-1] == ("token_exchange", "ok")
    assert (
        leases.save(service.pool, [leases.Result(jti=dead.tokens[0].jti, lease=dead.lease, state="issued")])
        == set()
    )
    assert bench.fetch(outcome).tokens


def fallen_back(service: Service, iam: FakeIAM) -> tuple[Bench, Outcome, str]:
    """Return a bench whose one token the IAM refused to refresh, the request's outcome, and the handle."""
    bench = Bench(service, iam, exchange(fallback=("minted",)), MINTED, outage_margin_seconds=300)
    outcome = bench.ask("a", subject=bench.subject())
    bench.run_once()
    handle = bench.fetch(outcome).tokens[0].handle
    with transaction(service.pool) as connection:
        connection.execute("UPDATE managed SET subject = NULL")
    iam._families.clear()
    bench.forward(minutes=45)
    bench.run_once()
    return bench, outcome, handle


def test_a_refresh_that_is_refused_ends_in_the_fallback(service: Service, iam: FakeIAM) -> None:
    bench, outcome, handle = fallen_back(service, iam)
    (token,) = bench.fetch(outcome).tokens
    claims = jwt.decode(token.token, options={"verify_signature": False})
    assert claims["iss"] != iam.issuer
    assert claims["scope"] == "storage.read:/atlas/atlasdatadisk/rucio/data/a"
    assert bench.row()["state"] == "finished"
    assert (
        bench.lifecycle.fetch(ME, FetchRequest(handles=(uuid.UUID(handle),)), bench.clock()).tokens[0].token
        == token.token
    )
    ((steps,),) = rows(service, "SELECT steps FROM rules WHERE route = 'minted'")
    assert ["fallback", "replaces a provider's token"] in steps
    (story,) = traces.find(
        service.pool, "external_id", "a", bench.clock() - timedelta(hours=3), bench.clock()
    )[-1:]
    (before,) = rows(service, "SELECT jti FROM managed")
    assert (story.mode, story.instead_of) == ("mint", before[0])
    earlier = traces.find(service.pool, "jti", before[0], bench.clock() - timedelta(hours=3), bench.clock())
    assert [(s.jti, str(s.use_id)) for s in earlier] == [(before[0], handle)]


@pytest.mark.parametrize("back", [False, True])
def test_fallback_tokens_of_a_leaked_key_are_made_anew(service: Service, iam: FakeIAM, back: bool) -> None:
    """Also after the provider is back: an exchange would need the subject token again."""
    bench, outcome, handle = fallen_back(service, iam)
    (old,) = bench.fetch(outcome).tokens
    kid = jwt.get_unverified_header(old.token)["kid"]
    service.clock = bench.clock
    service.ensure_standby(kid, "tests")
    keyring.revoke(service.pool, kid, bench.clock(), keys.RotationPolicy(0), "tests", "leak")
    if not back:
        with transaction(service.pool) as connection:
            until = bench.clock() + timedelta(hours=1)
            connection.execute("UPDATE providers SET open_until = %s", (until,))
    with transaction(service.pool) as connection:
        (key,) = (k for k in read_keys(connection) if k.kid == kid)
    report = Recovery(service.engine, service.pool, key, bench.clock).run(dry=False)
    assert report.made == report.tokens > 0
    (new,) = bench.fetch(outcome).tokens
    by_handle = bench.lifecycle.fetch(ME, FetchRequest(handles=(uuid.UUID(handle),)), bench.clock())
    assert [token.token for token in by_handle.tokens] == [new.token]
    claims = [jwt.decode(t.token, options={"verify_signature": False}) for t in (old, new)]
    assert claims[0]["scope"] == claims[1]["scope"]
    assert jwt.get_unverified_header(new.token)["kid"] != kid


def test_one_request_is_stood_in_for_though_another_is_not(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, own(fallback=("minted",), granularity="directory"), MINTED)
    iam.behaviour = Behaviour(fault="error_500")
    first, second = bench.ask("data/a"), bench.ask("data/b")
    with transaction(service.pool) as connection:  # the record is from another time
        connection.execute(
            "UPDATE requests SET activity = '(several)' WHERE request_id = %s",
            (second.submission.request.request_id,),
        )
    bench.run_once(until=lambda: bench.fetch(first).tokens)
    bench.run_once()
    assert bench.row()["uses"] == 1
    iam.behaviour = Behaviour()
    bench.forward(minutes=8)
    bench.run_once(until=lambda: not rows(service, "SELECT 1 FROM managed WHERE state <> 'issued'"))
    (given,), (stood_in,) = bench.fetch(second).tokens, bench.fetch(first).tokens
    issuers = [jwt.decode(t.token, options={"verify_signature": False})["iss"] for t in (given, stood_in)]
    assert [iss == iam.issuer for iss in issuers] == [True, False]
    report = ReportRequest(files=tuple(FileReport(state="finished", external_id=f"data/{n}") for n in "ab"))
    assert (
        bench.lifecycle.report(ME, report, bench.clock()).changed == 3
    )  # two uses, and the fallback token itself
    assert bench.row()["state"] == "finished"


def test_a_paused_provider_is_stood_in_for_and_asked_again_when_it_is_back(
    service: Service, iam: FakeIAM
) -> None:
    bench = Bench(service, iam, own(fallback=("minted",)), MINTED)
    iam.behaviour = Behaviour(fault="error_500")
    waiting = [bench.ask(f"f{n}") for n in range(8)]
    assert all(o.pending for o in waiting)
    bench.run_once(until=lambda: not rows(service, "SELECT 1 FROM managed WHERE state <> 'finished'"))
    for outcome in waiting:  # pending tokens got a fallback token
        (token,) = bench.fetch(outcome).tokens
        assert jwt.decode(token.token, options={"verify_signature": False})["iss"] != iam.issuer
    asked = len(bench.asked)
    fresh = bench.ask("g")  # what comes now is minted at once, and says why
    assert fresh.issued
    assert fresh.decision is not None
    assert any(
        "is not available: fallback route minted is used" in s.text
        for s in fresh.decision.planned_tokens[0].plan.steps
    )
    assert len(bench.asked) == asked
    iam.behaviour = Behaviour()
    bench.forward(minutes=6)
    bench.run_once(until=lambda: not rows(service, "SELECT 1 FROM providers WHERE open_until IS NOT NULL"))
    assert bench.ask("h").pending


def test_bans_stop_the_refresh(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, exchange(), outage_margin_seconds=300)
    bench.ask("a", subject=bench.subject())
    bench.run_once()
    control_changes.add_ban(
        service.pool, Ban("path", "/atlas/atlasdatadisk/rucio/data/a", "alpen"), "test", "test"
    )
    bench.forward(minutes=45)
    bench.run_once()
    assert len(bench.asked) == 1
    assert bench.row()["error"]["reason"] == "banned"


def test_cancelled_handles_are_not_given(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, own())
    outcome = bench.ask("a")
    bench.run_once()
    gone = bench.lifecycle.cancel(ME, CancelRequest(external_ids=("a",)), bench.clock())
    assert gone.changed == 1
    assert bench.fetch(outcome).refusals[0].error["reason"] == "expired"


def test_subject_tokens_are_verified(service: Service, iam: FakeIAM) -> None:
    from minter.providers.iam import check_subject

    bench = Bench(service, iam, own())
    assert check_subject(bench.iam, bench.subject(), ("minter",))["sub"] == "atlas-user"
    iam.behaviour = Behaviour(life_seconds=-10)
    expired = bench.subject()
    iam.behaviour = Behaviour()
    other = FakeIAM(0)
    foreign = other.sign({"sub": "x", "aud": "minter", "scope": "storage.read:/"})
    other.server_close()
    for token in (
        expired,
        foreign,
        bench.subject(aud="somebody"),
        "eyJ.x.y",
        "",
        iam.sign({"aud": "minter"}, "wrong_key"),
    ):
        with pytest.raises(InvalidGrant) as caught:
            check_subject(bench.iam, token, ("minter",))
        assert "eyJ" not in str(caught.value)
    assert urllib3.__version__ >= "2"  # type: ignore[attr-defined] # urllib3 does not list it


def test_what_is_known_of_a_managed_token(service: Service, iam: FakeIAM) -> None:
    """A token is found by the id that FTS shows, and is listed only while it is valid."""
    bench = Bench(service, iam, own())
    outcome = bench.ask("a")
    (waiting,) = traces.find_request(service.pool, outcome.submission.request.request_id)[0]
    assert (waiting.state, waiting.mode, waiting.fts_token_id, waiting.kid) == (
        "queued",
        "client_credentials",
        "",
        "",
    )
    assert not list(
        live_tokens.under(
            service.pool, "client", ME, "alpen", bench.clock(), service.loaded.policy.matching_of
        )
    )
    bench.run_once()
    (token,) = bench.fetch(outcome).tokens
    fts_id = fts_token_id(token.token.encode())
    day = timedelta(days=1)
    (found,) = traces.find(service.pool, "fts_token_id", fts_id, bench.clock() - day, bench.clock() + day)
    assert found.state == "issued"
    assert found.external_id == "a"
    assert int(found.fts_token_id, 16) == fts_id % (1 << 64)
    (by_handle,) = traces.find(
        service.pool, "jti", uuid.UUID(token.handle), bench.clock() - day, bench.clock() + day
    )
    assert by_handle.use_id == uuid.UUID(token.handle)
    assert not traces.find(
        service.pool, "jti", uuid.UUID(token.handle), bench.clock() - day, bench.clock() + day, asker="other"
    )
    for kind, value in (("client", ME), ("storage", found.storage), ("path", "/atlas"), ("vo", "alpen")):
        (living,) = live_tokens.under(
            service.pool, kind, value, "alpen", bench.clock(), service.loaded.policy.matching_of
        )
        assert living.exp == token.exp
    bench.lifecycle.cancel(ME, CancelRequest(external_ids=("a",)), bench.clock())
    assert list(
        live_tokens.under(
            service.pool, "client", ME, "alpen", bench.clock(), service.loaded.policy.matching_of
        )
    )  # it is still valid
    bench.forward(hours=1, minutes=1)
    assert not list(
        live_tokens.under(
            service.pool, "client", ME, "alpen", bench.clock(), service.loaded.policy.matching_of
        )
    )


def test_the_reason_of_a_failure_is_told(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, own())
    iam.behaviour = Behaviour(fault="wider_scope")
    outcome = bench.ask("a")
    bench.run_once(until=lambda: len(bench.asked) >= 1)
    bench.forward(minutes=16)
    bench.run_once(until=lambda: bench.row()["state"] == "failed")
    (story,) = traces.find_request(service.pool, outcome.submission.request.request_id)[0]
    assert story.state == "failed"
    assert story.error is not None
    assert story.error["reason"] == "provider_token_rejected"


def test_overdue_ones_are_finished_and_forgotten_in_bulk(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, own())
    for n in range(5):
        bench.ask(f"f{n}")
    bench.forward(days=1)
    assert managed.end_overdue(service.pool, bench.clock()) == 5
    assert partitions.prune_managed(service.pool, 30, bench.clock()) == 0
    assert partitions.prune_managed(service.pool, 30, bench.clock() + timedelta(days=40)) == 5


def test_a_changed_master_key(service: Service, iam: FakeIAM, dsn: str) -> None:
    from minter.database import keyring
    from minter.tokens.keystore import Keystore, MasterKey, new_master_key, read_master_key
    from tests.conftest import MASTER_KEY

    bench = Bench(service, iam, exchange())
    subject = bench.subject()
    outcome = bench.ask("a", subject=subject)
    sealed = service.keystore.seal_token("alpen", ME, "client_subject", subject)
    until = bench.clock() + timedelta(days=1)
    control_changes.set_subject(
        service.pool,
        ME,
        {"subject_token": sealed, "subject_provider": "iam", "subject_expires_at": until},
        "test",
    )
    bench.run_once()
    token = bench.fetch(outcome).tokens[0].token
    fresh = new_master_key()
    both = read_master_key("alpen", text=f"{fresh},{MASTER_KEY}", path=None)
    count = keyring.rewrap(
        service.pool,
        Keystore({"alpen": both}, lambda k: read_private_key(service.pool, k)),
        "alpen",
        "test",
    )
    assert count >= 4
    new = Keystore({"alpen": read_master_key("alpen", text=fresh, path=None)}, lambda _: None)
    ((jti, access, refresh),) = rows(service, "SELECT jti, access, refresh FROM managed")
    assert new.open_token("alpen", jti, "access", bytes(access)) == token
    assert new.open_token("alpen", jti, "refresh", bytes(refresh))
    ((stored,),) = rows(service, f"SELECT subject_token FROM clients WHERE name = '{ME}'")
    assert new.open_token("alpen", ME, "client_subject", bytes(stored)) == subject
    assert isinstance(both, MasterKey)


# ── attacks and unlucky combinations ─────────────────────────────────────────────────────────


def due_again(service: Service, iam: FakeIAM, **options: Any) -> tuple[Bench, Outcome]:
    """A token that was exchanged and is due, and that only its refresh token can refresh."""
    bench = Bench(
        service, iam, exchange(**options.pop("route", {})), MINTED, outage_margin_seconds=300, **options
    )
    outcome = bench.ask("a", subject=bench.subject())
    bench.run_once()
    bench.forward(minutes=45)
    return bench, outcome


def without_subject(service: Service) -> None:
    with transaction(service.pool) as connection:
        connection.execute("UPDATE managed SET subject = NULL")


def test_a_gateways_timeout_may_have_spent_the_refresh_token(service: Service, iam: FakeIAM) -> None:
    bench, outcome = due_again(service, iam)
    iam.behaviour = structs.replace(iam.behaviour, fault="gateway_504")
    bench.run_once(until=lambda: len(bench.asked) == 2)
    assert bench.asked[-1] == ("refresh_token", "lost")
    iam.behaviour = structs.replace(iam.behaviour, fault="")
    bench.forward(seconds=30)
    bench.run_once(until=lambda: len(bench.asked) == 3)
    assert bench.asked[-1] == ("token_exchange", "ok")
    assert bench.fetch(outcome).tokens


def test_the_refresh_token_beside_an_odd_access_token_is_kept(service: Service, iam: FakeIAM) -> None:
    bench, outcome = due_again(service, iam)
    without_subject(service)
    iam.behaviour = structs.replace(iam.behaviour, fault="odd_audience")
    bench.run_once(until=lambda: len(bench.asked) == 2)
    assert bench.asked[-1] == ("refresh_token", "provider_token_rejected")
    iam.behaviour = structs.replace(iam.behaviour, fault="")
    bench.forward(seconds=30)
    bench.run_once(until=lambda: len(bench.asked) == 3)
    assert bench.asked[-1] == ("refresh_token", "ok")
    assert bench.fetch(outcome).tokens[0].exp > bench.clock().timestamp() + 3000


def test_a_spent_refresh_token_is_never_tried_again(service: Service, iam: FakeIAM) -> None:
    bench, _ = due_again(service, iam, timeout_seconds=1.0)
    iam.behaviour = structs.replace(iam.behaviour, fault="lost_answer")
    bench.run_once(until=lambda: len(bench.asked) == 2)
    iam.behaviour = structs.replace(iam.behaviour, fault="error_500")
    for number in (3, 4):
        bench.forward(seconds=30)
        bench.run_once(until=lambda number=number: len(bench.asked) == number)
    iam.behaviour = structs.replace(iam.behaviour, fault="")
    bench.forward(seconds=30)
    bench.run_once(until=lambda: len(bench.asked) == 5)
    assert [planned for planned, _ in bench.asked[2:]] == ["token_exchange"] * 3


def test_postgres_away_between_taking_and_asking(
    service: Service, iam: FakeIAM, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, outcome = due_again(service, iam)
    without_subject(service)
    from minter.errors import Unavailable

    def away() -> Never:
        raise Unavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(bench.refresher, "_current", away)
        with pytest.raises(Unavailable):
            bench.refresher.run_once()
    bench.forward(minutes=2)
    bench.run_once()
    assert bench.asked[-1] == ("refresh_token", "ok")
    assert bench.fetch(outcome).tokens


def test_what_an_iam_echoes_is_not_told(service: Service, iam: FakeIAM) -> None:
    bench, outcome = due_again(service, iam)
    without_subject(service)
    (spent,) = iam._refresh
    iam.behaviour = structs.replace(iam.behaviour, fault="echo")
    bench.run_once(until=lambda: bench.row()["state"] == "failed")
    assert spent not in json.dumps(bench.row()["error"])
    bench.forward(minutes=20)
    assert spent not in str(bench.fetch(outcome).refusals[0].error)


def test_a_row_that_does_not_open_is_one_rows_trouble(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, own(), Route(name="delete", operations=("delete",)))
    first = bench.ask("a")
    bench.run_once()
    with transaction(service.pool) as connection:
        connection.execute("UPDATE managed SET access = decode(repeat('00', 64), 'hex')")
    files = (FileRequest(operations=(FileOperation("delete", SE + "b"),)),)
    minted = from_mint(MintRequest(request_id=clock.new_uuid7(), files=files))
    joined = from_mint(
        MintRequest(
            request_id=clock.new_uuid7(),
            files=(FileRequest(operations=(FileOperation("download", SE + "a"),), external_id="a"),),
        )
    )
    one, two = service.engine.mint_many([Submission(joined, ME), Submission(minted, ME)], bench.clock())
    assert one.pending
    assert two.issued
    assert bench.fetch(first).pending


def test_a_fallback_that_refuses_costs_nothing_while_the_provider_is_paused(
    service: Service, iam: FakeIAM
) -> None:
    bench = Bench(service, iam, own(fallback=("narrow",)), Route(name="narrow", operations=("delete",)))
    iam.behaviour = Behaviour(fault="error_500")
    asked = [bench.ask(f"f{n}") for n in range(6)]
    bench.run_once(until=lambda: rows(service, "SELECT 1 FROM providers WHERE open_until IS NOT NULL"))
    bench.run_once()
    assert all(bench.fetch(one).pending for one in asked)
    iam.behaviour = Behaviour()
    bench.forward(minutes=8)
    bench.run_once(until=lambda: not rows(service, "SELECT 1 FROM managed WHERE state <> 'issued'"))


def test_a_use_that_joins_while_a_stand_in_is_made(
    service: Service, iam: FakeIAM, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(service, iam, own(fallback=("minted",)), MINTED)
    bench.ask("a")
    (taken,) = rows(service, "SELECT jti FROM managed")
    lease = uuid.uuid4()
    with transaction(service.pool) as connection:
        connection.execute(
            "UPDATE managed SET lease = %s, leased_until = now() + interval '1 hour'", (lease,)
        )
    uses = live_uses(service.pool, taken[0])
    late = bench.ask("a")
    assert bench.row()["uses"] == 2
    instead = {use[0]: uuid.uuid4() for use in uses}
    assert fall_back(service.pool, taken[0], uuid.uuid4(), instead) == 0  # the lease of another process
    assert fall_back(service.pool, taken[0], lease, instead) == 1
    assert (bench.row()["state"], bench.row()["uses"]) == ("queued", 1)
    assert bench.fetch(late).pending


def test_nothing_is_pushed_to_whom_it_may_not_go(service: Service, iam: FakeIAM) -> None:
    from minter.refresher.notifications import Pushes

    sent: list[Push] = []
    refusing: set[str] = set()

    def send(pushes: Sequence[Push]) -> set[str]:
        sent.extend(pushes)
        return refusing

    control_changes.change_client(
        service.pool, ME, {"reply_queues": ["mine"], "jwe_key": {"kty": "EC"}}, "test"
    )
    bench = Bench(service, iam, own())
    bench.ask("a", reply_queue="mine")
    bench.run_once()
    with service.engine.store.recording() as tx:
        tx.control()
    control_changes.add_ban(service.pool, Ban("client", ME, "alpen"), "test", "test")
    pushes = Pushes(
        service.pool,
        service.keystore,
        bench.refresher._current,
        send,
        service.loaded.policy.matching_of,
    )
    pushes.run_once(bench.clock())
    assert not sent
    control_changes.lift_ban(service.pool, Ban("client", ME, "alpen"), "test")
    with transaction(service.pool) as connection:
        connection.execute("UPDATE managed SET pushed_id = NULL")
    pushes.run_once(bench.clock())
    (push,) = sent
    assert push.queue == "mine"
    assert push.answer.tokens[0].handle
    pushes.run_once(bench.clock())
    assert len(sent) == 1


@pytest.mark.parametrize("code", ["invalid_client", "unauthorized", "access_denied"])
def test_a_401_is_about_our_credentials_and_waited_for(
    service: Service, iam: FakeIAM, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """Spring's Basic filter, proxies and others name a wrong secret in words of their own."""
    bench = Bench(service, iam, own())
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> Never:
            raise OAuthRefusal(code, "Bad credentials", 401)

        patch.setattr(iam, "answer", refuse)
        outcome = bench.ask("a")
        bench.run_once(until=lambda: len(bench.asked) >= 2)
        assert {o for _, o in bench.asked} == {"misconfigured"}
    bench.forward(minutes=5)
    bench.run_once(until=lambda: bench.row()["state"] == "issued")
    assert bench.fetch(outcome).tokens


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"paths": ["/elsewhere"]}, "path_not_allowed"),
        ({"operations": ["write"]}, None),
        ({"operations": ["read"]}, "operation_not_allowed"),
        ({"paths": ["/"]}, None),
    ],
)
def test_a_client_that_is_narrowed_keeps_no_wider_token(
    service: Service, iam: FakeIAM, limits: dict[str, Any], reason: str | None
) -> None:
    bench = Bench(service, iam, own(), outage_margin_seconds=300)
    bench.ask("a", operation="upload")
    bench.run_once()
    control_changes.change_client(service.pool, ME, limits, "test")
    bench.forward(minutes=45)
    bench.run_once()
    assert len(bench.asked) == (1 if reason else 2)
    assert (bench.row()["error"] or {}).get("reason") == reason


def test_a_queue_that_refuses_is_left_alone_and_others_are_served(
    service: Service, iam: FakeIAM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minter.refresher import notifications

    issued = "SELECT count(*) FROM managed WHERE state = 'issued'"
    sent: list[str] = []
    refusing, elapsed = {"full"}, [0.0]

    def send(pushes: Sequence[Push]) -> set[str]:
        sent.extend(push.queue for push in pushes)
        return refusing & {push.queue for push in pushes}

    queues = {"reply_queues": ["full", "good"], "jwe_key": {"kty": "EC"}}
    control_changes.change_client(service.pool, ME, queues, "test")
    monkeypatch.setattr(time, "monotonic", lambda: elapsed[0])
    bench = Bench(service, iam, own())
    bench.ask("a", reply_queue="full")
    bench.ask("b", reply_queue="good")
    bench.run_once(until=lambda: rows(service, issued) == [(2,)])
    pushes = notifications.Pushes(
        service.pool,
        service.keystore,
        bench.refresher._current,
        send,
        service.loaded.policy.matching_of,
    )
    pushes.run_once(bench.clock())
    assert sorted(sent) == ["full", "good"]
    bench.forward(minutes=1)
    pushes.run_once(bench.clock())
    assert len(sent) == 2
    elapsed[0], refusing = notifications.REFUSED_SECONDS, set()
    pushes.run_once(bench.clock())
    pushes.run_once(bench.clock())
    assert sent[2:] == ["full"]


def test_equal_wishes_of_different_limits_are_not_shared(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, own())
    bench.ask("a")
    bench.ask("a", lifetime_seconds=1800)
    bench.ask("a", on_behalf_of="somebody")
    bench.ask("a", activity="Other")
    bench.ask("a")
    assert sorted(n for (n,) in rows(service, "SELECT uses FROM managed")) == [1, 1, 1, 2]
    bench.run_once(until=lambda: len(bench.asked) >= 4)
    outcomes = {o for _, o in bench.asked}
    assert outcomes <= {"ok", "provider_token_rejected"}  # the provider's hour is more than half of one


def test_half_of_an_all_or_nothing_request_is_not_given(service: Service, iam: FakeIAM) -> None:
    bench = Bench(service, iam, own(storages=("BOREAS-*",)), MINTED)
    areas = service.engine.policy.directories["alpen"]._areas
    (host, port), (area, *_) = next(a for a in areas.items() if "boreas" not in a[0][0] and a[1][0].tokens)
    urls = (SE + "a", f"davs://{host}:{port}{area.prefix}/data/b")
    files = (FileRequest(operations=tuple(FileOperation("download", url) for url in urls)),)
    request = from_mint(MintRequest(request_id=clock.new_uuid7(), files=files, all_or_nothing=True))
    (outcome,) = service.engine.mint_many([Submission(request, ME)], bench.clock())
    assert not outcome.refusals, outcome.refusals
    assert not outcome.issued
    assert len(outcome.pending) == 1
    bench.run_once()
    assert len(bench.fetch(outcome).tokens) == 2


def test_a_refresher_without_the_master_key_goes_on_with_others(
    service: Service, iam: FakeIAM, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(service, iam, own())
    bench.ask("a")
    with monkeypatch.context() as patched:
        patched.setattr(service.keystore, "seal_token", _keyless)
        bench.run_once(seconds=1)
    assert len(bench.asked) == 1
    assert not bench.refresher._unsaved
    bench.forward(minutes=6)
    bench.run_once()
    assert bench.row()["state"] == "issued"


@pytest.mark.parametrize("why", ["late", "banned", "keyless"])
def test_a_probe_that_asks_nothing_holds_up_no_other(
    service: Service, iam: FakeIAM, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """It held up a provider that was back for a whole lease, 70 s; a drill's fast clock made hours of it."""
    bench, _ = due_again(service, iam)
    with transaction(service.pool) as connection:
        connection.execute("UPDATE providers SET failures = 5, pauses = 1, open_until = %s", (bench.clock(),))
    with monkeypatch.context() as patched:
        if why == "late":
            patched.setattr(refresher, "TOLERANCE_SECONDS", -1)
        elif why == "keyless":
            patched.setattr(bench.refresher._keystore, "open_token", _keyless)
        else:
            control_changes.add_ban(
                service.pool, Ban("path", "/atlas/atlasdatadisk/rucio/data/a", "alpen"), "test", "test"
            )
        while not bench.refresher._out.total():
            bench.refresher._take(bench.iam)
        while bench.refresher._out.total():
            bench.refresher._wait()
        bench.refresher._save()
    assert len(bench.asked) == 1
    assert rows(service, "SELECT probed_until FROM providers WHERE open_until IS NOT NULL") == [(None,)]


def test_a_fallback_token_is_told_once(
    service: Service, iam: FakeIAM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minter.transfers")
    bench = Bench(service, iam, own(fallback=("minted",)), MINTED)
    iam.behaviour = Behaviour(fault="error_500")
    for number in range(6):
        bench.ask(f"f{number}")
    bench.run_once(until=lambda: not rows(service, "SELECT 1 FROM managed WHERE state <> 'finished'"))
    bench.lifecycle.report(
        ME, ReportRequest(files=(FileReport(state="finished", external_id="f0"),)), bench.clock()
    )
    (record,) = (r for r in caplog.records if r.name == "minter.transfers")
    (token,) = vars(record)["event"]["tokens"]
    assert token["handle"]


def _keyless(*_: object) -> Never:
    raise NoUsableKey("the master key is away")
