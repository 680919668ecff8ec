"""Operations on issued tokens: fetch, renew, report, cancel.

A client reaches its own tokens only. Other tokens that it names are returned as unknown, whether or not
they exist, so that one client cannot learn of another's tokens. Each call is one transaction, and may be
repeated. The state of a shared token belongs to its uses: `id` below is the id of a use, or the jti of a
token of one file.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any
from uuid import UUID

import psycopg
from msgspec import structs

from minter import logs
from minter.contract.followups import (
    CancelRequest,
    FetchRequest,
    FileReport,
    RenewRequest,
    ReportRequest,
)
from minter.contract.messages import Answer, LiveToken
from minter.database.ended import EndedToken, ended_tokens
from minter.database.recording import PostgresStore
from minter.database.requests import find_operations, read_request
from minter.database.states import (
    FileToken,
    by_external_id,
    change_state,
    consumer_of,
    files_of_jobs,
    live_of,
    note_jobs,
    own_ids,
    requests_of_external_ids,
    tokens_of_requests,
)
from minter.errors import RequestError, UnknownRequest
from minter.fts.events import FTSEvent
from minter.policy.requests import Request
from minter.tasks import answers
from minter.tasks.renewals import renewal
from minter.tokens.mint import Engine
from minter.tokens.records import known_client, path_hash

transfers_logger = logging.getLogger("minter.transfers")
"""One line for each transfer that ended, for the VO's monitoring."""


class Lifecycle:
    """The four operations, bound to the engine and the store: callers give client, request and time.

    `observe` is called with each token whose transfer ended.
    """

    def __init__(
        self, engine: Engine, store: PostgresStore, observe: Callable[[EndedToken], None] = lambda _: None
    ) -> None:
        self.engine = engine
        self.store = store
        self._observe = observe

    def fetch(self, name: str, wire: FetchRequest, now: datetime) -> Answer:
        """Return the tokens of a request or of handles again; raises the errors of `Reissuer.fetch`.

        Minted tokens have the same bytes as before.
        """
        if isinstance(wire.request_id, UUID):
            return answers.answer(self.engine.reissuer.fetch(wire.request_id, name, now), now)
        outcome, unknown = self.engine.reissuer.fetch_handles(wire.handles, name, now)
        places = {handle: f"handles[{n}]" for n, handle in enumerate(wire.handles)}
        found = answers.answer(outcome, now)
        return structs.replace(found, request_id=None, unknown=[places[handle] for handle in unknown])

    def renewal(self, name: str, wire: RenewRequest) -> Request:
        """Return the request that renews another; raises UnknownRequest, UnknownStorage."""
        with self.store.controlled() as (connection, control):
            client = known_client(control, name)
            found = read_request(connection, wire.renews, client.client_id)
            if found is None:
                raise UnknownRequest(
                    f"client {name!r} has made no request {wire.renews} that is still kept; ask anew"
                )
            row, tokens = found
            operations = find_operations(connection, {t.rule_id for t in tokens})
            uses = [UUID(t.use_id) for t in tokens if t.use_id]
            consumer = consumer_of(connection, uses)
        return renewal(wire, row, tokens, operations, client.vo, self.engine.policy, consumer)

    def report(self, name: str, wire: ReportRequest, now: datetime) -> Answer:
        """Record submitted jobs, and files that became active or finished.

        The answer has the number of changed tokens, and the reported jobs and files that are unknown.
        """
        with self.store.controlled() as (connection, control):
            client_id = known_client(control, name).client_id
            unknown = note_jobs(connection, client_id, wire.jobs)
            found = _named(connection, client_id, wire.files, now)
            changed, ended = _bring(connection, found, wire.files, now)
            known = {number for number, _ in found}
            unknown += [f"files[{n}]" for n in range(len(wire.files)) if n not in known]
        self._tell(ended)
        return Answer(changed=changed, unknown=unknown)

    def events(self, vo: str, found: Sequence[FTSEvent], now: datetime) -> tuple[int, int]:
        """Record FTS events of transfers; return the number of tokens changed, and of unknown events.

        A file is found by the job that its client reported. Else it is found by Rucio's request id, and then
        only if the transfer's URLs are those of its tokens: any user of an FTS may write any request id.
        """
        with self.store.controlled() as (connection, control):
            clients = [c.client_id for c in control.clients.values() if c.vo == vo]
            files_of = files_of_jobs(connection, clients, {event.job_id for event in found})
            by_file: dict[int, tuple[UUID, int]] = {}
            by_id: dict[str, list[int]] = defaultdict(list)
            for number, event in enumerate(found):
                request_id, _, by_file_id = files_of.get(event.job_id, (None, {}, {}))
                file = by_file_id.get(event.file_id)
                if request_id is not None and file is not None:
                    by_file[number] = (request_id, file)
                elif event.external_id and event.source_url and event.destination_url:
                    by_id[event.external_id].append(number)
            claimed = self._claimed(connection, clients, by_id, now)
            requests = {request_id for request_id, _ in by_file.values()} | {r for _, (r, _) in claimed}
            tokens: dict[UUID, list[FileToken]] = defaultdict(list)
            for token in tokens_of_requests(connection, clients, requests):
                tokens[token.request_id].append(token)
            named = set(by_file.items())
            named |= {(n, at) for n, at in claimed if self._is_transfer_of(vo, found[n], at, tokens[at[0]])}
            concerned = {
                (number, token.id)
                for number, (request_id, file) in named
                for token in _concerned(found[number], file, tokens[request_id])
            }
            changed, ended = _bring(connection, concerned, found, now)
        transfers = {at for _, at in named}  # later hops of a chain that broke ended, but were no transfers
        self._tell([token for token in ended if (token.request_id, token.file) in transfers])
        return changed, len(found) - len({number for number, _ in named})

    def _tell(self, ended: Sequence[EndedToken]) -> None:
        """Log one line for each transfer that ended, with its tokens; its states are committed by now."""
        for (client, request_id, file), of_one in groupby(ended, lambda t: (t.client, t.request_id, t.file)):
            tokens = list(of_one)
            for token in tokens:
                self._observe(token)
            logs.event(
                transfers_logger, "transfer ended", request_id=str(request_id), file=file,
                vo=tokens[0].vo, client=client, external_id=tokens[0].external_id or None,
                tokens=[token.told() for token in tokens],
            )  # fmt: skip

    def _claimed(
        self, connection: Any, clients: Sequence[int], by_id: Mapping[str, Sequence[int]], now: datetime
    ) -> set[tuple[int, tuple[UUID, int]]]:
        """Return the (request_id, file) that events claim by their external id, each with its event."""
        ids = by_external_id(connection, clients, by_id, now) if by_id else []
        place = requests_of_external_ids(connection, [id_ for _, id_ in ids]) if ids else {}
        return {(n, place[id_]) for external_id, id_ in ids if id_ in place for n in by_id[external_id]}

    def _is_transfer_of(
        self, vo: str, event: FTSEvent, at: tuple[UUID, int], tokens: Sequence[FileToken]
    ) -> bool:
        """Say whether an event's URLs are those of a source and a destination token of this file."""
        directory = self.engine.policy.directories[vo]
        for side, url in (("source", event.source_url), ("destination", event.destination_url)):
            try:
                area, path = directory.locate(url)
            except RequestError:
                return False
            here = (at[1], side, area.storage, path_hash(path))
            if here not in {(t.file, t.side, t.storage, t.path_hash) for t in tokens}:
                return False
        return True

    def cancel(self, name: str, wire: CancelRequest, now: datetime) -> Answer:
        """Cancel tokens that have not ended; the answer lists those that work until they expire."""
        with self.store.controlled() as (connection, control):
            client_id = known_client(control, name).client_id
            if wire.request_id is not None:
                found = read_request(connection, wire.request_id, client_id)
                if found is None:
                    raise UnknownRequest(f"client {name!r} has made no request {wire.request_id}")
                ids = [t.id for t in found[1] if not wire.files or t.file in wire.files]
                ids += [
                    t.id
                    for t in tokens_of_requests(connection, [client_id], [wire.request_id])
                    if not wire.files or t.file in wire.files
                ]
                known = {t.file for t in found[1]}
                unknown = [f"files[{n}]" for n, file in enumerate(wire.files) if file not in known]
            else:
                by_id = by_external_id(connection, [client_id], wire.external_ids, now)
                ids = [id_ for _, id_ in by_id]
                known_ids = {external_id for external_id, _ in by_id}
                unknown = [
                    f"external_ids[{n}]" for n, e in enumerate(wire.external_ids) if e not in known_ids
                ]
            changed = len(change_state(connection, ids, "cancelled", now))
            live = live_of(connection, ids, now)
        return Answer(changed=changed, unknown=unknown, alive=[LiveToken(*row) for row in live])


def _named(
    connection: "psycopg.Connection[Any]", client_id: int, reports: Sequence[FileReport], now: datetime
) -> set[tuple[int, UUID]]:
    """Return the tokens and uses that reports name, as (position of the report, id)."""
    by_id: dict[str, list[int]] = defaultdict(list)
    by_jti: dict[UUID, list[int]] = defaultdict(list)
    by_file: dict[tuple[UUID, int], list[int]] = defaultdict(list)
    files_of = files_of_jobs(connection, [client_id], {r.job_id for r in reports if r.job_id is not None})
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
    found = {(number, jti) for jti in own_ids(connection, client_id, by_jti) for number in by_jti[jti]}
    return found.union(_known(connection, [client_id], by_id, by_file, now))


def _known(
    connection: "psycopg.Connection[Any]",
    client_ids: Sequence[int],
    by_id: Mapping[str, Sequence[int]],
    by_file: Mapping[tuple[UUID, int], Sequence[int]],
    now: datetime,
) -> Iterator[tuple[int, UUID]]:
    """Yield the tokens of external ids and of requests' files, each with the numbers of its reports."""
    for external_id, id_ in by_external_id(connection, client_ids, by_id, now) if by_id else ():
        yield from ((number, id_) for number in by_id[external_id])
    requests = {request_id for request_id, _ in by_file}
    for token in tokens_of_requests(connection, client_ids, requests) if requests else ():
        yield from ((number, token.id) for number in by_file.get((token.request_id, token.file), ()))


def _concerned(event: FTSEvent, file: int, tokens: Sequence[FileToken]) -> Iterator[FileToken]:
    """Yield the tokens that an event of one file is about: its own, and those of a chain's later hops."""
    own = [t for t in tokens if t.file == file]
    if event.unless_others and len({t.position for t in own if t.side == "source"}) > 1:
        return
    yield from own
    if event.ends_chain:
        yield from (t for t in tokens if t.file > file)


def _bring(
    connection: "psycopg.Connection[Any]",
    known: Collection[tuple[int, UUID]],
    told: Sequence[FileReport | FTSEvent],
    now: datetime,
) -> tuple[int, list[EndedToken]]:
    """Set tokens to their reported states, found by position in `told`.

    Returns how many changed, and those that ended.
    """
    active, finished = (
        change_state(connection, (id_ for n, id_ in known if told[n].state == state), state, now)
        for state in ("active", "finished")
    )
    return len(active) + len(finished), ended_tokens(connection, finished) if finished else []
