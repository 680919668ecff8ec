"""Charts of what all processes counted, drawn by pygal as SVG pictures for light and dark pages."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pygal
from pygal.style import Style
from sqlalchemy.engine import Engine as Pool

from minter.database import counts
from minter.errors import InvalidRequest
from minter.tokens.keys import Key, RotationPolicy, signs_until


class Period(NamedTuple):
    """A period of a chart: its length, its steps, and the form of its labels."""

    length: timedelta
    step: timedelta
    label: str


PERIODS = {
    "hour": Period(timedelta(hours=1), timedelta(minutes=1), "%H:%M"),
    "day": Period(timedelta(days=1), timedelta(minutes=15), "%H:%M"),
    "week": Period(timedelta(days=7), timedelta(hours=2), "%d. %H:%M"),
}
KINDS = {"tokens": "Tokens a second", "requests": "Requests a second", "refusals": "Refusals a second"}
_ORIGIN = datetime(2020, 1, 1, tzinfo=UTC)
_GREY = "#808080"  # readable on white and on black
_STYLE = Style(
    background="transparent", plot_background="transparent", foreground=_GREY, foreground_strong=_GREY,
    foreground_subtle=_GREY, opacity=".6",
    colors=("#2a78d6", "#e07a1f", "#2f9e6e", "#b5459e", "#c9a40c", "#c23b3b", "#6b6fc9", "#5b8c2a"),
    font_family="sans-serif", label_font_size=16, major_label_font_size=16,
    legend_font_size=16, title_font_size=18, no_data_font_size=24,
)  # fmt: skip


class Rates(NamedTuple):
    """Rates by label at each step of a period."""

    times: list[datetime]
    per_second: dict[str, list[float]]


def rates(pool: Pool, kind: str, period: Period, now: datetime) -> Rates:
    """Return the rates of a kind by label, and by VO where there are several; the last step is now."""
    first = now - period.length - (now - period.length - _ORIGIN) % period.step  # as Postgres bins them
    counted = counts.amounts(pool, [kind], first, period.step)
    several = len({vo for _, vo, *_ in counted if vo}) > 1
    times = [first + n * period.step for n in range(int((now - first) / period.step) + 1)]
    place = {at: n for n, at in enumerate(times)}
    found: dict[str, list[float]] = {}
    for at, vo, _, label, amount in counted:
        series = found.setdefault(f"{vo} {label}" if several and vo else label, [0.0] * len(times))
        if at in place:  # Postgres's clock may be a little ahead
            series[place[at]] += amount / period.step.total_seconds()
    return Rates(times, found)


def svg(pool: Pool, kind: str, period: str, now: datetime) -> bytes:
    """Return the chart of a kind; raises InvalidRequest for a kind or period that there is not."""
    if kind not in KINDS or period not in PERIODS:
        raise InvalidRequest(f"no chart of {kind} by {period}, expected {list(KINDS)} by {list(PERIODS)}")
    shown = rates(pool, kind, PERIODS[period], now)
    chart = pygal.StackedLine(
        fill=True, show_dots=False, style=_STYLE, js=[], title=KINDS[kind], width=800, height=260,
        legend_at_bottom=True, x_labels_major_count=6, show_minor_x_labels=False, no_data_text="nothing yet",
        show_x_guides=False, truncate_label=-1,
    )  # fmt: skip
    chart.x_labels = [f"{at:{PERIODS[period].label}}" for at in shown.times]
    for label, values in sorted(shown.per_second.items()):
        chart.add(label, [round(v, 4) for v in values])
    return bytes(chart.render())


class KeyLine(NamedTuple):
    """One key's life: when it was published, signs or may sign, signs no more, and leaves the key set."""

    name: str
    published: datetime
    signs_from: datetime
    signs_until: datetime
    public_until: datetime

    @classmethod
    def of(cls, key: Key, rotation: RotationPolicy, now: datetime) -> "KeyLine":
        """Return the line of a key; one that never signed waits until now, or until it was withdrawn."""
        ends = key.retired_at or (signs_until(key, rotation) if key.activated_at else None) or now
        starts = min(key.activated_at or ends, ends)
        public = ends if key.state == "revoked" else max(key.last_exp or ends, ends)
        name = f"{key.kid[:8]} {key.algorithm}, {key.vo}, {key.state}"
        return cls(name, key.published_at, max(starts, key.published_at), max(ends, key.published_at), public)


def key_lines(lines: Sequence[KeyLine], now: datetime) -> bytes:
    """Return the picture of keys' lives, by days before and after now."""
    first = min((line.published for line in lines), default=now)

    def days(start: datetime, end: datetime) -> float:
        return max(0.0, (end - start) / timedelta(days=1))

    chart = pygal.HorizontalStackedBar(
        style=_STYLE, js=[], title="Days from now: before it signs, signs, still public", width=800,
        height=120 + 36 * len(lines), legend_at_bottom=True, no_data_text="no keys", truncate_label=-1,
        truncate_legend=-1, value_formatter=lambda day: f"{day - days(first, now):+.0f}",
    )  # fmt: skip
    chart.x_labels = [line.name for line in lines]
    chart.add(
        None, [{"value": days(first, line.published), "style": "fill: none; stroke: none"} for line in lines]
    )
    chart.add("public, does not sign yet", [days(line.published, line.signs_from) for line in lines])
    chart.add("signs", [days(line.signs_from, line.signs_until) for line in lines])
    chart.add("public, signs no more", [days(line.signs_until, line.public_until) for line in lines])
    return bytes(chart.render())


def of_storages(pool: Pool, now: datetime) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the tokens and refusals of the last day by VO and storage, counted by whole hours."""
    found: Counter[tuple[str, str, str]] = Counter()
    day = PERIODS["day"].length
    for _, vo, kind, storage, amount in counts.amounts(pool, counts.OF_STORAGES.values(), now - day, day):
        found[kind, vo, storage] += amount
    tokens, refusals = counts.OF_STORAGES["tokens"], counts.OF_STORAGES["refusals"]
    return {(vo, name): (found[tokens, vo, name], found[refusals, vo, name]) for _, vo, name in found}


def means(pool: Pool, period: Period, now: datetime) -> dict[str, float]:
    """Return the mean seconds of each stage of a batch in a period, and `waiting`, of a request before it."""
    totals: Counter[tuple[str, str]] = Counter()
    kinds = ("stage_us", "stages", "age_us", "ages")
    for _, _, kind, label, amount in counts.amounts(pool, kinds, now - period.length, period.length):
        totals[kind, label] += amount
    found = {
        label: totals["stage_us", label] / number / 1e6
        for (kind, label), number in sorted(totals.items())
        if kind == "stages" and number
    }
    if number := totals["ages", ""]:
        found = {"waiting": totals["age_us", ""] / number / 1e6, **found}
    return found
