"""The command `lifetimes`: how long tokens were really needed, and what routes could give."""

import math
from datetime import timedelta
from typing import Annotated

import typer
from msgspec import structs

from minter.cli.tables import AsJson, Listing, guarded, open_service, show
from minter.database.lifetimes import NeededTime, needed
from minter.policy.limits import HARD_MAX_SECONDS, PROFILE_MIN_SECONDS

FEW = 1_000
"""Ended tokens below which nothing is recommended."""
SPARE, STEP_SECONDS = 1.25, 600
"""What is recommended: what 999 of 1 000 tokens needed, and a quarter more, in whole ten minutes."""


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command("lifetimes")(lifetimes)


@guarded
def lifetimes(
    days: Annotated[int, typer.Option(help="Days to look back.", min=1, max=400)] = 7, as_json: AsJson = False
) -> None:
    """Show how long the tokens of each route were needed until their transfers ended, and recommend lifetimes."""
    service = open_service()
    found = needed(service.pool, service.clock() - timedelta(days=days))
    show(
        as_json,
        [{**structs.asdict(one), "recommended": recommended(one)} for one in found],
        lambda: Listing(
            f"{sum(one.tokens for one in found)} ended tokens of {days} days",
            ("route", "tokens", "waited: median, most", "needed: median, 99.9 %, most", "given: median, most",
             "expired too early", "recommended"),
            [_row(one) for one in found],
        ),
    )  # fmt: skip


def recommended(one: NeededTime) -> int | None:
    """Return a lifetime in seconds that would have done for 999 of 1 000 tokens, None where too few ended.

    Where tokens expired too early, how long they were needed is known no better than how long others lived.
    """
    if one.tokens < FEW:
        return None
    wanted = math.ceil(one.needed_999 * SPARE / STEP_SECONDS) * STEP_SECONDS
    return min(max(wanted, PROFILE_MIN_SECONDS), HARD_MAX_SECONDS)


def _row(one: NeededTime) -> tuple[object, ...]:
    advice = recommended(one)
    return (
        one.route,
        one.tokens,
        ", ".join(map(_time, (one.waited_median, one.waited_most))),
        ", ".join(map(_time, (one.needed_median, one.needed_999, one.needed_most))),
        ", ".join(map(_time, (one.given_median, one.given_most))),
        one.late or None,
        f"max_lifetime_seconds = {advice}" if advice else f"wait for {FEW} ended tokens",
    )


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))
