"""What every reader of a JWT from outside checks: its form, and the errors that a malformed one causes."""

import re

import jwt

is_compact = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+").fullmatch
"""Matches a JWS in compact serialization (RFC 7515 §3.1): base64url without padding, in three parts."""

UNREADABLE = (
    jwt.PyJWTError,
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors that PyJWT raises for malformed tokens and keys."""


def without_tokens(body: bytes) -> bytes:
    """Return a body as it is, or in its place a word if it may hold a token (I5): they begin with `eyJ`."""
    return b'"removed: it may hold a token"' if b"eyJ" in body else body
