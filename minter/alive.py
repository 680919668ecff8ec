"""What the supervisor of a process is told: that the process is ready, and that it is stuck."""

import asyncio
import faulthandler
import logging
import os
import socket
import time

logger = logging.getLogger(__name__)

TURN_SECONDS = 10.0
"""Event loops make a turn so often."""
AGAIN_SECONDS = 1.0
"""Turns that follow sooner need not be noted."""
STUCK_SECONDS = 900.0
"""A process without a turn for so long is stuck, or Postgres has left one statement without an answer."""

_ready = False
_armed_at = 0.0


def ready() -> None:
    """Tell systemd, if it started this process, that it serves (sd_notify(3)); from now on, watch its turns.

    A unit of Type=notify counts as started from then on: `systemctl start` waits for it.
    """
    global _ready  # noqa: PLW0603 - there is one process
    _ready = True
    path = os.environ.pop("NOTIFY_SOCKET", "")  # not for programs that this one starts
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(f"\0{path[1:]}" if path.startswith("@") else path)
            connection.send(b"READY=1")
    except OSError as error:  # inherited from another unit, say
        logger.warning("systemd is not told that this process serves: %s", error)


def turn(seconds: float = STUCK_SECONDS) -> None:
    """Note a turn of the main loop; without another within `seconds`, the process ends with exit code 1.

    It writes to standard error where each of its threads stands, and its supervisor starts another.
    """
    global _armed_at  # noqa: PLW0603
    now = time.monotonic()
    if _ready and now - _armed_at >= AGAIN_SECONDS:  # each arming starts a thread
        _armed_at = now
        faulthandler.dump_traceback_later(seconds, exit=True)


async def turns(seconds: float) -> None:
    """Note the turns of an event loop, without end."""
    while True:
        turn(seconds)
        await asyncio.sleep(TURN_SECONDS)


def rest() -> None:
    """Note that the main loop makes no turns for now, because it waits for a connection or has ended."""
    global _armed_at  # noqa: PLW0603
    _armed_at = 0.0
    faulthandler.cancel_dump_traceback_later()
