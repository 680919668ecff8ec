"""Plans: what a route makes of an operation on a storage, whatever the file: scopes, lifetime, steps.

Here are also the values that a decision consists of. A plan is recorded once as a rule, and every
token of it names the rule (I8).
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct, structs

from minter.contract.messages import RefusedNeed
from minter.contract.operations import Operation
from minter.errors import RequestError
from minter.policy.clients import Client, fits
from minter.policy.limits import PROFILE_MAX_SECONDS
from minter.policy.requests import Need, refusal
from minter.policy.routes import Granularity, Mitigation, Route
from minter.storages.dialects import Needed, scopes_needed
from minter.storages.directory import Area

SEVERAL_STORAGES = "(several)"
"""Stands in the record for the storages of a token that is for none or several."""


class Step(NamedTuple):
    """One step of a decision: the rule that applied, and what it did."""

    rule: str
    text: str


class Plan(Struct, frozen=True, eq=False):
    """All of a grant that does not depend on the file: made once, used for every file alike."""

    route: Route | None
    area: Area
    operations: tuple[Operation, ...]
    needed: tuple[Needed, ...]
    cap_seconds: int
    cap_rule: str
    steps: tuple[Step, ...]
    granularity: Granularity = "file"
    digest: bytes = b""
    """By which equal plans of all processes are one row."""

    def __post_init__(self) -> None:
        text = msgspec.json.encode([self.rule, self.area.storage, self.operations, self.steps])
        structs.force_setattr(self, "digest", sha256(text).digest())

    @property
    def rule(self) -> str:
        """The name of the rule that made it."""
        return self.route.name if self.route else self.cap_rule


class Lifetime(Struct, frozen=True, gc=False):
    """How long a token lives: `seconds` from iat to exp, and what it was made of.

    A derived need of `wanted` seconds beyond the cap is clipped. `fixed` is the part for transfer,
    retries, staging and margin, so `seconds - fixed` is what the file may wait in a queue.
    """

    seconds: int
    wanted: int
    fixed: int


class Extra(Struct, frozen=True):
    """What a token of the token endpoint says beside its scopes: for whom, in which groups, through whom."""

    sub: str
    groups: tuple[str, ...] = ()
    act: dict[str, Any] | None = None


class PlannedToken(Struct, frozen=True, eq=False, gc=False):
    """One token that may be made."""

    need: Need
    plan: Plan
    path: str
    scope: str
    lifetime: Lifetime
    external_id: str
    shared: str = ""
    """The path that the scopes are on instead, if the token serves other files, too."""
    extra: Extra | None = None

    @property
    def managed(self) -> bool:
        """Whether a provider signs the token, and we keep it fresh."""
        return self.plan.route is not None and self.plan.route.mode != "mint"

    def whole(self) -> "PlannedToken":
        """Return the grant of the token that this one is a use of: with all the life it may have."""
        cap = self.plan.cap_seconds
        return structs.replace(self, path=self.shared, lifetime=Lifetime(cap, cap, self.lifetime.fixed))

    @property
    def audience(self) -> tuple[str, ...]:
        """The audiences of the token: those of one storage endpoint."""
        return self.plan.area.audience


class Refused(NamedTuple):
    """A need that gets no token, and why; `need` is None for a request refused as a whole."""

    need: Need | None
    error: RequestError

    def record(self) -> RefusedNeed:
        """Return the refusal as it is recorded and sent."""
        return refusal(self.need, self.error)


class Decision(Struct, frozen=True, eq=False):
    """What a request gets; `error` refuses it whole, and then there are no grants."""

    planned_tokens: list[PlannedToken]
    refused: list[Refused]
    error: RequestError | None = None

    def refused_files(self) -> list[int]:
        """Return the numbers of the files that get no token at all."""
        granted = {g.need.file for g in self.planned_tokens}
        refused = {r.need.file for r in self.refused if r.need is not None}
        return sorted(refused - granted)


def matches(route: Route, client: Client, activity: str, via_fts: bool, area: Area, need: Need) -> bool:
    """Say whether a route is for this client, activity, storage and all operations of a need."""
    return (
        route.via in ("any", "fts" if via_fts else "direct")
        and (route.tape is None or route.tape == area.tape)
        and set(route.operations).issuperset(need.operations)
        and fits(area.vo, route.vos)
        and fits(client.name, route.clients)
        and fits(activity, route.activities)
        and fits(area.storage, route.storages)
    )


def make_plan(
    route: Route,
    client: Client,
    via_fts: bool,
    area: Area,
    need: Need,
    granularity: Granularity,
    before: Sequence[Step] = (),
) -> Plan:
    """Return the plan of a need by the route that matches it; `before` are the steps that led to it."""
    asked = need.operations
    steps = [
        *before,
        Step("storage", f"{area.storage}, dialect {area.dialect.name}, audience {', '.join(area.audience)}"),
        Step("route", f"{route.name}: {', '.join(asked)}"),
    ]  # fmt: skip
    if route.provider:
        steps.append(Step(f"route {route.name}, {route.mode}", f"asked of provider {route.provider}"))
    operations = list(asked)
    writes = need.side == "destination" and ("write" in asked or "overwrite" in asked)
    for rule in ("cleanup", "make_parents"):
        if writes and getattr(route, rule):
            operation: Operation = "retry" if rule == "cleanup" else "make_parents"
            operations.append(operation)
            steps.append(Step(f"route {route.name}, {rule}", f"adds the operation {operation}"))
    needed = scopes_needed(area.dialect, operations, frozenset(route.forbid))
    steps += [
        Step(f"quirk {n.quirk.name}", f"adds {n.scope} on the {n.where}: {n.quirk.meaning}")
        for n in needed
        if n.quirk is not None
    ]
    if granularity != "file":
        steps.append(
            Step(f"route {route.name}, granularity", f"one token for the {granularity}, shared by its files")
        )
    cap, rule, why = cap_of(route, client, via_fts, area, needed, granularity)
    steps.append(Step(rule, why))
    return Plan(route, area, asked, needed, cap, rule, tuple(steps), granularity)


def cap_of(
    route: Route,
    client: Client,
    via_fts: bool,
    area: Area,
    needed: Sequence[Needed],
    granularity: Granularity,
) -> tuple[int, str, str]:
    """Return the longest lifetime allowed, the rule that set it, and the sentence for `explain`."""
    cap, rule = route.max_lifetime_seconds, f"route {route.name}"
    why = f"lifetime at most {cap} s"
    if cap > PROFILE_MAX_SECONDS:
        if area.matching == "prefix":
            cap, rule = PROFILE_MAX_SECONDS, f"dialect {area.dialect.name}"
            why = f"at most {cap} s: paths are matched by prefix there, or in an unknown way"
        elif failed := _failed_mitigations(route, via_fts, area, needed, granularity):
            cap, rule = PROFILE_MAX_SECONDS, f"route {route.name}"
            why = f"at most {cap} s: {', '.join(failed)} does not hold for this token"
        else:
            why += f", relying on {', '.join(route.mitigations)} ({route.risk_assessment})"
    if client.max_lifetime_seconds is not None and client.max_lifetime_seconds < cap:
        cap, rule = client.max_lifetime_seconds, f"client {client.name}"
        why = f"lifetime at most {cap} s"
    return cap, rule, why


def _failed_mitigations(
    route: Route, via_fts: bool, area: Area, needed: Sequence[Needed], granularity: Granularity
) -> list[str]:
    writes = [n for n in needed if n.scope in ("storage.create", "storage.modify")]
    reads = [n for n in needed if n.scope == "storage.read"]
    one_file = area.matching == "exact" and granularity == "file"
    holds: dict[Mitigation, bool] = {
        "narrow_write": not writes or (one_file and all(n.where == "file" for n in writes)),
        "narrow_read": not reads or (one_file and all(n.where == "file" or n.quirk for n in reads)),
        "one_storage": not any(a.endswith("wlcg.cern.ch/jwt/v1/any") for a in area.audience),
        "no_modify": not any(n.scope == "storage.modify" for n in needed),
        "fts_only": via_fts,
        "pull_mode": True,  # asserted by the VO, nothing in a token shows it
    }
    return [m for m in route.mitigations if not holds[m]]
