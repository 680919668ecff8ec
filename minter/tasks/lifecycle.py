"""The life of tokens after they were issued: fetched, renewed, reported, cancelled.

A client reaches its own tokens only; what it names and has not is counted as unknown, so that one
client cannot learn of another's. Each call is one transaction, and may be repeated. What of a shared
token has a life is its uses: `id` below is a use's or, where a token is of one file, its jti.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from msgspec import structs
from sqlalchemy.engine import Engine as Pool

from minter.contract.followups import (
    CancelRequest,
    FetchRequest,
    FileReport,
    JobReport,
    RenewRequest,
    ReportRequest,
)
from minter.contract.messages import Answer, LiveToken
from minter.database import managed
from minter.database.connection import floor, one, transaction
from minter.database.control import read_control
from minter.database.requests import OWN, find_operations, read_request
from minter.errors import InvalidRequest, UnknownRequest
from minter.fts.events import FTSEvent
from minter.policy.limits import LAST_EXPIRY
from minter.policy.requests import Request
from minter.tasks import answers
from minter.tasks.renewals import renewal
from minter.tokens.mint import Engine
from minter.tokens.records import known_client

MAX_TOKENS = 100_000
"""Tokens of all requests that one report may name by request and file."""


class Lifecycle:
    """The four operations, with everything but client, request and time bound to them."""

    def __init__(self, engine: Engine, pool: Pool) -> None:
        self.engine = engine
        self.pool = pool

    def fetch(self, name: str, wire: FetchRequest, now: datetime) -> Answer:
        """Return what a request was granted, the same bytes; raises as `Engine.fetch`."""
        if isinstance(wire.request_id, UUID):
            return answers.answer(self.engine.reissuer.fetch(wire.request_id, name, now), now)
        outcome, unknown = self.engine.reissuer.fetch_handles(wire.handles, name, now)
        places = {handle: f"handles[{n}]" for n, handle in enumerate(wire.handles)}
        found = answers.answer(outcome, now)
        return structs.replace(found, request_id=None, unknown=[places[handle] for handle in unknown])

    def renewal(self, name: str, wire: RenewRequest) -> Request:
        """Return the request that renews another; raises UnknownRequest, UnknownStorage."""
        with transaction(self.pool) as connection:
            client = known_client(read_control(connection), name)
            found = read_request(connection, wire.renews, client.client_id)
            if found is None:
                raise UnknownRequest(
                    f"client {name!r} has made no request {wire.renews} that is still kept; ask anew"
                )
            row, tokens = found
            operations = find_operations(connection, {t.rule_id for t in tokens})
            uses = [UUID(t.use_id) for t in tokens if t.use_id]
            (consumer,) = one(
                connection.execute("SELECT max(consumer) FROM uses WHERE use_id = ANY(%s)", (uses,))
            )
        return renewal(wire, row, tokens, operations, client.vo, self.engine.policy, consumer or "")

    def report(self, name: str, wire: ReportRequest, now: datetime) -> Answer:
        """Note submitted jobs, and files that became active or finished; returns what changed."""
        with transaction(self.pool) as connection:
            client_id = known_client(read_control(connection), name).client_id
            unknown = _note_jobs(connection, client_id, wire.jobs)
            found = _named(connection, client_id, wire.files, now)
            changed = _bring(connection, found, wire.files, now)
            known = {number for number, _ in found}
            unknown += [f"files[{n}]" for n in range(len(wire.files)) if n not in known]
        return Answer(changed=changed, unknown=unknown)

    def events(self, vo: str, found: Sequence[FTSEvent], now: datetime) -> tuple[int, int]:
        """Note what FTS says of its transfers; return the number of tokens changed, and of unknown events.

        A file is known by the job that was reported, or else by Rucio's request id as `external_id`.
        """
        with transaction(self.pool) as connection:
            clients = _clients_of(connection, vo)
            files_of = _files_of_jobs(connection, clients, {event.job_id for event in found})
            by_file: dict[tuple[UUID, int], list[int]] = defaultdict(list)
            by_id: dict[str, list[int]] = defaultdict(list)
            for number, event in enumerate(found):
                request_id, _, by_file_id = files_of.get(event.job_id, (None, {}, {}))
                file = by_file_id.get(event.file_id)
                if request_id is not None and file is not None:
                    by_file[request_id, file].append(number)
                elif event.external_id:
                    by_id[event.external_id].append(number)
            known = list(_known(connection, clients, by_id, by_file, now))
            changed = _bring(connection, known, found, now)
        return changed, len(found) - len({number for number, _ in known})

    def cancel(self, name: str, wire: CancelRequest, now: datetime) -> Answer:
        """Cancel tokens that are not finished; returns those that work until they expire."""
        with transaction(self.pool) as connection:
            client_id = known_client(read_control(connection), name).client_id
            if wire.request_id is not None:
                found = read_request(connection, wire.request_id, client_id)
                if found is None:
                    raise UnknownRequest(f"client {name!r} has made no request {wire.request_id}")
                ids = [t.id for t in found[1] if not wire.files or t.file in wire.files]
                known = {t.file for t in found[1]}
                unknown = [f"files[{n}]" for n, file in enumerate(wire.files) if file not in known]
            else:
                by_id = _by_external_id(connection, [client_id], wire.external_ids, now)
                ids = [id_ for _, id_ in by_id]
                known_ids = {external_id for external_id, _ in by_id}
                unknown = [
                    f"external_ids[{n}]" for n, e in enumerate(wire.external_ids) if e not in known_ids
                ]
            changed = _change(connection, ids, "cancelled", now)
            alive = connection.execute(
                "SELECT t.jti::text, s.name, extract(epoch FROM t.expires_at)::bigint FROM tokens t"
                " JOIN storages s USING (storage_id) WHERE t.expires_at > %(now)s AND t.jti IN ("
                " SELECT unnest(%(ids)s::uuid[])"
                " UNION SELECT u.jti FROM uses u WHERE u.use_id = ANY(%(ids)s)) ORDER BY t.jti",
                {"ids": ids, "now": now},
            ).fetchall()
        return Answer(changed=changed, unknown=unknown, alive=[LiveToken(*row) for row in alive])


def cancel_token(pool: Pool, client_id: int, jti: UUID, now: datetime) -> None:
    """Cancel one of a client's own tokens, if it is one and has not ended."""
    with transaction(pool) as connection:
        _change(connection, _own(connection, client_id, [jti]), "cancelled", now)


def end_family(pool: Pool, name: str, family_id: UUID) -> None:
    """Revoke the refresh tokens that descend from one exchange of a client's, audited."""
    with transaction(pool) as connection:
        connection.execute(
            "WITH ended AS (UPDATE families f SET revoked_at = now() FROM clients c"
            " WHERE f.family_id = %s AND c.client_id = f.client_id AND c.name = %s AND f.revoked_at IS NULL"
            " RETURNING c.name) INSERT INTO audit (actor, action, subject)"
            " SELECT name, 'refresh.revoke', %s FROM ended",
            (family_id, name, str(family_id)),
        )


def _clients_of(connection: "psycopg.Connection[Any]", vo: str) -> list[int]:
    rows = connection.execute("SELECT client_id FROM clients WHERE vo = %s", (vo,)).fetchall()
    return [client_id for (client_id,) in rows]


def _note_jobs(connection: "psycopg.Connection[Any]", client_id: int, jobs: Sequence[JobReport]) -> list[str]:
    unknown = []
    for number, job in enumerate(jobs):
        noted = connection.execute(
            "INSERT INTO jobs (job_id, request_id, client_id, files, file_ids)"
            " SELECT %s, request_id, client_id, %s, %s FROM requests"
            " WHERE request_id = %s AND client_id = %s"
            " ON CONFLICT (job_id) DO UPDATE SET file_ids = excluded.file_ids"
            " WHERE jobs.client_id = excluded.client_id",
            (job.job_id, list(job.files), list(job.file_ids), job.request_id, client_id),
        ).rowcount
        if not noted:
            unknown.append(f"jobs[{number}]")
    return unknown


def _by_external_id(
    connection: "psycopg.Connection[Any]", client_ids: Sequence[int], ids: Iterable[str], now: datetime
) -> list[tuple[str, UUID]]:
    wanted = [i.replace("\x00", "") for i in ids]  # as they were recorded: Postgres has no NUL
    # The index holds 8 bytes of each external_id, in Postgres's own hash.
    (hashes,) = one(
        connection.execute(
            "SELECT array_agg(hashtextextended(e, 0)) FROM unnest(%s::text[]) AS w (e)", (wanted,)
        )
    )
    return connection.execute(
        " UNION ALL ".join(
            f"SELECT external_id, {id_} FROM {table}"
            " WHERE hashtextextended(external_id, 0) = ANY(%(hashes)s::bigint[])"
            " AND external_id = ANY(%(wanted)s) AND external_id <> '' AND client_id = ANY(%(clients)s)"
            f" AND {id_} >= %(first)s"
            for table, id_ in (("tokens", "jti"), ("uses", "use_id"))
        ),
        {
            "hashes": hashes or [],
            "wanted": wanted,
            "clients": list(client_ids),
            "first": floor(now - LAST_EXPIRY),
        },
    ).fetchall()


def _named(
    connection: "psycopg.Connection[Any]", client_id: int, reports: Sequence[FileReport], now: datetime
) -> set[tuple[int, UUID]]:
    """Return the tokens that reports name, as (place of the report, jti)."""
    by_id: dict[str, list[int]] = defaultdict(list)
    by_jti: dict[UUID, list[int]] = defaultdict(list)
    by_file: dict[tuple[UUID, int], list[int]] = defaultdict(list)
    files_of = _files_of_jobs(connection, [client_id], {r.job_id for r in reports if r.job_id is not None})
    for number, report in enumerate(reports):
        if report.external_id is not None:
            by_id[report.external_id].append(number)
        elif report.jti is not None:
            by_jti[report.jti].append(number)
        elif report.request_id is not None and report.file is not None:
            by_file[report.request_id, report.file].append(number)
        elif report.job_id in files_of:
            request_id, by_place, by_file_id = files_of[report.job_id]
            file = by_file_id.get(report.file_id) if report.file is None else by_place.get(report.file)
            if file is not None:
                by_file[request_id, file].append(number)
    found = {(number, jti) for jti in _own(connection, client_id, by_jti) for number in by_jti[jti]}
    return found.union(_known(connection, [client_id], by_id, by_file, now))


def _known(
    connection: "psycopg.Connection[Any]",
    client_ids: Sequence[int],
    by_id: Mapping[str, Sequence[int]],
    by_file: Mapping[tuple[UUID, int], Sequence[int]],
    now: datetime,
) -> Iterator[tuple[int, UUID]]:
    """Yield the tokens of external ids, and of requests' files, each with the places that name it."""
    for external_id, id_ in _by_external_id(connection, client_ids, by_id, now):
        yield from ((number, id_) for number in by_id[external_id])
    for where, id_ in _by_file(connection, client_ids, {request_id for request_id, _ in by_file}):
        yield from ((number, id_) for number in by_file.get(where, ()))


def _bring(
    connection: "psycopg.Connection[Any]",
    known: Collection[tuple[int, UUID]],
    told: Sequence[FileReport | FTSEvent],
    now: datetime,
) -> int:
    """Bring tokens into the states that were told of them, by place; return how many changed."""
    return sum(
        _change(connection, (id_ for n, id_ in known if told[n].state == state), state, now)
        for state in ("active", "finished")
    )


def _own(connection: "psycopg.Connection[Any]", client_id: int, jtis: Iterable[UUID]) -> list[UUID]:
    rows = connection.execute(
        f"SELECT jti FROM tokens t WHERE jti = ANY(%(jtis)s) AND client_id = %(client)s AND {OWN}"
        " UNION ALL SELECT use_id FROM uses u JOIN tokens t USING (jti)"
        " WHERE use_id = ANY(%(jtis)s) AND u.client_id = %(client)s AND t.mode <> 'mint'",  # a handle
        {"jtis": list(jtis), "client": client_id},
    ).fetchall()
    return [jti for (jti,) in rows]


def _by_file(
    connection: "psycopg.Connection[Any]", client_ids: Sequence[int], requests: Iterable[UUID]
) -> list[tuple[tuple[UUID, int], UUID]]:
    """Return ((request_id, file), id) of all tokens and uses of these requests."""
    ranges = connection.execute(
        "SELECT request_id, first_jti, tokens FROM requests WHERE request_id = ANY(%s)"
        " AND client_id = ANY(%s)",
        (list(requests), list(client_ids)),
    ).fetchall()
    if sum(count for *_, count in ranges) > MAX_TOKENS:
        raise InvalidRequest(
            f"the requests named have more than {MAX_TOKENS} tokens together; report fewer at once"
        )
    request_of = {UUID(int=first.int + n): request for request, first, count in ranges for n in range(count)}
    rows = connection.execute(
        "SELECT jti, file FROM tokens WHERE jti = ANY(%(ids)s) AND file >= 0"
        " UNION ALL SELECT use_id, file FROM uses WHERE use_id = ANY(%(ids)s)",
        {"ids": list(request_of)},
    ).fetchall()
    return [((request_of[id_], file), id_) for id_, file in rows]


def _files_of_jobs(
    connection: "psycopg.Connection[Any]", client_ids: Sequence[int], jobs: Iterable[UUID]
) -> dict[UUID | None, tuple[UUID, dict[int | None, int], dict[int | None, int]]]:
    """Return of each job its request, and the files' numbers there by place and by FTS's file_id."""
    rows = connection.execute(
        "SELECT job_id, request_id, files, file_ids FROM jobs WHERE job_id = ANY(%s) AND client_id = ANY(%s)",
        (list(jobs), list(client_ids)),
    ).fetchall()
    return {
        job: (request, dict(enumerate(files)), dict(zip(ids, files, strict=False)))
        for job, request, files, ids in rows
    }


def _change(connection: "psycopg.Connection[Any]", jtis: Iterable[UUID], state: str, now: datetime) -> int:
    """Bring tokens into a state, sorted so that two calls cannot deadlock; what has ended stays."""
    active, ended = (now, None) if state == "active" else (None, now)
    changed = connection.execute(
        "INSERT INTO token_states (jti, active_at, ended_at, state)"
        " SELECT jti, %s::timestamptz, %s::timestamptz, %s::token_state FROM unnest(%s::uuid[]) AS j (jti)"
        " ON CONFLICT (jti) DO UPDATE SET state = excluded.state, ended_at = excluded.ended_at,"
        " active_at = coalesce(token_states.active_at, excluded.active_at)"
        " WHERE token_states.ended_at IS NULL AND token_states.state <> excluded.state RETURNING jti",
        (active, ended, state, sorted(set(jtis))),
    ).fetchall()
    if ended is not None:
        managed.end_uses(connection, [jti for (jti,) in changed])
    return len(changed)
