"""What the token endpoint is asked for, as values: scopes, audiences, and on whose token.

RFC 6749 §4.4 and §6, RFC 8693 §2.1. A refresh token is one of a family, which descends from one
exchange. `present` is the rule of WLCG 1.3 §4.3.2: the newest works, and the one before it until the
newest was used, for a day at most.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec import Struct, structs

from minter.policy.limits import GRACE


class SubjectToken(Struct, frozen=True):
    """A provider's token to act with (RFC 8693 §2.1); `provider` is there once it was verified.

    `client` is who asked the provider for it, by its `client_id` or `azp`.
    """

    token: str
    provider: str = ""
    scope: str = ""
    expires_at: int = 0
    sub: str = ""
    client: str = ""

    def __repr__(self) -> str:
        """Name the provider, never show the token."""
        return f"SubjectToken({self.provider})"


class TokenRequest(Struct, frozen=True, kw_only=True):
    """What a token is wanted for; an empty scope or audience means what its default or subject has.

    `subject` is the jti of one of our tokens and its payload, `refresh` the family and generation of a
    refresh token, `foreign` a provider's token; all were verified. `offline` says whether a refresh token
    is wanted.
    """

    scope: tuple[str, ...] = ()
    audience: tuple[str, ...] = ()
    offline: bool = False
    subject: tuple[UUID, str] | None = None
    refresh: tuple[UUID, int] | None = None
    foreign: SubjectToken | None = None


class Subject(Struct, frozen=True, kw_only=True):
    """A token of ours that somebody else may act with, as recorded."""

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
        """Whether it was cancelled, or its key revoked."""
        return self.state == "cancelled" or self.key_state == "revoked"


class Family(Struct, frozen=True, kw_only=True):
    """The refresh tokens of one exchange; `generation` is the newest given out, at `rotated_at`."""

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


def present(family: Family, generation: int, now: datetime) -> Family | None:
    """Return the family after one of its refresh tokens came; None if that one was spent.

    The newest one is followed by another. The one before it gets the newest again, the same bytes: its
    answer was lost. Anything older can only be in the wrong hands, or in two. A newer one than is known
    was signed by us before the database was restored from a dump.
    """
    if generation >= family.generation:
        return structs.replace(family, generation=generation + 1, rotated_at=now)
    if generation == family.generation - 1 and now < family.rotated_at + GRACE:
        return family
    return None


def act_depth(act: dict[str, Any] | None) -> int:
    """Return how many actors are named in an `act` claim, one in the other."""
    return 0 if act is None else 1 + act_depth(act.get("act"))
