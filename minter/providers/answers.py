"""What is asked of an external IAM, and what it answers."""

from typing import Any

from msgspec import Struct

from minter.errors import MinterError


class Documents(Struct, frozen=True):
    """The published metadata of an IAM: its endpoints (RFC 8414, OpenID Discovery) and its keys."""

    issuer: str
    token_endpoint: str
    jwks: list[dict[str, Any]]
    introspection_endpoint: str = ""
    revocation_endpoint: str = ""


class Asked(Struct, frozen=True):
    """Properties of a requested token: scope, audience, longest life and shortest useful life, in seconds."""

    scope: str
    audience: tuple[str, ...]
    cap_seconds: int
    least_seconds: int = 0


class Obtained(Struct, frozen=True):
    """An IAM's answer: a checked access token or the error that rejected it, and a refresh token.

    `jti` is the IAM's id of the access token, which storages log. `dropped` are requested scopes that the
    IAM left out without an error. `refresh` may be set beside `error`: it must be kept, because the previous
    refresh token is spent. `repr` shows no token.
    """

    access: str = ""
    scope: str = ""
    expires_at: int = 0
    refresh: str = ""
    jti: str = ""
    dropped: tuple[str, ...] = ()
    error: MinterError | None = None

    def __repr__(self) -> str:
        """Describe the answer without showing a token."""
        return f"Obtained({self.scope!r}, exp={self.expires_at}, refresh={bool(self.refresh)})"
