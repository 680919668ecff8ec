"""The workers' application with a trigger: `celery -A tests.acceptance.fault_app`.

MINTER_FAULT=stage:n kills this process with SIGKILL when it reaches the stage for the n-th time. MINTER_CUTS=n
cuts the connection to the broker n times, each while an answer is published. A message
body that holds "poison-pill" kills the process at each delivery. MINTER_CLOCK_OFF names a file with the seconds
by which the clock of this process is wrong.
"""

import os
import signal
from datetime import datetime

from minter.contract.messages import Answer
from minter.tokens.outcomes import Submission
from workers import app as module
from workers import redeliveries
from workers.batching import MessageBatcher
from workers.messages import PendingMessage

app = module.app
_stage, _, _left = os.environ.get("MINTER_FAULT", "").partition(":")
_counts = {_stage: int(_left or 0), "cut": int(os.environ.get("MINTER_CUTS", "0"))}


if _stage:  # these deaths are not caused by messages, so no message may be dead-lettered for three of them
    redeliveries.MAX_TRIES = 1_000_000


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_stage(stage: str) -> None:
    if stage == "half_replied" and _counts["cut"]:
        _counts["cut"] -= 1
        raise ConnectionResetError("cut by the test")
    if stage == _stage:
        _counts[stage] -= 1
        if _counts[stage] == 0:
            _die()


_decode = MessageBatcher._decode


def decode(self: MessageBatcher, pending: PendingMessage) -> Submission | Answer:
    if b"poison-pill" in pending.body:
        _die()
    return _decode(self, pending)


module.on_stage = on_stage
MessageBatcher._decode = decode  # type: ignore[method-assign] # the trigger is put in front of it

if _off := os.environ.get("MINTER_CLOCK_OFF"):  # a file with this process's clock error in seconds
    from datetime import timedelta
    from pathlib import Path

    from minter import service
    from minter.tokens.clock import now as _now

    _wrong_by = Path(_off)

    def _wrong() -> datetime:
        return _now() + timedelta(seconds=float(_wrong_by.read_text()))

    service.now = _wrong  # type: ignore[attr-defined] # the module's own name for the clock
