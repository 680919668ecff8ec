"""Batches: requests that wait together in an HTTP process share one call of `mint_many`.

One thread of each process calls the engine, so the engine's caches need no locks. Requests that arrive
while the thread is busy form the next batch. There is no timer: a single request is served at once.

Small requests and large ones wait in lines of their own, and in each line the clients take turns. While
small requests come, large ones get half of the engine's time, so neither keeps the other waiting for long.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import ParamSpec, TypeVar

from minter.errors import MinterError, ServerError, TooManyRequests, Unavailable
from minter.tokens.mint import Engine
from minter.tokens.outcomes import Outcome, Submission

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

MOST_REQUESTS = 128
MOST_NEEDS = 500
"""Limits of one batch, which has at least one request, however many tokens the request needs."""
SMALL_NEEDS = 20
"""A request that needs more tokens is large."""
QUIET_SECONDS = 1.0
"""Large requests get all of the engine's time when no small one came for so long."""
SHARE = 4
"""One client's requests may be this part of those that wait, a quarter."""

Waiting = tuple[Submission, asyncio.Future[Outcome]]


class Line:
    """Requests that wait; `take` returns one of each client in turn."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Waiting]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def of(self, client: str) -> int:
        """Return how many requests of a client wait."""
        return len(self._queues.get(client, ()))

    def add(self, waiting: Waiting) -> None:
        """Add a request at the end of its client's."""
        self._queues.setdefault(waiting[0].client, deque()).append(waiting)

    def take(self) -> list[Waiting]:
        """Remove and return the next batch."""
        batch: list[Waiting] = []
        needs = 0
        while self._queues and len(batch) < MOST_REQUESTS:
            client, queue = next(iter(self._queues.items()))
            needs += queue[0][0].request.weight
            if batch and needs > MOST_NEEDS:
                break
            batch.append(queue.popleft())
            del self._queues[client]
            if queue:
                self._queues[client] = queue  # at the end of the line
        return batch


class Batcher:
    """Hands requests to the engine's thread; its methods run in the event loop's thread."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime], waiting_requests: int) -> None:
        self._engine = engine
        self._clock = clock
        self._limit = waiting_requests
        self._thread = ThreadPoolExecutor(1, "engine")
        self._small, self._large = Line(), Line()
        self._small_at = self._large_from = float("-inf")
        self._came = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    async def mint(self, submission: Submission) -> Outcome:
        """Return the outcome; raises Unavailable, TooManyRequests, or ServerError for an internal fault."""
        own = self._small.of(submission.client) + self._large.of(submission.client)
        share = max(1, self._limit // SHARE)
        if own >= share or len(self._small) + len(self._large) >= self._limit:
            raise TooManyRequests(
                f"{own} requests of this client wait already, of {share}, or {self._limit} of all; "
                "send the same request again later",
                retry_after=1,
            )
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        small = submission.request.weight <= SMALL_NEEDS
        (self._small if small else self._large).add((submission, future))
        self._came.set()
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        return await future

    async def call(self, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """Run another function that uses the engine or the database, in the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: function(*arguments, **named)
        )

    async def _serve(self) -> None:
        try:
            while self._small or self._large:
                if self._small:
                    await self._serve_batch(self._small.take())
                    self._small_at = time.monotonic()
                if not self._large:
                    continue
                started = time.monotonic()
                if started < self._large_from:
                    await self._wait(self._large_from - started)
                    continue
                await self._serve_batch(self._large.take())
                ended = time.monotonic()
                if ended - self._small_at < QUIET_SECONDS:
                    self._large_from = ended + (ended - started)
        finally:
            self._serving = None

    async def _wait(self, seconds: float) -> None:
        """Wait for a small request, for so many seconds at most."""
        if self._small:
            return
        self._came.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._came.wait()

    async def _serve_batch(self, batch: list[Waiting]) -> None:
        try:
            outcomes = await self.call(self._mint, [submission for submission, _ in batch])
        except Unavailable as error:
            _fail(batch, error)
        except Exception as error:
            if len(batch) > 1:
                logger.exception("a batch of %d failed, serving each alone", len(batch))
                for one in batch:
                    await self._serve_batch([one])
                return
            logger.exception("a request failed alone")
            cause = error if isinstance(error, MinterError) else ServerError("see the service's log")
            _fail(batch, cause)
        else:
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if not future.done():  # the caller may have disconnected
                    future.set_result(outcome)

    def _mint(self, submissions: list[Submission]) -> list[Outcome]:
        return self._engine.mint_many(submissions, self._clock())


def _fail(batch: list[Waiting], error: MinterError) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
