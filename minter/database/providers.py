"""SQL of providers' rows: request budgets, circuit breakers, and discovery documents.

All workers share the one row of each provider; no other store has the state of a provider (ADR 12).
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import transaction
from minter.providers.budgets import Breaker, next_two
from minter.providers.dialects import Provider


def paused_until(pool: Pool, name: str) -> datetime | None:
    """Return the end of a provider's pause, None if it is not paused."""
    with transaction(pool) as connection:
        return known(connection, name).open_until


def known(connection: "psycopg.Connection[Any]", name: str) -> Breaker:
    """Return a provider's circuit breaker without locking the row, so it may be out of date at once."""
    row = connection.execute(
        "SELECT failures, pauses, open_until, probed_until FROM providers WHERE name = %s", (name,)
    ).fetchone()
    assert row is not None, name  # `sync_providers` added the rows at start
    return Breaker(*row)


def locked(connection: "psycopg.Connection[Any]", name: str, now: datetime) -> tuple[datetime, Breaker, int]:
    """Lock a provider's row until the transaction ends; return due_at, breaker, number of leases."""
    row = connection.execute(
        "SELECT due_at, failures, pauses, open_until, probed_until FROM providers WHERE name = %s FOR UPDATE",
        (name,),
    ).fetchone()
    assert row is not None, name
    leased = connection.execute(
        "SELECT count(*) FROM managed WHERE provider = %s AND lease IS NOT NULL AND leased_until > %s",
        (name, now),
    ).fetchone()
    assert leased is not None
    return row[0], Breaker(*row[1:]), leased[0]


def probe(pool: Pool, provider: Provider, now: datetime, seconds: float) -> bool:
    """Reserve the probe of a half-open provider for `seconds`; return False if the breaker is not half open.

    This probe fetches documents, so it needs no token that is due.
    """
    with transaction(pool) as connection:
        due_at, breaker, _ = locked(connection, provider.name, now)
        if breaker.state(now) != "half_open":
            return False
        slots = next_two(due_at, now, provider.requests_per_second)
        connection.execute(
            "UPDATE providers SET due_at = %s, probed_until = %s WHERE name = %s",
            (slots.due_at, now + timedelta(seconds=seconds), provider.name),
        )
    return True


def end_probe(pool: Pool, provider: str, until: datetime) -> None:
    """End the probe reserved `until` that asked nothing, so that another may follow at once."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE providers SET probed_until = NULL WHERE name = %s AND probed_until = %s",
            (provider, until),
        )


def note_answers(
    pool: Pool, provider: str, answers: Sequence[tuple[bool, float]], now: datetime,
    jitter: Callable[[float], float],
) -> tuple[Breaker, Breaker]:  # fmt: skip
    """Update the breaker with answers, as (failed, Retry-After in seconds); return it before and after.

    The row is neither locked nor written if the breaker is in its initial state and no answer failed.
    """
    with transaction(pool) as connection:
        before = after = known(connection, provider)
        if before == Breaker() and not any(failed for failed, _ in answers):
            return before, after
        _, before, _ = locked(connection, provider, now)
        after = before
        for failed, retry_after in answers:
            after = after.after(failed=failed, now=now, retry_after=retry_after, jitter=jitter)
        if after != before:
            connection.execute(
                "UPDATE providers SET failures = %s, pauses = %s, probed_until = %s WHERE name = %s",
                (after.failures, after.pauses, after.probed_until, provider),
            )
        if after.open_until != before.open_until:  # a statement of its own: it increments the control version
            connection.execute(
                "UPDATE providers SET open_until = %s WHERE name = %s", (after.open_until, provider)
            )
    return before, after


# ── documents ────────────────────────────────────────────────────────────────────────────────


def documents(pool: Pool, provider: str) -> tuple[Any, datetime | None]:
    """Return a provider's discovery document and JWKS, as any process fetched them last, and their time."""
    with transaction(pool) as connection:
        row = connection.execute(
            "SELECT documents, documents_at FROM providers WHERE name = %s", (provider,)
        ).fetchone()
    return (None, None) if row is None else (row[0], row[1])


LEASED_DOCUMENTS = timedelta(seconds=60)
"""How long other processes wait for a fetch that one process began, before they fetch themselves."""


def lease_documents(pool: Pool, provider: Provider, now: datetime, older_than: datetime) -> timedelta | None:
    """Reserve the fetch of the documents; return the delay before it, None if this process must not fetch.

    The fetch gets the next two slots after those already reserved; later reservations cannot delay it.
    """
    with transaction(pool) as connection:
        due_at, breaker, _ = locked(connection, provider.name, now)
        row = connection.execute(
            "SELECT FROM providers WHERE name = %s AND (documents_at IS NULL OR documents_at < %s)",
            (provider.name, older_than),
        ).fetchone()
        if row is None or breaker.state(now) == "open":
            return None
        slots = next_two(due_at, now, provider.requests_per_second)
        connection.execute(
            "UPDATE providers SET due_at = %s, documents_at = %s WHERE name = %s",
            (slots.due_at, older_than + LEASED_DOCUMENTS, provider.name),
        )
    return slots.first - now


def save_documents(pool: Pool, provider: str, found: Any, at: datetime) -> None:
    """Store a provider's discovery document and JWKS with the time `at`; None keeps the stored documents."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE providers SET documents = coalesce(%s, documents), documents_at = %s WHERE name = %s",
            (None if found is None else Jsonb(found), at, provider),
        )
