"""Connection pool, transactions, and conversion of values for Postgres.

The module knows nothing about the contents of tokens. A temporary failure of Postgres is raised as
`Unavailable`, and the transaction leaves nothing behind. Every wait for Postgres has a deadline. A commit
that is not confirmed in time, by Postgres or by its synchronous standby, is `Unavailable`, too: Postgres may
have committed, so a repeated request may find its record, and reading a record waits for the standby again.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import psycopg
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine as Pool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

import schemas
from minter.errors import Unavailable

CONTROL_LOCK = 0x6D696E74  # "mint"; recording holds the lock shared, changes of control tables exclusively

QUICK_SECONDS = 6.0
"""Longest wait for one answer of Postgres while a caller waits; a commit gives up before (COMMIT_SECONDS)."""
PATIENCE_SECONDS = 60.0
"""Longest wait for one answer of Postgres elsewhere; work on many rows asks for LONG_SECONDS."""
LONG_SECONDS = 3_600.0
COMMIT_SECONDS = 5.0
"""How long a commit may wait for the synchronous standby; shorter than any wait for its answer."""
COMMIT_SHARE = 0.6
"""A commit gives up after this share of the patience, so that its error can name the standby."""
CANCEL_SECONDS = 0.5
SLOW_SECONDS = 3.0
"""A command says what it waits for after this time."""
_WARNING = "01000"
"""SQLSTATE of the warning that a commit did not wait for its standby; others have their own."""

PASSING = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)
"""Errors that pass: Postgres is away, or is not the primary any more."""


_UNKNOWN = (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.UndefinedFunction)
"""Errors of a release that runs before `minter db upgrade`."""

SCHEMA = max(path.name[:4] for path in Path(schemas.__file__).parent.glob("migrations/versions/[0-9]*.py"))
"""Revision of the schema that this release needs; revisions are numbers of four digits."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection whose waits for Postgres end after `patience` seconds, with an OperationalError."""

    patience = LONG_SECONDS
    most_patience = math.inf
    committing = False
    warned = ""
    on_slow: Callable[[str], None] = staticmethod(lambda _: None)
    """Called with what is waited for when a wait takes SLOW_SECONDS; commands print it."""
    last: Sequence[tuple[str, Sequence[Any]]] = ()
    """Statements and their values that are sent together with the commit, in one round trip."""

    def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **named: Any) -> Any:
        """Drive an exchange with the server; raises OperationalError after `patience` seconds."""
        return super().wait(self._bounded(gen), *arguments, **named)

    def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        started, told = time.monotonic(), False
        try:
            state = next(gen)
            while True:
                ready = yield state
                if not ready:
                    waited = time.monotonic() - started
                    if self.committing and waited > min(COMMIT_SECONDS, COMMIT_SHARE * self.patience):
                        self.committing = False
                        self._cancel()
                    if waited > self.patience:
                        self._cancel()  # a server process does not notice that its client is gone
                        self.pgconn.finish()  # else the end of a pipeline would raise an error of its own
                        raise psycopg.OperationalError(f"no answer within {self.patience:g} s")
                    if waited > SLOW_SECONDS and not told:
                        told = True
                        self.on_slow(f"Postgres at {self.info.host}:{self.info.port}")
                state = gen.send(ready)
        except StopIteration as done:
            return done.value

    def _cancel(self) -> None:
        """Ask the server to end what it does for this connection; a frozen server does not answer."""
        with suppress(psycopg.Error):
            self.cancel_safe(timeout=CANCEL_SECONDS)

    def commit_bounded(self) -> None:
        """Run `last` and commit; raises Unavailable if no synchronous standby confirms within COMMIT_SECONDS.

        `statement_timeout` does not cover a commit. A cancel request ends its wait for the standby with a
        warning, not with an error.
        """
        self.warned, self.committing = "", True
        try:
            if self.last:
                with self.pipeline():
                    for statement, values in self.last:
                        self.execute(statement, values)
                    self.execute("COMMIT")  # `commit` would wait once more
            else:
                self.commit()
        finally:
            self.committing = False
        if self.warned:
            raise Unavailable(
                "Postgres waited for its synchronous standby in vain; nothing was handed out. Is the "
                "standby away? Requests are served again when it is back",
                retry_after=COMMIT_SECONDS,
            )

    def note(self, notice: "psycopg.errors.Diagnostic") -> None:
        """Remember the warning that a commit did not wait for its standby."""
        if notice.sqlstate == _WARNING:
            self.warned = notice.message_primary or "warning"


def open_pool(dsn: str, size: int = 2, connect_seconds: int = 5, most_patience: float = math.inf) -> Pool:
    """Return a connection pool; connections keep no session state, so PgBouncer may be used.

    No wait for an answer is longer than `most_patience` seconds, whatever a transaction allows.

    synchronous_commit is set for each recording transaction (`PostgresStore.recording`), not per session.
    """

    def connect() -> BoundedConnection:
        made = BoundedConnection.connect(dsn, prepare_threshold=None, connect_timeout=connect_seconds)
        made.add_notice_handler(made.note)
        made.most_patience = most_patience
        return made

    return create_engine("postgresql+psycopg://", creator=connect, pool_size=size, max_overflow=size)


def why(error: BaseException) -> str:
    """Return the cause of a failed connection, as libpq tells it: no secret is in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextmanager
def transaction(pool: Pool, patience: float = PATIENCE_SECONDS) -> Iterator[BoundedConnection]:
    """Yield a driver connection in a transaction; raises Unavailable for temporary failures.

    `patience` is the longest wait for one answer of Postgres, in seconds.
    """
    try:
        pooled = pool.raw_connection()
    except PASSING as error:
        raise Unavailable(f"no connection to Postgres: {why(error)}") from error
    except DBAPIError as error:  # of SQLAlchemy's own questions on its first connection
        raise Unavailable(f"no connection to Postgres: {why(error.orig or error)}") from error
    except PoolTimeout as error:
        raise Unavailable("all connections to Postgres are in use; they wait for it") from error
    driver: BoundedConnection = pooled.driver_connection  # type: ignore[assignment]
    driver.patience, driver.last = min(patience, driver.most_patience), ()
    try:
        yield driver
        driver.commit_bounded()
    except BaseException as error:
        rolled_back = not isinstance(error, PASSING) and _rolled_back(driver)
        old = rolled_back and isinstance(error, _UNKNOWN) and _is_old(driver)
        temporary = _temporary(error, lost=not rolled_back, old=old)
        if not rolled_back or driver.warned:  # a late cancel request must not meet the next statement
            pooled.invalidate()
        if temporary is not None:
            raise temporary from error
        raise
    finally:
        if not driver.closed:
            driver.autocommit = False
            driver.patience = LONG_SECONDS
        pooled.close()


def _temporary(error: BaseException, lost: bool, old: bool) -> Unavailable | None:
    """Return the error of a failure that passes, None for another.

    `lost` says that the connection is gone, `old` that the schema is of an earlier release.
    """
    if isinstance(error, PASSING):
        return Unavailable(f"Postgres failed during the transaction ({why(error)}); nothing was handed out")
    if old:
        return Unavailable(f"the schema is older than this release ({error}); run: minter db upgrade"[:300])
    if isinstance(error, psycopg.errors.CheckViolation) and "no partition of relation" in str(error):
        return Unavailable("no partition for this day; is beat running? (minter db upgrade makes them too)")
    if lost and isinstance(error, psycopg.Error | ValueError):  # psycopg's when PgBouncer cuts a COPY
        return Unavailable("the connection to Postgres was lost; nothing was handed out")
    return None


def _is_old(driver: BoundedConnection) -> bool:
    """Say whether the schema is older than this release needs; requests then wait for its upgrade."""
    try:
        row = driver.execute("SELECT version_num FROM alembic_version").fetchone()
    except psycopg.Error:
        row = None
    _rolled_back(driver)
    return row is None or str(row[0]) < SCHEMA


def _rolled_back(driver: BoundedConnection) -> bool:
    """Roll a transaction back; return False if the connection is lost."""
    if driver.closed:
        return False
    try:
        driver.rollback()
    except PASSING:
        driver.close()
        return False
    return True


def one(cursor: "psycopg.Cursor[Any]") -> Any:
    """Return the first row of a query; raises Unavailable if there is none: the database was not upgraded."""
    row = cursor.fetchone()
    if row is None:
        raise Unavailable("the control row is missing; run: minter db upgrade")
    return row


def synchronous_standbys(connection: "psycopg.Connection[Any]") -> str:
    """Return Postgres's setting `synchronous_standby_names`, empty if a commit waits for no standby."""
    return str(one(connection.execute("SHOW synchronous_standby_names"))[0])


def floor(instant: datetime) -> UUID:
    """Return the smallest UUIDv7 of an instant (milliseconds, RFC 9562 §5.7); 0 for all before 1970."""
    return UUID(int=max(0, int(instant.timestamp() * 1000)) << 80)


def instant(numeric_date: int) -> datetime:
    """Return a NumericDate (RFC 7519 §2) as an aware datetime."""
    return datetime.fromtimestamp(numeric_date, UTC)


# ── writing ──────────────────────────────────────────────────────────────────────────────────


def plain_text(text: str) -> str:
    """Return a text without NUL characters, which Postgres cannot store."""
    return text.replace("\x00", "")


def json_text(value: object) -> str:
    """Return a value as JSON without NUL characters, which Postgres cannot store."""
    text = msgspec.json.encode(value).decode()
    return msgspec.json.encode(_without_nul(value)).decode() if "\\u0000" in text else text


def _without_nul(value: object) -> object:
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, dict):
        return {plain_text(str(k)): _without_nul(v) for k, v in value.items()}
    return [_without_nul(v) for v in value] if isinstance(value, list | tuple) else value
