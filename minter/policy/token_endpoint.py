"""Decisions of the token endpoint: one token with the requested scopes and audiences (ADR 11).

As in all decisions, the token is never wider than the request (I1), the storages' areas or the client's
own limits. Scopes that may not be granted are left out, and the `scope` of the answer lists the others. If
no scope is left, or a ban covers one of them, the request is refused. An exchange or a refresh grants
nothing beyond the token that it presents.
"""

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from msgspec import structs

from minter.contract.operations import OPERATIONS, Operation
from minter.errors import (
    InvalidScope,
    LifetimeNotAllowed,
    RequestError,
)
from minter.policy import exchanges
from minter.policy.audiences import Audience
from minter.policy.clients import Bans, Client, fits
from minter.policy.lifetimes import cap_of
from minter.policy.limits import (
    ANY_SECONDS,
    BACKDATE_SECONDS,
    MAX_CLAIM_CHARACTERS,
    MIN_LEFT_SECONDS,
)
from minter.policy.plans import SEVERAL_STORAGES, Decision, Extra, Lifetime, PlannedToken, Refused, Step
from minter.policy.requests import Need, Request
from minter.policy.subject_tokens import (
    RefreshReused,
    SubjectAuthority,
    check_holder,
    on_foreign_token,
    on_refresh_token,
    on_subject_token,
)
from minter.policy.token_requests import Family, Subject, TokenRequest, as_held
from minter.policy.transfers import Policy
from minter.scopes import STORAGE_SCOPES, Scope, intersect, parse_scopes, path_contains
from minter.storages.dialects import DIALECTS, Needed
from minter.storages.directory import Area
from minter.storages.matching import opens
from minter.storages.needed import scopes_needed

CACHE_SIZE = 4_096
"""Most cached decisions on clients' own behalf: Rucio and FTS send equal token requests again and again."""

_OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "storage.read": ("read",),
    "storage.create": ("write",),
    "storage.modify": ("overwrite", "delete"),
    "storage.stage": ("stage",),
    "storage.poll": ("poll",),
}
"""Operations of each scope; a client that is allowed one of them may have the scope."""


class EndpointDecision(NamedTuple):
    """A decision of the token endpoint, and the refresh family after the decision, if it changes."""

    decision: Decision
    family: Family | None = None
    on_behalf_of: str = ""
    activity: str = ""


def decide(
    policy: Policy,
    request: Request,
    client: Client,
    clients: Mapping[str, Client],
    bans: Bans,
    now: datetime,
    subjects: Mapping[uuid.UUID, Subject],
    families: Mapping[uuid.UUID, Family],
    exchanged: Mapping[uuid.UUID, Sequence[Family]] = MappingProxyType({}),
) -> EndpointDecision:
    """Decide one request of the token endpoint. Refusals are returned, not raised.

    `exchanged` has the unused families of the last minutes by their subject token.
    """
    token_request = request.token_request
    assert token_request is not None
    try:
        policy.admit(request, client, bans)
        family: Family | None
        if token_request.refresh is not None:
            family, authority = on_refresh_token(policy, token_request, client, now, subjects, families)
        elif token_request.foreign is not None:
            family, authority = (
                None,
                on_foreign_token(policy, token_request.foreign, client, now, offline=token_request.offline),
            )
        elif token_request.subject is not None:
            family, authority = on_subject_token(policy, token_request, client, now, subjects)
        else:
            return _own(policy, client, bans, token_request, request.on_behalf_of)
        holder = check_holder(authority, client.vo, clients, bans)
        planned = _Decider(policy, client, bans, token_request, authority, holder).planned()
    except RefreshReused as reuse:
        refused = Refused(None, reuse.error)
        return EndpointDecision(Decision([], [refused], reuse.error), reuse.family)
    except RequestError as error:
        return EndpointDecision(Decision([], [Refused(None, error)], error))
    if family is not None and token_request.refresh is None:
        family = structs.replace(family, scope=planned.scope, audience=planned.audience)
        # The answer to the first exchange may have been lost: its family serves the second one, too.
        family = next((f for f in exchanged.get(family.subject_jti, ()) if f.repeated_by(family)), family)
    return EndpointDecision(Decision([planned], []), family, authority.on_behalf_of, authority.activity)


def _own(
    policy: Policy, client: Client, bans: Bans, token_request: TokenRequest, on_behalf_of: str
) -> EndpointDecision:
    """Decide on the client's own behalf; equal requests are decided once, and the result is cached.

    After each change of the control tables, clients and bans are new objects, so no result is outdated.
    """
    key = (client, bans, token_request.scope, token_request.audience)
    planned = policy.own_planned_tokens.get(key)
    if planned is None:
        planned = _Decider(policy, client, bans, token_request, None).planned()
        if len(policy.own_planned_tokens) >= CACHE_SIZE:
            policy.own_planned_tokens.clear()
        policy.own_planned_tokens[key] = planned
    return EndpointDecision(Decision([planned], []), None, on_behalf_of)


# ── scopes and audiences ─────────────────────────────────────────────────────────────────────


class _Allowed(NamedTuple):
    """Permission for a scope on one area: the operation and route that allow it, and the lifetime cap."""

    area: Area
    operation: Operation | None = None
    route: str = ""
    cap: tuple[int, str, str] | None = None


class _Decider:
    """One decision: find the requested scopes that may be granted, then plan the token with them."""

    def __init__(
        self,
        policy: Policy,
        client: Client,
        bans: Bans,
        token_request: TokenRequest,
        authority: SubjectAuthority | None,
        holder: Client | None = None,
    ) -> None:
        self.policy = policy
        self.client = client
        self.bans = bans
        self.authority = authority
        self.holder = holder
        """The client whose token the subject token is, None if there is none here."""
        held = authority.scope if authority else ""
        self.wanted = dict.fromkeys(as_held(token_request.scope, held) or held.split())
        self.audience = Audience(policy, client, authority, tuple(dict.fromkeys(token_request.audience)))
        self.allowed: dict[tuple[str, str], _Allowed] = {}
        """Permissions found so far, by scope name and storage."""
        self.left_out: set[Step] = set()

    def planned(self) -> PlannedToken:
        """Return the planned token; raises a RequestError if no scope may be granted."""
        storage: dict[str, Scope] = {}
        groups: list[str] = []
        words: dict[str, None] = {}
        for word in self.wanted:
            if not word.isascii():
                raise InvalidScope("the scope has characters that RFC 6749 §3.3 forbids; percent-encode them")
            scope = Scope.parse(word)
            if scope.name in STORAGE_SCOPES:
                granted = self._on_storage(word, scope)
                storage |= granted
                words |= dict.fromkeys(granted)
            elif word == "wlcg.groups" or word.startswith("wlcg.groups:"):
                groups += self._groups(word)
            elif self._other(word):
                words[word] = None
        if groups and storage:
            self.left_out.add(Step("profile", "leaves out wlcg.groups, ignored beside storage scopes"))
            groups = []
        if groups:
            words["wlcg.groups"] = None
        if not words.keys() - {"offline_access"}:
            raise InvalidScope(
                f"nothing of scope {' '.join(self.wanted)[:200]!r} may be granted to client "
                f"{self.client.name!r} for {' '.join(self.audience.names)[:200]!r}"
            )
        return self._planned_token(" ".join(words), tuple(dict.fromkeys(groups)), list(storage.values()))

    def _planned_token(
        self, scope: str, groups: tuple[str, ...], on_storage: Sequence[Scope]
    ) -> PlannedToken:
        if len(scope) > MAX_CLAIM_CHARACTERS or len(" ".join(self.audience.names)) > MAX_CLAIM_CHARACTERS:
            raise InvalidScope(
                f"scope or audience is longer than {MAX_CLAIM_CHARACTERS} characters; ask for less at once"
            )
        cap, rule, why = self._cap(bool(on_storage))
        left = self.authority.left_seconds if self.authority else cap
        seconds = min(cap, left + BACKDATE_SECONDS)
        if seconds < BACKDATE_SECONDS + MIN_LEFT_SECONDS:
            raise LifetimeNotAllowed(f"lifetime {seconds} s allowed by {rule} is too short to be of use")
        storages = {a.area.storage: a.area for a in self.allowed.values()}
        one = next(iter(storages.values())) if len(storages) == 1 else None
        area = Area(
            self.client.vo, one.storage if one else SEVERAL_STORAGES, "/", "/", self.audience.names,
            (one.dialect if one else DIALECTS["profile"])._replace(algorithms=self.audience.algorithms),
            self.audience.matching, False, True,
        )  # fmt: skip
        # No text of the caller's: all tokens with equal steps share one recorded rule.
        steps = {
            Step(f"route {a.route}", f"{name}, {a.operation}")
            for (name, _), a in self.allowed.items()
            if a.route
        } | self.left_out
        operations = {a.operation for a in self.allowed.values() if a.operation}
        plan = self.policy.plan_of_steps(
            area,
            tuple(sorted(operations)),
            cap,
            rule,
            (*sorted(steps), Step(rule, f"at most {cap} s: {why}")),
        )
        sub, act = (self.authority.sub, self.authority.act) if self.authority else (self.client.sub, None)
        path = (on_storage[0].path or "") if on_storage else ""
        return PlannedToken(
            Need(-1, "service", 0, "", plan.operations), plan, path, scope,
            Lifetime(seconds, cap, BACKDATE_SECONDS), "", extra=Extra(sub, groups, act),
        )  # fmt: skip

    def _cap(self, on_storage: bool) -> tuple[int, str, str]:
        """Return the shortest lifetime cap in seconds, the rule that sets it, and the reason."""
        caps = [
            (self.policy.token_lifetime_seconds, "token endpoint", "the settings' token_lifetime_seconds")
        ]
        caps += [a.cap for a in self.allowed.values() if a.cap is not None]
        caps += [
            (limits.max_lifetime_seconds, f"client {limits.name}", "its own limit")
            for limits in (self.client, self.holder)
            if limits is not None and limits.max_lifetime_seconds is not None
        ]
        if self.audience.is_any and on_storage:
            caps.append((ANY_SECONDS, "audience any", "every storage of the VO takes it"))
        return min(caps)

    # ── scopes ───────────────────────────────────────────────────────────────────────────────

    def _on_storage(self, word: str, scope: Scope) -> dict[str, Scope]:
        """Return the scopes that are granted for one requested storage scope, by their text.

        A token works at each endpoint of each of its audiences, so each endpoint must allow the scope; of
        several endpoints of one storage, one that holds the path is enough if no other holds something else
        there. For the audience that means every storage of the VO, one endpoint is enough.
        """
        assert scope.path is not None
        if self.authority is not None and not exchanges.allows(self.authority.rule, scope.name):
            self.left_out.add(Step(f"exchange {self.authority.rule.name}", f"leaves out {scope.name}"))
            return {}
        paths = self._paths(scope.path, scope.name)
        granted = {
            Scope(scope.name, p) for p in paths if not any(q != p and path_contains(q, p) for q in paths)
        }
        if self.authority is not None:  # DIRAC requests all its configured scopes
            granted = set(intersect(granted, parse_scopes(self.authority.scope)))
        granted = {one for one in granted if self._may_be_written(one)}
        for one in granted:
            self.bans.check_path(self.client.vo, one.path or "/", self.audience.matching)
        # oauthlib warns of a scope that is spelt differently from the request; a directory's slash may stay.
        if len(granted) == 1 and word in {f"{s}{end}" for s in granted for end in ("", "/")}:
            return dict.fromkeys([word], *granted)
        return {str(s): s for s in sorted(granted)}

    def _paths(self, path: str, name: str) -> list[str]:
        """Return the parts of a path that the storages, and the clients' own limits, allow for a scope."""
        paths = [path]
        if self.audience.is_any:
            paths = [p for areas in self.audience.endpoints for p in self._within(paths, [areas], name)]
        else:
            by_storage: dict[frozenset[str], list[list[Area]]] = {}
            for areas in self.audience.endpoints:
                by_storage.setdefault(frozenset(a.storage for a in areas), []).append(areas)
            for endpoints in by_storage.values():
                paths = self._within(paths, endpoints, name)
            if not self.audience.all_at_storages:
                return []
        for limits in filter(None, (self.client, self.holder)):
            if limits.paths:
                paths = [p for p in _meet(paths, limits.paths) if limits.may_reach(p, self.audience.matching)]
        return paths

    def _may_be_written(self, scope: Scope) -> bool:
        """Say whether every storage of the token reads the scope's path as this path alone."""
        for area in (a for areas in self.audience.endpoints for a in areas):
            if area.dialect.refused is not None and area.dialect.refused.search(scope.path or ""):
                self.left_out.add(
                    Step(f"dialect {area.dialect.name}", f"leaves out {scope.name} on a name read otherwise")
                )
                return False
        return True

    def _within(self, paths: Sequence[str], endpoints: Sequence[list[Area]], name: str) -> list[str]:
        """Return the parts of `paths` that a scope may be on at the endpoints of one storage.

        For each base path, the area with the longest prefix around a path and all areas that the path opens
        must allow the scope. An endpoint with no area there has nothing to allow.
        """
        found = []
        roots = [area.root for areas in endpoints for area in areas]
        for path in _meet(paths, roots):
            concerned = [area for areas in endpoints for area in self._concerned(path, areas)]
            allowed = [self._allow(area, name) for area in concerned]
            if concerned and all(allowed):
                found.append(path)
                self.allowed |= {(name, a.area.storage): a for a in allowed if a is not None}
        return list(dict.fromkeys(found))

    def _concerned(self, path: str, areas: Sequence[Area]) -> list[Area]:
        """Return the areas of one endpoint that a scope on `path` is in, or opens."""
        # By base path, since each base path gives a path its own meaning; the longest prefix comes first.
        around = {a.base_path: a for a in reversed(areas) if path_contains(a.root, path)}
        return [
            *around.values(),
            *(a for a in areas if a.root != path and opens(self.audience.matching, path, a.root)),
        ]

    def _allow(self, area: Area, name: str) -> _Allowed | None:
        """Return the permission of client and route for a scope on an area, or None; raises Banned."""
        if not area.tokens:
            return None
        self.bans.check(self.client.vo, storage=area.storage)
        operations = [
            o for o in _OPERATIONS[name] if not self.client.operations or o in self.client.operations
        ]
        if self.authority is not None and self.authority.ours and operations:  # a route allowed the token
            return _Allowed(area) if self._holder_may(area, name) else None
        for operation in operations:
            need = Need(-1, "operation", 0, "", (operation,))
            route = self.policy.route_of(self.client, "", "direct", area, need)
            if route is not None:
                cap = cap_of(route, self.client, "direct", area, [Needed(name)], "directory")
                return _Allowed(area, operation, route.name, cap)
        return None

    def _holder_may(self, area: Area, name: str) -> bool:
        """Say whether the client that holds the subject token could have this scope for itself today.

        Its operations count with the scopes that they need at this storage: a token to write may read there.
        """
        if self.holder is None or not self.holder.operations:
            return True
        operations = [o for o in OPERATIONS if o in self.holder.operations]
        return name in {needed.scope for needed in scopes_needed(area.dialect, operations)}

    def _groups(self, word: str) -> list[str]:
        if self.authority is not None:
            self.left_out.add(Step("profile", "leaves out wlcg.groups, which an exchange does not pass on"))
            return []
        _, colon, group = word.partition(":")
        return [g for g in self.client.groups if not colon or g == group]

    def _other(self, word: str) -> bool:
        if word == "offline_access":  # Rucio and FTS request it; it is in the scope, but grants nothing
            return True
        if self.authority is not None:
            return word in self.authority.scope.split(" ") and exchanges.allows(self.authority.rule, word)
        listed = fits(word, self.client.scopes)
        return listed or (word == "fts" and any(map(self.audience.is_fts, self.audience.names)))


def _meet(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """Return the paths of each side that lie inside a path of the other side."""
    inside = [a for a in left for b in right if path_contains(b, a)]
    return list(dict.fromkeys(inside + [b for a in left for b in right if path_contains(a, b)]))
