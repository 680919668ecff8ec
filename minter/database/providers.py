"""SQL of providers' rows: their budgets, how they are, what they say of themselves (design decision 9)."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import transaction
from minter.providers.budgets import Breaker, next_two
from minter.providers.dialects import Provider


def known(connection: "psycopg.Connection[Any]", name: str) -> Breaker:
    """Return how a provider was a moment ago; its row is not locked."""
    row = connection.execute(
        "SELECT failures, pauses, open_until, probed_until FROM providers WHERE name = %s", (name,)
    ).fetchone()
    assert row is not None, name  # settings were brought into rows at start
    return Breaker(*row)


def locked(connection: "psycopg.Connection[Any]", name: str, now: datetime) -> tuple[datetime, Breaker, int]:
    """Return a provider's row, which nobody else changes until the end, and how many requests are out."""
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
    """Say whether this process shall see if a paused provider is back, while no token waits for it."""
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


def note_health(
    pool: Pool, provider: str, answers: Sequence[tuple[bool, float]], now: datetime,
    jitter: Callable[[float], float],
) -> tuple[Breaker, Breaker]:  # fmt: skip
    """Count answers, as (failed, the seconds that it asked to wait); return the breaker before and after.

    The row is left alone, and not locked, while all is well.
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
        if after.open_until != before.open_until:  # apart: this bumps the control tables' version
            connection.execute(
                "UPDATE providers SET open_until = %s WHERE name = %s", (after.open_until, provider)
            )
    return before, after


# ── documents ────────────────────────────────────────────────────────────────────────────────


def documents(pool: Pool, provider: str) -> tuple[Any, datetime | None]:
    """Return a provider's discovery and JWKS as some process fetched them last, and when."""
    with transaction(pool) as connection:
        row = connection.execute(
            "SELECT documents, documents_at FROM providers WHERE name = %s", (provider,)
        ).fetchone()
    return (None, None) if row is None else (row[0], row[1])


LEASED_DOCUMENTS = timedelta(seconds=60)
"""Until another process fetches what one began to fetch."""


def lease_documents(pool: Pool, provider: Provider, now: datetime, older_than: datetime) -> timedelta | None:
    """Return how long this process shall wait before it fetches the documents, None if it shall not.

    Their slots come after those that are given out, but never later for what comes after them.
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
    """Keep a provider's discovery and JWKS for all processes, as of `at`; None keeps those before."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE providers SET documents = coalesce(%s, documents), documents_at = %s WHERE name = %s",
            (None if found is None else Jsonb(found), at, provider),
        )
