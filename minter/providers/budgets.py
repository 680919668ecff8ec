"""How fast a provider may be asked, and when not at all: GCRA slots and a breaker, in values only.

All workers share one row of each provider, so what is computed here is computed under its lock. A slot
is the instant at which one request may leave. What is not used in time is lost, never saved up:
so there is no burst, however late a worker is.
"""

import math
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Literal

from msgspec import Struct, structs

USED_SHARE = 0.975
"""Of the budget: what the way to the provider bunches must not go over it."""
HORIZON = timedelta(seconds=0.2)
"""How far ahead slots are given out: soon enough for what becomes urgent, and little to lose in a crash."""
FAILURES_TO_OPEN = 5
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 300.0
MAX_RETRY_AFTER_SECONDS = 3_600.0
"""A provider is not left alone for longer, whatever it asks."""


class Slots(Struct, frozen=True):
    """Slots reserved: `count` instants from `first` on, `interval` apart."""

    count: int
    first: datetime
    interval: timedelta

    @property
    def due_at(self) -> datetime:
        """The instant before which nothing else may leave: what the row says from now on."""
        return self.first + self.count * self.interval


def reserve(
    due_at: datetime,
    now: datetime,
    requests_per_second: float,
    wanted: int,
    free_in_flight: int,
    horizon: timedelta = HORIZON,
) -> Slots:
    """Return as many of the wanted slots as there are before the horizon (GCRA without tolerance)."""
    interval = timedelta(seconds=1 / (requests_per_second * USED_SHARE))
    first = max(due_at, now)
    # One that may leave at once is always there: the interval may be longer than the horizon.
    room = math.ceil((now + horizon - first) / interval) if first < now + horizon else 0
    count = max(0, min(wanted, free_in_flight, room))
    return Slots(count, first, interval)


def next_two(due_at: datetime, now: datetime, requests_per_second: float) -> Slots:
    """Return the next two slots, however far ahead: for discovery and JWKS, which all else waits for."""
    return Slots(2, max(due_at, now), timedelta(seconds=1 / (requests_per_second * USED_SHARE)))


class Breaker(Struct, frozen=True):
    """What is known of a provider's health: failures in a row, pauses in a row, and the present pause.

    While it is paused nothing is asked. After `open_until` one request probes until `probed_until`.
    """

    failures: int = 0
    pauses: int = 0
    open_until: datetime | None = None
    probed_until: datetime | None = None

    def state(self, now: datetime) -> Literal["closed", "open", "half_open"]:
        """Return whether requests may go: all, none, or one."""
        if self.open_until is None:
            return "closed"
        if now < self.open_until or (self.probed_until is not None and now < self.probed_until):
            return "open"
        return "half_open"

    def probing(self, until: datetime) -> "Breaker":
        """Return the breaker while one request is under way to see whether the provider is back."""
        return structs.replace(self, probed_until=until)

    def after(
        self, *, failed: bool, now: datetime, retry_after: float, jitter: Callable[[float], float]
    ) -> "Breaker":
        """Return the breaker after one answer, or after none came.

        `retry_after` is what the provider asked for, in seconds, 0 if nothing; `jitter` draws from 0 up to
        what it is given (full jitter). A pause once begun is not lengthened by requests sent before it.
        """
        if not failed:
            return self if self.state(now) == "open" and self.probed_until is None else Breaker()
        failures = self.failures + 1
        asked = timedelta(seconds=min(retry_after, MAX_RETRY_AFTER_SECONDS))
        if self.open_until is not None and now < self.open_until:
            return Breaker(failures, self.pauses, max(self.open_until, now + asked))
        if self.open_until is None and failures < FAILURES_TO_OPEN and not retry_after:
            return structs.replace(self, failures=failures)
        bound = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(self.pauses, 20))
        until = now + max(timedelta(seconds=jitter(bound)), asked)
        return Breaker(failures, self.pauses + 1, until)


def backoff_seconds(tries: int, jitter: Callable[[float], float]) -> float:
    """Return how long one token waits before it is tried again, with full jitter."""
    return jitter(min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(tries, 20)))
