"""Planning: match routes with needs, and make the plan of a need from its route."""

from collections.abc import Sequence

from minter.contract.operations import Operation
from minter.errors import OperationNotAllowed
from minter.policy.clients import Client, fits
from minter.policy.lifetimes import cap_of
from minter.policy.plans import Plan, Step
from minter.policy.requests import Need
from minter.policy.routes import Granularity, Route, Via
from minter.storages.directory import Area
from minter.storages.needed import scopes_needed


def matches(route: Route, client: Client, activity: str, via: Via, area: Area, need: Need) -> bool:
    """Say whether a route matches this client, activity, storage and all operations of a need."""
    return (
        (route.via == via or (route.via == "any" and via != "url"))
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
    via: Via,
    area: Area,
    need: Need,
    granularity: Granularity,
    before: Sequence[Step] = (),
) -> Plan:
    """Return the plan of a need by its matching route; `before` are the steps that led to this route."""
    asked = need.operations
    steps = [
        *before,
        Step("storage", f"{area.storage}, dialect {area.dialect.name}, audience {', '.join(area.audience)}"),
        Step("route", f"{route.name}: {', '.join(asked)}"),
    ]  # fmt: skip
    if route.provider:
        steps.append(Step(f"route {route.name}, {route.mode}", f"asked of provider {route.provider}"))
    operation: Operation
    operations = [o for o in asked if o not in area.dialect.unable]
    for operation in (o for o in asked if o in area.dialect.unable):
        why = f"storage {area.storage!r} cannot {operation} by token: {area.dialect.unable[operation]}"
        if operation not in need.if_able:
            raise OperationNotAllowed(why)
        steps.append(Step(f"dialect {area.dialect.name}", f"leaves out the operation {operation}: {why}"))
    if via == "url":
        _check_url(area)
        steps.append(Step(f"route {route.name}, via", "put into a URL that anybody may hold"))
    writes = need.side == "destination" and ("write" in asked or "overwrite" in asked)
    for rule in ("cleanup", "make_parents"):
        if writes and getattr(route, rule):
            operation = "retry" if rule == "cleanup" else "make_parents"
            if operation in area.dialect.unable:
                steps.append(Step(f"dialect {area.dialect.name}", area.dialect.unable[operation]))
                continue
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
    cap, rule, why = cap_of(route, client, via, area, needed, granularity)
    steps.append(Step(rule, why))
    return Plan(route, area, asked, needed, cap, rule, tuple(steps), granularity)


def _check_url(area: Area) -> None:
    """Raise OperationNotAllowed for a storage whose URLs must not hold tokens."""
    why = (
        "is tape, and a URL would not wait until the file is online"
        if area.tape
        else f"has the dialect {area.dialect.name}, of which no spelling of a token in a URL is known"
        if not area.dialect.url_parameter
        else "logs the URLs that it serves (logs_urls in its settings)"
        if area.logs_urls
        else ""
    )
    if why:
        raise OperationNotAllowed(f"no URL can be signed on storage {area.storage!r}: it {why}")
