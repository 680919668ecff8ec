"""Plans: scopes, lifetime cap and steps of operations on a storage, the same for every file.

This module also has the other values that a decision consists of. A plan is recorded once as a row of
`rules`, and every token made by the plan names this row (I8).
"""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct, structs

from minter.contract.operations import Operation
from minter.errors import RequestError
from minter.policy.requests import Need, refusal
from minter.policy.routes import Granularity, Route
from minter.storages.dialects import Needed
from minter.storages.directory import Area

MAX_DESCRIBED = 2_000
"""Most refusals of one request that say what was wrong; the others have their reason only."""
SEVERAL_STORAGES = "(several)"
"""Recorded storage of a token that is for no storage or for several."""


class Step(NamedTuple):
    """One step of a decision: the rule that applied, and what it did."""

    rule: str
    text: str


class Plan(Struct, frozen=True, eq=False):
    """The part of a planned token that does not depend on the file; made once, used for all such files."""

    route: Route | None
    area: Area
    operations: tuple[Operation, ...]
    needed: tuple[Needed, ...]
    cap_seconds: int
    cap_rule: str
    steps: tuple[Step, ...]
    granularity: Granularity = "file"
    digest: bytes = b""
    """Hash under which equal plans of all processes share one row of `rules`."""

    def __post_init__(self) -> None:
        text = msgspec.json.encode([self.rule, self.area.storage, self.operations, self.steps])
        structs.force_setattr(self, "digest", sha256(text).digest())

    @property
    def rule(self) -> str:
        """The name of the route, or of the other rule, that made the plan."""
        return self.route.name if self.route else self.cap_rule


class Lifetime(Struct, frozen=True, gc=False):
    """The lifetime of a token: `seconds` from iat to exp, and its parts.

    A derived need of `wanted` seconds above the cap is clipped to the cap. `fixed` covers transfer,
    retries, archiving and margin, so the file may wait in a queue for `seconds - fixed`. FTS's queue includes
    `staging_seconds`; where the request asked for a queue of `raised_from` seconds, too short for it, the
    queue was raised.
    """

    seconds: int
    wanted: int
    fixed: int
    staging_seconds: int = 0
    raised_from: int | None = None

    def notes(self, cap_rule: str) -> Iterator[str]:
        """Yield what the requester should know of this lifetime."""
        if self.seconds < self.wanted:
            yield f"lifetime clipped from {self.wanted} s to {self.seconds} s by {cap_rule}"
        if self.raised_from is not None:
            yield (
                f"time in FTS's queue raised from {self.raised_from} s: staging alone may take "
                f"{self.staging_seconds} s of it"
            )


class Extra(Struct, frozen=True):
    """Claims of a token of the token endpoint besides its scopes: subject, groups, and actors (`act`)."""

    sub: str
    groups: tuple[str, ...] = ()
    act: dict[str, Any] | None = None


class PlannedToken(Struct, frozen=True, eq=False, gc=False):
    """One token that the decision allows to be made."""

    need: Need
    plan: Plan
    path: str
    scope: str
    lifetime: Lifetime
    external_id: str
    shared: str = ""
    """Path of the scopes, instead of `path`, if the token serves other files, too."""
    extra: Extra | None = None

    @property
    def managed(self) -> bool:
        """Whether a provider signs the token, and the refresher keeps it fresh."""
        return self.plan.route is not None and self.plan.route.mode != "mint"

    def whole(self) -> "PlannedToken":
        """Return the shared token that this one is a use of, planned with the whole lifetime of the cap."""
        cap = self.plan.cap_seconds
        return structs.replace(self, path=self.shared, lifetime=Lifetime(cap, cap, self.lifetime.fixed))

    @property
    def audience(self) -> tuple[str, ...]:
        """The audiences of the token: those of one storage endpoint."""
        return self.plan.area.audience


class Refused(NamedTuple):
    """A need that gets no token, and the error; `need` is None for a request refused as a whole."""

    need: Need | None
    error: RequestError


class Decision(Struct, frozen=True, eq=False):
    """Planned tokens and refusals of a request; with `error`, it is refused as a whole and gets no token."""

    planned_tokens: list[PlannedToken]
    refused: list[Refused]
    error: RequestError | None = None

    def records(self) -> list[dict[str, Any]]:
        """Return the refusals as they are recorded and sent; those beyond MAX_DESCRIBED are brief."""
        return [
            structs.asdict(refusal(r.need, r.error, brief=number >= MAX_DESCRIBED))
            for number, r in enumerate(self.refused)
        ]
