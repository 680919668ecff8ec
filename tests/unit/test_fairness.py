"""Shares of the HTTP service: nobody's requests keep another's waiting."""

import asyncio
import threading
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from minter.errors import TooManyRequests
from minter.issuer.batches import LIMITS, Batcher
from minter.issuer.ratelimits import SHARE, RateLimit, Room
from minter.policy.requests import File, Need, Request
from minter.tokens.outcomes import Submission


class SlowEngine:
    """Records who is in each batch, and returns when it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.free = threading.Event()

    def mint_many(self, submissions: Sequence[Submission], _now: datetime) -> Sequence[Submission]:
        self.batches.append([s.client for s in submissions])
        self.free.wait(10)
        return submissions


def submission(client: str, needs: int = 1) -> Submission:
    files = (File(tuple(Need(0, "source", n, "davs://h/f", ("read",)) for n in range(needs))),)
    return Submission(Request(uuid.uuid4(), "mint", b"", files), client)


def served(submissions: list[Submission], waiting: int = 10_000) -> tuple[list[list[str]], list[Any]]:
    engine: Any = SlowEngine()
    batcher = Batcher(engine, lambda: datetime.now(UTC), waiting)

    async def run() -> list[Any]:
        first = asyncio.create_task(batcher.mint(submission("first")))
        await asyncio.sleep(0.05)  # the engine has it, and the others wait
        others = [asyncio.create_task(batcher.mint(s)) for s in submissions]
        await asyncio.sleep(0)
        engine.free.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    _, *answers = asyncio.run(run())
    return engine.batches[1:], answers


def test_clients_take_turns() -> None:
    greedy = [submission("greedy") for _ in range(3 * LIMITS.requests)]
    batches, _ = served([*greedy, submission("honest"), submission("honest")])
    assert batches[0][:4] == ["greedy", "honest", "greedy", "honest"]
    assert sum(map(len, batches)) == len(greedy) + 2


def test_small_requests_do_not_wait_for_all_large_ones() -> None:
    large = [submission(f"large{n}", LIMITS.weight) for n in range(3)]
    batches, _ = served([*large, submission("small"), submission("small")])
    assert ["small", "small"] in batches[:2]


def test_a_batch_is_bounded_by_the_tokens_it_needs() -> None:
    batches, _ = served([submission("a", LIMITS.weight - 100), submission("b", 100), submission("c", 100)])
    assert batches == [["a", "b"], ["c"]]


def test_one_client_fills_its_share_of_the_waiting_only() -> None:
    _, answers = served([submission("greedy") for _ in range(20)] + [submission("honest")], waiting=40)
    refused = [isinstance(a, TooManyRequests) for a in answers]
    assert refused == [False] * (40 // SHARE) + [True] * 10 + [False]


@pytest.mark.parametrize("calls", [1, 5, 500])
def test_work_is_paid_for_by_the_next_calls(calls: int) -> None:
    limit = RateLimit(10)
    assert limit.wait("a", 0.0) == 0
    limit.charge("a", 0.0, calls)
    wait = limit.wait("a", 0.0)
    assert wait == pytest.approx(max(0, (calls + 1) / 10 - 1))
    assert limit.wait("a", wait) == 0
    assert limit.wait("b", 0.0) == 0


def test_bytes_of_one_client_are_its_share() -> None:
    room = Room(400)
    with room.of("greedy") as take:
        take(60)
        with (
            room.of("greedy") as more,
            pytest.raises(TooManyRequests, match="60 bytes of requests of this client"),
        ):
            more(41)
        take(40)
        with room.of("honest") as others:
            others(100)
            with pytest.raises(TooManyRequests):
                others(1)
    with room.of("greedy") as take:
        take(100)


def test_bytes_of_all_clients_are_bounded() -> None:
    room = Room(400)
    with ExitStack() as stack:
        for n in range(4):
            stack.enter_context(room.of(f"c{n}"))(100)
        with pytest.raises(TooManyRequests, match="and 400 of all"):
            stack.enter_context(room.of("late"))(1)
