"""Recovery from a leaked key: every live token of a revoked key is made anew (ADR 17).

Each request with such tokens is renewed: decided again with the current bans, routes and limits, and signed
with the key that is active now. Its renewal has an id of its own (`replacements`), so a recovery that ended
early is started again and makes nothing twice. Clients get the new tokens where they got the old ones.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

import psycopg
from msgspec import Struct, structs
from sqlalchemy.engine import Engine as Pool

from minter import logs
from minter.contract.followups import RenewRequest
from minter.contract.messages import TokenAnswer
from minter.contract.operations import Operation
from minter.database.connection import transaction
from minter.database.control import read_control
from minter.database.recovery import find_routes, jobs_of, live_by_request, read_requests, reader
from minter.database.requests import find_operations
from minter.errors import RequestError, UnknownRequest
from minter.policy.clients import Client
from minter.policy.plans import Decision
from minter.policy.requests import Need, Request, content_digest
from minter.tasks.answers import answer
from minter.tasks.renewals import renewal
from minter.tokens.keys import Key
from minter.tokens.mint import MAX_LOCKED_NEEDS, Engine
from minter.tokens.outcomes import Submission
from minter.tokens.records import OWN_KINDS, Control, RequestRow, TokenRow
from minter.tokens.replacements import Place, Recorded, follow, is_lost, tries

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


_Group = tuple[Place, list[TokenRow]]


class _Lost(Struct, frozen=True):
    """The tokens of one request that were not made anew yet, and the request_id for their renewal."""

    row: RequestRow
    client: Client
    tokens: list[TokenRow]
    service: TokenRow | None
    new_id: UUID


class Recovery:
    """The recovery from one revoked key, of one process."""

    def __init__(self, engine: Engine, pool: Pool, key: Key, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._pool = pool
        self._key = key
        self._revoked = {key.key_id: key.kid}
        self._clock = clock

    def run(
        self,
        *,
        dry: bool,
        part: int = 0,
        parts: int = 1,
        note: Callable[[RecoveryReport], None] = lambda _: None,
    ) -> RecoveryReport:
        """Make the live tokens of the key anew, or with `dry` only look; return what was done.

        Several processes may each do one of `parts` parts. `note` gets the report so far after each batch.
        Refusals are in the report. Raises NoUsableKey if no other key may sign.
        """
        report = RecoveryReport(self._key.kid)
        for batch in _batches(live_by_request(self._pool, self._key.key_id, self._clock(), part, parts)):
            self._serve(batch, report, dry=dry)
            note(report)
        return report

    def _serve(self, batch: Sequence[_Group], report: RecoveryReport, *, dry: bool) -> None:
        """Count the requests of a batch, and renew those that were not renewed yet."""
        now, rules = self._clock(), {token.rule_id for _, tokens in batch for token in tokens}
        with transaction(self._pool) as connection:
            control = read_control(connection)
            clients = {client.client_id: client for client in control.clients.values()}
            rows = read_requests(connection, [place for place, _ in batch])
            of_key = {
                place: (rows[place], [t for t in tokens if self._is_concerned(t, now)])
                for place, tokens in batch
                if rows[place].kind not in OWN_KINDS
            }
            made, free = follow(reader(connection), of_key, self._revoked)
            report.jobs += self._jobs(connection, dict(batch), made, clients, control.ring)
            operations, routes = find_operations(connection, rules), find_routes(connection, rules)
        waiting: list[tuple[_Lost, Request]] = []
        for place, tokens in batch:
            name = clients[place[1]].name
            if place not in of_key:
                report.own[name] = report.own.get(name, 0) + len(tokens)
                continue
            whole = of_key[place][1]
            lost = [n for n in range(len(whole)) if (place, n) in free]
            report.requests += 1
            report.tokens += len(whole)
            report.made += len(whole) - len(lost)
            report.by_client[name] = report.by_client.get(name, 0) + len(whole)
            if not lost or dry:
                continue
            service = next((t for t in tokens if t.side == "service"), None)
            one = _Lost(
                rows[place], clients[place[1]], [whole[n] for n in lost], service, free[place, lost[0]]
            )
            try:
                request = self._request(one, report, control, operations, routes, now)
            except RequestError as error:
                report.unmade.append(Unmade(name, place[0], len(lost), error.message))
            else:
                waiting += [(one, request)] if request is not None else []
        if waiting:
            self._renew(waiting, report, now)

    def _is_concerned(self, token: TokenRow, now: datetime) -> bool:
        return is_lost(token, self._revoked) and token.expires_at > now.timestamp()

    def _request(
        self,
        lost: _Lost,
        report: RecoveryReport,
        control: Control,
        operations: Mapping[int, Sequence[Operation]],
        routes: Mapping[int, str],
        now: datetime,
    ) -> Request | None:
        """Return the request that renews the files of another that are not refused now; raises RequestError.

        A refusal is counted and not recorded, so the next run tries again.
        """
        policy, client = self._engine.policy, lost.client
        for_urls = {route.name for route in policy.routes if route.via == "url"}
        if any(routes.get(token.rule_id) in for_urls for token in lost.tokens):
            raise UnknownRequest("the tokens are in URLs; sign these under a new request_id")
        names = tuple(sorted({routes[t.rule_id] for t in lost.tokens if t.rule_id in routes}))

        def decide(tokens: Sequence[TokenRow], only: tuple[str, ...]) -> tuple[Request, Decision]:
            request = structs.replace(self._renewal(lost, tokens, operations), routes=only)
            return request, policy.decide(request, client.at(now), control.bans, control.away)

        only: tuple[str, ...] = ()
        _, decision = decide(lost.tokens, only)
        if any(planned.managed for planned in decision.planned_tokens) or decision.refused:
            # What was signed in place of a provider's token is signed again, by the route of then.
            _, instead = decide(lost.tokens, names)
            if len(instead.planned_tokens) >= len(decision.planned_tokens):
                only, decision = names, instead
        if decision.error is not None:
            raise decision.error
        why = {r.need.file: r.error for r in decision.refused if r.need is not None}
        chosen = [token for token in lost.tokens if token.file not in why]
        if refused := len(lost.tokens) - len(chosen):
            first = next(iter(why.values()))
            report.unmade.append(Unmade(client.name, lost.row.request_id, refused, first.message))
        if not chosen or (why and all(token.side == "service" for token in chosen)):
            return None
        return decide(chosen, only)[0]

    def _renew(self, waiting: Sequence[tuple[_Lost, Request]], report: RecoveryReport, now: datetime) -> None:
        """Mint the tokens of renewals, and count them; raises the error of one that recorded nothing."""
        submissions = [Submission(request, lost.client.name) for lost, request in waiting]
        for (lost, request), outcome in zip(waiting, self._engine.mint_many(submissions, now), strict=True):
            if outcome.error is not None:
                if not isinstance(outcome.error, RequestError):
                    raise outcome.error
                why = outcome.error.message
                report.unmade.append(Unmade(lost.client.name, lost.row.request_id, len(lost.tokens), why))
                continue
            served = {issued.slot for issued in outcome.issued}
            served |= {pending.slot for pending in outcome.pending}  # a fallback's provider is back
            report.made += len(served & {token.slot for token in lost.tokens})
            logs.event(
                logger, "request renewed", client=lost.client.name, request_id=str(lost.row.request_id),
                new_request_id=str(request.request_id), tokens=len(outcome.issued),
            )  # fmt: skip

    def _renewal(
        self, lost: _Lost, tokens: Sequence[TokenRow], operations: Mapping[int, Sequence[Operation]]
    ) -> Request:
        """Return the request for these tokens, which may be a service token alone."""
        row, vo, policy = lost.row, lost.client.vo, self._engine.policy
        files = sorted({token.file for token in tokens if token.side != "service"})
        wire = RenewRequest(request_id=lost.new_id, renews=row.request_id, files=tuple(files))
        if files:
            services = [lost.service] if lost.service is not None else []
            of_files = [token for token in tokens if token.side != "service"]
            return renewal(wire, row, [*of_files, *services], operations, vo, policy)
        assert lost.service is not None
        return Request(
            request_id=lost.new_id,
            kind="renew",
            digest=content_digest(wire),
            files=(),
            on_behalf_of=row.on_behalf_of,
            activity=row.activity,
            service=Need(-1, "service", 0, policy.fts_url(vo, lost.service.storage), ()),
            via="fts",
            renews=row.request_id,
        )

    def _jobs(
        self,
        connection: "psycopg.Connection[Any]",
        batch: Mapping[Place, Sequence[TokenRow]],
        made: Recorded,
        clients: Mapping[int, Client],
        ring: Sequence[Key],
    ) -> Iterator[RevokedJob]:
        """Yield the FTS jobs that hold tokens of these requests.

        A replacement's tokens are in the jobs that were reported, after it, for the request that it serves.
        Jobs that were reported when the tokens had replacements hold these.
        """
        newer = {
            place: [(t.request_id, place[1]) for t in tokens if t.request_id != place[0]]
            for place, (_, tokens) in made.items()
        }
        new_rows = read_requests(connection, [one for ones in newer.values() for one in ones])
        of: dict[Place, Place] = {}
        for place, (row, _) in made.items():
            of |= {(id_, place[1]): place for id_ in self._served(connection, row, ring)} | {place: place}
        for job, asked, at in jobs_of(connection, list(of)):
            place = of[asked]
            until = min((new_rows[one].received_at for one in newer[place]), default=at)
            if at <= until and (asked == place or at > made[place][0].received_at):
                fts = next((t.storage for t in batch[place] if t.side == "service"), "")
                yield RevokedJob(fts, job, clients[place[1]].name, asked[0])

    def _served(
        self, connection: "psycopg.Connection[Any]", row: RequestRow, ring: Sequence[Key]
    ) -> Iterator[UUID]:
        """Yield the requests that this one serves as a replacement, from the nearest on."""
        revoked = [key.kid for key in ring if key.state == "revoked"]
        while row.kind == "renew" and row.renews is not None:
            if not any(row.request_id in tries(row.renews, kid) for kid in revoked):
                return
            yield row.renews
            found = read_requests(connection, [(row.renews, row.client_id)])
            if not found:
                return
            (row,) = found.values()


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
