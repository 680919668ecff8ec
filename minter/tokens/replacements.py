"""Replacements: what answers a request whose tokens were signed with a key that is revoked now (ADR 17).

`minter keys recover` renews such requests. The id of the renewal follows from the request's and the key's, so
whoever asks under the old request_id finds it, and a recovery that is started again makes nothing twice.
"""

from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from uuid import UUID

from minter.tokens.keys import Key
from minter.tokens.records import Recording, RequestRow, TokenRow

_RANDOM_BITS = (1 << 62) - 1
_VERSION_BITS = 0xFFFF_FFFF_FFFF << 80 | 0xF << 76 | 0x3 << 62
"""The time, the version and the variant of a UUIDv7 (RFC 9562 §5.7)."""
_SUB_SECOND = 0xFFF << 64
ENDED = ("cancelled", "finished")

Recorded = Mapping[tuple[UUID, int], tuple[RequestRow, list[TokenRow]]]


def replacement_id(request_id: UUID, kid: str) -> UUID:
    """Return the id of the request that renews another after a key was revoked: a UUIDv7 of its time."""
    drawn = int.from_bytes(sha256(f"{request_id} {kid}".encode()).digest()[:16])
    return UUID(int=request_id.int & _VERSION_BITS | drawn & (_SUB_SECOND | _RANDOM_BITS))


def with_replacements(
    tx: Recording, found: Recorded, ring: Collection[Key]
) -> dict[tuple[UUID, int], tuple[RequestRow, list[TokenRow]]]:
    """Return recorded requests with the replacement of each token whose key is revoked, where there is one.

    A replacement may itself be of a key that was revoked later. Tokens that ended have no replacement.
    """
    revoked = {key.key_id: key.kid for key in ring if key.state == "revoked"}
    made = dict(found)
    waiting = {place: place for place in found}
    while waiting:
        wanted = {
            (replacement_id(latest[0], revoked[token.key_id]), latest[1]): place
            for place, latest in waiting.items()
            for token in made[place][1]
            if _is_lost(token, revoked)
        }
        waiting = {}
        for latest, (_, tokens) in (tx.recorded(list(wanted)) if wanted else {}).items():
            place = wanted[latest]
            row, old = made[place]
            made[place] = row, _replaced(old, tokens, revoked)
            waiting[place] = latest
    return made


def _is_lost(token: TokenRow, revoked: Mapping[int, str]) -> bool:
    return token.mode == "mint" and token.key_id in revoked and token.state not in ENDED


def _replaced(old: Iterable[TokenRow], new: Iterable[TokenRow], revoked: Mapping[int, str]) -> list[TokenRow]:
    """Return tokens in their order, each lost one replaced by the new one of its slot if there is one."""
    by_slot = {token.slot: token for token in new}
    return [by_slot.get(t.slot, t) if _is_lost(t, revoked) else t for t in old]
