"""What `minter status` says: one line for each part of the system, each asked for by itself.

Nothing here changes anything. A part that cannot be asked gives a failed line, and the others are asked all
the same. A line is `ok`, `warning` (look at it today) or `failed` (requests wait, or soon will).
"""

import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import kombu
import psycopg
from cryptography import x509
from sqlalchemy.engine import Engine as Pool

from minter import __version__
from minter.broker.connections import connect, nodes, opened
from minter.broker.publisher import Outgoing, Publisher, count_waiting
from minter.contract import names
from minter.database import (
    control_changes,
    migrations,
    overview,
    partitions,
    processes,
)
from minter.database.connection import open_pool
from minter.errors import MinterError, Unavailable
from minter.key_status import issuer_lines, key_lines, published_lines
from minter.lines import LEVELS, SECONDS, Level, Line, failed, ok, warning
from minter.service import Service
from minter.settings import Loaded
from minter.tokens.clock import check_clock, new_uuid7

logger = logging.getLogger(__name__)

CERTIFICATE_DAYS = 14
"""A certificate that ends sooner gives a warning."""
QUEUE_LONG = 10_000
"""Waiting requests that give a warning."""
EVENTS_SILENT = timedelta(hours=1)
"""A broker of FTS that has sent nothing for longer gives a warning."""
DISK_LOW, DISK_FULL = 0.15, 0.03
"""Free shares of a disk below which there is a warning, and a failure."""
EPOCH = datetime.fromtimestamp(0, UTC)
CONNECTIONS_LEFT = 10
"""Free connections of Postgres below which there is a warning."""


def keep_looking(look: Callable[[], None], seconds: float) -> None:
    """Call a function in a thread of its own, now and again after so many seconds; its errors are logged."""

    def run() -> None:
        pause = threading.Event()
        while True:
            try:
                look()
            except Exception:
                logger.exception("the state of the system could not be asked")
            pause.wait(seconds)

    threading.Thread(target=run, name="status", daemon=True).start()


def lines(loaded: Loaded) -> list[Line]:
    """Return the state of every part; never raises for a part that is down."""
    service = Service(loaded)
    service.pool = pool = open_pool(loaded.dsn, 2, 2)
    parts: list[tuple[str, Callable[[], Iterator[Line]]]] = [
        ("postgres", lambda: _postgres(pool, service)),
        ("processes", lambda: _processes(pool, loaded)),
        ("broker", lambda: _broker(pool, loaded)),
        ("FTS events", lambda: _events(pool, loaded)),
        ("disk", lambda: _disk(pool, loaded)),
        ("keys", lambda: key_lines(pool, service)),
        ("issuers", lambda: issuer_lines(pool, loaded)),
        ("published keys", lambda: published_lines(pool, loaded, service.clock())),
        ("providers", lambda: _providers(pool, loaded, service.clock())),
        ("certificates", lambda: _certificates(loaded, service.clock())),
    ]
    found: list[Line] = []
    try:
        for part, ask in parts:
            try:
                found += ask()
            except MinterError as error:
                found.append(failed(part, error.message))
            except (OSError, ValueError, psycopg.Error) as error:
                found.append(failed(part, f"{type(error).__name__}: {error}"[:300]))
    finally:
        pool.dispose()
    return found


def worst(found: Sequence[Line]) -> Level:
    """Return the worst level of all lines."""
    return max((line.level for line in found), key=LEVELS.index, default="ok")


def by_part(found: Iterable[Line]) -> dict[str, Level]:
    """Return the worst level of each part."""
    parts: dict[str, Level] = {}
    for line in found:
        parts[line.part] = max(line.level, parts.get(line.part, "ok"), key=LEVELS.index)
    return parts


# ── Postgres ─────────────────────────────────────────────────────────────────────────────────


def _postgres(pool: Pool, service: Service) -> Iterator[Line]:
    found = overview.server(pool, SECONDS)
    free = found.max_connections - found.connections
    yield ok("postgres", f"version {found.version}, database {found.size}, {free} connections free")
    if free < CONNECTIONS_LEFT:
        yield warning("postgres", f"only {free} connections are free; raise max_connections")
    if found.read_only:
        yield failed("postgres", "this server is a standby: nothing can be written; correct the DSN")
    try:
        check_clock((service.clock() - found.now).total_seconds())
        yield ok("clock", "this machine and Postgres agree")
    except Unavailable as error:
        yield failed("clock", error.message)
    in_step = [kind for _, state, kind in found.standbys if state == "streaming" and kind != "async"]
    told = ", ".join(f"{name} {state} {kind}" for name, state, kind in found.standbys) or "none connected"
    if not found.wanted_standbys:
        yield warning("standby", f"commits wait for none ({told}): a lost disk loses rows of issued tokens")
    elif found.standbys and all(state is None for _, state, _ in found.standbys):
        yield warning("standby", "its state is hidden from this role; run: GRANT pg_monitor TO minter")
    elif not in_step:
        yield failed("standby", f"commits wait for {found.wanted_standbys!r}, and none is in step ({told})")
    else:
        yield ok("standby", told)
    yield from _schema(pool, service)


def _schema(pool: Pool, service: Service) -> Iterator[Line]:
    try:
        revision = migrations.check(pool)
    except Unavailable as error:
        yield failed("schema", error.message)
        return
    yield ok("schema", f"revision {revision}")
    ahead = partitions.partitions_ahead(pool, service.clock().date())
    level: Level = "ok" if ahead >= partitions.DAYS_AHEAD // 2 else "warning" if ahead else "failed"
    yield Line(level, "partitions", f"{ahead} days ahead" + ("" if level == "ok" else "; is beat running?"))


# ── processes and broker ─────────────────────────────────────────────────────────────────────


def _processes(pool: Pool, loaded: Loaded) -> Iterator[Line]:
    expected = {"worker", "beat", "serve"}
    expected |= {"refresher"} if loaded.settings.providers else set()
    expected |= {"events"} if loaded.settings.fts_events else set()
    alive: Counter[str] = Counter()
    for process, ago in processes.known(pool):
        where = f"{process.role} on {process.host}, pid {process.pid}"
        if ago > processes.ALIVE_SECONDS:
            yield warning(process.role, f"{where}: no heartbeat for {timedelta(seconds=round(ago))}")
            continue
        alive[process.role] += 1
        try:
            check_clock(process.skew_seconds)
        except Unavailable:
            yield Line("failed", process.role, f"{where}: clock {process.skew_seconds:.0f} s off; repair NTP")
        if process.version != __version__:
            yield warning(process.role, f"{where}: version {process.version}, here {__version__}")
    for role in sorted(expected | alive.keys()):
        count = alive[role]
        level: Level = "ok" if count else "failed" if role == "worker" else "warning"
        told = f"{count} running" + (", one of them acts" if role == "beat" and count > 1 else "")
        yield Line(level, role, told if count else f"none running; start: minter {role}")


def _broker(pool: Pool, loaded: Loaded) -> Iterator[Line]:
    if not loaded.broker_url:
        yield warning("broker", "no broker URL is set: only HTTP is served")
        return
    with opened(connect(loaded.broker_url, loaded.broker_ca, SECONDS)) as connection:
        where = f"{connection.transport.driver_name} at {connection.host}"
        if takes_messages(loaded):
            yield ok("broker", where)
        else:
            yield failed("broker", f"{where} takes no messages: see its memory and disk alarms")
        yield from _nodes(loaded)
        yield _requests(connection, pool)
        for queue in (names.INTERNAL_QUEUE, names.DEAD_LETTER_QUEUE):
            yield _queue(connection, queue)


def _nodes(loaded: Loaded) -> Iterator[Line]:
    """Yield a line for the nodes of a cluster, each of which is connected to."""
    urls = nodes(loaded.broker_url)
    silent = []
    for url in urls if len(urls) > 1 else ():
        connection = connect(url, loaded.broker_ca, SECONDS)
        try:
            with opened(connection):
                pass
        except Unavailable:
            silent.append(str(connection.hostname))
    if silent:
        yield warning("broker", f"{len(silent)} of {len(urls)} nodes do not answer: {', '.join(silent)}")
    elif len(urls) > 1:
        yield ok("broker", f"all {len(urls)} nodes answer")


def takes_messages(loaded: Loaded) -> bool:
    """Say whether the broker takes a message; RabbitMQ reads none while a memory or disk alarm is on.

    The messages go to no queue, and RabbitMQ confirms and returns them. A blocked one takes the first message
    of each connection.
    """
    publisher = Publisher(connect(loaded.broker_url, loaded.broker_ca, SECONDS), SECONDS)
    try:
        for _ in range(2 if publisher.confirms else 0):
            publisher.publish([Outgoing(b"", f"minter.status.{new_uuid7()}")])
    except (ConnectionError, TimeoutError):
        return False
    finally:
        publisher.close()
    return True


def _requests(connection: kombu.Connection, pool: Pool) -> Line:
    """Return the line of all queues for requests, which names the longest."""
    clients: list[str] = []
    with suppress(Unavailable):  # the lines of Postgres say it; the common queue can be asked all the same
        clients = control_changes.client_names(pool, SECONDS)
    counts = {queue: count_waiting(connection, queue) for queue in map(names.client_requests, clients)}
    counts[names.REQUEST_QUEUE] = count_waiting(connection, names.REQUEST_QUEUE)
    if counts[names.REQUEST_QUEUE] is None:
        return failed(names.REQUEST_QUEUE, "does not exist; run: minter broker setup")
    waiting = {queue: count for queue, count in counts.items() if count}
    total = sum(waiting.values())
    most = max(waiting, key=waiting.__getitem__, default="")
    client = most.removeprefix(names.client_requests(""))
    told = f"{total} waiting" + (f", most of client {client}" if client != most else "")
    return Line("warning" if total > QUEUE_LONG else "ok", names.REQUEST_QUEUE, told)


def _queue(connection: kombu.Connection, queue: str) -> Line:
    count = count_waiting(connection, queue)
    if count is None:
        return failed(queue, "does not exist; run: minter broker setup")
    if queue == names.DEAD_LETTER_QUEUE:
        level: Level = "warning" if count else "ok"
        return Line(level, queue, f"{count} dead letters" + ("; see: minter dead list" if count else ""))
    return Line("warning" if count > QUEUE_LONG else "ok", queue, f"{count} waiting")


# ── FTS's messages, and disks ────────────────────────────────────────────────────────────────


def _events(pool: Pool, loaded: Loaded) -> Iterator[Line]:
    """Yield a line for each broker of FTS: when its last message came to a process of the last day."""
    last: dict[str, datetime] = {}
    for process, _ in processes.known(pool):
        for broker, at in process.facts.get("last_events", {}).items():
            last[broker] = max(datetime.fromisoformat(at), last.get(broker, EPOCH))
    now = datetime.now(UTC)
    for broker in dict.fromkeys(b for wanted in loaded.settings.fts_events for b in wanted.brokers):
        if broker not in last:
            yield warning("FTS events", f"no message of {broker} since minter events started")
        else:
            ago = timedelta(seconds=round((now - last[broker]).total_seconds()))
            level: Level = "warning" if ago > EVENTS_SILENT else "ok"
            yield Line(level, "FTS events", f"last message of {broker} {ago} ago")


def _disk(pool: Pool, loaded: Loaded) -> Iterator[Line]:
    """Yield a line for each disk of this machine that Postgres or the archive is on."""
    folders = {"archive": loaded.archive_folder, "postgres": overview.data_folder(pool, SECONDS)}
    for what, folder in folders.items():
        if folder is None or not os.access(folder, os.F_OK):
            continue  # not known, not for this user's eyes, or on another machine
        disk = shutil.disk_usage(folder)
        share = disk.free / disk.total
        level: Level = "failed" if share < DISK_FULL else "warning" if share < DISK_LOW else "ok"
        yield Line(level, "disk", f"{share:.0%} free ({disk.free >> 30} GiB) for {what} at {folder}")


# ── providers and certificates ───────────────────────────────────────────────────────────────


def _providers(pool: Pool, loaded: Loaded, now: datetime) -> Iterator[Line]:
    if not loaded.settings.providers:
        return
    for name, open_until, failures, pending, issued in overview.providers(pool, SECONDS):
        if name not in {p.name for p in loaded.settings.providers}:
            continue
        told = f"{pending} tokens pending, {issued} kept fresh"
        if open_until and open_until > now:
            yield failed(
                f"provider {name}", f"paused until {open_until:%T} after {failures} failures; {told}"
            )
        else:
            yield ok(f"provider {name}", told)


def _certificates(loaded: Loaded, now: datetime) -> Iterator[Line]:
    if file := loaded.settings.http.certificate:
        chain = x509.load_pem_x509_certificates((loaded.folder / file).read_bytes())
        end = min(c.not_valid_after_utc for c in chain)
        left = end - now.astimezone(UTC)
        level: Level = "failed" if left < timedelta() else "warning" if left.days < CERTIFICATE_DAYS else "ok"
        yield Line(level, "certificate", f"{file} is valid until {end:%F %H:%M}")
