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
        due = max(self._due.get(name, now), now) + self._interval
        if due - now > 1 + self._interval:
            return due - now - 1
        self._due[name] = due
        self._due.move_to_end(name)
        if len(self._due) > MOST_CALLERS:
            self._due.popitem(last=False)
        return 0.0
