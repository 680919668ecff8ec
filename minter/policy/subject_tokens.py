"""Decisions on subject and refresh tokens: the most that an exchange or a refresh may grant.

An exchange (RFC 8693) or a refresh (RFC 6749 §6) grants nothing beyond the token that it presents.
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
    """The authority of a subject or refresh token: the most that may be granted on it, and its subject.

    For a provider's token `audience` is empty: the token is meant for Minter itself, and no route has
    allowed its scopes yet.
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
        """Whether Minter signed the token, and so decided its scopes and audience."""
        return bool(self.audience)


# ── subject and refresh tokens ───────────────────────────────────────────────────────────────


def check_holder(
    authority: SubjectAuthority, vo: str, clients: Mapping[str, Client], bans: Bans
) -> Client | None:
    """Return the client that holds the token, None if a provider's client does.

    Raises Banned or InvalidGrant if the holder may no longer have tokens (I9).
    """
    bans.check(vo, client=authority.client, on_behalf_of=authority.on_behalf_of, activity=authority.activity)
    if not authority.ours:
        return None
    holder = clients.get(authority.client)
    if holder is None or holder.disabled:
        raise InvalidGrant(f"client {authority.client!r}, the holder of the token, is disabled")
    return holder


class RefreshReused(Exception):
    """A spent refresh token was presented again; `family` must be saved as revoked."""

    def __init__(self, error: RequestError, family: Family) -> None:
        super().__init__(error.message)
        self.error = error
        self.family = family


def _presented(subject: Subject | None, payload: str, now: datetime) -> tuple[Subject, int]:
    """Return a subject token that may be exchanged, and the seconds that it lives; raises InvalidGrant."""
    if subject is None or subject.payload != payload:
        raise InvalidGrant("the subject token is not on record here, or its retention is over")
    if subject.shared:
        raise InvalidGrant("the subject token is shared by several files; exchange a token of one file")
    _check_subject(subject)
    left = int((subject.expires_at - now).total_seconds())
    if left < MIN_LEFT_SECONDS:
        raise InvalidGrant(f"the subject token lives {max(left, 0)} s more")
    return subject, left


def on_subject_token(
    policy: Policy,
    token_request: TokenRequest,
    client: Client,
    now: datetime,
    subjects: Mapping[uuid.UUID, Subject],
) -> tuple[Family | None, SubjectAuthority]:
    """Return the family that an exchange of Minter's own token starts, and its authority (RFC 8693 §2.1)."""
    assert token_request.subject is not None
    jti, payload = token_request.subject
    subject, left = _presented(subjects.get(jti), payload, now)
    rule = exchanges.find(
        policy.exchanges, client.vo, client.name, subject.client, offline=token_request.offline
    )
    if rule is None:
        raise UnauthorizedClient(
            f"no exchange rule lets client {client.name!r} act with tokens of client {subject.client!r}"
            + (" and refresh them" if token_request.offline else "")
        )
    claims = json.loads(subject.payload)
    act = _actors(client, claims)
    # A transfer's token lives as long as the transfer may take, and tokens exchanged for it live no longer.
    # The lifetime of a token that a client requested for itself says nothing about a transfer.
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


def _actors(client: Client, claims: Mapping[str, Any]) -> dict[str, Any]:
    """Return `act` of the new token: the client, then who acted before (RFC 8693 §4.1)."""
    act = {"sub": client.sub, **({"act": claims["act"]} if "act" in claims else {})}
    if act_depth(act) > MAX_ACT_DEPTH:
        raise InvalidGrant(f"the subject token was exchanged {MAX_ACT_DEPTH} times already")
    return act


def on_foreign_token(
    policy: Policy,
    subject: SubjectToken,
    client: Client,
    now: datetime,
    *,
    offline: bool,
) -> SubjectAuthority:
    """Return the authority of a provider's token; its `sub` is prefixed with the provider's name."""
    if offline:
        raise InvalidGrant("refresh tokens are given on Minter's tokens only; ask without offline_access")
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
    # The prefix keeps a provider's `sub` apart from an equal `sub` of a client of Minter.
    sub = f"{subject.provider}:{subject.sub}"
    if not _SUB(sub):
        raise InvalidGrant("the subject token's sub is longer than 255 characters, or not of ASCII")
    act: dict[str, Any] = {"sub": client.sub}
    if subject.act is not None:
        act["act"] = _prefixed(subject.act, subject.provider)
    if act_depth(act) > MAX_ACT_DEPTH:
        raise InvalidGrant(f"the subject token was exchanged {MAX_ACT_DEPTH} times already")
    return SubjectAuthority(sub, act, subject.scope, (), left, rule, "", sub, "")


def _prefixed(act: Mapping[str, Any], provider: str) -> dict[str, Any]:
    """Return a provider's actors with the provider's name before each `sub`, as for the subject itself."""
    below = {"act": _prefixed(act["act"], provider)} if "act" in act else {}
    return {"sub": f"{provider}:{act['sub']}", **below}


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
    """Return the family after the use of this refresh token, and the token's authority (RFC 6749 §6).

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
    if family.subject_jti in subjects:  # missing if its day was archived
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
