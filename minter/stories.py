"""Stories: who had which right on which file, when and why, and what became of it (I8).

A story is one token with everything around it. The same records are read from the database and
from archives (`minter.archive`), so a trace does not end where retention does.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec import Struct, json
from sqlalchemy.engine import Engine as Pool

from minter.database import floor, transaction
from minter.mint import path_hash
from minter.requests import unix_time


class Story(Struct, frozen=True, kw_only=True):
    """One token: who asked, what decided, what it allowed, when, and what became of it."""

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

    @property
    def scope(self) -> str:
        """The `scope` claim."""
        return str(json.decode(self.payload)["scope"])

    @property
    def issued_at(self) -> datetime:
        """When the token was made, as its jti says (RFC 9562 §5.7)."""
        return datetime.fromtimestamp(unix_time(self.jti), self.expires_at.tzinfo)


class Refusals(Struct, frozen=True):
    """What a request was refused; `error` when it was refused whole."""

    request_id: UUID
    client: str
    received_at: datetime
    error: dict[str, Any] | None
    refusals: list[dict[str, Any]]


COLUMNS = """
    t.jti, t.request_id, coalesce(c.name, ''), coalesce(c.vo, ''), coalesce(r.on_behalf_of, ''),
    coalesce(r.activity, ''), coalesce(r.kind, ''), r.renews, coalesce(s.name, ''), t.side::text, t.file,
    t.position, t.external_id, t.path_hash, lpad(to_hex(t.fts_token_id), 16, '0'), coalesce(k.kid, ''),
    t.mode::text, coalesce(u.route, ''), coalesce(u.operations, '{}'), coalesce(u.steps, '[]'), t.expires_at,
    coalesce(l.state, t.state)::text, l.active_at, l.ended_at,
    (SELECT j.job_id FROM jobs j WHERE j.request_id = t.request_id AND t.file = ANY (j.files) LIMIT 1),
    t.payload
"""
AROUND = """
    LEFT JOIN storages s USING (storage_id)
    LEFT JOIN clients c ON c.client_id = t.client_id
    LEFT JOIN signing_keys k USING (key_id)
    LEFT JOIN rules u USING (rule_id)
    LEFT JOIN LATERAL (
        SELECT * FROM requests r WHERE (r.request_id, r.client_id) = (t.request_id, t.client_id) LIMIT 1
    ) r ON true
    LEFT JOIN LATERAL (SELECT * FROM token_states l WHERE l.jti = t.jti LIMIT 1) l ON true
"""
# The tokens are chosen before anything is joined to them: one probe of one index a partition. The
# LIMITs keep each partitioned table a look-up by key, in the one partition that can have it.
_STORIES = """
    WITH t AS MATERIALIZED (
        SELECT * FROM tokens t WHERE {condition} AND t.jti >= %(first)s AND t.jti < %(last)s
        ORDER BY t.jti DESC LIMIT %(limit)s
    )
    SELECT {columns} FROM t {around} ORDER BY t.jti DESC
"""

INDEXED = {
    "jti": "t.jti = %(value)s",
    "path": "t.path_hash = %(value)s",
    "fts_token_id": "t.fts_token_id = %(value)s",
    "external_id": "hashtextextended(t.external_id, 0) = hashtextextended(%(value)s, 0)"
    " AND t.external_id = %(value)s AND t.external_id <> ''",
}
"""The questions that one index answers; each is bounded in time by the jti."""
WALKED = {
    "client": "t.client_id = (SELECT client_id FROM clients WHERE name = %(value)s)",
    "storage": "t.storage_id IN (SELECT storage_id FROM storages WHERE name = %(value)s)",
    "key": "t.key_id = (SELECT key_id FROM signing_keys WHERE kid = %(value)s)",
}
"""The questions that walk back from the newest token until there are enough."""


def query(by: str) -> str:
    """Return the statement behind `find`, for EXPLAIN."""
    return _STORIES.format(condition=(INDEXED | WALKED)[by], columns=COLUMNS, around=AROUND)


def story(row: Sequence[Any]) -> Story:
    """Return the story of a row of COLUMNS."""
    fields = dict(zip(Story.__struct_fields__, row, strict=True))
    fields["steps"] = [(rule, text) for rule, text in fields["steps"]]
    return Story(**fields)


def wanted(by: str, value: object) -> object:
    """Return a question's value as its column holds it: a path is looked for by its hash."""
    return path_hash(str(value)) if by == "path" else value


def find(
    engine: Pool, by: str, value: object, since: datetime, until: datetime, limit: int = 100
) -> list[Story]:
    """Find tokens by one of INDEXED or WALKED, newest first."""
    values = {
        "value": wanted(by, value), "first": floor(since), "last": floor(until), "limit": limit,
    }  # fmt: skip
    with transaction(engine) as connection:
        rows = connection.execute(query(by), values).fetchall()
    return [story(row) for row in rows]


def find_request(engine: Pool, request_id: UUID) -> tuple[list[Story], list[Refusals]]:
    """Find what a request, of whichever client, was granted and refused."""
    with transaction(engine) as connection:
        requests = connection.execute(
            "SELECT r.first_jti, r.tokens, r.request_id, c.name, r.received_at, r.error,"
            " coalesce(r.refusals, '[]') FROM requests r JOIN clients c USING (client_id)"
            " WHERE r.request_id = %s",
            (request_id,),
        ).fetchall()
        found: list[Story] = []
        for first, count, *_ in requests:
            jtis = [UUID(int=first.int + n) for n in range(count)]
            found += map(story, connection.execute(_OF_JTIS, (jtis,)).fetchall())
    return found, [Refusals(*rest) for _, _, *rest in requests if rest[-1] or rest[-2]]


_OF_JTIS = f"SELECT {COLUMNS} FROM tokens t {AROUND} WHERE t.jti = ANY (%s) ORDER BY t.jti"


def matches(one: Story, by: str, value: object) -> bool:
    """Say whether an archived story answers a question; `value` is as `wanted` returns it."""
    attribute = {"path": "path_hash", "key": "kid"}.get(by, by)
    held = getattr(one, attribute)
    if by == "fts_token_id":
        return int(held, 16) == int(str(value)) % (1 << 64)
    return bool(held == value)


def newest(found: Iterable[Story], limit: int) -> list[Story]:
    """Return the newest of stories from several places."""
    return sorted(found, key=lambda s: s.jti, reverse=True)[:limit]
