"""States of issued tokens: look-up of tokens by their several names, and changes of state.

A look-up or change takes the same few statements for any number of rows. A state belongs to a token of one
file, or to one use of a shared or managed token; `id` is the id of either.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from sqlalchemy.engine import Engine as Pool

from minter.contract.followups import (
    JobReport,
)
from minter.contract.messages import Side
from minter.database import managed
from minter.database.connection import floor, one, transaction
from minter.database.requests import OWN
from minter.errors import InvalidRequest
from minter.policy.limits import LAST_EXPIRY
from minter.tokens.replacements import replacement_id

MAX_TOKENS = 100_000
"""Most tokens that the requests named in one report may have together."""


def note_jobs(connection: "psycopg.Connection[Any]", client_id: int, jobs: Sequence[JobReport]) -> list[str]:
    """Record a client's FTS jobs; return those whose request is not the client's, as `jobs[n]`."""
    unknown = []
    for number, job in enumerate(jobs):
        replicas = [(file, id_) for file, ids in zip(job.files, job.replica_ids, strict=False) for id_ in ids]
        noted = connection.execute(
            "INSERT INTO jobs (job_id, request_id, client_id, files, file_ids, replica_files, replica_ids)"
            " SELECT %s, request_id, client_id, %s, %s, %s, %s FROM requests"
            " WHERE request_id = %s AND client_id = %s"
            " ON CONFLICT (job_id, client_id) DO UPDATE SET request_id = excluded.request_id,"
            " files = excluded.files, file_ids = excluded.file_ids,"
            " replica_files = excluded.replica_files, replica_ids = excluded.replica_ids",
            (
                job.job_id, list(job.files), list(job.file_ids), [file for file, _ in replicas],
                [id_ for _, id_ in replicas], job.request_id, client_id,
            ),
        ).rowcount  # fmt: skip
        if not noted:
            unknown.append(f"jobs[{number}]")
    return unknown


def by_external_id(
    connection: "psycopg.Connection[Any]", client_ids: Sequence[int], ids: Iterable[str], now: datetime
) -> list[tuple[str, UUID]]:
    """Return (external_id, id) of the tokens and uses that have one of these external ids."""
    wanted = [i.replace("\x00", "") for i in ids]  # recorded without NUL, which Postgres cannot store
    # The index contains an 8-byte hash of each external_id. Postgres has no statistics of these, expects each
    # in one row of 200, and would read the whole day. OFFSET 0 makes it look up each external_id alone.
    # Without bitmaps it reads no other index beside this one, such as that of all jtis since `first`.
    connection.execute("SET LOCAL enable_bitmapscan TO off")
    found = connection.execute(
        " UNION ALL ".join(
            f"SELECT found.* FROM unnest(%(wanted)s::text[]) AS w (e), LATERAL ("
            f"SELECT external_id, {id_} FROM {table}"
            " WHERE hashtextextended(external_id, 0) = hashtextextended(w.e, 0) AND external_id = w.e"
            " AND external_id <> '' AND client_id = ANY(%(clients)s)"
            f" AND {id_} >= %(first)s OFFSET 0) AS found"
            for table, id_ in (("tokens", "jti"), ("uses", "use_id"))
        ),
        {"wanted": list(set(wanted)), "clients": list(client_ids), "first": floor(now - LAST_EXPIRY)},
    ).fetchall()
    connection.execute("SET LOCAL enable_bitmapscan TO DEFAULT")
    return found


def own_ids(connection: "psycopg.Connection[Any]", client_id: int, jtis: Iterable[UUID]) -> list[UUID]:
    """Return those of the given jtis and handles that belong to the client."""
    rows = connection.execute(
        f"SELECT jti FROM tokens t WHERE jti = ANY(%(jtis)s) AND client_id = %(client)s AND {OWN}"
        " UNION ALL SELECT use_id FROM uses u JOIN tokens t USING (jti)"
        " WHERE use_id = ANY(%(jtis)s) AND u.client_id = %(client)s AND t.mode <> 'mint'",  # a handle
        {"jtis": list(jtis), "client": client_id},
    ).fetchall()
    return [jti for (jti,) in rows]


class FileToken(NamedTuple):
    """A token or use of one file: its id, and what it is for."""

    id: UUID
    request_id: UUID
    file: int
    side: Side
    position: int
    storage: str
    path_hash: int


def tokens_of_requests(
    connection: "psycopg.Connection[Any]", client_ids: Sequence[int], requests: Iterable[UUID]
) -> list[FileToken]:
    """Return all tokens and uses of these requests' files, with their replacements (ADR 17).

    A replacement has the request_id of the request that it serves. Raises InvalidRequest if there are more
    than MAX_TOKENS.
    """
    served = _with_replacements(connection, client_ids, requests)
    ranges = connection.execute(
        "SELECT request_id, first_jti, tokens FROM requests WHERE request_id = ANY(%s)"
        " AND client_id = ANY(%s)",
        (list(served), list(client_ids)),
    ).fetchall()
    if sum(count for *_, count in ranges) > MAX_TOKENS:
        raise InvalidRequest(
            f"the requests named have more than {MAX_TOKENS} tokens together; report fewer at once"
        )
    ids = [UUID(int=first.int + n) for _, first, count in ranges for n in range(count)]
    rows = connection.execute(
        "SELECT t.jti, t.request_id, t.file, t.side::text, t.position, s.name, t.path_hash FROM tokens t"
        " JOIN storages s USING (storage_id) WHERE t.jti = ANY(%(ids)s) AND t.file >= 0"
        " UNION ALL SELECT u.use_id, u.request_id, u.file, u.side::text, u.position, s.name, u.path_hash"
        " FROM uses u JOIN tokens t USING (jti) JOIN storages s USING (storage_id)"
        " WHERE u.use_id = ANY(%(ids)s)",
        {"ids": ids},
    ).fetchall()
    return [FileToken(id_, served.get(request, request), *row) for id_, request, *row in rows]


def _with_replacements(
    connection: "psycopg.Connection[Any]", client_ids: Sequence[int], requests: Iterable[UUID]
) -> dict[UUID, UUID]:
    """Return requests and the renewals that serve them after a key was revoked, each with its request."""
    served = {request: request for request in requests}
    revoked = connection.execute("SELECT kid FROM signing_keys WHERE state = 'revoked'").fetchall()
    latest = list(served)
    while latest and revoked:
        ids = {replacement_id(request, kid): request for request in latest for (kid,) in revoked}
        found = connection.execute(
            "SELECT request_id, renews FROM requests WHERE request_id = ANY(%s) AND client_id = ANY(%s)"
            " AND kind = 'renew'",
            (list(ids), list(client_ids)),
        ).fetchall()
        latest = [request for request, renews in found if served.get(renews) == served[ids[request]]]
        served |= {request: served[ids[request]] for request in latest}
    return served


def requests_of_external_ids(
    connection: "psycopg.Connection[Any]", ids: Iterable[UUID]
) -> dict[UUID, tuple[UUID, int]]:
    """Return the (request_id, file) of tokens and uses by their ids."""
    rows = connection.execute(
        "SELECT jti, request_id, file FROM tokens WHERE jti = ANY(%(ids)s) AND file >= 0"
        " UNION ALL SELECT use_id, request_id, file FROM uses WHERE use_id = ANY(%(ids)s)",
        {"ids": list(ids)},
    ).fetchall()
    return {id_: (request_id, file) for id_, request_id, file in rows}


def files_of_jobs(
    connection: "psycopg.Connection[Any]", client_ids: Sequence[int], jobs: Iterable[UUID]
) -> dict[UUID | None, tuple[UUID, dict[int | None, int], dict[int | None, int]]]:
    """Return for each job its request_id, and its files' numbers there by position and by FTS's file_id."""
    rows = connection.execute(
        "SELECT job_id, request_id, files, file_ids || replica_ids, files[:cardinality(file_ids)] ||"
        " replica_files FROM jobs WHERE job_id = ANY(%s) AND client_id = ANY(%s)",
        (list(jobs), list(client_ids)),
    ).fetchall()
    return {
        job: (request, dict(enumerate(files)), dict(zip(ids, files_of_ids, strict=True)))
        for job, request, files, ids, files_of_ids in rows
    }


def change_state(
    connection: "psycopg.Connection[Any]", jtis: Iterable[UUID], state: str, now: datetime
) -> list[UUID]:
    """Set the state of tokens and uses; those that have ended keep their state. Return those that changed.

    The ids are sorted, so that two calls cannot deadlock.
    """
    active, ended = (now, None) if state == "active" else (None, now)
    rows = connection.execute(
        "INSERT INTO token_states (jti, active_at, ended_at, state)"
        " SELECT jti, %s::timestamptz, %s::timestamptz, %s::token_state FROM unnest(%s::uuid[]) AS j (jti)"
        " ON CONFLICT (jti) DO UPDATE SET state = excluded.state, ended_at = excluded.ended_at,"
        " active_at = coalesce(token_states.active_at, excluded.active_at)"
        " WHERE token_states.ended_at IS NULL AND token_states.state <> excluded.state RETURNING jti",
        (active, ended, state, sorted(set(jtis))),
    ).fetchall()
    changed = [jti for (jti,) in rows]
    if ended is not None:
        managed.end_uses(connection, changed)
    return changed


def cancel_token(pool: Pool, client_id: int, jti: UUID, now: datetime) -> bool:
    """Cancel a token or handle, unless it has ended; return False if it is another client's."""
    with transaction(pool) as connection:
        own = own_ids(connection, client_id, [jti])
        change_state(connection, own, "cancelled", now)
        known = connection.execute("SELECT FROM tokens WHERE jti = %s", (jti,)).fetchone() is not None
        return bool(own) or not known


def end_family_tokens(
    connection: "psycopg.Connection[Any]", family_ids: Sequence[UUID], now: datetime
) -> None:
    """Cancel the access tokens of refresh families that are still valid."""
    if not family_ids:
        return
    alive = connection.execute(
        "SELECT f.jti FROM family_tokens f JOIN tokens t USING (jti)"
        " WHERE f.family_id = ANY(%s) AND t.expires_at > %s",
        (list(family_ids), now),
    ).fetchall()
    change_state(connection, [jti for (jti,) in alive], "cancelled", now)


def end_family(pool: Pool, name: str, family_id: UUID, now: datetime) -> bool:
    """Revoke the refresh tokens that descend from one exchange of a client, and end their access tokens.

    The revocation is audited.

    Return False, and change nothing, if another client got them.
    """
    with transaction(pool) as connection:
        connection.execute(
            "WITH ended AS (UPDATE families f SET revoked_at = now() FROM clients c"
            " WHERE f.family_id = %s AND c.client_id = f.client_id AND c.name = %s AND f.revoked_at IS NULL"
            " RETURNING c.name) INSERT INTO audit (actor, action, subject)"
            " SELECT name, 'refresh.revoke', %s FROM ended",
            (family_id, name, str(family_id)),
        )
        holder = connection.execute(
            "SELECT c.name FROM families f JOIN clients c USING (client_id) WHERE f.family_id = %s",
            (family_id,),
        ).fetchone()
        if holder == (name,):
            end_family_tokens(connection, [family_id], now)
        return holder is None or holder == (name,)


def consumer_of(connection: "psycopg.Connection[Any]", uses: Sequence[UUID]) -> str:
    """Return the consumer that a request named for its managed tokens, empty if it named none."""
    if not uses:
        return ""
    (consumer,) = one(connection.execute("SELECT max(consumer) FROM uses WHERE use_id = ANY(%s)", (uses,)))
    return consumer or ""


def live_of(
    connection: "psycopg.Connection[Any]", ids: Sequence[UUID], now: datetime
) -> list[tuple[str, str, int]]:
    """Return jti, storage and `exp` of the tokens behind these ids that are still valid."""
    return connection.execute(
        "SELECT t.jti::text, s.name, extract(epoch FROM t.expires_at)::bigint FROM tokens t"
        " JOIN storages s USING (storage_id) WHERE t.expires_at > %(now)s AND t.jti IN ("
        " SELECT unnest(%(ids)s::uuid[])"
        " UNION SELECT u.jti FROM uses u WHERE u.use_id = ANY(%(ids)s)) ORDER BY t.jti",
        {"ids": ids, "now": now},
    ).fetchall()
