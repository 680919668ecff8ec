"""Retention: moves days whose tokens expired long ago from the database to compressed files.

Each day becomes one file for each kind (tokens, requests), as JSON lines that can be read without a
database. The file is complete and synced to disk under its final name before the day's partitions are
detached (CONCURRENTLY, so that no query waits) and dropped. After a crash at any point the next run
completes the work: it rewrites a partial file, does not write a partition again that is already in its
file, and drops a detached partition that is in its file.
"""

import fcntl
import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Literal
from uuid import UUID

import msgspec
import psycopg
from sqlalchemy.engine import Engine as Pool

from minter.contract.messages import instant_of
from minter.database.connection import LONG_SECONDS, one, transaction
from minter.database.partitions import bounds, day_of
from minter.database.traces import AROUND, COLUMNS, USES, Refusals, TraceRecord, matches, story, wanted
from minter.errors import SettingsError, Unavailable
from minter.policy.limits import LAST_EXPIRY

FETCH_ROWS = 5_000
Kind = Literal["tokens", "requests"]
TABLES: dict[Kind, tuple[str, ...]] = {
    "tokens": ("tokens", "uses", "token_states"),
    "requests": ("requests",),
}
"""Tables whose partitions of a day are dropped once the file of each kind is written.

A shared token has one trace for each use. All of them are in the file of the day on which the token was
made, also those of uses on later days: when the file is written the token has expired, and the
partitions of the later days still exist. The uses of a day belong to tokens of that day or of earlier
days.
"""

_encode = msgspec.json.Encoder().encode
_story = msgspec.json.Decoder(TraceRecord).decode
_refused = msgspec.json.Decoder(Refusals).decode


def due(pool: Pool, now: datetime, retention_days: int) -> list[tuple[Kind, date]]:
    """Return the days that are due for archiving, with their kinds, oldest first.

    A day of tokens is due when all its tokens expired at least `retention_days` ago. A day of requests is
    due `retention_days` later: a request_id may be used for `retention_days`, and the traces of the
    request's tokens contain the request.
    """
    last: dict[Kind, date] = {
        "tokens": (now - timedelta(days=retention_days) - LAST_EXPIRY).date(),
        "requests": (now - timedelta(days=2 * retention_days) - LAST_EXPIRY).date(),
    }
    return sorted(
        {(kind, day) for table, day, _ in _partitions(pool) for kind in _kinds(table) if day <= last[kind]},
        key=lambda x: (x[1], x[0]),
    )


def archive_day(pool: Pool, folder: Path, kind: Kind, day: date) -> tuple[Path, int]:
    """Write one day's file, then detach and drop its partitions; return its path and number of lines.

    Raises SettingsError if the folder cannot be written. Raises Unavailable if Postgres cannot be used, if
    another run archives to the folder, or if the file and the database contradict each other.
    """
    path = folder / f"{kind}-{day:%Y%m%d}.jsonl.gz"
    with _alone(folder):
        return path, _archive(pool, path, kind, day)


def _archive(pool: Pool, path: Path, kind: Kind, day: date) -> int:
    present = {table: attached for table, that, attached in _partitions(pool) if that == day}
    held = sum(1 for _ in _lines(path)) if path.exists() else 0
    if kind in present and all(present.get(table, True) for table in TABLES[kind]):
        with transaction(pool, LONG_SECONDS) as connection:
            there = sum(one(connection.execute(query, bounds(day)))[0] for query in _COUNTS[kind])
        if held > there > 0:
            raise Unavailable(f"archive {path} has {held} lines and the database {there}; move the file away")
        count = held if held >= there and held else _write(pool, path, kind, day)
    elif kind in present and not path.exists():  # detached by other means; its rows are in no file
        raise Unavailable(
            f"a partition of {kind} of {day} is detached, and {path} is not there; attach it again"
        )
    else:
        count = held
    if kind == "requests":
        with transaction(pool, LONG_SECONDS) as connection:
            connection.execute(
                "DELETE FROM jobs WHERE reported_at < %s", (datetime.combine(day, time(), UTC),)
            )
    for table in TABLES[kind]:
        if table in present:
            _remove(pool, table, f"{table}_{day:%Y%m%d}", attached=present[table])
    return count


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder for this run; raises SettingsError, or Unavailable while another run holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o640)
    except OSError as error:
        raise SettingsError(f"archive folder {folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Unavailable(f"another run archives to {folder}") from None
    finally:
        os.close(lock)


def find(
    folder: Path, by: str, value: object, since: datetime, until: datetime, limit: int = 100
) -> list[TraceRecord]:
    """Find tokens in archives as `traces.find` does in the database, newest day first."""
    held = wanted(by, value)
    found: list[TraceRecord] = []
    # The trace of a use is in the file of the day on which its token was made.
    for path in reversed(_files(folder, "tokens", since - LAST_EXPIRY, until)):
        found += [
            one
            for one in map(_story, _lines(path))
            if matches(one, by, held) and since <= one.issued_at < until
        ]
        if len(found) >= limit:
            break
    return found


def find_request(folder: Path, request_id: UUID, until: datetime) -> tuple[list[TraceRecord], list[Refusals]]:
    """Find a request's refusals in the file of its day, and its tokens in files of several days.

    The request may have been received after the day in its request_id, so files up to `until` are read. It
    may use older shared tokens, so files from LAST_EXPIRY before that day are read.
    """
    sent = instant_of(request_id)
    if sent is None:
        return [], []
    refusals = [
        one
        for path in _files(folder, "requests", sent, sent)
        for one in map(_refused, _lines(path))
        if one.request_id == request_id
    ]
    found: list[TraceRecord] = []
    for path in _files(folder, "tokens", sent - LAST_EXPIRY, until):
        if found and path.name > f"tokens-{found[0].issued_at:%Y%m%d}.jsonl.gz":
            break  # a request's tokens and uses have ids of one moment; tokens that it uses are older
        found += [one for one in map(_story, _lines(path)) if one.request_id == request_id]
    return found, refusals


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as lines:
        yield from lines


def _files(folder: Path, kind: Kind, since: datetime, until: datetime) -> list[Path]:
    first, last = (f"{kind}-{day:%Y%m%d}.jsonl.gz" for day in (since, until))
    return sorted(p for p in folder.glob(f"{kind}-*.jsonl.gz") if first <= p.name <= last)


def _kinds(table: str) -> list[Kind]:
    return [kind for kind, tables in TABLES.items() if table in tables]


def _partitions(pool: Pool) -> list[tuple[str, date, bool]]:
    """Return the daily partitions, attached or not, as (table, day, attached)."""
    with transaction(pool, LONG_SECONDS) as connection:
        rows = connection.execute(
            "SELECT c.relname, EXISTS (SELECT FROM pg_inherits i"
            " WHERE i.inhrelid = c.oid AND NOT i.inhdetachpending)"
            " FROM pg_class c WHERE c.relkind = 'r' AND c.relnamespace = current_schema()::regnamespace"
            " AND c.relname ~ '^(tokens|uses|token_states|requests)_[0-9]{8}$'"
        ).fetchall()
    return [(name.rpartition("_")[0], day_of(name), attached) for name, attached in rows]


def _write(pool: Pool, path: Path, kind: Kind, day: date) -> int:
    """Write and sync a day's file, which gets its final name when complete; return its number of lines."""
    partial = path.with_suffix(".partial")
    count = 0
    try:
        with (
            os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640), "wb") as file,
            gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed,
            transaction(pool, LONG_SECONDS) as connection,
        ):
            # One snapshot: a report made meanwhile is wholly in the file or wholly missing from it.
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            for query in _QUERIES[kind]:
                with connection.cursor("archive") as cursor:
                    cursor.itersize = FETCH_ROWS
                    cursor.execute(query, bounds(day))
                    for row in cursor:
                        told = story(row) if kind == "tokens" else Refusals(*row)
                        packed.write(_encode(told) + b"\n")
                        count += 1
            packed.close()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise SettingsError(f"archive {path} cannot be written: {error.strerror}") from error
    return count


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


_TOKENS = "t.jti >= %s AND t.jti < %s"
_REFUSED = (
    " FROM requests r JOIN clients c USING (client_id) WHERE r.request_id >= %s AND r.request_id < %s"
    " AND (r.error IS NOT NULL OR r.refusals IS NOT NULL)"
)
# Tokens of one file have no uses; joined like the others, each would be looked for in all days of `uses`.
_ALONE, _SHARED = "CROSS JOIN (SELECT (NULL::uses).*) u", USES
_QUERIES: dict[Kind, list[str]] = {
    "tokens": [
        f"SELECT {COLUMNS} FROM tokens t {uses} {AROUND} WHERE {_TOKENS} AND t.file {which} 0 ORDER BY t.jti"
        for uses, which in ((_ALONE, ">="), (_SHARED, "<"))
    ],
    "requests": [
        "SELECT r.request_id, c.name, r.received_at, r.error, coalesce(r.refusals, '[]')"
        + _REFUSED
        + " ORDER BY 1"
    ],
}
# Of the joins around a token only that of uses adds rows, so counting rows needs no other join.
_COUNTS: dict[Kind, list[str]] = {
    "tokens": [
        f"SELECT count(*) FROM tokens t {uses} WHERE {_TOKENS} AND t.file {which} 0"
        for uses, which in (("", ">="), (_SHARED, "<"))
    ],
    "requests": [f"SELECT count(*) {_REFUSED}"],
}


def _remove(pool: Pool, table: str, partition: str, *, attached: bool) -> None:
    """Detach a partition without blocking queries, then drop it; raises Unavailable if it stays in use."""
    with transaction(pool, LONG_SECONDS) as connection:
        connection.autocommit = True  # DETACH CONCURRENTLY is not allowed in a transaction
        pending = connection.execute(
            "SELECT FROM pg_inherits WHERE inhrelid = %s::regclass AND inhdetachpending", (partition,)
        ).fetchone()
        try:
            if pending is not None:
                connection.execute(f"ALTER TABLE {table} DETACH PARTITION {partition} FINALIZE")
            elif attached:
                connection.execute(f"ALTER TABLE {table} DETACH PARTITION {partition} CONCURRENTLY")
            connection.execute(f"DROP TABLE {partition}")
        except psycopg.errors.LockNotAvailable as error:
            raise Unavailable(f"partition {partition} is in use; the next run removes it") from error
