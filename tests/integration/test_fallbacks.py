"""Fallback tokens: what stands in for a managed token that its provider does not give."""

import uuid
from datetime import timedelta

import jwt
import pytest

from minter.contract.followups import FetchRequest, FileReport, ReportRequest
from minter.database import keyring, traces
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.local.fake_iam import Behaviour, FakeIAM
from minter.service import Service
from minter.tasks.recovery import Recovery
from minter.tokens import keys
from minter.tokens.outcomes import Outcome
from tests.conftest import rows
from tests.integration.refreshing import ME, MINTED, Bench, exchange, own


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
