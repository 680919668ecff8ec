"""The long-running processes: `minter worker`, `beat`, `refresher`, `fts` and `events`, beside `serve`.

The programs live in `workers`, on top of the engine, so they are loaded by name when they are started.
"""

import importlib
import os
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from minter.cli.tables import guarded
from minter.service import load_settings


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (worker, beat, refresher, fts, events):
        app.command()(guarded(command))


def _program(name: str) -> Any:
    """Check the settings, then return a module of `workers`; raises SettingsError."""
    load_settings()
    return importlib.import_module(f"workers.{name}")


def worker(
    name: Annotated[
        str, typer.Option(help="Name of this worker, unique on the broker; by default host and process id.")
    ] = "",
) -> None:
    """Serve requests from the broker, until SIGTERM. Start one worker for each core that signs."""
    _program("app").run_worker(name or f"worker-{os.getpid()}@{socket.gethostname()}")


def beat(
    schedule: Annotated[
        Path, typer.Option(help="File in which beat notes when it last ran each task.")
    ] = Path("beat-schedule"),
) -> None:
    """Keep partitions, keys and gauges up to date, until SIGTERM. A second beat waits until this one ends."""
    _program("app").run_beat(schedule)


def refresher() -> None:
    """Get managed tokens from external IAMs and keep them fresh, until SIGTERM."""
    _program("refresher").run()


def events() -> None:
    """Read FTS's monitoring messages and record the states of transfers, until SIGTERM."""
    _program("fts_listener").run()


def fts(
    queue: Annotated[str, typer.Option(help="Durable queue to which the client's answers go.")],
    fts: Annotated[list[str], typer.Option(help="REST URL of FTS; NAME=URL for each if there are several.")],
    key: Annotated[
        Path | None, typer.Option(help="File with the private JWK to which answers are encrypted.")
    ] = None,
    ca: Annotated[
        str | None, typer.Option(help="CA file or directory for FTS and broker; the system's by default.")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Name of the client, if the broker URL names no user.")
    ] = None,
    metrics_port: Annotated[
        int, typer.Option(help="Port for Prometheus on 127.0.0.1; 0 switches metrics off.")
    ] = 0,
) -> None:
    """Submit filled jobs from a durable queue to FTS, until SIGTERM. It needs only MINTER_BROKER_URL."""
    importlib.import_module("workers.fts_forwarder").run(queue, fts, key, ca, client, metrics_port)
