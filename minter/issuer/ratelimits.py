"""Rate limits by caller: GCRA, computed from values only. A limit keeps one number for each caller."""

from collections import OrderedDict

MOST_CALLERS = 10_000


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
