"""Repeated requests on a real Postgres: the same answer (I4)."""

import json
import threading
from datetime import UTC, datetime, timedelta

import pytest

from minter.contract.messages import FileRequest, MintRequest
from minter.database import control_changes
from minter.local import stack
from minter.policy.requests import from_mint
from minter.service import Service
from minter.storages.dialects import Algorithm
from minter.tokens import clock, keys
from minter.tokens.keystore import new_master_key
from minter.tokens.outcomes import Submission
from tests.conftest import load_settings
from tests.integration.test_mint import asked_file, count, mint, reason, submission, tokens


def test_asked_twice_same_bytes_also_in_one_batch_from_another_process_and_later(
    service: Service, dsn: str
) -> None:
    asked = submission("a", "b")
    first, twin = mint(service, asked, asked)
    assert tokens(first) == tokens(twin)
    assert twin.repeated
    other = Service(load_settings(dsn))
    (again,) = mint(other, asked, now=clock.now() + timedelta(minutes=5))
    other.pool.dispose()
    assert tokens(again) == tokens(first)
    assert count(service) == 4


def rotate(service: Service, algorithm: Algorithm) -> keys.Signer:
    """Let a new key sign from now on; return its signer."""
    with control_changes.controlling(service.pool, "test", "retire", "alpen", {}) as tx:
        tx.execute("UPDATE signing_keys SET state = 'old', retired_at = now()")
    signer = keys.generate(algorithm)
    with control_changes.controlling(service.pool, "test", "key", "alpen", {}) as tx:
        tx.execute(
            "INSERT INTO signing_keys (vo, kid, algorithm, state, public_jwk, private_key, activated_at)"
            " VALUES ('alpen', %s, %s, 'active', %s, %s, now())",
            (signer.kid, algorithm, json.dumps(signer.public_jwk), service.keystore.seal("alpen", signer)),
        )
    return signer


def test_rs256_too(service: Service) -> None:
    signer = rotate(service, "RS256")
    asked = submission("a")
    first, again = (mint(service, asked)[0] for _ in range(2))
    assert tokens(first) == tokens(again)
    keys.verify(first.issued[0].token, signer.public_jwk)


def test_other_content_under_the_same_id_is_a_conflict(service: Service) -> None:
    id_ = clock.new_uuid7()
    mint(service, submission("a", request_id=id_))
    (other,) = mint(service, submission("b", request_id=id_))
    assert (reason(other), other.issued) == ("conflict", [])
    one, two = mint(
        service, submission("c", request_id=(new := clock.new_uuid7())), submission("d", request_id=new)
    )
    assert {one.error and one.error.reason, two.error and two.error.reason} == {None, "conflict"}


def test_a_twin_with_the_recorded_content_gets_its_tokens_beside_one_with_other_content(
    service: Service,
) -> None:
    id_ = clock.new_uuid7()
    good = submission("a", request_id=id_)
    (first,) = mint(service, good)
    for batch in ([submission("b", request_id=id_), good], [good, submission("b", request_id=id_)]):
        outcomes = {o.submission is good: o for o in mint(service, *batch)}
        assert tokens(outcomes[True]) == tokens(first)
        assert reason(outcomes[False]) == "conflict"


def test_a_key_that_does_not_open_is_told_and_stops_nothing_else(service: Service, dsn: str) -> None:
    asked = submission("a")
    mint(service, asked)
    other = Service(load_settings(dsn, MINTER_MASTER_KEY_ALPEN=new_master_key()))
    outcomes = mint(other, asked, submission("b"))
    assert [reason(o) for o in outcomes] == ["no_usable_key"] * 2
    other.pool.dispose()
    assert mint(service, asked)[0].issued


def test_text_that_postgres_cannot_hold_is_recorded_without_it(service: Service) -> None:
    url = "davs://nowhere.example.org/\\u0000x\x00"
    odd = from_mint(
        MintRequest(
            request_id=clock.new_uuid7(),
            activity="a\x00b",
            files=(FileRequest(sources=(url,)), asked_file("a")),
        )
    )
    first, again = (mint(service, Submission(odd, "rucio-alpen"))[0] for _ in range(2))
    assert len(first.issued) == len(again.issued) == 2
    assert [r["error"]["reason"] for r in again.refusals] == ["unknown_storage"]


def test_another_client_may_use_the_same_id(service: Service) -> None:
    stack.add_client(service, "dirac", "alpen", "tests")
    id_ = clock.new_uuid7()
    one, two = mint(service, submission("a", request_id=id_), submission("a", request_id=id_, client="dirac"))
    assert not one.error
    assert not two.error
    assert set(tokens(one)).isdisjoint(tokens(two))


@pytest.mark.parametrize(("left", "given"), [(300, True), (299, False)])
def test_a_token_is_given_again_while_it_lives_for_five_minutes(
    service: Service, left: int, given: bool
) -> None:
    asked = submission("a")
    now = clock.now().replace(microsecond=0)
    first = mint(service, asked, now=now)[0]
    exp = min(i.exp for i in first.issued)
    assert len({i.exp for i in first.issued}) == 1
    again = mint(service, asked, now=datetime.fromtimestamp(exp - left, UTC))[0]
    assert tokens(again) == (tokens(first) if given else [])


def test_a_token_that_no_longer_covers_the_need_is_expired_with_an_offer(service: Service) -> None:
    asked = submission("a")
    mint(service, asked)
    # Only the time that the engine is given is late; the token's lifetime is 6 h at most.
    (late,) = mint(service, asked, now=clock.now() + timedelta(hours=6))
    assert late.error is not None
    assert (late.error.reason, late.error.fields) == ("expired", {"renew": True})


def test_an_old_key_resigns_for_a_day_and_a_revoked_one_never(service: Service) -> None:
    asked = submission("a")
    (first,) = mint(service, asked)
    with control_changes.controlling(service.pool, "test", "retire", "alpen", {}) as tx:
        tx.execute("UPDATE signing_keys SET state = 'old', retired_at = now() - interval '23 hours'")
    service.create_keys("alpen", ("ES256", "RS256"), "tests")
    assert tokens(mint(service, asked)[0]) == tokens(first)
    with control_changes.controlling(service.pool, "test", "retire", "alpen", {}) as tx:
        tx.execute("UPDATE signing_keys SET retired_at = now() - interval '25 hours' WHERE state = 'old'")
    assert reason(mint(service, asked)[0]) == "expired"
    with control_changes.controlling(service.pool, "test", "revoke", "alpen", {}) as tx:
        tx.execute(
            "UPDATE signing_keys SET state = 'revoked', revoked_at = now(), private_key = NULL WHERE state = 'old'"
        )
    assert reason(mint(service, asked)[0]) == "expired"


def test_two_processes_with_the_same_requests_at_once_give_one_outcome(service: Service, dsn: str) -> None:
    asked = [submission(f"f{n}") for n in range(40)]
    others = [Service(load_settings(dsn)) for _ in range(3)]
    results = {}

    def work(number: int, engine: Service) -> None:
        results[number] = [mint(engine, *asked[i : i + 5]) for i in range(0, 40, 5)]

    threads = [threading.Thread(target=work, args=(n, s)) for n, s in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flat = [[tokens(o) for batch in results[n] for o in batch] for n in range(3)]
    assert flat[0] == flat[1] == flat[2]
    assert count(service) == 80
    for other in others:
        other.pool.dispose()
