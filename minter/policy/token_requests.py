"""Token requests as values: scopes, audiences, and the subject or refresh token presented.

The sources are RFC 6749 §4.4 and §6, and RFC 8693 §2.1. Every refresh token belongs to a family, which
begins with one exchange. `present` is the rule of WLCG 1.3 §4.3.2: the newest refresh token works, and
the one before it until the newest was used, for a day at most.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from urllib.parse import unquote_plus
from uuid import UUID

from msgspec import Struct, structs

from minter.policy.limits import GRACE


class SubjectToken(Struct, frozen=True):
    """A provider's token presented as subject token (RFC 8693 §2.1); `provider` is set once it is verified.

    `client` is the client that got the token from the provider, by the claim `client_id` or `azp`.
    """

    token: str
    provider: str = ""
    scope: str = ""
    expires_at: int = 0
    sub: str = ""
    client: str = ""
    act: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """Name the provider without showing the token."""
        return f"SubjectToken({self.provider})"


class TokenRequest(Struct, frozen=True, kw_only=True):
    """One token request; empty scope or audience means those of the presented token, or the default.

    `subject` is the jti and payload of a token of Minter, `refresh` the family and generation of a refresh
    token, `foreign` a provider's token; all were verified. `offline` says whether a refresh token is
    requested.
    """

    scope: tuple[str, ...] = ()
    audience: tuple[str, ...] = ()
    offline: bool = False
    subject: tuple[UUID, str] | None = None
    refresh: tuple[UUID, int] | None = None
    foreign: SubjectToken | None = None


class Subject(Struct, frozen=True, kw_only=True):
    """A token of Minter, as recorded, that a client presents as subject token."""

    jti: UUID
    payload: str
    client: str
    on_behalf_of: str
    activity: str
    kind: str
    state: str
    key_state: str
    expires_at: datetime
    shared: bool = False

    @property
    def ended(self) -> bool:
        """Whether the token was cancelled, or its key revoked."""
        return self.state == "cancelled" or self.key_state == "revoked"


class Family(Struct, frozen=True, kw_only=True):
    """The refresh tokens of one exchange; `generation` numbers the newest, handed out at `rotated_at`."""

    family_id: UUID
    client_id: int
    subject_jti: UUID
    subject_client: str
    on_behalf_of: str
    activity: str
    sub: str
    act: dict[str, Any] | None
    scope: str
    audience: tuple[str, ...]
    rule: str
    ends_at: datetime
    generation: int
    rotated_at: datetime
    revoked_at: datetime | None = None

    def repeated_by(self, later: "Family") -> bool:
        """Say whether the exchange that starts `later` asks again for what this unused family gives."""
        return (
            self.generation == 1
            and self.revoked_at is None
            and (self.client_id, self.scope, self.audience) == (later.client_id, later.scope, later.audience)
        )


def present(family: Family, generation: int, now: datetime) -> Family | None:
    """Return the family after one of its refresh tokens was presented; None if that token was spent.

    The newest refresh token gets a successor. The one before it gets the newest again, byte for byte: the
    answer to its first use was lost. An older one was stolen, or is used by two parties. One newer than the
    record was signed by Minter before the database was restored from a dump.
    """
    if generation >= family.generation:
        return structs.replace(family, generation=generation + 1, rotated_at=now)
    if generation == family.generation - 1 and now < family.rotated_at + GRACE:
        return family
    return None


def as_held(asked: Sequence[str], held: str) -> tuple[str, ...]:
    """Return requested scopes, with those that FTS sent unescaped replaced by the held scope that they mean.

    FTS puts the scopes of a token into a form as they are, so `+`, `&`, `%20` and UTF-8 arrive decoded once
    more. The replacement is a held scope, so it never widens the request.
    """
    words = held.split(" ")
    text = f" {' '.join(asked)} "
    for word in sorted(words, key=len, reverse=True):
        arrived = " ".join(unquote_plus(word.partition("&")[0]).split())
        if word not in asked and arrived not in words:
            text = text.replace(f" {arrived} ", f" {word} ")
    return tuple(text.split())


def act_depth(act: dict[str, Any] | None) -> int:
    """Return how many actors are nested in an `act` claim."""
    return 0 if act is None else 1 + act_depth(act.get("act"))
