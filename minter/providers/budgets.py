"""Request budget and circuit breaker of a provider: GCRA slots and states, as pure functions of values.

All workers share one row of each provider, and change it with these functions while the row is locked. A
slot is the instant at which one request may be sent. A slot that is not used in time is lost, never saved
up, so there is no burst, however late a worker is.
"""

import math
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Literal

from msgspec import Struct, structs

USED_SHARE = 0.975
"""Share of the budget that is used, so that requests bunched by the network do not exceed the budget."""
HORIZON = timedelta(seconds=0.2)
"""How far ahead slots are reserved: briefly, so urgent tokens wait little and a crash loses few slots."""
FAILURES_TO_OPEN = 5
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 300.0
MAX_RETRY_AFTER_SECONDS = 3_600.0
"""Longest pause, in seconds, that a provider's Retry-After can cause."""


class Slots(Struct, frozen=True):
    """Reserved slots: `count` instants from `first` on, `interval` apart."""

    count: int
    first: datetime
    interval: timedelta

    @property
    def due_at(self) -> datetime:
        """Instant before which no other request may be sent; it is stored in the provider's row."""
        return self.first + self.count * self.interval


def reserve(
    due_at: datetime,
    now: datetime,
    requests_per_second: float,
    wanted: int,
    free_in_flight: int,
    horizon: timedelta = HORIZON,
) -> Slots:
    """Return the slots before the horizon, at most `wanted` and `free_in_flight` (GCRA without tolerance)."""
    interval = timedelta(seconds=1 / (requests_per_second * USED_SHARE))
    first = max(due_at, now)
    # A slot before the horizon is always given, even if the interval is longer than the horizon.
    room = math.ceil((now + horizon - first) / interval) if first < now + horizon else 0
    count = max(0, min(wanted, free_in_flight, room))
    return Slots(count, first, interval)


def next_two(due_at: datetime, now: datetime, requests_per_second: float) -> Slots:
    """Return the next two slots, however far ahead, for discovery and JWKS: all other requests need these."""
    return Slots(2, max(due_at, now), timedelta(seconds=1 / (requests_per_second * USED_SHARE)))


class Breaker(Struct, frozen=True):
    """Circuit breaker of a provider: failures in a row, pauses in a row, and the current pause.

    No request is sent until `open_until`. Then one request probes the provider; until `probed_until` no
    other request is sent.
    """

    failures: int = 0
    pauses: int = 0
    open_until: datetime | None = None
    probed_until: datetime | None = None

    def state(self, now: datetime) -> Literal["closed", "open", "half_open"]:
        """Return whether requests may be sent: all (closed), none (open), or one as a probe (half_open)."""
        if self.open_until is None:
            return "closed"
        if now < self.open_until or (self.probed_until is not None and now < self.probed_until):
            return "open"
        return "half_open"

    def after(
        self, *, failed: bool, now: datetime, retry_after: float, jitter: Callable[[float], float]
    ) -> "Breaker":
        """Return the breaker after one answer, or after a request without an answer.

        `retry_after` is the provider's Retry-After in seconds, 0 if there is none; `jitter` draws a number
        from 0 up to its argument (full jitter). Failures of requests sent before a pause do not lengthen the
        pause, but their Retry-After may.
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
    """Return the seconds before the next request for one token, with full jitter."""
    return jitter(min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(tries, 20)))
