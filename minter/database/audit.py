"""SQL of the audit: who changed what, and when (I8)."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from msgspec import Struct
from psycopg.types.json import Jsonb
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import LONG_SECONDS, transaction


class Change(Struct, frozen=True):
    """One audited change."""

    at: datetime
    actor: str
    action: str
    subject: str
    details: dict[str, Any]


def changes(
    pool: Pool, since: datetime, actor: str | None, action: str | None, subject: str | None, limit: int
) -> list[Change]:
    """Return the newest changes since an instant; an actor, an action or a subject selects among them."""
    with transaction(pool, LONG_SECONDS) as connection:
        rows = connection.execute(
            "SELECT at, actor, action, subject, details FROM audit WHERE at >= %(since)s"
            " AND (%(actor)s::text IS NULL OR actor = %(actor)s)"
            " AND (%(action)s::text IS NULL OR action LIKE %(action)s || '%%')"
            " AND (%(subject)s::text IS NULL OR subject = %(subject)s)"
            " ORDER BY audit_id DESC LIMIT %(limit)s",
            {"since": since, "actor": actor, "action": action, "subject": subject, "limit": limit},
        ).fetchall()
    return [Change(*row) for row in rows]


def last(pool: Pool, action: str, subjects: Sequence[str]) -> dict[str, Change]:
    """Return the newest change of an action for each of these subjects that has one."""
    with transaction(pool) as connection:
        rows = connection.execute(
            "SELECT DISTINCT ON (subject) at, actor, action, subject, details FROM audit"
            " WHERE subject = ANY(%s) AND action = %s ORDER BY subject, audit_id DESC",
            (list(subjects), action),
        ).fetchall()
    return {row[3]: Change(*row) for row in rows}


def note(pool: Pool, actor: str, action: str, subject: str, details: Mapping[str, object]) -> None:
    """Add a change that no control table holds to the audit."""
    with transaction(pool) as connection:
        connection.execute(
            "INSERT INTO audit (actor, action, subject, details) VALUES (%s, %s, %s, %s)",
            (actor, action, subject, Jsonb(dict(details))),
        )
