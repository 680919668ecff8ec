"""Refresh families on a real Postgres: a refresh token that comes twice ends what came of its family."""

from uuid import UUID

from minter.local import stack
from minter.policy.exchanges import Exchange
from minter.policy.requests import Request
from minter.policy.token_requests import TokenRequest
from minter.service import Service
from minter.tokens import clock
from minter.tokens.outcomes import Outcome, Submission
from tests.conftest import rows

SCOPE, AUDIENCE = "storage.read:/atlas/atlasdatadisk/rucio/data/x", "https://se01.boreas.example.org"


def asked(kind: str, client: str = "fts", **wanted: object) -> Submission:
    request = TokenRequest(scope=(SCOPE,), audience=(AUDIENCE,), **wanted)  # type: ignore[arg-type]
    return Submission(Request(clock.new_uuid7(), kind, b"\0" * 32, (), token_request=request), client)  # type: ignore[arg-type]


def family_of(service: Service) -> UUID:
    """Let FTS exchange a token of Rucio for one with a refresh token; return the family."""
    stack.add_client(service, "fts", "alpen", "tests")
    service.engine.policy.exchanges = (
        Exchange(name="fts", clients=("fts",), subject_clients=("rucio-alpen",), offline_access=True),
    )
    (first,) = service.engine.mint_many([asked("token", "rucio-alpen")], service.clock())
    (token,) = first.issued
    ((payload,),) = rows(service, "SELECT payload FROM tokens WHERE jti = %s", token.jti)
    subject = (UUID(token.jti), payload)
    (exchanged,) = service.engine.mint_many(
        [asked("exchange", subject=subject, offline=True)], service.clock()
    )
    assert exchanged.family is not None
    return exchanged.family.family_id


def state(service: Service, outcome: Outcome) -> list[str]:
    (token,) = outcome.issued
    return [
        str(s) for (s,) in rows(service, "SELECT state::text FROM token_states WHERE jti = %s", token.jti)
    ]


def test_a_token_of_the_batch_that_revokes_its_family_ends_with_it(service: Service) -> None:
    family = family_of(service)
    (second,) = service.engine.mint_many(
        [asked("refresh", refresh=(family, 1), offline=True)], service.clock()
    )
    assert second.issued
    (third,) = service.engine.mint_many(
        [asked("refresh", refresh=(family, 2), offline=True)], service.clock()
    )
    newest, old = (
        asked("refresh", refresh=(family, 3), offline=True),
        asked("refresh", refresh=(family, 1), offline=True),
    )
    fourth, refused = service.engine.mint_many([newest, old], service.clock())
    assert refused.error is not None
    assert refused.error.reason == "invalid_grant"
    for outcome in (second, third, fourth):
        assert state(service, outcome) == ["cancelled"]
