"""SQL of what processes counted: rates of the whole cluster, minute by minute or hour by hour, for 8 days.

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

from minter.database.connection import transaction

Counts: TypeAlias = Mapping[tuple[str, str, str], int]
"""Amounts by VO, kind and label."""
KEPT = "8 days"
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


def prune(pool: Pool) -> None:
    """Delete what is older than KEPT."""
    with transaction(pool) as connection:
        connection.execute(f"DELETE FROM counts WHERE minute < now() - interval '{KEPT}'")
