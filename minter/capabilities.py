"""Decisions of the token endpoint: one token with the scopes and audiences that were asked for.

As everywhere: never wider than what was asked (I1), than the storages' areas, than the client's own
limits; here, what may not be granted is left out, and the `scope` of the answer says what is left. Where
nothing is, or a ban covers any of it, the request is refused. On another's token (exchange, refresh)
nothing beyond that token is granted.
"""

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from msgspec import structs

from minter import exchanges
from minter.clients import Bans, Client
from minter.dialects import DIALECTS, Needed, Operation
from minter.errors import (
    InvalidGrant,
    InvalidScope,
    InvalidTarget,
    RequestError,
    UnauthorizedClient,
)
from minter.exchanges import Exchange
from minter.plans import (
    BACKDATE_SECONDS,
    MAX_CLAIM_CHARACTERS,
    SEVERAL_STORAGES,
    Decision,
    Extra,
    Grant,
    Lifetime,
    Refused,
    Step,
    cap_of,
)
from minter.policy import Policy
from minter.requests import Need, Request
from minter.scopes import STORAGE_SCOPES, Scope, intersect, parse_scopes, path_contains
from minter.storages import Area
from minter.wishes import MAX_ACT_DEPTH, Family, Subject, Wish, act_depth, present

ANY = ("https://wlcg.cern.ch/jwt/v1/any",)
ANY_SECONDS = 3600
"""Longest token that every storage of the VO would take."""
MIN_LEFT_SECONDS = 60
MOST_KEPT = 4_096
"""Decisions of clients' own wishes that are kept: Rucio and FTS ask for the same again and again."""

_OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "storage.read": ("read",),
    "storage.create": ("write",),
    "storage.modify": ("overwrite", "delete"),
    "storage.stage": ("stage",),
    "storage.poll": ("poll",),
}
"""What a client must be allowed, one of them, to have a scope."""


class Held(NamedTuple):
    """What a token that is acted with holds: the most that may be granted on it, and for whom."""

    sub: str
    act: dict[str, Any] | None
    scope: str
    audience: tuple[str, ...]
    left_seconds: int
    rule: Exchange | None
    client: str
    on_behalf_of: str
    activity: str = ""


class Granted(NamedTuple):
    """A decision of the token endpoint, and the refresh family as it is after it, if it changes."""

    decision: Decision
    family: Family | None = None
    on_behalf_of: str = ""


def decide(
    policy: Policy,
    request: Request,
    client: Client,
    clients: Mapping[str, Client],
    bans: Bans,
    now: datetime,
    subjects: Mapping[uuid.UUID, Subject],
    families: Mapping[uuid.UUID, Family],
) -> Granted:
    """Decide one request of the token endpoint. Refusals are returned, not raised."""
    wish, family = request.wish, None
    assert wish is not None
    try:
        policy.admit(request, client, bans)
        held = None
        if wish.refresh is None and wish.subject is None:
            return _own(policy, client, bans, wish, request.on_behalf_of)
        if wish.refresh is not None:
            family, held = _refreshed(policy, wish, client, now, families)
        elif wish.subject is not None:
            family, held = _exchanged(policy, wish, client, now, subjects)
        if held is not None:
            _check_holder(held, client.vo, clients, bans)
        grant = _Decider(policy, client, bans, wish, held).grant()
    except _Reused as reuse:
        refused = Refused(None, reuse.error)
        return Granted(Decision([], [refused], reuse.error), reuse.family)
    except RequestError as error:
        return Granted(Decision([], [Refused(None, error)], error))
    if family is not None and wish.refresh is None:
        family = structs.replace(family, scope=grant.scope, audience=grant.audience)
    return Granted(Decision([grant], []), family, held.on_behalf_of if held else request.on_behalf_of)


def _own(policy: Policy, client: Client, bans: Bans, wish: Wish, on_behalf_of: str) -> Granted:
    """Decide on the client's own behalf: nothing but its arguments matters, so equal ones are decided once.

    Clients and bans are other objects after each change of the control tables.
    """
    key = (client, bans, wish.scope, wish.audience)
    grant = policy.own_grants.get(key)
    if grant is None:
        grant = _Decider(policy, client, bans, wish, None).grant()
        if len(policy.own_grants) >= MOST_KEPT:
            policy.own_grants.clear()
        policy.own_grants[key] = grant
    return Granted(Decision([grant], []), None, on_behalf_of)


# ── on another's token ───────────────────────────────────────────────────────────────────────


def _check_holder(held: Held, vo: str, clients: Mapping[str, Client], bans: Bans) -> None:
    """Raise Banned or InvalidGrant if the client whose token it is may have none itself any more (I9)."""
    bans.check(vo, client=held.client, on_behalf_of=held.on_behalf_of, activity=held.activity)
    holder = clients.get(held.client)
    if holder is None or holder.disabled:
        raise InvalidGrant(f"client {held.client!r}, whose token it is, is disabled")


class _Reused(Exception):
    def __init__(self, error: RequestError, family: Family) -> None:
        super().__init__(error.message)
        self.error = error
        self.family = family


def _exchanged(
    policy: Policy, wish: Wish, client: Client, now: datetime, subjects: Mapping[uuid.UUID, Subject]
) -> tuple[Family | None, Held]:
    assert wish.subject is not None
    jti, payload = wish.subject
    subject = subjects.get(jti)
    if subject is None or subject.payload != payload:
        raise InvalidGrant("the subject token is not on record here, or its retention is over")
    left = int((subject.expires_at - now).total_seconds())
    if left < MIN_LEFT_SECONDS or subject.key_state == "revoked":
        raise InvalidGrant(f"the subject token lives {max(left, 0)} s more, or its key was revoked")
    if subject.state == "cancelled":
        raise InvalidGrant("the subject token was cancelled")
    rule = exchanges.find(policy.exchanges, client.vo, client.name, subject.client, offline=wish.offline)
    if rule is None:
        raise UnauthorizedClient(
            f"no exchange rule lets client {client.name!r} act with tokens of client {subject.client!r}"
            + (" and refresh them" if wish.offline else "")
        )
    claims = json.loads(subject.payload)
    act = {"sub": client.sub, **({"act": claims["act"]} if "act" in claims else {})}
    if act_depth(act) > MAX_ACT_DEPTH:
        raise InvalidGrant(f"the subject token was exchanged {MAX_ACT_DEPTH} times already")
    # A token of a transfer lives as long as that may take; others say nothing of the transfer.
    limit = now + timedelta(seconds=rule.max_refresh_seconds)
    ends_at = limit if subject.kind in ("token", "refresh", "exchange") else min(limit, subject.expires_at)
    audience = _audience_of(claims)
    held = Held(
        claims["sub"], act, str(claims["scope"]), audience, int((ends_at - now).total_seconds()), rule,
        subject.client, subject.on_behalf_of, subject.activity,
    )  # fmt: skip
    if not wish.offline:
        return None, held._replace(left_seconds=left)
    family = Family(
        family_id=uuid.UUID(int=jti.int ^ uuid.uuid4().int),
        client_id=client.client_id,
        subject_jti=jti,
        subject_client=subject.client,
        on_behalf_of=subject.on_behalf_of,
        sub=held.sub,
        act=act,
        scope=held.scope,
        audience=audience,
        rule=rule.name,
        ends_at=ends_at.replace(microsecond=0),
        generation=1,
        rotated_at=now.replace(microsecond=0),
    )
    return family, held


def _refreshed(
    policy: Policy, wish: Wish, client: Client, now: datetime, families: Mapping[uuid.UUID, Family]
) -> tuple[Family, Held]:
    assert wish.refresh is not None
    family_id, generation = wish.refresh
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
        raise _Reused(error, structs.replace(family, revoked_at=now))
    rule = next((r for r in policy.exchanges if r.name == family.rule and r.offline_access), None)
    if rule is None:
        raise UnauthorizedClient(f"exchange rule {family.rule!r} does not allow refreshing any more")
    held = Held(
        family.sub, family.act, family.scope, family.audience, left, None, family.subject_client,
        family.on_behalf_of,
    )  # fmt: skip
    return after, held


def _audience_of(claims: Mapping[str, Any]) -> tuple[str, ...]:
    audience = claims["aud"]
    return (audience,) if isinstance(audience, str) else tuple(audience)


# ── scopes and audiences ─────────────────────────────────────────────────────────────────────


class _Decider:
    """One decision; it gathers the steps that led to it and the shortest of the lifetimes allowed."""

    def __init__(self, policy: Policy, client: Client, bans: Bans, wish: Wish, held: Held | None) -> None:
        self.policy = policy
        self.client = client
        self.bans = bans
        self.held = held
        self.wanted = wish.scope or tuple(held.scope.split(" ") if held else ())
        self.audience = self._audience(wish.audience)
        self.is_any = any(a in ANY for a in self.audience)
        self.areas_of = self._areas()
        self.steps: list[Step] = []
        self.cap = policy.token_lifetime_seconds
        self.cap_rule = "token endpoint"
        self.operations: set[Operation] = set()
        self.storages: dict[str, Area] = {}
        self.path = ""

    def grant(self) -> Grant:
        """Return what is granted; raises a RequestError if that is nothing."""
        limit = parse_scopes(self.held.scope) if self.held else None
        words: list[str] = []
        groups: list[str] = []
        for word in dict.fromkeys(self.wanted):
            scope = Scope.parse(word)
            if scope.name in STORAGE_SCOPES:
                words += self._on_storage(word, scope, limit)
            elif scope.name == "wlcg.groups" or word.startswith("wlcg.groups:"):
                groups += self._groups(word)
            elif self._other(word, limit):
                words.append(word)
        has_storage = any(Scope.parse(w).name in STORAGE_SCOPES for w in words)
        if groups and has_storage:
            self.steps.append(Step("profile", "leaves out wlcg.groups, ignored beside storage scopes"))
            groups = []
        if groups:
            words.append("wlcg.groups")
        words = list(dict.fromkeys(words))
        if not [w for w in words if w != "offline_access"]:
            raise InvalidScope(
                f"nothing of scope {' '.join(self.wanted)[:200]!r} may be granted to client "
                f"{self.client.name!r} for {' '.join(self.audience)[:200]!r}"
            )
        if self.is_any and has_storage:
            self._limit(ANY_SECONDS, "audience any", "every storage of the VO takes it")
        return self._made(" ".join(words), tuple(dict.fromkeys(groups)))

    def _made(self, scope: str, groups: tuple[str, ...]) -> Grant:
        if len(scope) > MAX_CLAIM_CHARACTERS or len(" ".join(self.audience)) > MAX_CLAIM_CHARACTERS:
            raise InvalidScope(
                f"scope or audience is longer than {MAX_CLAIM_CHARACTERS} characters; ask for less at once"
            )
        if self.client.max_lifetime_seconds is not None:
            self._limit(self.client.max_lifetime_seconds, f"client {self.client.name}", "its own limit")
        area = self._area()
        plan = self.policy.plan_of_steps(
            area, tuple(sorted(self.operations)), self.cap, self.cap_rule, tuple(dict.fromkeys(self.steps))
        )
        seconds = self.cap
        if self.held is not None:
            seconds = min(seconds, self.held.left_seconds + BACKDATE_SECONDS)
        sub, act = (self.held.sub, self.held.act) if self.held else (self.client.sub, None)
        return Grant(
            Need(-1, "service", 0, "", plan.operations), plan, self.path, scope,
            Lifetime(seconds, self.cap, BACKDATE_SECONDS), "", extra=Extra(sub, groups, act),
        )  # fmt: skip

    # ── audiences ────────────────────────────────────────────────────────────────────────────

    def _audience(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        if self.held is not None:
            if outside := [a for a in asked if a not in self.held.audience]:
                raise InvalidTarget(f"audience {outside[0][:200]!r} is not the subject token's")
            return asked or self.held.audience
        audience = asked or self.client.default_audience
        if not audience:
            raise InvalidTarget(
                f"no audience: name one, or set a default for client {self.client.name!r} with: "
                "minter clients change --default-audience"
            )
        return tuple(dict.fromkeys(audience))

    def _areas(self) -> list[list[Area]]:
        """Return the areas that each audience stands for; raises InvalidTarget for one of nobody."""
        directory, found = self.policy.directories[self.client.vo], []
        for audience in self.audience:
            areas = directory.areas() if audience in ANY else directory.at(audience)
            usable = [area for area in areas if area.tokens]
            if audience in ANY:  # no pattern says so by accident
                known = audience in self.client.audiences
            else:
                listed = any(fnmatchcase(audience, pattern) for pattern in self.client.audiences)
                known = bool(areas) or self._fts(audience) or listed
            if not (known or self.held):
                raise InvalidTarget(
                    f"audience {audience[:200]!r} is of no storage or FTS here, and not listed for client "
                    f"{self.client.name!r}"
                )
            if areas:
                found.append(usable)
        return found

    def _fts(self, audience: str) -> bool:
        services = self.policy.fts[self.client.vo]
        host = (urlsplit(audience).hostname or "") if "//" in audience else audience.partition(":")[0]
        return host.lower() in services or any(audience in p.area.audience for p in services.values())

    def _area(self) -> Area:
        """Return what stands for the storages in the record: the one, or a name for none and several."""
        names = sorted(self.storages)
        self.steps.append(Step("audience", f"of {', '.join(names) or 'no storage'}"))
        one = next(iter(self.storages.values())) if len(names) == 1 else None
        return Area(
            self.client.vo, one.storage if one else SEVERAL_STORAGES, "/", "/", self.audience,
            one.dialect if one else DIALECTS["profile"], one.matching if one else "exact", False, True,
        )  # fmt: skip

    # ── scopes ───────────────────────────────────────────────────────────────────────────────

    def _on_storage(self, word: str, scope: Scope, limit: Iterable[Scope] | None) -> list[str]:
        """Return the words of one storage scope: as it was written, or what is left of it."""
        assert scope.path is not None
        rule = self.held.rule if self.held is not None else None
        if rule is not None and not exchanges.allows(rule, scope.name):
            self.steps.append(Step(f"exchange {rule.name}", f"leaves out {scope.name}"))
            return []
        paths = [scope.path] if self.areas_of else []
        for areas in self.areas_of:  # a token is good at each of its audiences, so each must have the path
            paths = [
                path
                for area in areas
                if (met := self._meet(paths, [area.top])) and self._allowed_on(area, scope.name)
                for path in met
            ]
        if self.client.paths:
            paths = self._meet(paths, self.client.paths)
        narrowest = [
            Scope(scope.name, p)
            for p in dict.fromkeys(paths)
            if not any(q != p and path_contains(q, p) for q in paths)
        ]
        if limit is not None:
            narrowest = sorted(intersect(narrowest, limit))  # DIRAC asks for all that it is configured with
        for one in narrowest:
            self.bans.check_path(self.client.vo, one.path or "/")
        if narrowest and not self.path:
            self.path = narrowest[0].path or "/"
        # oauthlib warns of a scope that is not spelt as it was asked for; a directory's slash may stay.
        if len(narrowest) == 1 and word in (str(narrowest[0]), f"{narrowest[0]}/"):
            return [word]
        return sorted(map(str, narrowest))

    @staticmethod
    def _meet(left: Sequence[str], right: Sequence[str]) -> list[str]:
        inside = [a for a in left for b in right if path_contains(b, a)]
        return inside + [b for a in left for b in right if path_contains(a, b) and a != b]

    def _allowed_on(self, area: Area, name: str) -> bool:
        """Say whether a route, and the client's own limits, allow a scope on an area; note its lifetime."""
        if self.held is not None:  # a route allowed it when the token was made
            self.bans.check(self.client.vo, storage=area.storage)
            self.storages[area.storage] = area
            return True
        operations = [
            o for o in _OPERATIONS[name] if not self.client.operations or o in self.client.operations
        ]
        for operation in operations:
            need = Need(-1, "operation", 0, "", (operation,))
            route = self.policy.route_of(self.client, "", False, area, need)
            if route is not None:
                self.bans.check(self.client.vo, storage=area.storage)
                cap, rule, why = cap_of(route, self.client, False, area, [Needed(name)], "directory")
                self._limit(cap, rule, why)
                self.steps.append(Step(f"route {route.name}", f"{name} on {area.storage}, {operation}"))
                self.operations.add(operation)
                self.storages[area.storage] = area
                return True
        self.steps.append(Step("operations", f"{name} is not allowed to the client on {area.storage}"))
        return False

    def _groups(self, word: str) -> list[str]:
        if self.held is not None:
            return []  # groups are the client's own, never another's
        _, colon, group = word.partition(":")
        return [g for g in self.client.groups if not colon or g == group]

    def _other(self, word: str, limit: Iterable[Scope] | None) -> bool:
        if word == "offline_access":  # Rucio and FTS ask for it: it stands in the scope, and grants nothing
            return True
        if limit is not None:
            rule = self.held.rule if self.held else None
            return any(str(s) == word for s in limit) and (rule is None or exchanges.allows(rule, word))
        listed = any(fnmatchcase(word, pattern) for pattern in self.client.scopes)
        return listed or (word == "fts" and any(map(self._fts, self.audience)))

    def _limit(self, cap: int, rule: str, why: str) -> None:
        if cap < self.cap:
            self.cap, self.cap_rule = cap, rule
            self.steps.append(Step(rule, f"at most {cap} s: {why}"))
