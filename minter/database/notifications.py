"""Notifications: managed tokens whose last change was not yet pushed to a durable queue of their client."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec import Struct
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import transaction

# ── pushed to durable queues ─────────────────────────────────────────────────────────────────


class Unpushed(Struct, frozen=True):
    """A managed token that changed since its last push, and one use whose request named a queue.

    `use_id`, `request_id` and `queue` are empty if no such use is left.
    """

    jti: UUID
    client: str
    vo: str
    state: str
    storage: str
    granted_scope: str
    on_behalf_of: str
    activity: str
    scope: str
    access: bytes | None
    expires_at: datetime | None
    fts_token_id: int
    error: dict[str, Any] | None
    use_id: UUID | None
    request_id: UUID | None
    file: int
    side: str
    position: int
    queue: str


_UNPUSHED = ", ".join(
    {"client": "c.name", "vo": "c.vo", "state": "m.state::text", "side": "coalesce(u.side::text, '')",
     "use_id": "u.use_id", "request_id": "u.request_id", "file": "coalesce(u.file, 0)",
     "position": "coalesce(u.position, 0)", "queue": "coalesce(u.queue, '')"}.get(name, f"m.{name}")
    for name in Unpushed.__struct_fields__
)  # fmt: skip
PUSH_SECONDS = 30


def unpushed(pool: Pool, now: datetime, most: int, refusing: Sequence[str] = ()) -> list[Unpushed]:
    """Reserve at most `most` changed tokens for PUSH_SECONDS; return one row for each use with a queue.

    Tokens with a use for a queue in `refusing` are left for later.
    """
    with transaction(pool) as connection:
        rows = connection.execute(
            f"""
            WITH m AS (
                UPDATE managed SET pushing_until = %(now)s + make_interval(secs => {PUSH_SECONDS})
                WHERE jti IN (
                    SELECT jti FROM managed WHERE pushes AND fts_token_id IS DISTINCT FROM pushed_id
                        AND (pushing_until IS NULL OR pushing_until <= %(now)s)
                        AND (%(refusing)s::text[] = '{{}}' OR NOT EXISTS (
                            SELECT FROM uses r WHERE r.jti = managed.jti AND r.queue = ANY(%(refusing)s)))
                    LIMIT %(most)s FOR UPDATE SKIP LOCKED)
                RETURNING *)
            SELECT {_UNPUSHED} FROM m JOIN clients c USING (client_id)
            LEFT JOIN uses u ON u.jti = m.jti AND u.queue <> '' AND NOT EXISTS (
                SELECT FROM token_states l WHERE l.jti = u.use_id AND l.ended_at IS NOT NULL)
            """,
            {"now": now, "most": most, "refusing": list(refusing)},
        ).fetchall()
    return [Unpushed(*row) for row in rows]


def pushed(pool: Pool, done: Mapping[UUID, int]) -> None:
    """Record the FTS id with which each token was pushed; a token that changed meanwhile is pushed again."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE managed m SET pushed_id = r.id, pushing_until = NULL"
            " FROM unnest(%s::uuid[], %s::bigint[]) AS r (jti, id) WHERE m.jti = r.jti",
            (list(done), list(done.values())),
        )
