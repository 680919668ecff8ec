"""Managed tokens from a fake provider: they are recorded, obtained, refreshed, or replaced by a fallback."""

import json
import logging
import uuid
from datetime import timedelta

import jwt
import pytest
import urllib3
from msgspec import structs

from minter.contract.followups import CancelRequest, FetchRequest, FileReport, ReportRequest
from minter.contract.messages import FileRequest, MintRequest
from minter.database import control_changes, keyring, leases, live_tokens, managed, partitions, traces
from minter.database.connection import transaction
from minter.database.control import read_private_key
from minter.errors import InvalidGrant
from minter.local.fake_iam import Behaviour, FakeIAM, Fault
from minter.policy.clients import Ban
from minter.policy.requests import from_mint
from minter.providers.dialects import Reuse
from minter.service import Service
from minter.tokens import clock
from minter.tokens.outcomes import Submission
from minter.tokens.records import fts_token_id
from tests.conftest import rows
from tests.integration.refreshing import ME, Bench, exchange, own


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
