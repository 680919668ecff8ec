"""Minter under the issuer of the VO's IAM: one key set of both signers (ADR 16).

Sites trust an issuer and read its keys at one address. There, a file with the IAM's keys and Minter's takes
the place of the IAM's own answer. A key of the IAM leaves the file only after two fetches in a row without
it, or when an operator drops it; an answer that is no key set changes nothing. The module reads no clock and
does no I/O.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any

import jwt
import msgspec
from msgspec import Struct, structs

from minter.errors import InvalidRequest

MAX_KEYS = 50
MAX_BYTES = 128 * 1024
MISSED = 2
"""So many good answers in a row without a key mean that the IAM has withdrawn it."""
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})

_canonical = msgspec.json.Encoder(order="sorted").encode

PublicKey = dict[str, Any]


class IamKeys(Struct, frozen=True, kw_only=True):
    """What is known of the keys of one VO's IAM; `missing` counts good answers without a key, by kid."""

    vo: str
    keys: list[PublicKey] = []
    missing: dict[str, int] = {}
    problem: str = ""
    tried_at: datetime | None = None
    fetched_at: datetime | None = None
    written_at: datetime | None = None


def read_key_set(body: bytes) -> list[PublicKey]:
    """Return the keys of a JWK Set (RFC 7517 §5); raises InvalidRequest for anything else.

    A set without a key that verifies signatures is refused, as is one with a private key, or with two keys of
    one kid. Keys for encryption and of unknown types stay in the set, as RFC 7517 §5 says.
    """
    try:
        keys = msgspec.json.decode(body, type=dict[str, Any])["keys"]
        found = msgspec.convert(keys, list[dict[str, Any]])
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, RecursionError):
        raise InvalidRequest("the answer is no JWK Set (RFC 7517 §5)") from None
    if b"\\u0000" in msgspec.json.encode(found):
        raise InvalidRequest("the key set has a NUL character")
    if len(found) > MAX_KEYS:
        raise InvalidRequest(f"the key set has {len(found)} keys, expected at most {MAX_KEYS}")
    if any(_PRIVATE & key.keys() for key in found):
        raise InvalidRequest("the key set holds a private or a symmetric key")
    kids = [kid_of(key) for key in found]
    if len(kids) != len(set(kids)):
        raise InvalidRequest("the key set has two keys with one kid")
    if not any(_verifies(key) for key in found):
        raise InvalidRequest("the key set has no key that verifies signatures")
    return found


def kid_of(key: Mapping[str, Any]) -> str:
    """Return the kid of a key, or a digest of the key if it has none (RFC 7517 §4.5)."""
    kid = key.get("kid")
    return kid if isinstance(kid, str) and kid else sha256(_canonical(dict(key))).hexdigest()


def after(known: IamKeys, fetched: Sequence[PublicKey], own: Collection[str], now: datetime) -> IamKeys:
    """Return what is known after a good answer; raises InvalidRequest if it has a kid of ours.

    `own` are the kids of Minter's keys, past ones, too: an answer with one of them is not the IAM's own, but
    the merged file, or the IAM has a key of ours.
    """
    present = {kid_of(key) for key in fetched}
    if clash := sorted(present & set(own)):
        raise InvalidRequest(
            f"the IAM's key set has Minter's kid {clash[0]}: does co_issuer.keys point at the merged file?"
        )
    kept, missing = list(fetched), dict[str, int]()
    for key in known.keys:
        if (kid := kid_of(key)) in present:
            continue
        count = known.missing.get(kid, 0) + 1
        if count < MISSED:
            kept.append(key)
            missing[kid] = count
    problem = f"the IAM's answer lacks {', '.join(sorted(missing))}" if missing else ""
    return structs.replace(known, keys=kept, missing=missing, problem=problem, tried_at=now, fetched_at=now)


def merged(known: IamKeys, own: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return one key set of both signers; raises InvalidRequest while no keys of the IAM are known."""
    if not known.keys:
        raise InvalidRequest(
            f"no keys of VO {known.vo}'s IAM are known yet ({known.problem or 'not fetched'})"
        )
    return {"keys": [*known.keys, *own]}


def _verifies(key: Mapping[str, Any]) -> bool:
    if key.get("use", "sig") != "sig":
        return False
    try:
        jwt.PyJWK(dict(key))
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return True
