"""Managed tokens: what a provider shall give, and what is kept of it, as values (design decision 10).

A managed token is recorded like a shared one: a row of its own, and a use for each file that it serves.
The use's id is the handle: a name, not a secret, by which the client, or a consumer that it named, gets
the access token of the moment. Equal wishes of one client are one managed token.
"""

from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct, structs

from minter.keys import HARD_MAX_SECONDS
from minter.plans import BACKDATE_SECONDS, FTS_QUEUE_SECONDS, Grant
from minter.providers import PATIENCE_SECONDS, Provider, lead_of
from minter.requests import Request
from minter.routes import Mode

LEAST_SECONDS = 120
"""A token with less life than this is of no use to anybody who waits for it."""
SHOWN_SECONDS = 60
"""A token with less life left than this is not handed out any more."""
MAX_TRIES = 4
"""How often something that a provider gives is rejected before that is final."""


class Wanted(Struct, frozen=True, kw_only=True):
    """A managed token as it is first recorded, or joined by one more use.

    `subject` is the token to exchange, empty for the client's stored one; `cap_seconds` is the longest life
    that one access token may have, `least_seconds` the shortest that is of use. It is kept fresh until
    `deadline`, first wanted at `needed_at` (see `providers.PATIENCE_SECONDS`).
    """

    jti: UUID
    client_id: int
    digest: bytes
    provider: str
    mode: Mode
    scope: str
    audience: tuple[str, ...]
    storage: str
    on_behalf_of: str
    activity: str
    fallback: tuple[str, ...]
    subject: str
    cap_seconds: int
    least_seconds: int
    deadline: datetime
    needed_at: datetime
    lead_seconds: int = PATIENCE_SECONDS
    uses: int = 1
    pushes: bool = False

    def __repr__(self) -> str:
        """Name it without the subject token."""
        return f"Wanted({self.jti}, {self.provider})"

    def joined(self, other: "Wanted") -> "Wanted":
        """Return this one with a use more."""
        return structs.replace(
            self,
            uses=self.uses + 1,
            pushes=self.pushes or other.pushes,
            deadline=max(self.deadline, other.deadline),
            least_seconds=max(self.least_seconds, other.least_seconds),
        )

    def payload(self, client: str) -> str:
        """Return what is recorded in place of claims: the words of the decision."""
        audience: Any = self.audience[0] if len(self.audience) == 1 else list(self.audience)
        told = {"provider": self.provider, "aud": audience, "scope": self.scope, "client_id": client}
        exp = int(self.deadline.timestamp())
        return msgspec.json.encode({**told, "iat": int(self.needed_at.timestamp()), "exp": exp}).decode()


class ManagedToken(Struct, frozen=True, kw_only=True):
    """What is kept of a managed token; `access` is encrypted, `scope` what it really holds."""

    jti: UUID
    state: str
    vo: str
    scope: str
    access: bytes | None
    expires_at: datetime | None
    error: dict[str, Any] | None

    def shows(self, now: datetime) -> bool:
        """Say whether it has an access token that may be handed out."""
        if self.access is None or self.expires_at is None:
            return False
        return self.expires_at - now > timedelta(seconds=SHOWN_SECONDS)


def wanted(grant: Grant, request: Request, client_id: int, jti: UUID, activity: str, now: datetime) -> Wanted:
    """Return what a grant of a provider's token wants; equal digests are one managed token."""
    route = grant.plan.route
    assert route is not None
    life = grant.lifetime
    subject = request.subject.token if request.subject is not None and route.mode == "exchange" else ""
    same = (
        client_id, route.provider, route.mode, grant.scope, grant.audience, request.on_behalf_of, activity,
        sha256(subject.encode()).hexdigest(), grant.plan.rule,
    )  # fmt: skip
    # From its coming, which takes a while, it shall last as long as one that we sign at once.
    keep = min(max(life.wanted, life.seconds), HARD_MAX_SECONDS) + PATIENCE_SECONDS - BACKDATE_SECONDS
    return Wanted(
        jti=jti,
        client_id=client_id,
        digest=sha256(msgspec.json.encode(same)).digest(),
        provider=route.provider,
        mode=route.mode,
        scope=grant.scope,
        audience=grant.audience,
        storage=grant.plan.area.storage,
        on_behalf_of=request.on_behalf_of,
        activity=activity,
        fallback=route.fallback,
        subject=subject,
        cap_seconds=grant.plan.cap_seconds,
        # FTS takes the token as it is: its queue can be cut to an hour, what comes after cannot.
        least_seconds=life.fixed + FTS_QUEUE_SECONDS if grant.need.one_token else LEAST_SECONDS,
        deadline=now + timedelta(seconds=keep),
        needed_at=now + timedelta(seconds=PATIENCE_SECONDS),
        pushes=request.reply_queue is not None,
    )


def next_need(
    expires_at: datetime, deadline: datetime, now: datetime, provider: Provider
) -> tuple[int | None, datetime | None]:
    """Return by how many seconds before which instant a token is to be refreshed; None if never.

    What lives until the deadline needs no other.
    """
    if expires_at >= deadline:
        return None, None
    life = int((expires_at - now).total_seconds())
    return lead_of(life, provider.outage_margin_seconds), expires_at
