"""Housekeeping: partitions made in advance, redelivery counts, and deletion of rows no longer needed."""

from collections.abc import Collection
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

from sqlalchemy.engine import Engine as Pool

from minter.database import managed
from minter.database.connection import LONG_SECONDS, QUICK_SECONDS, floor, one, transaction

DAYS_AHEAD = 7
GRACE_DAYS = 7
PARTITIONED = ("requests", "tokens", "uses", "token_states")
_PARTITION_LOCK = 0x6D696E75


def make_partitions(pool: Pool, today: date, retention_days: int) -> list[str]:
    """Make missing daily partitions, a week ahead and back to the oldest request_id that is accepted.

    Returns the names of the new partitions.
    """
    made = []
    with transaction(pool, LONG_SECONDS) as connection:
        connection.execute("SET LOCAL lock_timeout TO '5s'")  # better late partitions than late requests
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_PARTITION_LOCK,))
        known = {
            name
            for (name,) in connection.execute(
                "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                " JOIN pg_class p ON p.oid = i.inhparent WHERE p.relname = ANY(%s)",
                (list(PARTITIONED),),
            ).fetchall()
        }
        wanted = {
            f"{table}_{day:%Y%m%d}": (table, day)
            for table in PARTITIONED
            for day in _days(table, today, retention_days, known)
        }
        for name, (table, day) in wanted.items():
            if name in known:
                continue
            first, last = bounds(day)
            # CREATE ... PARTITION OF would wait for all readers of the table, and all recording for it.
            connection.execute(f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL)")
            connection.execute(
                f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ('{first}') TO ('{last}')"
            )
            made.append(name)
    return made


def day_of(partition: str) -> date:
    """Return the day that a partition's name ends in."""
    return datetime.strptime(partition.rpartition("_")[2], "%Y%m%d").replace(tzinfo=UTC).date()


def bounds(day: date) -> tuple[UUID, UUID]:
    """Return the first UUIDv7 of a day, and of the next."""
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return floor(start), floor(start + timedelta(days=1))


def _days(table: str, today: date, retention_days: int, known: Collection[str]) -> set[date]:
    """Return the days whose partitions a table needs; `uses` and `token_states` need all days of `tokens`."""
    back = retention_days + 1 if table == "requests" else 1
    days = {today + timedelta(days=n) for n in range(-back, DAYS_AHEAD + 1)}
    if table in ("uses", "token_states"):
        days |= {day_of(name) for name in known if name.startswith("tokens_")}
    return days


def partitions_ahead(pool: Pool, today: date) -> int:
    """Return the number of days after `today` for which `tokens` has a partition."""
    with transaction(pool, LONG_SECONDS) as connection:
        rows = connection.execute(
            "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
            " JOIN pg_class p ON p.oid = i.inhparent WHERE p.relname = 'tokens'"
            " AND c.relname > %s",
            (f"tokens_{today:%Y%m%d}",),
        ).fetchall()
    return len(rows)


# ── redelivery counts ────────────────────────────────────────────────────────────────────────


def count_redelivery(pool: Pool, digest: bytes) -> int:
    """Increment and return a message's redelivery count; this is committed before the message is tried."""
    with transaction(pool, QUICK_SECONDS) as connection:
        row = one(
            connection.execute(
                "INSERT INTO suspects (digest, attempts) VALUES (%s, 1) ON CONFLICT (digest)"
                " DO UPDATE SET attempts = suspects.attempts + 1, seen_at = now()"
                " RETURNING attempts",
                (digest,),
            )
        )
    return int(row[0])


def clear_redelivery(pool: Pool, digest: bytes) -> None:
    """Delete the redelivery count of a message that was served or dead-lettered."""
    with transaction(pool, QUICK_SECONDS) as connection:
        connection.execute("DELETE FROM suspects WHERE digest = %s", (digest,))


def prune_ended(pool: Pool, retention_days: int) -> int:
    """Delete expired assertions, and refresh families that ended `retention_days` ago; return how many."""
    with transaction(pool, LONG_SECONDS) as connection:
        assertions = connection.execute("DELETE FROM assertions WHERE expires_at < now()").rowcount
        families = connection.execute(
            "DELETE FROM families WHERE ends_at < now() - make_interval(days => %s)", (retention_days,)
        ).rowcount
    return assertions + families


def prune_managed(pool: Pool, retention_days: int, now: datetime) -> int:
    """Delete managed tokens whose deadline passed `retention_days` + GRACE_DAYS ago; return how many.

    By then their rows in `tokens` and `uses` are archived.
    """
    before, forgotten = now - timedelta(days=retention_days + GRACE_DAYS), 0
    while count := managed.forget(pool, before):
        forgotten += count
    return forgotten


def prune_suspects(pool: Pool) -> int:
    """Delete the redelivery counts of messages not seen for a day; return how many."""
    with transaction(pool, LONG_SECONDS) as connection:
        return connection.execute("DELETE FROM suspects WHERE seen_at < now() - interval '1 day'").rowcount
