"""SQL of the running processes: heartbeats, which also show that Postgres can be written to."""

import os
import socket
from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any
from uuid import UUID

from msgspec import Struct
from psycopg.types.json import Jsonb
from sqlalchemy.engine import Engine as Pool

from minter import __version__
from minter.database import counts
from minter.database.connection import one, transaction

ROLES = ("worker", "beat", "serve", "refresher", "events", "console")
BEAT_SECONDS = 5.0
LEAVE_SECONDS = 2.0
"""A process that ends waits at most so long for Postgres."""
ALIVE_SECONDS = 20.0
"""A process whose last heartbeat is older is gone, or cannot reach Postgres."""
KEPT = "1 day"
"""How long `minter status` tells of a process that ended without a word."""


class Process(Struct, frozen=True, kw_only=True):
    """One running process, as its last heartbeat left it; the skew is its clock minus Postgres's."""

    process_id: UUID
    role: str
    host: str
    pid: int
    version: str
    started_at: datetime
    seen_at: datetime | None = None
    skew_seconds: float = 0.0
    facts: dict[str, Any] = {}
    """What only this process knows: `last_events` has the time of each FTS broker's last message."""


def this_process(role: str, process_id: UUID, now: datetime) -> Process:
    """Return the description of this process, which starts now."""
    return Process(
        process_id=process_id, role=role, host=socket.gethostname(), pid=os.getpid(), version=__version__,
        started_at=now,
    )  # fmt: skip


def beat(
    pool: Pool,
    process: Process,
    clock: Callable[[], datetime],
    patience: float,
    facts: Mapping[str, object] = MappingProxyType({}),
    counted: counts.Counts = MappingProxyType({}),
) -> float:
    """Write a process's heartbeat durably, with its facts and what it counted since the last one.

    Return the skew of its clock in seconds. Raises Unavailable.
    """
    with transaction(pool, patience) as connection:
        connection.execute(f"SET LOCAL lock_timeout = {int(patience * 500)}")
        database_now = one(connection.execute("SELECT clock_timestamp()"))[0]
        skew = float((clock() - database_now).total_seconds())
        connection.execute(
            "INSERT INTO processes (process_id, role, host, pid, version, started_at, seen_at, skew_seconds,"
            " facts) VALUES (%s, %s, %s, %s, %s, %s, clock_timestamp(), %s, %s)"
            " ON CONFLICT (process_id) DO UPDATE SET seen_at = excluded.seen_at,"
            " skew_seconds = excluded.skew_seconds, facts = excluded.facts",
            (
                process.process_id, process.role, process.host, process.pid, process.version,
                process.started_at, skew, Jsonb(dict(facts)),
            ),
        )  # fmt: skip
        if counted:
            counts.add(connection, process.process_id, counted)
        connection.execute("SET LOCAL synchronous_commit TO on")
    return skew


def leave(pool: Pool, process_id: UUID) -> None:
    """Delete the row of a process that ends; raises Unavailable soon if Postgres does not answer."""
    with transaction(pool, LEAVE_SECONDS) as connection:
        connection.execute(f"SET LOCAL lock_timeout = {int(LEAVE_SECONDS * 500)}")
        connection.execute("DELETE FROM processes WHERE process_id = %s", (process_id,))


def longest_running(pool: Pool, role: str, patience: float) -> UUID | None:
    """Return the process of a role that is alive and started first; raises Unavailable."""
    with transaction(pool, patience) as connection:
        row = connection.execute(
            "SELECT process_id FROM processes WHERE role = %s"
            " AND seen_at > clock_timestamp() - make_interval(secs => %s)"
            " ORDER BY started_at, process_id LIMIT 1",
            (role, ALIVE_SECONDS),
        ).fetchone()
    return row[0] if row else None


def forget(pool: Pool) -> None:
    """Delete the rows of processes that ended long ago without a word."""
    with transaction(pool) as connection:
        connection.execute(f"DELETE FROM processes WHERE seen_at < now() - interval '{KEPT}'")


def known(pool: Pool) -> list[tuple[Process, float]]:
    """Return the processes, and how many seconds ago each was seen, by role, host and start."""
    names = ", ".join(Process.__struct_fields__)
    with transaction(pool) as connection:
        rows = connection.execute(
            f"SELECT {names}, extract(epoch FROM clock_timestamp() - seen_at)::float8 FROM processes"
            " ORDER BY role, host, started_at"
        ).fetchall()
    return [
        (Process(**dict(zip(Process.__struct_fields__, row, strict=False))), float(row[-1])) for row in rows
    ]
