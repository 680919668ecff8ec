"""Connection pool, transactions, and conversion of values for Postgres.

The module knows nothing about the contents of tokens. A temporary failure of Postgres is raised as
`Unavailable`, and the transaction leaves nothing behind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import psycopg
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine as Pool

from minter.errors import Unavailable

CONTROL_LOCK = 0x6D696E74  # "mint"; recording holds the lock shared, changes of control tables exclusively

_PASSING = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)


def open_pool(dsn: str, size: int = 2) -> Pool:
    """Return a connection pool; connections keep no session state, so PgBouncer may be used.

    synchronous_commit is set for each recording transaction (`PostgresStore.recording`), not per session.
    """
    return create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(dsn, prepare_threshold=None, connect_timeout=5),
        pool_size=size,
        max_overflow=size,
    )


@contextmanager
def transaction(pool: Pool) -> Iterator["psycopg.Connection[Any]"]:
    """Yield a driver connection in a transaction; raises Unavailable for temporary failures."""
    try:
        pooled = pool.raw_connection()
    except _PASSING as error:
        raise Unavailable(f"Postgres cannot be reached ({type(error).__name__})") from error
    driver: psycopg.Connection[Any] = pooled.driver_connection  # type: ignore[assignment]
    try:
        yield driver
        driver.commit()
    except _PASSING as error:
        pooled.invalidate()
        raise Unavailable(
            f"Postgres failed during the transaction ({type(error).__name__}); nothing was handed out"
        ) from error
    except psycopg.errors.CheckViolation as error:
        driver.rollback()
        if "no partition of relation" in str(error):
            raise Unavailable(
                "no partition for this day; is beat running? (minter db upgrade makes them too)"
            ) from error
        raise
    except BaseException:
        if not driver.closed:
            driver.rollback()
        raise
    finally:
        if not driver.closed:
            driver.autocommit = False
        pooled.close()


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
