"""Managed tokens: what a provider is asked for, and what is stored of its answers, as values (ADR 12).

A managed token is recorded like a shared one: a row of its own, and a use for each file that it serves.
The id of a use is its handle. A handle is a name, not a secret: by it the client, or a consumer that the
client named, gets the current access token. Equal requests of one client share one managed token.
"""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Protocol
from uuid import UUID

import msgspec
from msgspec import Struct, structs

from minter.errors import Banned, MinterError, OperationNotAllowed, PathNotAllowed, UnknownClient
from minter.policy.clients import Bans, Client
from minter.policy.limits import BACKDATE_SECONDS, FTS_QUEUE_SECONDS, HARD_MAX_SECONDS
from minter.policy.plans import PlannedToken
from minter.policy.requests import SEVERAL, Request
from minter.policy.routes import Mode
from minter.providers.dialects import PATIENCE_SECONDS, Provider, lead_of
from minter.scopes import Scope, parse_scopes
from minter.storages.dialects import Matching

LEAST_SECONDS = 120
"""Shortest life, in seconds, of a provider's token that is of use to its client."""
SHOWN_SECONDS = 60
"""A managed token with less life left than this, in seconds, is no longer handed out."""


class Wanted(Struct, frozen=True, kw_only=True):
    """A managed token to be recorded, or to be added as one more use of an equal managed token.

    `subject` is the subject token to exchange, empty for the client's stored one. `cap_seconds` is the
    longest life that one access token may have, `least_seconds` the shortest that is of use. The token is
    kept fresh until `deadline`; its first access token is needed at `needed_at` (see `PATIENCE_SECONDS`).
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
        """Name the managed token without its subject token."""
        return f"Wanted({self.jti}, {self.provider})"

    def joined(self, other: "Wanted") -> "Wanted":
        """Return this managed token with one more use, that of `other`."""
        return structs.replace(
            self,
            uses=self.uses + 1,
            pushes=self.pushes or other.pushes,
            deadline=max(self.deadline, other.deadline),
            least_seconds=max(self.least_seconds, other.least_seconds),
        )

    def payload(self, client: str) -> str:
        """Return the JSON text that is recorded in place of claims: what was decided."""
        audience: Any = self.audience[0] if len(self.audience) == 1 else list(self.audience)
        told = {"provider": self.provider, "aud": audience, "scope": self.scope, "client_id": client}
        exp = int(self.deadline.timestamp())
        return msgspec.json.encode({**told, "iat": int(self.needed_at.timestamp()), "exp": exp}).decode()


class ManagedToken(Struct, frozen=True, kw_only=True):
    """The stored state of a managed token; `access` is encrypted, `scope` is what the provider granted."""

    jti: UUID
    state: str
    vo: str
    scope: str
    access: bytes | None
    expires_at: datetime | None
    error: dict[str, Any] | None
    deadline: datetime

    def shows(self, now: datetime) -> bool:
        """Return whether an access token is stored that may be handed out: it outlives SHOWN_SECONDS."""
        if self.access is None or self.expires_at is None:
            return False
        return self.expires_at - now > timedelta(seconds=SHOWN_SECONDS)


def wanted(
    planned: PlannedToken, request: Request, client: Client, jti: UUID, activity: str, now: datetime
) -> Wanted:
    """Return the managed token for a planned token of a provider; equal digests are one managed token.

    The digest contains the day (UTC), so a managed token has uses of one day only, and is archived with them.
    """
    route = planned.plan.route
    assert route is not None
    life = planned.lifetime
    subject = request.subject.token if request.subject is not None and route.mode == "exchange" else ""
    stored = (client.subject_provider, client.subject_until) if route.mode == "exchange" else ()
    cap = min(planned.plan.cap_seconds, request.lifetime_seconds or planned.plan.cap_seconds)
    # FTS cannot replace the token: its queue time can be cut to one hour, the time after it cannot.
    least = life.fixed + life.staging_seconds + FTS_QUEUE_SECONDS if planned.need.one_token else LEAST_SECONDS
    same = (
        client.client_id, route.provider, route.mode, planned.scope, planned.audience,
        planned.plan.area.storage, request.on_behalf_of, activity, sha256(subject.encode()).hexdigest(),
        stored, planned.plan.rule, cap, least // 3600, int(now.timestamp()) // 86_400,
    )  # fmt: skip
    # A provider's token arrives later than one signed here, and must last as long from then on.
    seconds = min(max(life.wanted, life.seconds), HARD_MAX_SECONDS) + PATIENCE_SECONDS - BACKDATE_SECONDS
    return Wanted(
        jti=jti,
        client_id=client.client_id,
        digest=sha256(msgspec.json.encode(same)).digest(),
        provider=route.provider,
        mode=route.mode,
        scope=planned.scope,
        audience=planned.audience,
        storage=planned.plan.area.storage,
        on_behalf_of=request.on_behalf_of,
        activity=activity,
        fallback=route.fallback,
        subject=subject,
        cap_seconds=cap,
        least_seconds=least,
        deadline=now + timedelta(seconds=seconds),
        needed_at=now + timedelta(seconds=PATIENCE_SECONDS),
        pushes=request.reply_queue is not None,
    )


_WRITING = frozenset({"write", "overwrite", "retry", "delete", "make_parents"})
"""Operations for which a token may write."""


class Whose(Protocol):
    """The owner and the purpose of a managed token, to which bans apply."""

    @property
    def vo(self) -> str:
        """The VO."""
        ...

    @property
    def client(self) -> str:
        """Name of the client."""
        ...

    @property
    def on_behalf_of(self) -> str:
        """Account the client acts for."""
        ...

    @property
    def activity(self) -> str:
        """Activity of the request."""
        ...

    @property
    def storage(self) -> str:
        """Storage that the token is for."""
        ...

    @property
    def scope(self) -> str:
        """Scope that the token may have."""
        ...


def forbidden(
    token: Whose,
    clients: Mapping[str, Client],
    bans: Bans,
    matching_of: Callable[[str, str], Matching],
) -> MinterError | None:
    """Return the error that forbids to keep or hand out a token, None if it is allowed (I9).

    Besides bans, the client's present limits apply: its prefixes, and whether it may write at all.
    """
    client = clients.get(token.client)
    if client is None or client.disabled:
        return UnknownClient(f"client {token.client!r} is disabled")
    try:
        bans.check(
            token.vo, vo=token.vo, client=token.client, on_behalf_of=token.on_behalf_of,
            activity=token.activity, storage=token.storage,
        )  # fmt: skip
        matching = matching_of(token.vo, token.storage)
        for scope in parse_scopes(token.scope):
            if scope.path is not None:
                bans.check_path(token.vo, scope.path, matching)
                _check_limits(client, scope, matching)
    except (Banned, OperationNotAllowed, PathNotAllowed) as error:
        return error
    if token.activity == SEVERAL and bans.has("activity", token.vo):
        return Banned(
            "an activity of this VO is banned, and the request has several activities", kind="activity"
        )
    return None


def _check_limits(client: Client, scope: Scope, matching: Matching) -> None:
    if not client.may_reach(scope.path or "/", matching):
        raise PathNotAllowed(f"path {scope.path!r} is outside the prefixes of client {client.name!r} by now")
    writes = scope.name in ("storage.create", "storage.modify")
    if writes and client.operations and client.operations.isdisjoint(_WRITING):
        raise OperationNotAllowed(f"client {client.name!r} may not write by now")


def next_need(
    expires_at: datetime, deadline: datetime, now: datetime, provider: Provider
) -> tuple[int | None, datetime | None]:
    """Return a token's lead in seconds and its expiry: it is to be refreshed this lead before the expiry.

    Both are None for a token that lives until its deadline, because it needs no refresh.
    """
    if expires_at >= deadline:
        return None, None
    life = int((expires_at - now).total_seconds())
    return lead_of(life, provider.outage_margin_seconds), expires_at
