"""Claims: build the payload of a token, and check the bytes of a finished one.

The two halves share no code: the builder encodes a struct; the check decodes the bytes as an independent
verifier would, and compares them with the planned token. `docs/adr/0001` tells why every token is checked.
"""

from binascii import a2b_base64
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Struct

from minter.errors import TokenRejected
from minter.policy.limits import BACKDATE_SECONDS, HARD_MAX_SECONDS, MAX_CLAIM_CHARACTERS
from minter.policy.plans import PlannedToken

WLCG_VERSION = "1.0"
"""Profile version of all tokens: 1.0 until all verifiers accept newer ones; dCache and XRootD do not yet."""

# ── build ────────────────────────────────────────────────────────────────────────────────────


class _Claims(Struct, gc=False, omit_defaults=True):
    version: str = msgspec.field(name="wlcg.ver")
    iss: str
    sub: str
    aud: str | tuple[str, ...]
    scope: str
    client_id: str
    iat: int
    nbf: int
    exp: int
    jti: str
    groups: tuple[str, ...] = msgspec.field(default=(), name="wlcg.groups")
    act: dict[str, Any] | None = None


_encode = msgspec.json.Encoder().encode


def build_claims(planned: PlannedToken, issuer: str, sub: str, client_id: str, now: int, jti: str) -> bytes:
    """Return the JWS payload of a planned token (WLCG §2.1), the text that is recorded and signed.

    `now` is in whole seconds since the epoch; iat and nbf are back-dated by 60 s (§4.3.1), so
    `exp - iat` is the planned lifetime.
    """
    issued_at = now - BACKDATE_SECONDS
    audience, extra = planned.audience, planned.extra
    return _encode(
        _Claims(
            WLCG_VERSION,
            issuer,
            extra.sub if extra else sub,
            audience[0] if len(audience) == 1 else audience,
            planned.scope,
            client_id,
            issued_at,
            issued_at,
            issued_at + planned.lifetime.seconds,
            jti,
            extra.groups if extra else (),
            extra.act if extra else None,
        )
    )


# ── check ────────────────────────────────────────────────────────────────────────────────────


_BASE64 = bytes.maketrans(b"-_", b"+/")


def _segment(text: bytes) -> Any:
    return msgspec.json.decode(a2b_base64(text.translate(_BASE64) + b"=="))


# The header is equal for all tokens of one key, so it is decoded once.
_header = lru_cache(maxsize=256)(_segment)


def unverified_claims(token: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a compact JWS into header and claims without trusting either; raises TokenRejected."""
    try:
        head, payload, _signature = token.split(b".")
        header, claims = _header(head), _segment(payload)
    except (ValueError, msgspec.DecodeError) as error:  # too many parts, bad base64, bad JSON
        raise TokenRejected("not a compact JWS with JSON segments") from error
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise TokenRejected("header or claims are not JSON objects")
    return header, claims


def check_token(
    token: bytes,
    planned: PlannedToken,
    issuer: str,
    sub: str,
    client_id: str,
    now: int,
    jti: str,
    kid: str,
    algorithm: str,
) -> None:
    """Compare the bytes of a finished token with its planned token; raises TokenRejected.

    Every expected claim must be present with the decided value, and there may be no other claim.
    """
    header, claims = unverified_claims(token)
    _same("header", header, {"alg": algorithm, "kid": kid, "typ": "JWT"})
    audience = list(planned.audience)
    start = now - 60
    expected: dict[str, Any] = {
        "wlcg.ver": "1.0",
        "iss": issuer,
        "sub": sub,
        "aud": audience if len(audience) > 1 else audience[0],
        "scope": " ".join(_meant(planned)),
        "client_id": client_id,
        "iat": start,
        "nbf": start,
        "exp": start + planned.lifetime.seconds,
        "jti": jti,
    }
    if planned.extra is not None:
        expected["sub"] = planned.extra.sub
        if planned.extra.groups:
            expected["wlcg.groups"] = list(planned.extra.groups)
        if planned.extra.act is not None:
            expected["act"] = planned.extra.act
    _same("claims", claims, expected)
    # In Python 1 == 1.0 == True, but in JSON they differ.
    for name in ("iat", "nbf", "exp"):
        if type(claims[name]) is not int:
            raise TokenRejected(f"claims differ from the decision in {name}: not an integer", claims=[name])
    if not 0 < planned.lifetime.seconds <= min(planned.plan.cap_seconds, HARD_MAX_SECONDS):
        raise TokenRejected(f"lifetime {planned.lifetime.seconds} s is beyond policy")
    _check_size(token, claims, planned.plan.area.dialect.max_token_bytes)


def _meant(planned: PlannedToken) -> Iterable[str]:
    """Yield the scopes of a planned token; raises TokenRejected for a scope that no token may hold."""
    for scope in planned.scope.split(" "):
        name, colon, path = scope.partition(":")
        if name.startswith("storage.") and not (colon and path.startswith("/")):
            raise TokenRejected(f"scope {scope!r} has no absolute path")
        if name == "offline_access" and planned.extra is None:
            raise TokenRejected("offline_access would make FTS manage the token")
        yield scope


def _same(what: str, got: dict[str, Any], expected: dict[str, Any]) -> None:
    if got == expected:
        return
    names = sorted(n for n in expected.keys() | got.keys() if got.get(n) != expected.get(n))
    raise TokenRejected(f"{what} differ from the decision in {', '.join(names)}", claims=names)


def _check_size(token: bytes, claims: dict[str, Any], max_token_bytes: int) -> None:
    if len(token) > max_token_bytes:
        raise TokenRejected(
            f"token of {len(token)} bytes exceeds the {max_token_bytes} that its storage takes"
        )
    for name in ("scope", "aud"):
        value = claims[name]
        size = len(value if isinstance(value, str) else " ".join(map(str, value)))
        if size > MAX_CLAIM_CHARACTERS:
            raise TokenRejected(f"{name} of {size} characters exceeds {MAX_CLAIM_CHARACTERS}")
