"""Simulated transfers of a drill: which had no valid token while they ran, and what was made twice."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy.engine import Engine as Pool

from minter.database.connection import LONG_SECONDS, one, transaction
from minter.providers.dialects import LEADS

# Marks running transfers whose handle gives no token that is valid now.
_FAILED = """
    UPDATE drill_transfers d SET failed = true FROM uses u LEFT JOIN managed m ON m.jti = u.jti
    WHERE d.handle = u.use_id AND NOT d.failed AND d.starts_at <= %(now)s AND d.ends_at > %(now)s
        AND CASE WHEN m.jti IS NOT NULL THEN m.access IS NULL OR m.expires_at <= %(now)s
            ELSE NOT EXISTS (SELECT FROM tokens t WHERE t.jti = u.jti AND t.expires_at > %(now)s) END
"""
_FAILED_MINTED = """
    UPDATE drill_transfers SET failed = true
    WHERE NOT failed AND starts_at <= %(now)s AND ends_at > %(now)s AND expires_at <= %(now)s
"""
_STATE = """
    SELECT (SELECT count(*) FROM managed WHERE provider = 'iam' AND lead_seconds = ANY(%(leads)s)
            AND needed_at <= %(now)s + make_interval(secs => %(risk)s) AND state = 'issued'),
        (SELECT count(*) FROM managed WHERE provider = 'iam' AND lead_seconds = ANY(%(leads)s)
            AND needed_at <= %(now)s AND deadline > %(now)s AND state = 'issued'),
        (SELECT count(*) FROM drill_transfers WHERE starts_at <= %(now)s AND ends_at > %(now)s),
        (SELECT count(*) FROM drill_transfers WHERE failed)
"""


def create(pool: Pool) -> None:
    """Create the table `drill_transfers` and its index."""
    with transaction(pool, LONG_SECONDS) as connection:
        connection.execute(
            "CREATE TABLE drill_transfers (handle uuid, expires_at timestamptz, starts_at timestamptz,"
            " ends_at timestamptz, failed boolean NOT NULL DEFAULT false)"
        )
        connection.execute("CREATE INDEX ON drill_transfers (starts_at)")


def add(pool: Pool, rows: Sequence[tuple[str | None, datetime | None, datetime, datetime]]) -> None:
    """Add transfers as (handle or None, expiry of the token or None, start and end of the copy)."""
    with transaction(pool, LONG_SECONDS) as connection:
        connection.cursor().executemany(
            "INSERT INTO drill_transfers (handle, expires_at, starts_at, ends_at) VALUES (%s, %s, %s, %s)",
            rows,
        )


def sample(pool: Pool, now: datetime, risk_seconds: int) -> tuple[int, int, int, int]:
    """Mark running transfers without a valid token as failed; return four counts.

    The counts are the managed tokens at risk (due to be refreshed within `risk_seconds`), the overdue
    managed tokens, the running transfers, and the failed transfers.
    """
    with transaction(pool, LONG_SECONDS) as connection:
        connection.execute(_FAILED, {"now": now})
        connection.execute(_FAILED_MINTED, {"now": now})
        at_risk, overdue, running, failed = one(
            connection.execute(_STATE, {"now": now, "risk": risk_seconds, "leads": list(LEADS)})
        )
    return at_risk, overdue, running, failed


_RENEWED = (
    " FROM tokens t JOIN requests r ON (r.request_id, r.client_id) = (t.request_id, t.client_id)"
    " WHERE r.kind = 'renew'"
)


def renewals(pool: Pool) -> int:
    """Return how many requests were renewed."""
    return _count(pool, "SELECT count(*) FROM requests WHERE kind = 'renew'")


def renewed_of(pool: Pool, on_behalf_of: str) -> int:
    """Return how many tokens of renewals are of an account."""
    return _count(pool, f"SELECT count(*) {_RENEWED} AND r.on_behalf_of = %s", on_behalf_of)


def made_twice(pool: Pool) -> int:
    """Return how many tokens of renewals there are beyond one for each file and side of a request."""
    each = "count(DISTINCT (r.renews, t.file, t.side, t.position))"
    return _count(pool, f"SELECT count(*) - {each} {_RENEWED}")


def _count(pool: Pool, query: str, *values: object) -> int:
    with transaction(pool, LONG_SECONDS) as connection:
        return int(one(connection.execute(query, values))[0])


def totals(pool: Pool) -> tuple[int, int]:
    """Return how many transfers there were, and how many of them failed."""
    with transaction(pool, LONG_SECONDS) as connection:
        total, failed = one(
            connection.execute("SELECT count(*), count(*) FILTER (WHERE failed) FROM drill_transfers")
        )
    return total, failed
