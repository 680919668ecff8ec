"""Live tokens under a ban, of a client or of a key, which operators report to the sites (I9).

Operators ask for them rarely: each query reads all partitions that can hold live tokens, one after the
other, and may be slow.
"""

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

from msgspec import Struct
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import LONG_SECONDS, floor, one, transaction
from minter.errors import InvalidRequest
from minter.policy.clients import Ban, Bans
from minter.policy.limits import LAST_EXPIRY
from minter.policy.plans import SEVERAL_STORAGES
from minter.policy.requests import SEVERAL
from minter.scopes import encode_path, parse_scopes
from minter.storages.dialects import Matching

FETCH_ROWS = 5_000
CACHES = {"XRootD": timedelta(minutes=10), "Rucio": timedelta(hours=12), "FTS and DIRAC": timedelta(hours=24)}
"""How long verifiers still trust a key after it left the JWKS (facts of the real software)."""
VERIFIER_CACHES = "XRootD 10 min, Rucio 12 h, FTS and DIRAC 24 h"


class LiveTokenRow(Struct, frozen=True):
    """One live token; `exp` is a NumericDate."""

    jti: str
    client: str
    storage: str
    scope: str
    exp: int


# Selects a token by the request that it was made for or, if it is shared, by a request that used it.
_ASKED = """(
    EXISTS (SELECT FROM requests r WHERE (r.request_id, r.client_id) = (t.request_id, t.client_id) AND {0})
    OR t.file < 0 AND EXISTS (
        SELECT FROM uses u JOIN requests r ON (r.request_id, r.client_id) = (u.request_id, u.client_id)
        WHERE u.jti = t.jti AND {0}))"""
_CONDITIONS = {
    # Tokens of the client, and tokens that others got in exchange for them: these have the client's `sub`.
    "client": "c.name = %(value)s OR strpos(t.payload, %(sub)s) > 0",
    "vo": "c.vo = %(value)s",
    "storage": f"s.name IN (%(value)s, '{SEVERAL_STORAGES}')",
    "key": "k.kid = %(value)s",
    "on_behalf_of": _ASKED.format("r.on_behalf_of = %(value)s"),
    "activity": _ASKED.format(f"r.activity IN (%(value)s, '{SEVERAL}')"),
    "path": "strpos(t.payload, %(raw)s) > 0 OR strpos(t.payload, %(encoded)s) > 0"
    " OR t.payload ~ ':/[ .\"]'",  # or the root path, or a pattern that begins with any character
}
_ALIVE = """
    SELECT t.jti::text, c.vo, c.name, s.name, t.payload, coalesce(m.expires_at, t.expires_at)
    FROM tokens t JOIN clients c USING (client_id) JOIN storages s USING (storage_id)
    LEFT JOIN signing_keys k USING (key_id) LEFT JOIN managed m ON t.mode <> 'mint' AND m.jti = t.jti
    WHERE t.jti >= %(first)s AND t.expires_at > %(now)s
        AND (k.state <> 'revoked' OR %(kind)s = 'key' OR m.expires_at > %(now)s)
        AND (%(vo)s::text IS NULL OR c.vo = %(vo)s) AND ({condition})
"""


MatchingOf = Callable[[str, str], Matching]
"""How a storage, named by VO and name, matches paths."""


def under(
    pool: Pool, kind: str, value: str, vo: str | None, now: datetime, matching_of: MatchingOf
) -> Iterator[LiveTokenRow]:
    """Yield the live tokens that a ban of this kind and value covers or, for `key`, that a kid signed."""
    if kind not in _CONDITIONS:
        raise InvalidRequest(f"unknown kind {kind!r}, expected one of {', '.join(sorted(_CONDITIONS))}")
    first = floor(now - LAST_EXPIRY)
    bans = Bans([Ban("path", value)]) if kind == "path" else None
    # Scopes below the prefix and above it both match, and strings that it begins with: the query can only
    # look for the first character.
    start = value[:2]
    values = {
        "first": first, "now": now, "vo": vo, "value": value, "kind": kind,
        "raw": f":{start}", "encoded": f":{encode_path(start)}",
    }  # fmt: skip
    with transaction(pool, LONG_SECONDS) as connection, connection.cursor("alive") as cursor:
        subs = connection.execute("SELECT sub FROM clients WHERE name = %s", (value,)).fetchall()
        values["sub"] = f'"sub":{json.dumps(subs[0][0])}' if subs else "\x01"
        cursor.itersize = FETCH_ROWS
        cursor.execute(_ALIVE.format(condition=_CONDITIONS[kind]), values)
        for jti, of_vo, client, storage, payload, expires_at in cursor:
            claims = json.loads(payload)
            if bans is None or _touches(bans, str(claims["scope"]), matching_of(of_vo, storage)):
                yield LiveTokenRow(jti, client, storage, claims["scope"], int(expires_at.timestamp()))


def _touches(bans: Bans, scope: str, matching: Matching) -> bool:
    return any(bans.touches("", s.path, matching) for s in parse_scopes(scope) if s.path is not None)


_LARGE_ROWS = 1_000_000
"""If `tokens` has more rows than this, live tokens are counted in a sample of 1 %."""


def count_live(pool: Pool, now: datetime, soon: timedelta) -> dict[str, tuple[int, int]]:
    """Return, by VO, how many tokens have not expired, and how many of them expire within `soon`."""
    with transaction(pool, LONG_SECONDS) as connection:
        (size,) = one(
            connection.execute(
                "SELECT coalesce(sum(c.reltuples), 0) FROM pg_inherits i"
                " JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = 'tokens'::regclass AND c.reltuples > 0"
            )
        )
        sample, factor = ("TABLESAMPLE SYSTEM (1)", 100) if size > _LARGE_ROWS else ("", 1)
        rows = connection.execute(
            "SELECT c.vo, count(*), count(*) FILTER (WHERE t.expires_at <= %(soon)s)"
            f" FROM tokens t {sample} JOIN clients c USING (client_id)"
            " WHERE t.expires_at > %(now)s AND t.jti >= %(first)s GROUP BY c.vo",
            {"now": now, "soon": now + soon, "first": floor(now - LAST_EXPIRY)},
        ).fetchall()
    return {vo: (factor * alive, factor * expiring) for vo, alive, expiring in rows}
