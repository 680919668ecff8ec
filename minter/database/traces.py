"""Traces: who had which right on which file, when and why, and what became of it (I8).

A trace is the record of one token with its request, client, rule, key and state. The same records are read
from the database and from archives (`minter.database.archive`), so traces outlast the retention period.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec import Struct, json
from sqlalchemy.engine import Engine as Pool

from minter.contract.messages import unix_time
from minter.database.connection import LONG_SECONDS, floor, transaction
from minter.database.requests import OWN
from minter.policy.limits import HARD_MAX_SECONDS
from minter.tokens.records import path_hash


class TraceRecord(Struct, frozen=True, kw_only=True):
    """The trace of one token: who requested it, which rule decided, what it allowed, when, and its state.

    A shared token has one trace for each use, with the `path` of the file that the use serves. For a managed
    token, `payload` is the recorded decision, `fts_token_id` belongs to the provider's last access token, and
    `error` says why the provider gave no later one. `instead_of` is the managed token that a use had before
    a fallback replaced it.
    """

    jti: UUID
    request_id: UUID
    client: str
    vo: str
    on_behalf_of: str
    activity: str
    kind: str
    renews: UUID | None
    storage: str
    side: str
    file: int
    position: int
    external_id: str
    path_hash: int
    fts_token_id: str
    kid: str
    mode: str
    route: str
    operations: list[str]
    steps: list[tuple[str, str]]
    expires_at: datetime
    state: str
    active_at: datetime | None
    ended_at: datetime | None
    job_id: UUID | None
    payload: str
    use_id: UUID | None = None
    path: str = ""
    error: dict[str, Any] | None = None
    instead_of: UUID | None = None

    @property
    def scope(self) -> str:
        """The `scope` claim."""
        return str(json.decode(self.payload)["scope"])

    @property
    def addressed(self) -> list[str]:
        """The audiences and the issuer."""
        claims = json.decode(self.payload)
        audience = claims.get("aud", [])
        return [*([audience] if isinstance(audience, str) else audience), claims["iss"]]

    @property
    def issued_at(self) -> datetime:
        """Time at which the token was made or its use recorded, from the UUIDv7 (RFC 9562 §5.7)."""
        return datetime.fromtimestamp(unix_time(self.id), self.expires_at.tzinfo)

    @property
    def id(self) -> UUID:
        """Id under which the state is recorded: that of the use if there is one, else the jti."""
        return self.use_id or self.jti


class Refusals(Struct, frozen=True):
    """The refusals of one request; `error` is set if the request was refused as a whole."""

    request_id: UUID
    client: str
    received_at: datetime
    error: dict[str, Any] | None
    refusals: list[dict[str, Any]]


COLUMNS = """
    t.jti, n.request_id, coalesce(c.name, ''), coalesce(c.vo, ''), coalesce(r.on_behalf_of, ''),
    coalesce(r.activity, ''), coalesce(r.kind, ''), r.renews, coalesce(s.name, ''), n.side::text, n.file,
    n.position, n.external_id, n.path_hash,
    coalesce(lpad(to_hex(coalesce(t.fts_token_id, m.fts_token_id)), 16, '0'), ''), coalesce(k.kid, ''),
    t.mode::text, coalesce(d.route, ''), coalesce(d.operations, '{}'), coalesce(d.steps, '[]'), t.expires_at,
    coalesce(l.state, m.state, t.state)::text, l.active_at, l.ended_at,
    (SELECT j.job_id FROM jobs j WHERE j.request_id = n.request_id AND j.client_id = t.client_id
        AND n.file = ANY (j.files) LIMIT 1),
    t.payload, u.use_id, coalesce(u.path, ''), m.error, u.instead_of
"""
USES = (
    "LEFT JOIN LATERAL (SELECT * FROM uses u"
    " WHERE t.file < 0 AND (u.jti = t.jti OR u.instead_of = t.jti)) u ON true"
)
"""Join that gives a shared or managed token one row for each present or former use, others one row."""
AROUND = """
    CROSS JOIN LATERAL (
        SELECT coalesce(u.request_id, t.request_id) AS request_id, coalesce(u.side, t.side) AS side,
            coalesce(u.file, t.file) AS file, coalesce(u.position, t.position) AS position,
            coalesce(u.external_id, t.external_id) AS external_id,
            coalesce(u.path_hash, t.path_hash) AS path_hash
    ) n
    LEFT JOIN storages s USING (storage_id)
    LEFT JOIN clients c ON c.client_id = t.client_id
    LEFT JOIN signing_keys k USING (key_id)
    LEFT JOIN managed m ON t.mode <> 'mint' AND m.jti = t.jti
    LEFT JOIN rules d USING (rule_id)
    LEFT JOIN LATERAL (
        SELECT * FROM requests r WHERE (r.request_id, r.client_id) = (n.request_id, t.client_id) LIMIT 1
    ) r ON true
    LEFT JOIN LATERAL (SELECT * FROM token_states l WHERE l.jti = coalesce(u.use_id, t.jti) LIMIT 1) l ON true
"""
# Tokens are selected before the joins, with one probe of one index in each partition. The LIMITs keep each
# join with a partitioned table a look-up by key, in the one partition that can have the row.
_TRACES = """
    WITH t AS MATERIALIZED (
        SELECT * FROM tokens t WHERE {condition} AND {own} AND t.jti >= {first} AND t.jti < %(last)s
        ORDER BY t.jti DESC LIMIT %(limit)s
    )
    SELECT {columns} FROM t {uses} {around} WHERE coalesce(u.use_id, t.jti) >= %(first)s
    ORDER BY coalesce(u.use_id, t.jti) DESC LIMIT %(limit)s
"""
_OF_USES = """
    WITH u AS MATERIALIZED (
        SELECT * FROM uses t WHERE {condition} AND {own} AND t.use_id >= %(first)s AND t.use_id < %(last)s
        ORDER BY t.use_id DESC LIMIT %(limit)s
    )
    SELECT {columns} FROM u CROSS JOIN LATERAL (SELECT * FROM tokens t WHERE t.jti = u.jti LIMIT 1) t {around}
"""

INDEXED = {
    "jti": "t.jti = %(value)s",
    "path": "t.path_hash = %(value)s",
    "fts_token_id": "(t.fts_token_id = %(value)s OR t.jti = ANY (ARRAY("
    "SELECT jti FROM managed WHERE fts_token_id = %(value)s)))",
    "external_id": "hashtextextended(t.external_id, 0) = hashtextextended(%(value)s, 0)"
    " AND t.external_id = %(value)s AND t.external_id <> ''",
}
"""Searches that use one index; the range of jtis bounds each of them in time."""
_OF_FILES = ("path", "external_id")
"""Searches that read `uses`, too, with the same condition."""
WALKED = {
    "client": "t.client_id = (SELECT client_id FROM clients WHERE name = %(value)s)",
    "storage": "t.storage_id IN (SELECT storage_id FROM storages WHERE name = %(value)s)",
    "key": "t.key_id = (SELECT key_id FROM signing_keys WHERE kid = %(value)s)",
}
"""Searches that read tokens from the newest backwards until enough are found."""


_OWN_CLIENT = (
    "(%(asker)s::text IS NULL OR t.client_id = (SELECT client_id FROM clients WHERE name = %(asker)s))"
)


def queries(by: str) -> list[str]:
    """Return the SQL statements that `find` runs, for use with EXPLAIN."""
    condition = (INDEXED | WALKED)[by]
    # A shared token may be older than one of its uses, at most by its lifetime.
    first = "%(before)s" if by in WALKED else "%(first)s"
    parts = {"condition": condition, "columns": COLUMNS, "uses": USES, "around": AROUND, "own": _OWN_CLIENT}
    statements = (_TRACES, _OF_USES) if by in _OF_FILES else (_TRACES,)
    return [statement.format(**parts, first=first) for statement in statements]


def story(row: Sequence[Any]) -> TraceRecord:
    """Return a row of COLUMNS as a trace."""
    fields = dict(zip(TraceRecord.__struct_fields__, row, strict=True))
    fields["steps"] = [(rule, text) for rule, text in fields["steps"]]
    return TraceRecord(**fields)


def wanted(by: str, value: object) -> object:
    """Return the value of a search in the form of its column; a path is searched by its hash."""
    if isinstance(value, str):
        value = value.replace("\x00", "")  # Postgres has no NUL in text, so nothing was recorded with one
    return path_hash(str(value)) if by == "path" else value


def find(
    pool: Pool,
    by: str,
    value: object,
    since: datetime,
    until: datetime,
    limit: int = 100,
    asker: str | None = None,
    *,
    by_issue: bool = False,
) -> list[TraceRecord]:
    """Find tokens by one of INDEXED or WALKED, newest first; only those of the client `asker`, if named.

    A search by jti also accepts the handle of a managed token. With `by_issue`, a search of WALKED reads the
    tokens that were issued in the period only, not older shared ones that were used in it.
    """
    values = bounds(since, until) | {"value": wanted(by, value), "limit": limit, "asker": asker}
    if by_issue:
        values["before"] = values["first"]
    with transaction(pool, LONG_SECONDS) as connection:
        rows = [row for query in queries(by) for row in connection.execute(query, values).fetchall()]
        handles = connection.execute(_OF_IDS, {"ids": [value]}).fetchall() if by == "jti" else []
    of_handles = (
        one
        for one in map(story, handles)
        if one.use_id is not None and asker in (None, one.client) and since <= one.issued_at < until
    )
    return newest([*map(story, rows), *of_handles], limit)


def bounds(since: datetime, until: datetime) -> dict[str, UUID]:
    """Return the bounds of the ids that the statements of `queries` search."""
    before = since - timedelta(seconds=HARD_MAX_SECONDS)
    return {"first": floor(since), "before": floor(before), "last": floor(until)}


def find_request(pool: Pool, request_id: UUID) -> tuple[list[TraceRecord], list[Refusals]]:
    """Find the tokens and the refusals of the requests with this request_id, of any client."""
    with transaction(pool, LONG_SECONDS) as connection:
        requests = connection.execute(
            "SELECT r.first_jti, r.tokens, r.request_id, c.name, r.received_at, r.error,"
            " coalesce(r.refusals, '[]') FROM requests r JOIN clients c USING (client_id)"
            " WHERE r.request_id = %s",
            (request_id,),
        ).fetchall()
        found: list[TraceRecord] = []
        for first, count, *_ in requests:
            ids = {"ids": [UUID(int=first.int + n) for n in range(count)]}
            found += map(story, connection.execute(_OF_IDS, ids).fetchall())
    return found, [Refusals(*rest) for _, _, *rest in requests if rest[-1] or rest[-2]]


def request_of_job(pool: Pool, job_id: UUID) -> UUID | None:
    """Return the request whose tokens a job of FTS has, None if none was reported."""
    with transaction(pool, LONG_SECONDS) as connection:
        row = connection.execute(
            "SELECT request_id FROM jobs WHERE job_id = %s LIMIT 1", (job_id,)
        ).fetchone()
    return row[0] if row else None


_OF_IDS = f"""
    SELECT {COLUMNS} FROM (
        SELECT t.jti AS id, t AS token, NULL::uses AS u FROM tokens t WHERE t.jti = ANY (%(ids)s) AND {OWN}
        UNION ALL
        SELECT u.use_id, t, u FROM uses u JOIN tokens t USING (jti) WHERE u.use_id = ANY (%(ids)s)
    ) found CROSS JOIN LATERAL (SELECT (found.token).*) t CROSS JOIN LATERAL (SELECT (found.u).*) u {AROUND}
    ORDER BY found.id
"""


def matches(one: TraceRecord, by: str, value: object) -> bool:
    """Return whether an archived trace matches a search; `value` is a result of `wanted`."""
    attribute = {"path": "path_hash", "key": "kid"}.get(by, by)
    held = getattr(one, attribute)
    if by == "fts_token_id":
        return int(held, 16) == int(str(value)) % (1 << 64)
    return bool(held == value)


def newest(found: Iterable[TraceRecord], limit: int) -> list[TraceRecord]:
    """Return the newest `limit` traces out of several sources, without duplicates."""
    return sorted({one.id: one for one in found}.values(), key=lambda s: s.id, reverse=True)[:limit]
