"""A process says when it is ready, and ends when it is stuck."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TURNS = """
import time
from minter import alive
alive.ready()
alive.AGAIN_SECONDS = 0.0
alive.turn(0.3)
{then}
time.sleep(5)
"""


def _run(then: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    script = TURNS.format(then=then)
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_when_a_process_is_ready(abstract: bool, tmp_path: Path) -> None:
    address = f"@minter-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0"))
        receiver.settimeout(10)
        assert _run("raise SystemExit(0)", NOTIFY_SOCKET=address).returncode == 0
        assert receiver.recv(100) == b"READY=1"


def test_a_socket_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    done = _run(
        "import os; raise SystemExit('NOTIFY_SOCKET' in os.environ)", NOTIFY_SOCKET=str(tmp_path / "gone")
    )
    assert done.returncode == 0, done.stderr
    assert "systemd is not told that this process serves" in done.stderr


def test_a_process_that_makes_no_turn_ends_and_shows_where_it_stood() -> None:
    done = _run("secret = 'hunter2'")
    assert done.returncode == 1
    assert 'File "<string>", line 8' in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("then", ["alive.turn(60)", "alive.rest()"])
def test_a_process_that_makes_turns_or_rests_goes_on(then: str) -> None:
    assert _run(f"{then}; time.sleep(1); raise SystemExit(7)").returncode == 7


def test_turns_are_watched_only_in_a_process_that_said_it_is_ready() -> None:
    script = "from minter import alive; import time; alive.turn(0.2); time.sleep(1); raise SystemExit(7)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7
