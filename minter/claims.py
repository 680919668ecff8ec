"""Claims: build the payload of a token, and check the bytes of a finished one.

The two halves share no code: the builder encodes a struct, the check decodes bytes as a stranger
would and compares them with the grant. `docs/adr/0001` tells why every token is checked.
"""

import base64
import json
from collections.abc import Iterable
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct

from minter.errors import TokenRejected
from minter.policy import BACKDATE_SECONDS, HARD_MAX_SECONDS, MAX_CLAIM_CHARACTERS, Grant

WLCG_VERSION = "1.0"
"""Stays 1.0 until all verifiers read newer ones: dCache and XRootD refuse any other."""

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


_encode = msgspec.json.Encoder().encode


def build_claims(grant: Grant, issuer: str, sub: str, client_id: str, now: int, jti: UUID) -> bytes:
    """Return the JWS payload of a grant (WLCG §2.1), the text that is recorded and signed.

    `now` is in whole seconds since the epoch; iat and nbf are back-dated by 60 s (§4.3.1), so
    `exp - iat` is the grant's lifetime.
    """
    issued_at = now - BACKDATE_SECONDS
    audience = grant.audience
    return _encode(
        _Claims(
            WLCG_VERSION,
            issuer,
            sub,
            audience[0] if len(audience) == 1 else audience,
            grant.scope,
            client_id,
            issued_at,
            issued_at,
            issued_at + grant.lifetime.seconds,
            str(jti),
        )
    )


# ── check ────────────────────────────────────────────────────────────────────────────────────


def _segment(text: bytes) -> object:
    decoded: object = json.loads(base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4)))
    return decoded


def unverified_claims(token: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a compact JWS into header and claims without trusting either; raises TokenRejected."""
    try:
        head, payload, _signature = token.split(b".")
        header, claims = _segment(head), _segment(payload)
    except ValueError as error:  # too many parts, bad base64, bad JSON
        raise TokenRejected("not a compact JWS with JSON segments") from error
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise TokenRejected("header or claims are not JSON objects")
    return header, claims


def check_token(
    token: bytes,
    grant: Grant,
    issuer: str,
    sub: str,
    client_id: str,
    now: int,
    jti: UUID,
    kid: str,
    algorithm: str,
) -> None:
    """Compare the bytes of a finished token with its grant; raises TokenRejected.

    Every claim must be present, none may be added, and each must say what was decided.
    """
    header, claims = unverified_claims(token)
    _same("header", header, {"alg": algorithm, "kid": kid, "typ": "JWT"})
    audience = list(grant.audience)
    start = now - 60
    _same(
        "claims",
        claims,
        {
            "wlcg.ver": "1.0",
            "iss": issuer,
            "sub": sub,
            "aud": audience if len(audience) > 1 else audience[0],
            "scope": " ".join(_meant(grant)),
            "client_id": client_id,
            "iat": start,
            "nbf": start,
            "exp": start + grant.lifetime.seconds,
            "jti": f"{jti}",
        },
    )
    if not 0 < grant.lifetime.seconds <= min(grant.plan.cap_seconds, HARD_MAX_SECONDS):
        raise TokenRejected(f"lifetime {grant.lifetime.seconds} s is beyond policy")
    _check_size(token, claims, grant.plan.area.dialect.max_token_bytes)


def _meant(grant: Grant) -> Iterable[str]:
    """Return the grant's scopes one by one, refusing what no token may hold."""
    for scope in grant.scope.split(" "):
        name, colon, path = scope.partition(":")
        if name.startswith("storage.") and not (colon and path.startswith("/")):
            raise TokenRejected(f"scope {scope!r} has no absolute path")
        if name == "offline_access":
            raise TokenRejected("offline_access would make FTS manage the token")
        yield scope


def _same(what: str, got: dict[str, object], expected: dict[str, object]) -> None:
    if got == expected and all(type(got[name]) is type(expected[name]) for name in expected):
        return
    names = sorted(
        name
        for name in expected.keys() | got.keys()
        if got.get(name) != expected.get(name) or type(got.get(name)) is not type(expected.get(name))
    )
    raise TokenRejected(f"{what} differ from the grant in {', '.join(names)}", claims=names)


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
