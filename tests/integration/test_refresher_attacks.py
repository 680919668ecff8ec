"""Managed tokens under attack, and in unlucky combinations."""

import json
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any, Never

import pytest
from msgspec import structs

from minter.contract.followups import FileReport, ReportRequest
from minter.contract.messages import FileOperation, FileRequest, MintRequest
from minter.database import control_changes
from minter.database.connection import transaction
from minter.database.fallbacks import fall_back, live_uses
from minter.errors import NoUsableKey
from minter.local.fake_iam import Behaviour, FakeIAM, OAuthRefusal
from minter.policy.clients import Ban
from minter.policy.requests import from_mint
from minter.policy.routes import Route
from minter.policy.transfers import Policy
from minter.refresher import refresher
from minter.refresher.notifications import Push
from minter.service import Service
from minter.tokens import clock
from minter.tokens.outcomes import Outcome, Submission
from tests.conftest import rows
from tests.integration.refreshing import ME, MINTED, Bench, exchange, own
from tests.integration.test_mint import SE


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


def test_a_refused_fallback_is_tried_again_at_the_next_pause(service: Service, iam: FakeIAM) -> None:
    """The pause between was ended by another refresher: this one learns of it from the database only."""
    bench = Bench(service, iam, own(fallback=("narrow",)), Route(name="narrow", operations=("delete",)))
    iam.behaviour = Behaviour(fault="error_500")
    asked = bench.ask("f")
    bench.run_once(until=lambda: rows(service, "SELECT 1 FROM providers WHERE open_until IS NOT NULL"))
    bench.run_once()
    assert bench.fetch(asked).pending
    again = Policy(
        service.engine.policy.directories, (bench.routes[0], structs.replace(MINTED, name="narrow")), ()
    )
    service.engine.policy = bench.lifecycle.engine.policy = again
    bench.run_once()
    assert bench.fetch(asked).pending  # of this pause
    with transaction(service.pool) as connection:
        connection.execute("UPDATE providers SET open_until = open_until + interval '1 minute'")
    bench.run_once(until=lambda: bench.fetch(asked).tokens)


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
