"""Decisions on another's token: what an exchange or a refresh may grant at most, and for whom.

On a subject token (RFC 8693) or a refresh token (RFC 6749 §6) nothing beyond that token is granted.
"""

import json
import re
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from msgspec import structs

from minter.errors import (
    InvalidGrant,
    RequestError,
    UnauthorizedClient,
)
from minter.policy import exchanges
from minter.policy.clients import Bans, Client
from minter.policy.exchanges import Exchange
from minter.policy.limits import (
    MAX_ACT_DEPTH,
    MIN_LEFT_SECONDS,
)
from minter.policy.token_requests import Family, Subject, SubjectToken, TokenRequest, act_depth, present
from minter.policy.transfers import Policy

_SUB = re.compile(r"[ -~]{1,255}").fullmatch


class SubjectAuthority(NamedTuple):
    """What a token that is acted with holds: the most that may be granted on it, and for whom.

    A provider's has no `audience` that counts here, for it is meant for us, and no route has allowed it yet.
    """

    sub: str
    act: dict[str, Any] | None
    scope: str
    audience: tuple[str, ...]
    left_seconds: int
    rule: Exchange
    client: str
    on_behalf_of: str
    activity: str

    @property
    def ours(self) -> bool:
        """Whether we signed it, and so decided what it holds."""
        return bool(self.audience)


# ── on another's token ───────────────────────────────────────────────────────────────────────


def check_holder(authority: SubjectAuthority, vo: str, clients: Mapping[str, Client], bans: Bans) -> None:
    """Raise Banned or InvalidGrant if the client whose token it is may have none itself any more (I9)."""
    bans.check(vo, client=authority.client, on_behalf_of=authority.on_behalf_of, activity=authority.activity)
    if not authority.ours:
        return  # a provider's client
    holder = clients.get(authority.client)
    if holder is None or holder.disabled:
        raise InvalidGrant(f"client {authority.client!r}, whose token it is, is disabled")


class RefreshReused(Exception):
    """A refresh token that was spent came again: `family` is to be saved as revoked."""

    def __init__(self, error: RequestError, family: Family) -> None:
        super().__init__(error.message)
        self.error = error
        self.family = family


def on_subject_token(
    policy: Policy,
    token_request: TokenRequest,
    client: Client,
    now: datetime,
    subjects: Mapping[uuid.UUID, Subject],
) -> tuple[Family | None, SubjectAuthority]:
    """Return what an exchange of our own token may grant, and the family it starts (RFC 8693 §2.1)."""
    assert token_request.subject is not None
    jti, payload = token_request.subject
    subject = subjects.get(jti)
    if subject is None or subject.payload != payload:
        raise InvalidGrant("the subject token is not on record here, or its retention is over")
    if subject.shared:
        raise InvalidGrant("the subject token is shared by several files, whoever they are for; use its own")
    _check_subject(subject)
    left = int((subject.expires_at - now).total_seconds())
    if left < MIN_LEFT_SECONDS:
        raise InvalidGrant(f"the subject token lives {max(left, 0)} s more")
    rule = exchanges.find(
        policy.exchanges, client.vo, client.name, subject.client, offline=token_request.offline
    )
    if rule is None:
        raise UnauthorizedClient(
            f"no exchange rule lets client {client.name!r} act with tokens of client {subject.client!r}"
            + (" and refresh them" if token_request.offline else "")
        )
    claims = json.loads(subject.payload)
    act = {"sub": client.sub, **({"act": claims["act"]} if "act" in claims else {})}
    if act_depth(act) > MAX_ACT_DEPTH:
        raise InvalidGrant(f"the subject token was exchanged {MAX_ACT_DEPTH} times already")
    # A token of a transfer lives as long as that may take, and what was exchanged for it no longer;
    # one that a client got for itself says nothing of the transfer.
    limit = now + timedelta(seconds=rule.max_refresh_seconds)
    ends_at = limit if subject.kind == "token" else min(limit, subject.expires_at)
    audience = _audience_of(claims)
    authority = SubjectAuthority(
        claims["sub"], act, str(claims["scope"]), audience, int((ends_at - now).total_seconds()), rule,
        subject.client, subject.on_behalf_of, subject.activity,
    )  # fmt: skip
    if not token_request.offline:
        return None, authority._replace(left_seconds=left)
    family = Family(
        family_id=uuid.UUID(int=jti.int ^ uuid.uuid4().int),
        client_id=client.client_id,
        subject_jti=jti,
        subject_client=subject.client,
        on_behalf_of=subject.on_behalf_of,
        activity=subject.activity,
        sub=authority.sub,
        act=act,
        scope=authority.scope,
        audience=audience,
        rule=rule.name,
        ends_at=ends_at.replace(microsecond=0),
        generation=1,
        rotated_at=now.replace(microsecond=0),
    )
    return family, authority


def on_foreign_token(
    policy: Policy,
    subject: SubjectToken,
    client: Client,
    now: datetime,
    *,
    offline: bool,
) -> SubjectAuthority:
    """Return what a provider's token holds; its `sub` gets the provider's name before it."""
    if offline:
        raise InvalidGrant("refresh tokens are given on our own tokens only; ask without offline_access")
    left = int(subject.expires_at - now.timestamp())
    if left < MIN_LEFT_SECONDS:
        raise InvalidGrant(f"the subject token lives {max(left, 0)} s more")
    whose = subject.client or subject.sub
    rule = exchanges.find(
        policy.exchanges, client.vo, client.name, whose, offline=False, provider=subject.provider
    )
    if rule is None:
        raise UnauthorizedClient(
            f"no exchange rule lets client {client.name!r} act with tokens of client {whose[:100]!r} of "
            f"provider {subject.provider!r}"
        )
    # Their names are not ours: a `sub` of theirs may be that of a client here.
    sub = f"{subject.provider}:{subject.sub}"
    if not _SUB(sub):
        raise InvalidGrant("the subject token's sub is longer than 255 characters, or not of ASCII")
    return SubjectAuthority(sub, {"sub": client.sub}, subject.scope, (), left, rule, "", sub, "")


def _check_subject(subject: Subject) -> None:
    if subject.ended:
        raise InvalidGrant("the subject token was cancelled, or its key revoked")


def on_refresh_token(
    policy: Policy,
    token_request: TokenRequest,
    client: Client,
    now: datetime,
    subjects: Mapping[uuid.UUID, Subject],
    families: Mapping[uuid.UUID, Family],
) -> tuple[Family, SubjectAuthority]:
    """Return the family after this refresh token, and what it may grant (RFC 6749 §6).

    Raises RefreshReused for a token that was spent before.
    """
    assert token_request.refresh is not None
    family_id, generation = token_request.refresh
    family = families.get(family_id)
    if family is None or family.client_id != client.client_id:
        raise InvalidGrant("the refresh token is not this client's, or its family has ended")
    if family.revoked_at is not None:
        raise InvalidGrant("the refresh token was revoked")
    left = int((family.ends_at - now).total_seconds())
    if left < MIN_LEFT_SECONDS:
        raise InvalidGrant("the refresh token has expired with the transfer that it was for")
    after = present(family, generation, now.replace(microsecond=0))
    if after is None:
        error = InvalidGrant("the refresh token was spent before; all that descend from it are revoked now")
        raise RefreshReused(error, structs.replace(family, revoked_at=now))
    if family.subject_jti in subjects:  # its day may be archived by now
        _check_subject(subjects[family.subject_jti])
    rule = exchanges.find(policy.exchanges, client.vo, client.name, family.subject_client, offline=True)
    if rule is None:
        raise UnauthorizedClient(
            f"no exchange rule lets client {client.name!r} refresh tokens of client "
            f"{family.subject_client!r} any more"
        )
    authority = SubjectAuthority(
        family.sub, family.act, family.scope, family.audience, left, rule, family.subject_client,
        family.on_behalf_of, family.activity,
    )  # fmt: skip
    return after, authority


def _audience_of(claims: Mapping[str, Any]) -> tuple[str, ...]:
    audience = claims["aud"]
    return (audience,) if isinstance(audience, str) else tuple(audience)
