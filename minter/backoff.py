"""Back-off: the pauses between the tries of what may succeed later."""

import random


class Backoff:
    """Pauses of `first` seconds, then twice as long each, up to `most`; each varies by half (jitter)."""

    def __init__(self, first: float, most: float) -> None:
        self._first = self._next = first
        self._most = most

    def reset(self) -> None:
        """Begin again with the first pause, after a success."""
        self._next = self._first

    def pause(self) -> float:
        """Return the seconds until the next try."""
        seconds, self._next = self._next, min(2 * self._next, self._most)
        return seconds * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
