"""Read what an external IAM says: texts, scopes, keys and times in every form that HTTP and JSON allow."""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

import jwt

from minter.errors import (
    MinterError,
)
from minter.scopes import Scope, contains
from minter.storages.urls import host_key

_TOKEN_LIKE = re.compile(r".*(eyJ|[A-Za-z0-9_=+/~.-]{20,}).*").fullmatch
MAX_RETRY_AFTER_SECONDS = 3600.0


def scope_words(claim: object) -> list[str] | None:
    """Return the words of a `scope` claim, a text or, from some IAMs, a list; None if it is neither."""
    if isinstance(claim, list) and all(isinstance(word, str) for word in claim):
        claim = " ".join(claim)
    return [word for word in claim.split(" ") if word] if isinstance(claim, str) else None


def within(word: str, asked: str) -> bool:
    """Return whether a granted scope is within the requested scopes; one that cannot be parsed is not.

    A scope that is equal to a requested one is always within them.
    """
    words = asked.split(" ")
    if word in words:
        return True
    try:
        return contains({Scope.parse(w) for w in words}, [Scope.parse(word)])
    except MinterError:
        return False


_KEY_TYPES = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
_MATERIAL = ("kty", "crv", "x", "y", "n", "e")


def key_for(jwks: list[dict[str, Any]], header: Mapping[str, Any]) -> jwt.PyJWK | None:
    """Return the one key of a set that a token's header means (RFC 7517 §4); None if not exactly one fits.

    A key fits by its type, curve, use and operations, then by its kid, which may be a number. Keys without
    a kid are candidates where none has the header's. Copies of one key count once.
    """
    algorithm, kid = str(header.get("alg")), header.get("kid")
    fitting = [key for key in jwks if _fits(key, algorithm)]
    if kid is not None:
        named = [k for k in fitting if k.get("kid") is not None and str(k["kid"]) == str(kid)]
        fitting = named or [k for k in fitting if k.get("kid") is None]
    copies = {tuple(str(key.get(name)) for name in _MATERIAL): key for key in fitting}
    if len(copies) != 1:
        return None
    return jwt.PyJWK(next(iter(copies.values())), algorithm=algorithm)


def _fits(key: Mapping[str, Any], algorithm: str) -> bool:
    operations = key.get("key_ops")
    return (
        key.get("kty") == _KEY_TYPES.get(algorithm[:2])
        and key.get("crv") == _CURVES.get(algorithm, key.get("crv"))
        and key.get("use") in (None, "sig")
        and key.get("alg") in (None, algorithm)
        and (not isinstance(operations, list) or "verify" in operations)
    )


def text_of(answer: Mapping[str, Any] | None, name: str) -> str:
    """Return a member of an answer if it is a text, else the empty text: JSON allows any type."""
    value = (answer or {}).get(name)
    return value if isinstance(value, str) else ""


def seconds_of(header: str, now: datetime) -> float:
    """Return a Retry-After header, a number or a date, in seconds (RFC 9110 §10.2.3); 0 if neither."""
    said = header.strip()
    if said.isascii() and said.isdecimal():
        return min(float(said[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        at = parsedate_to_datetime(said)
    except (ValueError, TypeError):
        return 0.0
    left = (at.replace(tzinfo=at.tzinfo or UTC) - now).total_seconds()
    return max(0.0, min(left, MAX_RETRY_AFTER_SECONDS))


def may_point_at(url: str, issuer: str, hosts: Iterable[str]) -> bool:
    """Say whether an IAM may send us to a URL: at the issuer's host, below it, or a listed one, over TLS."""
    try:
        found, own = urlsplit(url), urlsplit(issuer)
        host, base = host_key(found.hostname or ""), host_key(own.hostname or "")
    except ValueError:
        return False
    return (
        found.scheme in ("https", own.scheme)
        and found.username is None
        and not found.fragment
        and (
            (host, found.port) == (base, own.port)
            or host.endswith(f".{base}")
            or any(fnmatchcase(host, pattern) for pattern in hosts)
        )
    )


def reason_of(error: Exception) -> str:
    """Return what an error of the HTTP library may say: its class, or a time-out's own words."""
    return str(error)[:200] if isinstance(error, TimeoutError) else type(error).__name__


def plain(text: str) -> str:
    """Return a text of an IAM, fit for a log line: printable, short, and without anything like a token."""
    words = ["".join(c for c in word if c.isprintable()) for word in text.split()]
    return " ".join(w for w in words if w and not _TOKEN_LIKE(w))[:200]
