"""Reading of requests and their tokens: columns, queries, and conversion of rows to values."""

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import psycopg

from minter.tokens.records import RequestRow, TokenRow

# ── reading ──────────────────────────────────────────────────────────────────────────────────

REQUEST_COLUMNS = (
    "r.request_id, r.client_id, r.digest, r.kind, r.activity, r.on_behalf_of, r.first_jti,"
    " r.tokens, r.refusals, r.error, r.received_at, r.renews, r.all_or_nothing"
)


def _token_columns(path: str, use_id: str, of: str) -> str:
    """Return the SQL columns of a TokenRow: `t` is the alias of the token, `of` that of the file's row."""
    return (
        f"t.jti::text, {of}.request_id, t.client_id, coalesce(s.name, ''), t.key_id,"
        f" extract(epoch FROM t.expires_at)::bigint, {path}, t.fts_token_id, {of}.file, {of}.side::text,"
        f" {of}.position, {of}.external_id, t.payload, coalesce(t.rule_id, 0), coalesce((SELECT l.state::text"
        f" FROM token_states l WHERE l.jti = {use_id or 't.jti'}), t.state::text), {of}.path_hash,"
        f" {use_id + '::text' if use_id else repr('')}, t.mode::text"
    )


TOKEN_COLUMNS = _token_columns("''", "", of="t")
USE_COLUMNS = _token_columns("u.path", "u.use_id", of="u")
OWN = "(t.file >= 0 OR t.side = 'service')"
"""Condition: the token is neither shared nor managed; the files of such tokens are in their uses."""


def request_row(row: Sequence[Any]) -> RequestRow:
    """Return a row of REQUEST_COLUMNS as a RequestRow."""
    fields = list(row)
    fields[8] = fields[8] or []
    return RequestRow(*fields)


def tokens_of(connection: "psycopg.Connection[Any]", request: RequestRow) -> list[TokenRow]:
    """Return the tokens of one request: a range of the primary key, in one or two partitions.

    Ids of the range that are no jti of such a token may be ids of uses; these are read with their tokens.
    """
    if not request.tokens:
        return []
    ids = (request.first_jti, UUID(int=request.first_jti.int + request.tokens - 1))
    rows = connection.execute(
        f"SELECT t.jti, {TOKEN_COLUMNS} FROM tokens t LEFT JOIN storages s USING (storage_id)"
        f" WHERE t.jti BETWEEN %s AND %s AND {OWN} ORDER BY t.jti",
        ids,
    ).fetchall()
    if len(rows) < request.tokens:
        rows += connection.execute(
            f"SELECT u.use_id, {USE_COLUMNS} FROM uses u JOIN tokens t USING (jti)"
            " LEFT JOIN storages s USING (storage_id) WHERE u.use_id BETWEEN %s AND %s",
            ids,
        ).fetchall()
        rows.sort()
    return [TokenRow(*row) for _, *row in rows]


def find_operations(connection: "psycopg.Connection[Any]", rules: Iterable[int]) -> dict[int, list[Any]]:
    """Return the requested operations by rule_id."""
    rows = connection.execute(
        "SELECT rule_id, operations FROM rules WHERE rule_id = ANY(%s)", (list(rules),)
    ).fetchall()
    return dict(rows)


def read_request(
    connection: "psycopg.Connection[Any]", request_id: UUID, client_id: int
) -> tuple[RequestRow, list[TokenRow]] | None:
    """Return one client's request with its tokens, None if there is none."""
    row = connection.execute(
        f"SELECT {REQUEST_COLUMNS} FROM requests r WHERE (r.request_id, r.client_id) = (%s, %s)",
        (request_id, client_id),
    ).fetchone()
    if row is None:
        return None
    request = request_row(row)
    return request, tokens_of(connection, request)
