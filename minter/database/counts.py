"""SQL of what processes counted: the whole cluster's rates, for two hours by minute, then by quarter.

A count is of a VO (empty if none is known), a kind and a label:

| kind | label | amount |
|---|---|---|
| `tokens` | mode, or `repeated` | tokens handed out |
| `requests` | granted, refused, repeated | requests served |
| `refusals` | reason | tokens and requests refused |
| `storage_tokens`, `storage_refusals` | storage | the same by storage, hour by hour |
| `stage_us`, `stages` | stage | microseconds in a stage, and batches that passed it |
| `age_us`, `ages` | empty | microseconds that requests waited, and requests |
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

import psycopg
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import one, transaction

Counts: TypeAlias = Mapping[tuple[str, str, str], int]
"""Amounts by VO, kind and label."""
KEPT, MINUTES_KEPT, QUARTER = "8 days", "2 hours", "15 minutes"
ALL_PROCESSES = UUID(int=0)
"""In place of the process in what was summed up."""
AT_ONCE = 200_000
"""Rows that are summed up in one transaction, at most."""
OF_STORAGES = {"tokens": "storage_tokens", "refusals": "storage_refusals"}
"""The kinds that are counted by storage, too: by the hour, as there may be hundreds of storages."""


def add(connection: "psycopg.Connection[Any]", process_id: UUID, counts: Counts) -> None:
    """Add what a process counted since its last heartbeat to the present minute."""
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO counts VALUES (date_trunc(%s, now()), %s, %s, %s, %s, %s)"
            " ON CONFLICT (minute, process_id, vo, kind, label)"
            " DO UPDATE SET amount = counts.amount + excluded.amount",
            [
                ("hour" if key[1] in OF_STORAGES.values() else "minute", process_id, *key, amount)
                for key, amount in counts.items()
                if amount
            ],
        )


def amounts(
    pool: Pool, kinds: Iterable[str], since: datetime, step: timedelta
) -> list[tuple[datetime, str, str, str, int]]:
    """Return what all processes counted since an instant: start of each step, VO, kind, label, amount."""
    with transaction(pool) as connection:
        return connection.execute(
            "SELECT date_bin(%s, minute, '2020-01-01Z'), vo, kind, label, sum(amount)::bigint FROM counts"
            " WHERE minute >= %s AND kind = ANY (%s) GROUP BY 1, 2, 3, 4 ORDER BY 1",
            (step, since, list(kinds)),
        ).fetchall()


def compact(pool: Pool) -> None:
    """Delete what is older than KEPT; sum up all processes by QUARTER in what is older than MINUTES_KEPT.

    Otherwise a week of ten processes would be a million rows, and each chart of it take a second.
    """
    with transaction(pool) as connection:
        connection.execute(f"DELETE FROM counts WHERE minute < now() - interval '{KEPT}'")
    summed = AT_ONCE
    while summed == AT_ONCE:
        with transaction(pool) as connection:
            (summed,) = one(connection.execute(_SUM_UP, {"all": ALL_PROCESSES, "most": AT_ONCE}))


_SUM_UP = f"""
    WITH old AS MATERIALIZED (
        SELECT ctid FROM counts WHERE minute < now() - interval '{MINUTES_KEPT}' AND process_id <> %(all)s
        LIMIT %(most)s FOR UPDATE SKIP LOCKED
    ), taken AS (
        DELETE FROM counts WHERE ctid = ANY (ARRAY(SELECT ctid FROM old)) RETURNING *
    ), summed AS (
        INSERT INTO counts
        SELECT date_bin('{QUARTER}', minute, '2020-01-01Z'), %(all)s, vo, kind, label, sum(amount)
        FROM taken GROUP BY 1, 3, 4, 5 ORDER BY 1, 3, 4, 5
        ON CONFLICT (minute, process_id, vo, kind, label)
        DO UPDATE SET amount = counts.amount + excluded.amount
    ) SELECT count(*) FROM taken
"""
"""Rows that another beat sums up at this moment are left to it."""
