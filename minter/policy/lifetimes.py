"""Lifetimes: how long a token may live, and how long its file needs it (WLCG 1.3 §4.3.1)."""

import math
from collections.abc import Sequence

from minter.errors import (
    LifetimeNotAllowed,
)
from minter.policy.clients import Client
from minter.policy.limits import (
    BACKDATE_SECONDS,
    FTS_QUEUE_SECONDS,
    PROFILE_MAX_SECONDS,
    PROFILE_MIN_SECONDS,
)
from minter.policy.plans import Lifetime, Plan
from minter.policy.requests import File, Need, Request
from minter.policy.routes import Granularity, Mitigation, Route, Via
from minter.storages.dialects import Needed
from minter.storages.directory import Area


def cap_of(
    route: Route,
    client: Client,
    via: Via,
    area: Area,
    needed: Sequence[Needed],
    granularity: Granularity,
) -> tuple[int, str, str]:
    """Return the longest lifetime allowed, the rule that set it, and the sentence for `explain`."""
    cap, rule = route.max_lifetime_seconds, f"route {route.name}"
    why = f"lifetime at most {cap} s"
    if cap > PROFILE_MAX_SECONDS:
        if area.matching != "exact":
            cap, rule = PROFILE_MAX_SECONDS, f"dialect {area.dialect.name}"
            why = f"at most {cap} s: paths are matched as strings there, or in an unknown way"
        elif failed := _failed_mitigations(route, via, area, needed, granularity):
            cap, rule = PROFILE_MAX_SECONDS, f"route {route.name}"
            why = f"at most {cap} s: {', '.join(failed)} does not hold for this token"
        else:
            why += f", relying on {', '.join(route.mitigations)} ({route.risk_assessment})"
    if client.max_lifetime_seconds is not None and client.max_lifetime_seconds < cap:
        cap, rule = client.max_lifetime_seconds, f"client {client.name}"
        why = f"lifetime at most {cap} s"
    return cap, rule, why


def _failed_mitigations(
    route: Route, via: Via, area: Area, needed: Sequence[Needed], granularity: Granularity
) -> list[str]:
    writes = [n for n in needed if n.scope in ("storage.create", "storage.modify")]
    reads = [n for n in needed if n.scope == "storage.read"]
    one_file = area.matching == "exact" and granularity == "file"
    holds: dict[Mitigation, bool] = {
        "narrow_write": not writes or (one_file and all(n.where == "file" for n in writes)),
        "narrow_read": not reads or (one_file and all(n.where == "file" or n.quirk for n in reads)),
        "one_storage": not any(a.endswith("wlcg.cern.ch/jwt/v1/any") for a in area.audience),
        "no_modify": not any(n.scope == "storage.modify" for n in needed),
        "fts_only": via == "fts",
        "pull_mode": True,  # the VO asserts pull mode; no part of a token shows it
    }
    return [m for m in route.mitigations if not holds[m]]


def lifetime_of(plan: Plan, request: Request, file: File, need: Need) -> Lifetime:
    """Return the lifetime of one token: the time that the file needs, clipped to the cap of the plan.

    Raises LifetimeNotAllowed if the client requests more than the cap, or if the resulting lifetime does
    not cover the margin (and, in an FTS job, an hour of queue).
    """
    route = plan.route
    assert route is not None
    if file.transfer_seconds is not None:
        once = file.transfer_seconds
    elif file.size is not None:
        once = math.ceil(file.size / route.min_rate_bytes)
    else:
        once = route.transfer_seconds
    transfer = once * (1 + max(file.retries, route.retries))
    fixed = BACKDATE_SECONDS + transfer + route.margin_seconds + need.after_seconds
    asked = route.wait_seconds if need.wait_seconds is None else need.wait_seconds
    wait = asked
    if need.one_token:  # FTS counts whole hours of queue, and the clock of its queue runs while it stages
        enough = need.staging_seconds + FTS_QUEUE_SECONDS
        if wait < enough:
            wait = need.staging_seconds + max(route.wait_seconds, FTS_QUEUE_SECONDS)
    queue = need.staging_seconds + FTS_QUEUE_SECONDS if need.one_token else 0
    cap = plan.cap_seconds
    if request.lifetime_seconds is not None:
        wanted = request.lifetime_seconds
        if wanted > cap:
            raise LifetimeNotAllowed(
                f"lifetime {wanted} s exceeds {cap} s allowed by {plan.cap_rule}; ask for less",
                expected=cap, got=wanted,
            )  # fmt: skip
    else:
        derived = fixed + wait if need.life_seconds is None else need.life_seconds
        wanted = max(derived, PROFILE_MIN_SECONDS)
    seconds = min(wanted, cap)
    margin = 0 if request.via == "url" else route.margin_seconds  # a URL serves no transfer that may be late
    least = BACKDATE_SECONDS + margin + need.after_seconds + queue
    if seconds < least:
        by = f"allowed by {plan.cap_rule}" if seconds < wanted else "asked for"
        raise LifetimeNotAllowed(
            f"lifetime {seconds} s {by} does not cover {_what(need)} of {least} s; ask "
            "for more or change the route",
            expected=least, got=seconds,
        )  # fmt: skip
    raised = asked if need.staging_seconds and wait > asked else None
    return Lifetime(seconds, wanted, min(fixed, seconds - queue), need.staging_seconds, raised)


def _what(need: Need) -> str:
    parts = ["the margin"]
    if need.staging_seconds:
        parts.append(f"staging ({need.staging_seconds} s)")
    if need.after_seconds:
        parts.append(f"archiving ({need.after_seconds} s)")
    return " and ".join(parts)
