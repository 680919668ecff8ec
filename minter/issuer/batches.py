"""Batches: requests that wait together in an HTTP process share one call of `mint_many`.

One thread of each process calls the engine, so the engine's caches need no locks. Requests that arrive
while the thread is busy form the next batch. There is no timer: a single request is served at once.
Clients take turns: one that sends more than the engine serves delays itself only.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import ParamSpec, TypeVar

from minter.errors import MinterError, ServerError, TooManyRequests, Unavailable
from minter.tokens.mint import Engine
from minter.tokens.outcomes import Outcome, Submission

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

MOST_REQUESTS = 128
MOST_NEEDS = 4_000
"""Limits of one batch, which has at least one request, however many tokens the request needs."""
SHARE = 4
"""One client's requests may be this part of those that wait, a quarter."""

Waiting = tuple[Submission, asyncio.Future[Outcome]]


class Batcher:
    """Hands requests to the engine's thread; its methods run in the event loop's thread."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime], waiting_requests: int) -> None:
        self._engine = engine
        self._clock = clock
        self._limit = waiting_requests
        self._thread = ThreadPoolExecutor(1, "engine")
        self._waiting: dict[str, deque[Waiting]] = {}
        self._serving: asyncio.Task[None] | None = None

    async def mint(self, submission: Submission) -> Outcome:
        """Return the outcome; raises Unavailable, TooManyRequests, or ServerError for an internal fault."""
        own = self._waiting.get(submission.client, ())
        share = max(1, self._limit // SHARE)
        if len(own) >= share or sum(map(len, self._waiting.values())) >= self._limit:
            raise TooManyRequests(
                f"{len(own)} requests of this client wait already, of {share}, or {self._limit} of all; "
                "send the same request again later",
                retry_after=1,
            )
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(submission.client, deque()).append((submission, future))
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
            while self._waiting:
                batch = self._take()
                await self._serve_batch(batch)
        finally:
            self._serving = None

    def _take(self) -> list[Waiting]:
        """Return the next batch, one request of each client in turn."""
        batch: list[Waiting] = []
        needs = 0
        while self._waiting and len(batch) < MOST_REQUESTS:
            client = next(iter(self._waiting))
            queue = self._waiting.pop(client)
            needs += queue[0][0].request.weight
            if batch and needs > MOST_NEEDS:
                self._waiting = {client: queue, **self._waiting}  # its turn comes first in the next batch
                break
            batch.append(queue.popleft())
            if queue:
                self._waiting[client] = queue  # at the end of the line
        return batch

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
