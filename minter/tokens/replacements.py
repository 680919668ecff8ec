"""Replacements: what answers a request whose tokens were signed with a key that is revoked now (ADR 17).

`minter keys recover` renews such requests. The id of the renewal follows from the request's and the key's, so
whoever asks under the old request_id finds it, and a recovery that is started again makes nothing twice.
Where a renewal could not serve every token, the next one has the id that follows from that renewal's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from uuid import UUID

from minter.tokens.records import RequestRow, TokenRow

_RANDOM_BITS = (1 << 62) - 1
_VERSION_BITS = 0xFFFF_FFFF_FFFF << 80 | 0xF << 76 | 0x3 << 62
"""The time, the version and the variant of a UUIDv7 (RFC 9562 §5.7)."""
_SUB_SECOND = 0xFFF << 64
_ENDED = ("cancelled", "finished")
_MOST_TRIES = 100

Place = tuple[UUID, int]
"""A request's request_id and client_id."""
Recorded = Mapping[Place, tuple[RequestRow, list[TokenRow]]]
Read = Callable[[Sequence[Place]], Recorded]
"""Reads requests with their tokens; those that are not recorded are missing."""


def replacement_id(request_id: UUID, kid: str) -> UUID:
    """Return the id of the request that renews another after a key was revoked: a UUIDv7 of its time."""
    drawn = int.from_bytes(sha256(f"{request_id} {kid}".encode()).digest()[:16])
    return UUID(int=request_id.int & _VERSION_BITS | drawn & (_SUB_SECOND | _RANDOM_BITS))


def tries(request_id: UUID, kid: str) -> Iterator[UUID]:
    """Yield the ids of the renewals of a request, in their order."""
    for _ in range(_MOST_TRIES):
        request_id = replacement_id(request_id, kid)
        yield request_id


def is_lost(token: TokenRow, revoked: Mapping[int, str]) -> bool:
    """Say whether a token has not ended and was signed with one of these keys (kid by key_id)."""
    return token.mode == "mint" and token.key_id in revoked and token.state not in _ENDED


def follow(
    read: Read, found: Recorded, revoked: Mapping[int, str]
) -> tuple[dict[Place, tuple[RequestRow, list[TokenRow]]], dict[tuple[Place, int], UUID]]:
    """Return requests with the replacement of each lost token, and the free ids of those without one.

    A replacement may itself be lost, if its key was revoked later. The id at which the next renewal must be
    recorded is given for each lost token, by its place and its position in the request's tokens.
    """
    made = {place: (row, list(tokens)) for place, (row, tokens) in found.items()}
    free: dict[tuple[Place, int], UUID] = {}
    waiting = {
        (place, n): replacement_id(token.request_id, revoked[token.key_id])
        for place, (_, tokens) in found.items()
        for n, token in enumerate(tokens)
        if is_lost(token, revoked)
    }
    while waiting:
        answers = read(sorted({(id_, place[1]) for (place, _), id_ in waiting.items()}))
        slots = {place: {token.slot: token for token in tokens} for place, (_, tokens) in answers.items()}
        asked, waiting = waiting, {}
        for (place, n), id_ in asked.items():
            row, tokens = made[place]
            old, again = tokens[n], answers.get((id_, place[1]))
            if again is None:
                free[place, n] = id_
                continue
            new = slots[id_, place[1]].get(old.slot) if _renews(again[0], old, row) else None
            if new is None:
                waiting[place, n] = replacement_id(id_, revoked[old.key_id])
            else:
                tokens[n] = new
                if is_lost(new, revoked):
                    waiting[place, n] = replacement_id(new.request_id, revoked[new.key_id])
    return made, free


def _renews(again: RequestRow, old: TokenRow, row: RequestRow) -> bool:
    """Say whether a recorded request is a renewal of a token's request: a client may have taken its id."""
    return (again.kind, again.renews, again.on_behalf_of, again.activity) == (
        "renew", old.request_id, row.on_behalf_of, row.activity,
    )  # fmt: skip
