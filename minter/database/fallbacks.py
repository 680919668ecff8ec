"""Fallbacks: managed tokens that their provider does not give, and the tokens that replace them."""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy.engine import Engine as Pool

from minter.database.connection import transaction
from minter.database.leases import LEASED, Leased, needed_soonest
from minter.database.managed import FINISHED
from minter.providers.dialects import LEADS, Provider

# ── replacements ─────────────────────────────────────────────────────────────────────────────

FALLBACK_WITHIN_SECONDS = 900
"""While a provider is paused, a token with less life left than this gets a fallback, if its route has one."""
_SOON = "m.needed_at <= %(soon)s AND m.fallback <> '{}' AND m.jti <> ALL(%(but)s)"


def lease_for_fallback(
    pool: Pool,
    provider: Provider,
    lease: UUID,
    most: int,
    now: datetime,
    lease_seconds: float,
    but: Collection[UUID] = (),
) -> list[Leased]:
    """Lease at most `most` tokens that need a fallback because their provider is paused; none of `but`.

    Returns an empty list while the provider is not paused.
    """
    with transaction(pool) as connection:
        paused = connection.execute(
            "SELECT FROM providers WHERE name = %s AND open_until IS NOT NULL", (provider.name,)
        ).fetchone()
        if paused is None:
            return []
        rows = connection.execute(
            f"""
            WITH due AS MATERIALIZED ({needed_soonest(_SOON, "m.retry_at IS NOT NULL")})
            UPDATE managed m SET leased_until = %(until)s, lease = %(lease)s FROM due d, clients c
            WHERE m.jti = d.jti AND c.client_id = m.client_id RETURNING {LEASED}
            """,
            {
                "provider": provider.name, "now": now, "lease": lease, "count": most,
                "until": now + timedelta(seconds=lease_seconds),
                "soon": now + timedelta(seconds=FALLBACK_WITHIN_SECONDS),
                "leads": list(LEADS), "but": list(but),
            },
        ).fetchall()  # fmt: skip
    return [Leased(*row) for row in rows]


def live_uses(pool: Pool, jti: UUID) -> list[tuple[UUID, UUID, str, int, str, int]]:
    """Return a managed token's uses that did not end: (use_id, request_id, queue, file, side, position)."""
    with transaction(pool) as connection:
        return connection.execute(
            "SELECT u.use_id, u.request_id, u.queue, u.file, u.side::text, u.position FROM uses u"
            " WHERE u.jti = %s AND NOT EXISTS (SELECT FROM token_states l WHERE l.jti = u.use_id"
            " AND l.ended_at IS NOT NULL) ORDER BY u.use_id",
            (jti,),
        ).fetchall()


def fall_back(pool: Pool, jti: UUID, lease: UUID, instead: Mapping[UUID, UUID]) -> int:
    """Move uses of a managed token to other tokens; return how many uses were moved.

    `instead` maps each use_id to the jti of its new token, or to the id of another use, whose token it then
    shares. Uses that ended meanwhile are not changed. A managed token without uses left becomes finished.
    Returns 0, without any change, if the lease was lost.
    """
    with transaction(pool) as connection:
        mine = connection.execute(
            "SELECT FROM managed WHERE jti = %s AND lease = %s FOR UPDATE", (jti, lease)
        ).fetchone()
        if mine is None:
            return 0
        moved = [
            use_id
            for (use_id,) in connection.execute(
                "UPDATE uses u SET instead_of = coalesce(u.instead_of, u.jti),"
                " jti = coalesce((SELECT o.jti FROM uses o WHERE o.use_id = r.other), r.other)"
                " FROM unnest(%s::uuid[], %s::uuid[]) AS r (use_id, other)"
                " WHERE u.use_id = r.use_id AND u.jti = %s AND NOT EXISTS ("
                " SELECT FROM token_states l WHERE l.jti = u.use_id AND l.ended_at IS NOT NULL)"
                " RETURNING u.use_id",
                (list(instead), list(instead.values()), jti),
            )
        ]
        connection.execute(
            "UPDATE managed m SET uses = m.uses + n.uses, pushes = m.pushes OR n.pushes FROM ("
            " SELECT jti, count(*) AS uses, bool_or(queue <> '') AS pushes FROM uses"
            " WHERE use_id = ANY(%s) GROUP BY jti) n WHERE m.jti = n.jti",
            (moved,),
        )
        connection.execute("UPDATE managed SET uses = uses - %s WHERE jti = %s", (len(moved), jti))
        connection.execute(f"UPDATE managed SET {FINISHED} WHERE jti = %s AND uses <= 0", (jti,))
    return len(moved)
