"""Plans: what a route makes of an operation on a storage, whatever the file: scopes, lifetime, steps.

Here are also the values that a decision consists of. A plan is recorded once as a rule, and every
token of it names the rule (I8).
"""

from hashlib import sha256
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct, structs

from minter.contract.messages import RefusedNeed
from minter.contract.operations import Operation
from minter.errors import RequestError
from minter.policy.requests import Need, refusal
from minter.policy.routes import Granularity, Route
from minter.storages.dialects import Needed
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
