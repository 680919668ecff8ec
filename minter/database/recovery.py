"""What a revoked key leaves to be done: its live tokens by request, and the FTS jobs that hold them."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from heapq import merge
from itertools import groupby
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import LONG_SECONDS, floor, transaction
from minter.database.requests import (
    OWN,
    REQUEST_COLUMNS,
    TOKEN_COLUMNS,
    USE_COLUMNS,
    request_row,
    tokens_of,
)
from minter.policy.limits import COVER_SECONDS, LAST_EXPIRY
from minter.tokens.records import RequestRow, TokenRow
from minter.tokens.replacements import Place, Read

FETCH_ROWS = 2_000
_ENDED = "EXISTS (SELECT FROM token_states e WHERE e.jti = {id} AND e.ended_at IS NOT NULL)"
_LIVE = (
    "t.key_id = %(key)s AND t.mode = 'mint'"
    f" AND t.expires_at > %(now)s::timestamptz + interval '{COVER_SECONDS} s'"
)
_PART = "('x' || right({of}.request_id::text, 4))::bit(16)::int %% %(parts)s = %(part)s"
_TOKENS = (
    f"SELECT t.jti, {TOKEN_COLUMNS} FROM tokens t LEFT JOIN storages s USING (storage_id) WHERE {OWN}"
    f" AND t.jti >= %(first)s AND {_PART.format(of='t')}"
    f" AND (t.side = 'service' OR {_LIVE} AND NOT {_ENDED.format(id='t.jti')})"
    " ORDER BY t.jti"
)
# A request's service token says that the request is for FTS, whatever key signed it, and if it lives or not.
_USES = (
    f"SELECT u.use_id, {USE_COLUMNS} FROM uses u JOIN tokens t USING (jti) LEFT JOIN storages s"
    f" USING (storage_id) WHERE u.use_id >= %(first)s AND t.jti >= %(first)s AND {_LIVE}"
    f" AND NOT {_ENDED.format(id='u.use_id')} AND {_PART.format(of='u')} ORDER BY u.use_id"
)


def live_by_request(
    pool: Pool, key_id: int, now: datetime, part: int = 0, parts: int = 1
) -> Iterator[tuple[Place, list[TokenRow]]]:
    """Yield (request_id, client_id) of each request with live tokens or uses of a key, and these.

    Tokens and uses that have ended, or end within COVER_SECONDS, are left out. A request's service token
    comes with them, whoever signed it. Only the part with the number `part` of `parts` parts is read.
    """
    values = {"key": key_id, "now": now, "first": floor(now - LAST_EXPIRY), "part": part, "parts": parts}
    with (
        transaction(pool, LONG_SECONDS) as connection,
        connection.cursor("tokens") as tokens,
        connection.cursor("uses") as uses,
    ):
        for cursor, query in ((tokens, _TOKENS), (uses, _USES)):
            cursor.itersize = FETCH_ROWS
            cursor.execute(query, values)
        # The ids of one request follow each other.
        in_order: Iterator[Any] = merge(tokens, uses, key=lambda row: row[0])
        rows = (TokenRow(*row) for _, *row in in_order)
        for request, group in groupby(rows, key=lambda t: (t.request_id, t.client_id)):
            of_request = list(group)
            if any(t.key_id == key_id and t.expires_at > now.timestamp() for t in of_request):
                yield request, of_request


class Revocation(NamedTuple):
    """A key that was revoked: when it was published, from which time on verifiers trust it, and revoked."""

    vo: str
    kid: str
    published_at: datetime
    revoked_at: datetime


def revocations(pool: Pool, since: datetime, patience: float = LONG_SECONDS) -> list[Revocation]:
    """Return the keys that were revoked after `since`."""
    with transaction(pool, patience) as connection:
        rows = connection.execute(
            "SELECT vo, kid, published_at, revoked_at FROM signing_keys"
            " WHERE state = 'revoked' AND revoked_at > %s ORDER BY revoked_at",
            (since,),
        ).fetchall()
    return [Revocation(*row) for row in rows]


def read_requests(connection: "psycopg.Connection[Any]", places: Sequence[Place]) -> dict[Place, RequestRow]:
    """Read requests by (request_id, client_id), without their tokens."""
    rows = connection.execute(
        f"SELECT {REQUEST_COLUMNS} FROM unnest(%s::uuid[], %s::int[]) AS w (id, client)"
        " JOIN requests r ON (r.request_id, r.client_id) = (w.id, w.client)",
        ([id_ for id_, _ in places], [client for _, client in places]),
    ).fetchall()
    found = map(request_row, rows)
    return {(row.request_id, row.client_id): row for row in found}


def reader(connection: "psycopg.Connection[Any]") -> Read:
    """Return the function that reads requests with their tokens in this transaction."""
    return lambda places: {
        place: (row, tokens_of(connection, row)) for place, row in read_requests(connection, places).items()
    }


def find_routes(connection: "psycopg.Connection[Any]", rules: Iterable[int]) -> dict[int, str]:
    """Return the names of the routes by rule_id."""
    return dict(
        connection.execute(
            "SELECT rule_id, route FROM rules WHERE rule_id = ANY(%s)", (list(rules),)
        ).fetchall()
    )


def jobs_of(
    connection: "psycopg.Connection[Any]", places: Sequence[Place]
) -> list[tuple[UUID, Place, datetime]]:
    """Return the FTS jobs with the tokens of requests: job_id, request, and when it was reported."""
    rows = connection.execute(
        "SELECT j.job_id, j.request_id, j.client_id, j.reported_at"
        " FROM unnest(%s::uuid[], %s::int[]) AS w (id, client)"
        " JOIN jobs j ON (j.request_id, j.client_id) = (w.id, w.client) ORDER BY j.job_id",
        ([id_ for id_, _ in places], [client for _, client in places]),
    ).fetchall()
    return [(job, (request, client), at) for job, request, client, at in rows]
