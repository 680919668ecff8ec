"""Batches: requests that wait together in an HTTP process share one call of `mint_many`.

One thread of each process calls the engine, so the engine's caches need no locks. Requests that arrive
while the thread is busy form the next batch. There is no timer: a single request is served at once.
Clients take turns (minter.tasks.turns).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import ParamSpec, TypeVar

from minter.errors import MinterError, ServerError, TooManyRequests, Unavailable
from minter.issuer.ratelimits import SHARE
from minter.tasks.turns import Limits, Turns
from minter.tokens.mint import Engine
from minter.tokens.outcomes import Outcome, Submission

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

LIMITS = Limits(requests=128, weight=500, small=20)
"""Limits of one batch; a request's weight is the number of tokens that it needs."""

Waiting = tuple[Submission, asyncio.Future[Outcome]]


class Batcher:
    """Hands requests to the engine's thread; its methods run in the event loop's thread."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime], waiting_requests: int) -> None:
        self._engine = engine
        self._clock = clock
        self._limit = waiting_requests
        self._thread = ThreadPoolExecutor(1, "engine")
        self._turns: Turns[Waiting] = Turns(
            lambda waiting: waiting[0].client, lambda waiting: waiting[0].request.weight, LIMITS
        )
        self._came = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    async def mint(self, submission: Submission) -> Outcome:
        """Return the outcome; raises Unavailable, TooManyRequests, or ServerError for an internal fault."""
        own = self._turns.of(submission.client)
        share = max(1, self._limit // SHARE)
        if own >= share or len(self._turns) >= self._limit:
            raise TooManyRequests(
                f"{own} requests of this client wait already, of {share}, or {self._limit} of all; "
                "send the same request again later",
                retry_after=1,
            )
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._turns.add((submission, future))
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
            while self._turns:
                started = time.monotonic()
                if not (batch := self._turns.take(started)):
                    await self._wait(self._turns.wait_seconds(started))
                    continue
                await self._serve_batch(batch)
                self._turns.served(started, time.monotonic())
        finally:
            self._serving = None

    async def _wait(self, seconds: float) -> None:
        """Wait until another request comes, for so many seconds at most."""
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
