"""Limits by caller: calls a second (GCRA, computed from values only), and bytes at once."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minter.errors import TooManyRequests

MOST_CALLERS = 10_000
SHARE = 4
"""One client may have this part of what all may have at once, a quarter."""


class RateLimit:
    """A limit of `per_second` calls a second for each name, after a burst of one second's calls."""

    def __init__(self, per_second: float) -> None:
        self._interval = 1 / per_second
        self._due: OrderedDict[str, float] = OrderedDict()

    def wait(self, name: str, now: float) -> float:
        """Count one call at `now`; return 0, or the seconds to wait if it comes too early."""
        early = self.early(name, now)
        if not early:
            self.charge(name, now)
        return early

    def early(self, name: str, now: float) -> float:
        """Return 0, or the seconds to wait if a call at `now` comes too early."""
        return max(0.0, self._due.get(name, now) - now - 1)

    def charge(self, name: str, now: float, calls: float = 1.0) -> None:
        """Count work that is already accepted: the caller's next calls pay for it."""
        self._due[name] = max(self._due.get(name, now), now) + calls * self._interval
        self._due.move_to_end(name)
        if len(self._due) > MOST_CALLERS:
            self._due.popitem(last=False)


class Room:
    """The bytes of requests that one process holds at once: `most`, of which each client gets its share."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()

    @contextmanager
    def of(self, client: str) -> Iterator[Callable[[int], None]]:
        """Yield a function that takes bytes for one request of a client; they are given back at the end.

        The function raises TooManyRequests if they are not free.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self._held[client] + size > self._most // SHARE or self._held.total() + size > self._most:
                raise TooManyRequests(
                    f"{self._held[client]} bytes of requests of this client and {self._held.total()} of all "
                    "are in work already; send the same request again later",
                    retry_after=1,
                )
            self._held[client] += size
            taken += size

        try:
            yield take
        finally:
            self._held[client] -= taken
            if not self._held[client]:
                del self._held[client]
