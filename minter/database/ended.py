"""SQL of tokens that were reported as no longer needed: what they were for, and how long they were needed."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import psycopg
from msgspec import Struct

from minter.database.lifetimes import issued_at, seconds


class EndedToken(Struct, frozen=True):
    """One token of one file whose transfer ended, or one use of a shared or managed token.

    `handle` is the id of the use, None for a token of one file. `waited` is the time from the request until
    the transfer began, `needed` that until it ended, and `left_at_start` and `left_at_end` are what was left
    of the token's lifetime, below 0 if it had expired, all in seconds; None if nobody reported the begin.
    """

    jti: UUID
    handle: UUID | None
    vo: str
    client: str
    request_id: UUID
    file: int
    side: str
    position: int
    external_id: str
    storage: str
    route: str
    mode: str
    waited: float | None
    needed: float
    left_at_start: float | None
    left_at_end: float

    def told(self) -> dict[str, object]:
        """Return the fields of one token for the line of its transfer, times in whole seconds."""
        fields = {
            "side": self.side, "position": self.position, "storage": self.storage, "jti": str(self.jti),
            "handle": self.handle and str(self.handle), "mode": self.mode, "route": self.route,
        }  # fmt: skip
        times = {
            "waited_seconds": self.waited, "needed_seconds": self.needed,
            "left_at_start_seconds": self.left_at_start, "left_at_end_seconds": self.left_at_end,
        }  # fmt: skip
        fields |= {name: None if seconds is None else round(seconds) for name, seconds in times.items()}
        return {name: value for name, value in fields.items() if value is not None}


def _ended(of: str, id_: str, handle: str, more: str, expires_at: str) -> str:
    return f"""
        SELECT t.jti, {handle}, c.vo, c.name, {of}.request_id, {of}.file, {of}.side::text, {of}.position,
            coalesce({of}.external_id, ''), s.name, d.route, t.mode::text,
            {seconds("l.active_at", issued_at(id_))}, {seconds("l.ended_at", issued_at(id_))},
            {seconds(expires_at, "l.active_at")}, {seconds(expires_at, "l.ended_at")}
        FROM token_states l {more} JOIN storages s ON s.storage_id = t.storage_id
            JOIN rules d ON d.rule_id = t.rule_id JOIN clients c ON c.client_id = {of}.client_id
        WHERE l.jti = ANY(%(ids)s) AND {id_} = ANY(%(ids)s)
    """


_ENDED = (
    _ended("t", "t.jti", "NULL::uuid", "JOIN tokens t ON t.jti = l.jti AND t.file >= 0", "t.expires_at")
    + " UNION ALL "
    + _ended(
        "u", "u.use_id", "u.use_id",
        "JOIN uses u ON u.use_id = l.jti JOIN tokens t ON t.jti = u.jti LEFT JOIN managed m ON m.jti = t.jti",
        "coalesce(m.expires_at, t.expires_at)",
    )
    + " ORDER BY 4, 5, 6, 7 DESC, 8"
)  # fmt: skip


def ended_tokens(connection: "psycopg.Connection[Any]", ids: Sequence[UUID]) -> list[EndedToken]:
    """Return the tokens and uses with these ids whose end was recorded, those of a file together.

    A fallback token is returned once, as the use that gives it.
    """
    found = [EndedToken(*row) for row in connection.execute(_ENDED, {"ids": list(ids)}).fetchall()]
    used = {token.jti for token in found if token.handle is not None}
    return [token for token in found if token.handle is not None or token.jti not in used]
