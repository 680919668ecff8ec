"""What the supervisor of a process is told: that the process is ready, and that it is stuck."""

import faulthandler
import os
import socket

TURN_SECONDS = 10.0
"""Event loops make a turn so often."""
STUCK_SECONDS = 900.0
"""A process without a turn for so long is stuck, or Postgres has left one statement without an answer."""

_state = {"ready": False}


def ready() -> None:
    """Tell systemd, if it started this process, that it serves (sd_notify(3)); from now on, watch its turns.

    A unit of Type=notify counts as started from then on: `systemctl start` waits for it.
    """
    _state["ready"] = True
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(f"\0{path[1:]}" if path.startswith("@") else path)
            connection.send(b"READY=1")


def turn(seconds: float = STUCK_SECONDS) -> None:
    """Note a turn of the main loop; without another within `seconds`, the process ends with exit code 1.

    It writes to standard error where each of its threads stands, and its supervisor starts another.
    """
    if _state["ready"]:
        faulthandler.dump_traceback_later(seconds, exit=True)


def rest() -> None:
    """Note that the main loop makes no turns for now, because it waits for a connection or has ended."""
    faulthandler.cancel_dump_traceback_later()
