"""Recovery from a leaked key: every live token of a revoked key is made anew (ADR 17).

Each request with such tokens is renewed: decided again with the current bans, routes and limits, and signed
with the key that is active now. Its renewal has an id of its own (`replacements`), so a recovery that ended
early is started again and makes nothing twice. Clients get the new tokens where they got the old ones.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

from msgspec import Struct
from sqlalchemy.engine import Engine as Pool

from minter import logs
from minter.contract.followups import RenewRequest
from minter.contract.messages import TokenAnswer
from minter.contract.operations import Operation
from minter.database.connection import transaction
from minter.database.recovery import jobs_of, live_by_request, read_requests
from minter.database.requests import find_operations
from minter.errors import RequestError
from minter.policy.clients import Client
from minter.policy.requests import Need, Request
from minter.tasks.answers import answer
from minter.tasks.renewals import renewal
from minter.tokens.keys import Key
from minter.tokens.mint import MAX_LOCKED_NEEDS, Engine
from minter.tokens.outcomes import Outcome, Submission
from minter.tokens.records import OWN_KINDS, RequestRow, TokenRow
from minter.tokens.replacements import replacement_id

logger = logging.getLogger("minter.recovery")

MOST_REQUESTS = 200
"""Requests that are read and renewed together, at most."""


class Unmade(Struct, frozen=True):
    """Live tokens of one request that were not made anew, and why."""

    client: str
    request_id: UUID
    tokens: int
    why: str


class RevokedJob(Struct, frozen=True):
    """An FTS job that was submitted with live tokens of the key: FTS cannot be given others for it."""

    fts: str
    job_id: UUID
    client: str
    request_id: UUID


class RecoveryReport(Struct):
    """What a recovery did, or would do.

    `requests` and `tokens` count what lives under the key, `made` the tokens that were made anew by this or
    an earlier run, `by_client` the live tokens of each client, and `own` those of the token endpoint, which
    clients ask for again by themselves.
    """

    kid: str
    requests: int = 0
    tokens: int = 0
    made: int = 0
    by_client: dict[str, int] = {}
    own: dict[str, int] = {}
    unmade: list[Unmade] = []
    jobs: list[RevokedJob] = []

    def add(self, other: "RecoveryReport") -> None:
        """Add the report of another part."""
        self.requests += other.requests
        self.tokens += other.tokens
        self.made += other.made
        self.by_client = dict(Counter(self.by_client) + Counter(other.by_client))
        self.own = dict(Counter(self.own) + Counter(other.own))
        self.unmade += other.unmade
        self.jobs += other.jobs

    def count(
        self,
        client: str,
        request_id: UUID,
        live: int,
        refusals: Sequence[Mapping[str, Any]],
        error: Mapping[str, Any] | None,
    ) -> None:
        """Count the live tokens of a request, those as made anew that its renewal did not refuse."""
        refused = live if error is not None else min(live, len(refusals))
        self.made += live - refused
        if refused:
            why = (error or refusals[0]["error"])["error_description"]
            self.unmade.append(Unmade(client, request_id, refused, why))


_Group = tuple[tuple[UUID, int], list[TokenRow]]


class Recovery:
    """The recovery from one revoked key, of one process."""

    def __init__(self, engine: Engine, pool: Pool, key: Key, clients: Mapping[int, Client]) -> None:
        self._engine = engine
        self._pool = pool
        self._key = key
        self._clients = clients

    def run(self, now: datetime, *, dry: bool, part: int = 0, parts: int = 1) -> RecoveryReport:
        """Make the live tokens of the key anew, or with `dry` only look; return what was done.

        Several processes may each do one of `parts` parts. Raises NoUsableKey if no other key may sign.
        Refusals are in the report.
        """
        report = RecoveryReport(self._key.kid)
        for batch in _batches(live_by_request(self._pool, self._key.key_id, now, part, parts)):
            self._serve(batch, report, now, dry=dry)
        return report

    def _serve(self, batch: Sequence[_Group], report: RecoveryReport, now: datetime, *, dry: bool) -> None:
        """Count the requests of a batch, and renew those that were not renewed yet."""
        new_ids = {place: replacement_id(place[0], self._key.kid) for place, _ in batch}
        with transaction(self._pool) as connection:
            rows = read_requests(connection, list(new_ids))
            done = read_requests(connection, [(new, place[1]) for place, new in new_ids.items()])
            operations = find_operations(connection, {t.rule_id for _, tokens in batch for t in tokens})
            jobs = jobs_of(connection, list(new_ids))
        fts = {place: t.storage for place, tokens in batch for t in tokens if t.side == "service"}
        report.jobs += [
            RevokedJob(fts.get(place, ""), job, self._clients[place[1]].name, place[0]) for job, place in jobs
        ]
        waiting: list[tuple[_Group, Submission]] = []
        for place, tokens in batch:
            name, live = self._clients[place[1]].name, sum(t.side != "service" for t in tokens)
            if rows[place].kind in OWN_KINDS:
                report.own[name] = report.own.get(name, 0) + live
                continue
            report.requests += 1
            report.tokens += live
            report.by_client[name] = report.by_client.get(name, 0) + live
            again = done.get((new_ids[place], place[1]))
            if again is not None:
                report.count(name, place[0], live, again.refusals, again.error)
            elif not dry:
                try:
                    request = self._renewal(new_ids[place], rows[place], tokens, operations)
                except RequestError as error:
                    report.count(name, place[0], live, [], error.as_dict())
                else:
                    waiting.append(((place, tokens), Submission(request, name)))
        if waiting:
            outcomes = self._engine.mint_many([submission for _, submission in waiting], now)
            for (group, _), outcome in zip(waiting, outcomes, strict=True):
                self._note(report, group, outcome)

    def _renewal(
        self,
        new_id: UUID,
        row: RequestRow,
        tokens: Sequence[TokenRow],
        operations: Mapping[int, Sequence[Operation]],
    ) -> Request:
        files = sorted({t.file for t in tokens if t.side != "service"})
        wire = RenewRequest(request_id=new_id, renews=row.request_id, files=tuple(files))
        return renewal(wire, row, tokens, operations, self._clients[row.client_id].vo, self._engine.policy)

    def _note(self, report: RecoveryReport, group: _Group, outcome: Outcome) -> None:
        """Count what became of one renewal; raises its error if nothing was recorded."""
        error, submission = outcome.error, outcome.submission
        if error is not None and not isinstance(error, RequestError):
            raise error
        (request_id, _), tokens = group
        live = sum(t.side != "service" for t in tokens)
        told = error.as_dict() if error is not None else None
        report.count(submission.client, request_id, live, outcome.refusals, told)
        logs.event(
            logger, "request renewed", client=submission.client, request_id=str(request_id),
            new_request_id=str(submission.request.request_id), tokens=len(outcome.issued),
        )  # fmt: skip


def service_token(engine: Engine, client: str, fts: str, now: datetime) -> TokenAnswer:
    """Return a new token with which a client acts at an FTS; raises the error for which it gets none."""
    request_id = engine.new_jti()
    request = Request(
        request_id=request_id,
        kind="mint",
        digest=sha256(request_id.bytes).digest(),
        files=(),
        service=Need(-1, "service", 0, fts, ()),
        via="fts",
    )
    (outcome,) = engine.mint_many([Submission(request, client)], now)
    if outcome.error is not None:
        raise outcome.error
    (token,) = answer(outcome, now).tokens
    return token


def _batches(groups: Iterable[_Group]) -> Iterator[list[_Group]]:
    """Yield groups together, up to MOST_REQUESTS requests and about MAX_LOCKED_NEEDS tokens."""
    batch: list[_Group] = []
    weight = 0
    for group in groups:
        batch.append(group)
        weight += len(group[1])
        if len(batch) >= MOST_REQUESTS or weight >= MAX_LOCKED_NEEDS:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch
