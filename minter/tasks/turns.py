"""Turns: of requests that wait, no client's and no large one keeps the others waiting for long.

Small requests and large ones wait in lines of their own, and in each line the clients take turns. While
small requests come, large ones get half of the engine's time. HTTP processes and workers use it alike.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

QUIET_SECONDS = 1.0
"""Large requests get all of the engine's time when no small one came for so long."""


class Limits(NamedTuple):
    """Bounds of one batch, which has at least one request, however heavy it is.

    A request is large if its weight is more than `small`.
    """

    requests: int
    weight: int
    small: int


class _Line(Generic[T]):
    """Requests that wait in one line; `take` returns one of each client in turn."""

    def __init__(self) -> None:
        self.queues: OrderedDict[str, deque[tuple[T, int]]] = OrderedDict()

    def take(self, limits: Limits) -> list[T]:
        """Remove and return the next batch."""
        batch: list[T] = []
        weight = 0
        while self.queues and len(batch) < limits.requests:
            client, queue = next(iter(self.queues.items()))
            weight += queue[0][1]
            if batch and weight > limits.weight:
                break
            batch.append(queue.popleft()[0])
            if queue:
                self.queues.move_to_end(client)
            else:
                del self.queues[client]
        return batch


class Turns(Generic[T]):
    """Requests that wait; `client_of` and `weight_of` return a request's client and weight.

    The times that its methods take are seconds of one monotonic clock.
    """

    def __init__(self, client_of: Callable[[T], str], weight_of: Callable[[T], int], limits: Limits) -> None:
        self._client_of = client_of
        self._weight_of = weight_of
        self._limits = limits
        self._small: _Line[T] = _Line()
        self._large: _Line[T] = _Line()
        self._count = 0
        self._small_at = self._large_from = float("-inf")
        self._large_next = False
        self._taken_large = False

    def __len__(self) -> int:
        return self._count

    @property
    def _has_small(self) -> bool:
        """Whether a small request waits."""
        return bool(self._small.queues)

    def of(self, client: str) -> int:
        """Return how many requests of a client wait."""
        return sum(len(line.queues.get(client, ())) for line in (self._small, self._large))

    def add(self, item: T) -> None:
        """Add a request after the others of its client."""
        self._queue(item).append((item, self._weight_of(item)))
        self._count += 1

    def put_back(self, items: Iterable[T]) -> None:
        """Add requests that were taken before, in their order, before all others."""
        for item in reversed(list(items)):
            self._queue(item, first=True).appendleft((item, self._weight_of(item)))
            self._count += 1

    def take(self, now: float) -> list[T]:
        """Remove and return the next batch; it is empty if large requests must wait (see `wait_seconds`)."""
        large = bool(self._large.queues) and now >= self._large_from
        self._taken_large = large and (self._large_next or not self._has_small)
        batch = (self._large if self._taken_large else self._small).take(self._limits)
        self._large_next = not self._taken_large
        self._count -= len(batch)
        return batch

    def served(self, started: float, ended: float) -> None:
        """Note when the last batch was served."""
        if not self._taken_large:
            self._small_at = ended
        elif ended - self._small_at < QUIET_SECONDS:
            self._large_from = ended + (ended - started)

    def wait_seconds(self, now: float) -> float:
        """Return for how many seconds `take` returns nothing, unless a small request comes."""
        return 0.0 if self._has_small else max(0.0, self._large_from - now)

    def clear(self) -> list[T]:
        """Remove and return all requests."""
        queues = [q for line in (self._small, self._large) for q in line.queues.values()]
        self._small, self._large, self._count = _Line(), _Line(), 0
        return [item for queue in queues for item, _ in queue]

    def _queue(self, item: T, *, first: bool = False) -> deque[tuple[T, int]]:
        line = self._large if self._weight_of(item) > self._limits.small else self._small
        client = self._client_of(item)
        queue = line.queues.setdefault(client, deque())
        if first:
            line.queues.move_to_end(client, last=False)
        return queue
