"""SQL of how long tokens were needed, from the states that FTS's events or clients reported."""

from datetime import datetime

from msgspec import Struct
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import LONG_SECONDS, floor, transaction

MOST = 1_000_000
"""Ended tokens that are looked at, the newest ones."""


class NeededTime(Struct, frozen=True):
    """Seconds for which one route's ended tokens were needed, from their issue on.

    `waited` is the time until the transfer began, where that was reported, and `needed` that until it ended;
    `given` is the lifetime. `late` tokens had expired before their transfer ended.
    """

    route: str
    tokens: int
    waited_median: float | None
    waited_most: float | None
    needed_median: float
    needed_999: float
    needed_most: float
    given_median: float
    given_most: float
    late: int


def issued_at(id_: str) -> str:
    """Return the SQL of the instant in a UUIDv7: its first 48 bits are milliseconds (RFC 9562 §5.7)."""
    return f"to_timestamp(('x' || translate(left({id_}::text, 13), '-', ''))::bit(48)::bigint / 1000.0)"


def seconds(until: str, since: str) -> str:
    """Return the SQL of the seconds between two instants."""
    return f"extract(epoch FROM {until} - {since})::float8"


_ISSUED = issued_at("l.jti")
_NEEDED = f"""
    WITH ended AS MATERIALIZED (
        SELECT * FROM token_states l WHERE l.state = 'finished' AND l.jti >= %s
        ORDER BY l.jti DESC LIMIT {MOST}
    ), one AS (
        SELECT d.route, {seconds("l.active_at", _ISSUED)} AS waited,
            {seconds("l.ended_at", _ISSUED)} AS needed,
            {seconds("t.expires_at", _ISSUED)} AS given, l.ended_at > t.expires_at AS late
        FROM ended l LEFT JOIN uses u ON u.use_id = l.jti JOIN tokens t ON t.jti = coalesce(u.jti, l.jti)
        JOIN rules d USING (rule_id) WHERE t.mode = 'mint'
    )
    SELECT route, count(*)::int, percentile_disc(0.5) WITHIN GROUP (ORDER BY waited), max(waited),
        percentile_disc(0.5) WITHIN GROUP (ORDER BY needed),
        percentile_disc(0.999) WITHIN GROUP (ORDER BY needed), max(needed),
        percentile_disc(0.5) WITHIN GROUP (ORDER BY given), max(given), count(*) FILTER (WHERE late)::int
    FROM one GROUP BY route ORDER BY route
"""


def needed(pool: Pool, since: datetime) -> list[NeededTime]:
    """Return how long the tokens of each route were needed that were minted since an instant, and ended."""
    with transaction(pool, LONG_SECONDS) as connection:
        rows = connection.execute(_NEEDED, (floor(since),)).fetchall()
    return [NeededTime(*row) for row in rows]
