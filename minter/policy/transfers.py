"""Decisions: which tokens a client may have for a file, with which scopes and for how long.

`Policy.decide` is a function of a request, its client, the current bans and the providers that are not
available. It returns planned tokens, refusals and the steps that led to each; `explain` only renders steps.
A planned token never holds more than the dialect's expansion of the request (I1); a step names the quirk
or the route's rule that added each extra scope.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from minter.contract.operations import Operation
from minter.errors import (
    InvalidRequest,
    NeighbourRefused,
    OperationNotAllowed,
    ReplyNotAllowed,
    RequestError,
    UnknownClient,
    UnknownStorage,
    UnknownVO,
)
from minter.policy.clients import Bans, Client, fits
from minter.policy.exchanges import Exchange
from minter.policy.lifetimes import lifetime_of
from minter.policy.limits import (
    BACKDATE_SECONDS,
)
from minter.policy.paths import area_path, check_reach, scope_on, shared_path
from minter.policy.permissions import check_plaintext, check_reply_queue, check_subject
from minter.policy.planning import make_plan, matches
from minter.policy.plans import Decision, Lifetime, Plan, PlannedToken, Refused, Step
from minter.policy.requests import File, Need, Request
from minter.policy.routes import SHIPPED_ROUTES, FTSInstance, Route, Via
from minter.storages.dialects import FTS_REST, Matching
from minter.storages.directory import LOOSEST_FIRST, Area, Directory
from minter.storages.urls import check_fts_url, check_signable, host_of

_CACHE_LIMIT = 512


class Policy:
    """The settings that decide: storages by VO, routes in order, FTS instances."""

    def __init__(
        self,
        directories: Mapping[str, Directory],
        routes: Sequence[Route] = SHIPPED_ROUTES,
        fts: Sequence[FTSInstance] = (),
        exchanges: Sequence[Exchange] = (),
        token_lifetime_seconds: int = 7200,
        prefixes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        for route in routes:
            route.check()
        self.directories = directories
        self.routes = tuple(routes)
        self.fts = {vo: _services(vo, fts) for vo in directories}
        self.exchanges = tuple(exchanges)
        self.token_lifetime_seconds = token_lifetime_seconds
        self.prefixes = prefixes
        """What names and `sub` of clients begin with, by VO, where the IAM signs under the same issuer."""
        # Plans depend on the client, and clients are new objects after each change of the control
        # tables. The size of this cache is bounded because activities are free text.
        self._plans: dict[tuple[Any, ...], dict[object, Plan | RequestError]] = {}
        self._plans_of_steps: dict[object, Plan] = {}
        self.own_planned_tokens: dict[object, PlannedToken] = {}
        """Cache of `token_endpoint`: tokens planned on clients' own behalf."""

    def check_prefix(self, client: Client) -> None:
        """Raise UnknownClient for a client that could be taken for one of the IAM's (ADR 16)."""
        prefix = self.prefixes.get(client.vo, "")
        if not (client.name.startswith(prefix) and client.sub.startswith(prefix)):
            raise UnknownClient(
                f"client {client.name!r} of VO {client.vo!r}: its name and sub must begin with {prefix!r}, "
                "because the VO's IAM signs under the same issuer"
            )

    def decide(
        self, request: Request, client: Client, bans: Bans, away: frozenset[str] = frozenset()
    ) -> Decision:
        """Decide every need of a request. Refusals are returned, not raised.

        `away` names the providers with an open circuit breaker; fallbacks of their routes are used.
        """
        try:
            self.admit(request, client, bans)
            service = [self._service(request.service, client.vo)] if request.service else []
        except RequestError as error:
            return Decision([], [Refused(None, error)], error)
        planned_tokens: list[PlannedToken] = []
        refused: list[Refused] = []
        whole = True
        for file in request.files:
            whole &= self._decide_file(request, file, client, bans, away, planned_tokens, refused)
        if request.all_or_nothing and not whole:
            why = "another file of this all-or-nothing request was refused"
            refused += [Refused(g.need, NeighbourRefused(why)) for g in planned_tokens]
            planned_tokens = []
        if planned_tokens or not request.files:
            planned_tokens += service
        try:
            check_plaintext(request, client, planned_tokens)
        except ReplyNotAllowed as error:
            return Decision([], [Refused(None, error)], error)
        return Decision(planned_tokens, refused)

    def admit(self, request: Request, client: Client, bans: Bans) -> None:
        """Raise Banned, UnknownVO or ReplyNotAllowed if a request must be refused as a whole."""
        bans.check(
            client.vo,
            vo=client.vo,
            client=client.name,
            on_behalf_of=request.on_behalf_of,
            activity=request.activity,
        )
        if request.vo is not None and request.vo != client.vo:
            raise UnknownVO(f"VO {request.vo!r} is not the client's, expected {client.vo!r} or none")
        if client.vo not in self.directories:
            raise UnknownVO(f"VO {client.vo!r} is not served by this engine")
        check_reply_queue(request.reply_queue, client)

    def _decide_file(
        self,
        request: Request,
        file: File,
        client: Client,
        bans: Bans,
        away: frozenset[str],
        planned_tokens: list[PlannedToken],
        refused: list[Refused],
    ) -> bool:
        """Decide one file and say if it is served; a copy without source or destination is refused."""
        activity = file.activity or request.activity
        plans = self._plans_of(client, activity, request.via, away, request.routes)
        made: list[PlannedToken] = []
        failed: list[Refused] = []
        for need in file.needs:
            area = None
            try:
                if file.activity:
                    bans.check(client.vo, activity=activity)
                area, path = self._locate(request, need, client)
                made.append(self._grant(request, file, need, area, path, plans, client, bans, away))
            except RequestError as error:
                if area is not None:
                    error.fields.setdefault("storage", area.storage)
                failed.append(Refused(need, error))
        made, onto_itself = _without_copies_onto_itself(made)
        failed += onto_itself
        if failed:
            broken = [
                side
                for side in ("source", "destination")
                if any(r.need and r.need.side == side for r in failed)
                and not any(g.need.side == side for g in made)
            ]
            if broken:
                why = f"every {broken[0]} of this file was refused"
                orphans = [g for g in made if g.need.side != "operation"]
                failed += [Refused(g.need, NeighbourRefused(why)) for g in orphans]
                made = [g for g in made if g.need.side == "operation"]
            refused += failed
            if broken or any(r.need and r.need.side == "operation" for r in failed):
                planned_tokens += made
                return False
        planned_tokens += made
        return True

    def _plans_of(self, *key: Any) -> dict[object, Plan | RequestError]:
        """Return the cached plans for this client and the other values that plans depend on."""
        plans = self._plans.get(key)
        if plans is None:
            if len(self._plans) >= _CACHE_LIMIT:
                self._plans.clear()
            plans = self._plans[key] = {}
        return plans

    def _locate(self, request: Request, need: Need, client: Client) -> tuple[Area, str]:
        if request.via_fts:
            check_fts_url(need.url)
        elif request.via == "url":
            check_signable(need.url)
        return self.directories[client.vo].locate(need.url)

    def _grant(
        self,
        request: Request,
        file: File,
        need: Need,
        area: Area,
        path: str,
        plans: dict[object, Plan | RequestError],
        client: Client,
        bans: Bans,
        away: frozenset[str],
    ) -> PlannedToken:
        bans.check(client.vo, storage=area.storage)
        key = (area, need.operations, need.if_able, need.side)
        plan = plans.get(key)
        if plan is None:
            activity = file.activity or request.activity
            plan = plans[key] = self._plan(client, activity, request, area, need, away)
        if isinstance(plan, RequestError):
            raise plan.with_traceback(None)
        if plan.route is not None and plan.route.poll_area and need.operations == ("poll",):
            path = area_path(plan, client, path)
        check_reach(area, path, client, bans)
        shared = ""
        if plan.granularity != "file":
            shared = shared_path(plan, path, request, client, bans)
            if not shared:
                plan = self._narrow(plan, key, plans, request, need, client)
        scope = scope_on(plan, path, shared, client, bans)
        if plan.route is not None and plan.route.mode == "exchange":
            check_subject(plan.route, request, client, scope)
        return PlannedToken(
            need,
            plan,
            path,
            scope,
            lifetime_of(plan, request, file, need),
            file.external_id,
            shared,
        )

    def _plan(
        self, client: Client, activity: str, request: Request, area: Area, need: Need, away: frozenset[str]
    ) -> Plan | RequestError:
        if client.operations and not client.operations.issuperset(need.operations):
            return OperationNotAllowed(
                f"client {client.name!r} may not {', '.join(need.operations)}, "
                f"only {', '.join(sorted(client.operations))}"
            )
        routes = [r for r in self.routes if not request.routes or r.name in request.routes]
        fitting = [r for r in routes if matches(r, client, activity, request.via, area, need)]
        if fitting:
            if request.routes:
                fitting = [r for r in fitting if r.provider not in away] or fitting
            route, stands_in = _there(fitting, away)
            if request.routes:
                stands_in = (Step("fallback", "replaces a provider's token"), *stands_in)
            try:
                return make_plan(route, client, request.via, area, need, route.granularity, stands_in)
            except OperationNotAllowed as error:
                return error
        what = "URLs that " if request.via == "url" else ""
        return OperationNotAllowed(
            f"no route allows {what}{', '.join(need.operations)} on storage {area.storage!r} "
            f"for client {client.name!r}; add a route or correct the request"
        )

    def _narrow(
        self,
        wide: Plan,
        key: tuple[object, ...],
        plans: dict[object, Plan | RequestError],
        request: Request,
        need: Need,
        client: Client,
    ) -> Plan:
        """Return the plan of a file that must have its own token where other files share one."""
        plan = plans.get((*key, "file"))
        if not isinstance(plan, Plan):
            assert wide.route is not None
            plan = make_plan(wide.route, client, request.via, wide.area, need, "file")
            plans[*key, "file"] = plan
        return plan

    def route_of(self, client: Client, activity: str, via: Via, area: Area, need: Need) -> Route | None:
        """Return the first matching route with mode `mint`, None if there is none."""
        own = (r for r in self.routes if r.mode == "mint")
        return next((r for r in own if matches(r, client, activity, via, area, need)), None)

    def plan_of_steps(
        self,
        area: Area,
        operations: tuple[Operation, ...],
        cap_seconds: int,
        rule: str,
        steps: tuple[Step, ...],
    ) -> Plan:
        """Return the plan of a token that no single route made; equal plans are made once."""
        key = (area.storage, area.audience, operations, cap_seconds, rule, steps)
        plan = self._plans_of_steps.get(key)
        if plan is None:
            if len(self._plans_of_steps) >= _CACHE_LIMIT:
                self._plans_of_steps.clear()
            plan = Plan(None, area, operations, (), cap_seconds, rule, steps)
            self._plans_of_steps[key] = plan
        return plan

    def matching_of(self, vo: str, storage: str) -> Matching:
        """Return how a storage matches paths; the loosest way for one that is not in the settings."""
        directory = self.directories.get(vo)
        return directory.matching_of(storage) if directory is not None else LOOSEST_FIRST[0]

    def fts_url(self, vo: str, name: str) -> str:
        """Return a URL of the FTS `name`; empty (the VO's first FTS) if the settings no longer name it."""
        return next((f"https://{h}" for h, p in self.fts[vo].items() if p.area.storage == name), "")

    def _service(self, need: Need, vo: str) -> PlannedToken:
        services = self.fts[vo]
        first = next(iter(services.values()), None)
        plan = services.get(host_of(need.url)) if need.url else first
        if plan is None:
            raise UnknownStorage(
                f"FTS {need.url or '(default)'!r} is not known to this engine, expected one of "
                f"{', '.join(services) or 'none: add [[fts]] to the settings'}"
            )
        life = Lifetime(plan.cap_seconds, plan.cap_seconds, BACKDATE_SECONDS)
        return PlannedToken(need, plan, "", "fts", life, "")


def _without_copies_onto_itself(
    made: list[PlannedToken],
) -> tuple[list[PlannedToken], list[Refused]]:
    """Refuse the tokens with which a file would be copied onto itself, which deletes or truncates it.

    Of several sources only the one that is the destination is refused. Staging in place is allowed.
    """

    def place(planned: PlannedToken) -> tuple[str, str]:
        return planned.plan.area.storage, planned.path

    targets = {
        place(p)
        for p in made
        if p.need.side == "destination" and not {"stage", "poll"}.issuperset(p.need.operations)
    }
    onto_itself = [p for p in made if p.need.side == "source" and place(p) in targets]
    if not onto_itself:
        return made, []
    if len(onto_itself) == sum(p.need.side == "source" for p in made):
        onto_itself += [p for p in made if p.need.side == "destination"]
    why = (
        "source and destination are one file, and a copy onto itself would delete it; to stage the file give "
        "bring_online, to watch its archiving archive_timeout"
    )
    refused = [Refused(p.need, InvalidRequest(why, path=p.path)) for p in onto_itself]
    return [p for p in made if p not in onto_itself], refused


def _there(fitting: Sequence[Route], away: frozenset[str]) -> tuple[Route, Sequence[Step]]:
    """Return the first matching route, or its fallback while its provider is not available, and the steps.

    Without a usable fallback, the first route is returned; its tokens stay pending until the provider is
    available.
    """
    first = fitting[0]
    if first.provider not in away:
        return first, ()
    by_name = {route.name: route for route in fitting if route.provider not in away}
    instead = next((by_name[name] for name in first.fallback if name in by_name), None)
    if instead is None:
        return first, (Step(f"provider {first.provider}", "is not available: the token stays pending"),)
    why = f"provider {first.provider} is not available: fallback route {instead.name} is used"
    return instead, (Step(f"route {first.name}, fallback", why),)


def _services(vo: str, fts: Sequence[FTSInstance]) -> dict[str, Plan]:
    found = {}
    for service in fts:
        if fits(vo, service.vos):
            host = host_of(service.url)
            area = Area(
                vo, service.name, "/", "/", (service.audience or host,),
                FTS_REST, "exact", False, True,
            )  # fmt: skip
            step = Step("fts", f"token for submitting to {service.name}, scope fts")
            found[host] = Plan(None, area, (), (), service.lifetime_seconds, "fts", (step,))
    return found
