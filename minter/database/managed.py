"""SQL of managed tokens: recording, reading, ending and deleting; one statement for any number of rows.

`minter.database.leases` has the leases of managed tokens, and saves the results of provider requests.
"""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import LONG_SECONDS, json_text, plain_text, transaction
from minter.tokens.managed import ManagedToken, Wanted

Seal = Callable[[int, UUID, str, str], bytes]
"""Encrypts one secret of a managed token; arguments: client_id, jti, name of the secret, the secret."""

# ── recorded with the request ────────────────────────────────────────────────────────────────

_SHOWN = "m.jti, m.state::text, c.vo, m.granted_scope, m.access, m.expires_at, m.error, m.deadline"


_TOO_SHORT = (
    "m.expires_at < excluded.needed_at"
    " - make_interval(secs => excluded.lead_seconds - excluded.least_seconds)"
)


_JOIN = f"""
    WITH new AS (
        INSERT INTO managed AS m (jti, client_id, digest, provider, mode, state, scope, audience, storage,
            on_behalf_of, activity, fallback, uses, cap_seconds, least_seconds, deadline,
            lead_seconds, needed_at, subject, pushes)
        SELECT j, c, d, p, o::token_mode, 'queued', s,
            ARRAY(SELECT jsonb_array_elements_text(a::jsonb)), g, b, v,
            ARRAY(SELECT jsonb_array_elements_text(f::jsonb)), u, x, l, e, t, w, z, q
        FROM unnest(%s::uuid[], %s::int[], %s::bytea[], %s::text[], %s::text[], %s::text[], %s::text[],
            %s::text[], %s::text[], %s::text[], %s::text[], %s::int[], %s::int[], %s::int[],
            %s::timestamptz[], %s::int[], %s::timestamptz[], %s::bytea[],
            %s::bool[])
            AS w (j, c, d, p, o, s, a, g, b, v, f, u, x, l, e, t, w, z, q)
        ON CONFLICT (digest) WHERE state IN ('queued', 'issued') DO UPDATE SET
            uses = m.uses + excluded.uses,
            pushes = m.pushes OR excluded.pushes,
            deadline = greatest(m.deadline, excluded.deadline),
            least_seconds = greatest(m.least_seconds, excluded.least_seconds),
            -- Due at once if the life left of the token is too short for this use.
            lead_seconds = CASE WHEN {_TOO_SHORT} THEN excluded.lead_seconds
                WHEN excluded.deadline > m.expires_at THEN coalesce(m.lead_seconds, 60)
                ELSE m.lead_seconds END,
            needed_at = CASE WHEN {_TOO_SHORT} THEN excluded.needed_at
                WHEN excluded.deadline > m.expires_at THEN coalesce(m.needed_at, m.expires_at)
                ELSE m.needed_at END
        RETURNING m.*)
    SELECT m.digest, {_SHOWN} FROM new m JOIN clients c USING (client_id)
    """


def join(
    connection: "psycopg.Connection[Any]", wanted: Sequence[Wanted], seal: Seal
) -> dict[bytes, ManagedToken]:
    """Add managed tokens, or add uses to existing ones with the same digest; return them by digest."""
    wanted = sorted(wanted, key=lambda w: w.digest)  # a fixed order, to avoid deadlocks
    rows = connection.execute(
        _JOIN,
        (
            [w.jti for w in wanted],
            [w.client_id for w in wanted],
            [w.digest for w in wanted],
            [w.provider for w in wanted],
            [w.mode for w in wanted],
            [w.scope for w in wanted],
            [json_text(w.audience) for w in wanted],
            [w.storage for w in wanted],
            [plain_text(w.on_behalf_of) for w in wanted],
            [plain_text(w.activity) for w in wanted],
            [json_text(w.fallback) for w in wanted],
            [w.uses for w in wanted],
            [w.cap_seconds for w in wanted],
            [w.least_seconds for w in wanted],
            [w.deadline for w in wanted],
            [w.lead_seconds for w in wanted],
            [w.needed_at for w in wanted],
            [seal(w.client_id, w.jti, "subject", w.subject) if w.subject else None for w in wanted],
            [w.pushes for w in wanted],
        ),
    ).fetchall()
    return {bytes(digest): _token(*row) for digest, *row in rows}


def read(connection: "psycopg.Connection[Any]", jtis: Collection[UUID]) -> dict[UUID, ManagedToken]:
    """Read managed tokens by jti; deleted ones are missing from the result."""
    rows = connection.execute(
        f"SELECT {_SHOWN} FROM managed m JOIN clients c USING (client_id) WHERE m.jti = ANY(%s)",
        (list(jtis),),
    ).fetchall()
    return {row[0]: _token(*row) for row in rows}


def _token(
    jti: UUID, state: str, vo: str, scope: str, access: Any, expires_at: Any, error: Any, deadline: Any
) -> ManagedToken:
    sealed = None if access is None else bytes(access)
    return ManagedToken(
        jti=jti, state=state, vo=vo, scope=scope, access=sealed, expires_at=expires_at, error=error,
        deadline=deadline,
    )  # fmt: skip


def end_uses(connection: "psycopg.Connection[Any]", uses: Sequence[UUID]) -> None:
    """Subtract ended uses; a managed token without uses left is finished, and its secrets are deleted."""
    if not uses:
        return
    ended = (
        "(SELECT u.jti, count(*) AS uses FROM uses u JOIN tokens t USING (jti)"
        " WHERE u.use_id = ANY(%(uses)s) AND t.mode <> 'mint' GROUP BY u.jti) e"
    )
    values = {"uses": list(uses)}
    connection.execute(
        f"SELECT FROM managed m JOIN {ended} USING (jti)"
        " ORDER BY m.digest FOR UPDATE OF m",  # the order in which `join` locks
        values,
    )
    connection.execute(
        f"UPDATE managed m SET uses = m.uses - e.uses FROM {ended} WHERE m.jti = e.jti", values
    )
    connection.execute(
        f"UPDATE managed m SET {FINISHED} FROM {ended} WHERE m.jti = e.jti AND m.uses <= 0", values
    )


_UNFINISHED = "(access IS NOT NULL OR lead_seconds IS NOT NULL)"
FINISHED = (
    "state = CASE WHEN state = 'failed' THEN state ELSE 'finished' END, access = NULL, refresh = NULL,"
    " subject = NULL, lead_seconds = NULL, needed_at = NULL, leased_until = NULL, lease = NULL"
)


# ── in bulk ──────────────────────────────────────────────────────────────────────────────────

BULK_ROWS = 5_000


def end_overdue(pool: Pool, now: datetime) -> int:
    """Finish managed tokens whose deadline has passed and delete their secrets; return how many.

    One call finishes at most BULK_ROWS tokens.
    """
    with transaction(pool, LONG_SECONDS) as connection:
        return connection.execute(
            f"UPDATE managed SET {FINISHED} WHERE jti IN (SELECT jti FROM managed WHERE deadline <= %s"
            f" AND {_UNFINISHED} LIMIT %s FOR UPDATE SKIP LOCKED)",
            (now, BULK_ROWS),
        ).rowcount


def forget(pool: Pool, before: datetime) -> int:
    """Delete managed tokens with a deadline up to `before`, at most BULK_ROWS in a call; return how many.

    Their rows in `tokens` and `uses` stay.
    """
    with transaction(pool, LONG_SECONDS) as connection:
        return connection.execute(
            "DELETE FROM managed WHERE jti IN (SELECT jti FROM managed WHERE deadline <= %s LIMIT %s"
            " FOR UPDATE SKIP LOCKED)",
            (before, BULK_ROWS),
        ).rowcount
