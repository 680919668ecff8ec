"""Mint: decide, sign, check, record, hand out. The whole product in one file.

`mint_many` takes submissions that wait together and gives each its outcome. It names what it needs
as Protocols; the adapters fit them. The order of its steps is the invariants:

1. Open the recording transaction and read bans, clients and keys under its lock: whatever an
   operator changed before binds this batch, and what changes now waits for it (I9).
2. Decide each request (pure).
3. Insert the requests; where a request_id is taken, read what was recorded instead (I4).
4. Build, sign and check each new token. Nothing has left: a failure here leaves nothing behind.
5. COPY their rows, with FTS's id of each token (SHA-1 of its bytes), while the next are signed.
   A grant of a shared token gets a row of its use, and a new token only where none serves it.
6. Commit. Now the tokens are issued (I2).
7. Hand out: new tokens as signed; repeated ones signed again from their rows, byte for byte.

A crash before 6 leaves nothing; after it, the unacknowledged message comes again and ends in 7.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec import structs

from minter.contract.messages import Side
from minter.errors import (
    Banned,
    ClientMismatch,
    ClockSkew,
    Conflict,
    Expired,
    NoUsableKey,
    ReplyNotAllowed,
    RequestError,
    UnknownClient,
    UnknownRequest,
    from_dict,
)
from minter.policy import token_endpoint
from minter.policy.clients import Client
from minter.policy.limits import COVER_SECONDS, MAX_CLOCK_SKEW_SECONDS
from minter.policy.plans import Plan, PlannedToken
from minter.policy.requests import SEVERAL, Request, check_request_id
from minter.policy.transfers import Policy, check_reply_queue
from minter.scopes import parse_scopes
from minter.tokens import keys, managed
from minter.tokens.claims import build_claims, check_token, unverified_claims
from minter.tokens.keys import Key, RotationPolicy, Signer
from minter.tokens.managed import ManagedToken, Wanted
from minter.tokens.outcomes import (
    Issued,
    Observe,
    Observed,
    Outcome,
    Pending,
    PendingRequest,
    Submission,
    copy_outcome,
)
from minter.tokens.records import OWN_KINDS, Control, Recording, RequestRow, Store, TokenRow
from minter.tokens.shared import Shared, SharedKey, SharedTokenCache

_SAMPLE = 256
"""The signature of every such token, told by FTS's id of it, is verified; the claims of every one
are checked."""
_JTI_NUMBERS = (1 << 20) - 1
"""The bits, five hex digits, of a jti that count a request's tokens: no request has 2^20."""


def _opens_none(*_: object) -> str:
    raise NoUsableKey("this process opens no tokens of providers")


class Engine:
    """`mint_many` with everything but the submissions and the time bound to it."""

    def __init__(
        self,
        store: Store,
        policy: Policy,
        unlock: Callable[[Key], Signer],
        new_jti: Callable[[], UUID],
        observe: Observe,
        *,
        open_token: Callable[[str, UUID, str, bytes], str] = _opens_none,
        rotation: RotationPolicy | None = None,
        retention_seconds: int = 30 * 86400,
    ) -> None:
        self.store = store
        self.policy = policy
        self.unlock = unlock
        self.new_jti = new_jti
        self.observe = observe
        self._open_token = open_token
        self.rotation = rotation or RotationPolicy()
        self.retention_seconds = retention_seconds
        self._shared_tokens = SharedTokenCache()

    def mint_many(self, submissions: Sequence[Submission], now: datetime) -> list[Outcome]:
        """Give each submission its outcome; equal ones are served once.

        Raises what the store raises when it is away: then nothing was recorded or handed out.
        """
        outcomes = [Outcome(s, [], []) for s in submissions]
        # Lock order: every batch inserts its request_ids sorted, so two batches cannot deadlock.
        ordered = sorted(outcomes, key=lambda o: (o.submission.request.request_id, o.submission.client))
        self._observe("received", outcomes, now)
        waiting: dict[tuple[UUID, str], PendingRequest] = {}
        duplicates: list[tuple[Outcome, PendingRequest]] = []
        with self.store.recording() as tx:
            control, skew = tx.control()
            try:
                check_clock(skew)
            except ClockSkew as error:
                return [structs.replace(o, error=error) for o in outcomes]
            lookups = _Lookups(tx, ordered)
            for outcome in ordered:
                self._begin(outcome, control, now, waiting, duplicates, lookups)
            self._observe("decided", outcomes, now)
            ready = [w for w in waiting.values() if self._ready(w, control, now)]
            rules = tx.rules({g.plan for w in ready for g in w.decision.planned_tokens})
            new = tx.insert_requests([w.row for w in ready])
            self._observe("inserted", outcomes, now)
            fresh = [w for w in ready if w.key in new]
            # The rows stream into COPY while the next ones are signed.
            self._manage(tx, fresh, rules, now)
            shares = self._shares(tx, fresh, rules, now)
            tx.copy_tokens(row for w in fresh for row in self._sign(w, control, rules, shares, now))
            tx.copy_uses([use for w in fresh for use in w.uses])
            tx.save_families(list({f.family_id: f for w in fresh if (f := w.outcome.family)}.values()))
            self._observe("copied", outcomes, now)
            known = [w for w in waiting.values() if w.key not in new]
            recorded = tx.recorded([w.key for w in known]) if known else {}
            managed_tokens = _managed_rows(tx, (token for _, tokens in recorded.values() for token in tokens))
        self._shared_tokens.remember(shares)
        self._observe("committed", outcomes, now)
        for waiting_request in known:
            if waiting_request.key in recorded:
                self._repeat(waiting_request, *recorded[waiting_request.key], managed_tokens, control, now)
        for outcome, waiting_request in duplicates:
            if waiting_request.key in recorded:
                self._repeat(
                    waiting_request.duplicate(outcome),
                    *recorded[waiting_request.key],
                    managed_tokens,
                    control,
                    now,
                )
            else:
                copy_outcome(outcome, waiting_request)
        for outcome in outcomes:
            outcome.keep_whole(all_or_nothing=outcome.submission.request.all_or_nothing)
        self._observe("answered", outcomes, now)
        return outcomes

    # ── the steps ────────────────────────────────────────────────────────────────────────────

    def _begin(
        self,
        outcome: Outcome,
        control: Control,
        now: datetime,
        waiting: dict[tuple[UUID, str], PendingRequest],
        duplicates: list[tuple[Outcome, PendingRequest]],
        lookups: "_Lookups",
    ) -> None:
        """Decide one submission, or set it beside its equal one in the same batch."""
        request, name = outcome.submission.request, outcome.submission.client
        first = waiting.get((request.request_id, name))
        if first is not None:
            duplicates.append((outcome, first))
            return
        try:
            client = _client(control, request, name)
            if request.kind not in OWN_KINDS:  # whose ids are made here
                check_request_id(request, now.timestamp(), self.retention_seconds)
        except RequestError as error:  # not a client, or no id to record it under
            outcome.error = error
            return
        if request.token_request is None:
            on_behalf_of, activity = request.on_behalf_of, _activity(request)
            decision = self.policy.decide(request, client.at(now), control.bans, control.away)
        else:
            granted = token_endpoint.decide(
                self.policy,
                request,
                client,
                control.clients,
                control.bans,
                now,
                lookups.subjects,
                lookups.families,
            )
            decision, outcome.family, on_behalf_of, activity = granted
            if outcome.family is not None:
                lookups.families[outcome.family.family_id] = outcome.family
        outcome.client, outcome.decision, outcome.error = client, decision, decision.error
        outcome.refusals = [structs.asdict(r.record()) for r in decision.refused]
        waiting[request.request_id, name] = PendingRequest(outcome, client, decision, on_behalf_of, activity)

    def _ready(self, waiting_request: PendingRequest, control: Control, now: datetime) -> bool:
        """Make the request's row; False if no key may sign, so that nothing can be recorded."""
        request, client, planned_tokens = (
            waiting_request.outcome.submission.request,
            waiting_request.client,
            waiting_request.decision.planned_tokens,
        )
        base = self.new_jti().int & ~_JTI_NUMBERS
        shared = {(g.plan, g.shared) for g in planned_tokens if g.shared and not g.managed}
        waiting_request.first_managed = len(planned_tokens) + len(shared)
        waiting_request.row = RequestRow(
            request.request_id, client.client_id, request.digest, request.kind, waiting_request.activity,
            waiting_request.on_behalf_of, UUID(int=base), waiting_request.first_managed + sum(g.managed for g in planned_tokens),
            waiting_request.outcome.refusals,
            waiting_request.decision.error.as_dict() if waiting_request.decision.error else None, now, request.renews,
            request.all_or_nothing,
        )  # fmt: skip
        if not planned_tokens:
            return True
        try:  # a provider's token needs no key of ours, but the master key that opens one
            waiting_request.signing_key = keys.active(control.ring, client.vo)
            self.unlock(waiting_request.signing_key)
        except NoUsableKey as error:
            waiting_request.outcome.error, waiting_request.outcome.refusals = error, []
            return False
        return True

    def _manage(
        self, tx: Recording, fresh: Sequence[PendingRequest], rules: Mapping[Plan, int], now: datetime
    ) -> None:
        """Record what providers are to give; what was given for an equal wish before is handed out."""
        token_requests: dict[bytes, Wanted] = {}
        rows: dict[bytes, TokenRow] = {}
        uses: list[tuple[PendingRequest, PlannedToken, str, bytes]] = []
        for waiting_request in fresh:
            base, request = waiting_request.row.first_jti.int, waiting_request.outcome.submission.request
            fresh_id = base + waiting_request.first_managed
            for number, planned in enumerate(waiting_request.decision.planned_tokens):
                if not planned.managed:
                    continue
                jti = UUID(int=fresh_id)
                one = managed.wanted(
                    planned, request, waiting_request.client, jti, waiting_request.activity, now
                )
                if one.digest in token_requests:
                    token_requests[one.digest] = token_requests[one.digest].joined(one)
                else:
                    token_requests[one.digest], fresh_id = one, fresh_id + 1
                    rows[one.digest] = waiting_request.managed_row(planned, rules[planned.plan], one)
                uses.append((waiting_request, planned, str(UUID(int=base + number)), one.digest))
        if not token_requests:
            return
        managed_tokens = tx.join_managed(list(token_requests.values()))
        tx.copy_managed([row for digest, row in rows.items() if str(managed_tokens[digest].jti) == row.jti])
        for waiting_request, planned, handle, digest in uses:
            token = managed_tokens[digest]
            waiting_request.manage(planned, handle, token.jti)
            need: tuple[int, Side, int] = (planned.need.file, planned.need.side, planned.need.index)
            least = timedelta(seconds=token_requests[digest].least_seconds)
            storage = planned.plan.area.storage
            given = self._given(token, need, storage, handle) if token.shows(now + least) else None
            if given is not None:
                waiting_request.outcome.issued.append(given)
            else:
                waiting_request.outcome.pending.append(Pending(need, storage, planned.scope, handle))

    def _given(
        self, token: ManagedToken, need: tuple[int, Side, int], storage: str, handle: str
    ) -> Issued | None:
        """Return the access token of a managed token, None if it does not open: one row's trouble."""
        assert token.access is not None
        assert token.expires_at is not None
        try:
            access = self._open_token(token.vo, token.jti, "access", token.access)
        except NoUsableKey:
            return None
        exp = int(token.expires_at.timestamp())
        return Issued(need, storage, token.scope, handle, exp, access.encode(), handle)

    def _shares(
        self, tx: Recording, fresh: Sequence[PendingRequest], rules: Mapping[Plan, int], now: datetime
    ) -> dict[SharedKey, Shared]:
        """Return the shared tokens that may serve these requests: kept here, or recorded elsewhere."""
        wanted = {
            SharedKey(w.client.client_id, rules[g.plan], g.shared): (w, g)
            for w in fresh
            for g in w.decision.planned_tokens
            if g.shared and not g.managed
        }
        if not wanted:
            return {}
        found, seconds = self._shared_tokens.get(wanted), int(now.timestamp())
        missing = [
            shared_key
            for shared_key, (waiting_request, planned) in wanted.items()
            if shared_key not in found
            or not found[shared_key].serves(planned, waiting_request.key_id, seconds)
        ]
        for shared_key, row in tx.shared_tokens(missing, now).items() if missing else ():
            key = wanted[shared_key][0].signing_key
            if key is not None and row.key_id == key.key_id:
                token = self.unlock(key).sign(row.payload.encode())
                scope = str(unverified_claims(token)[1]["scope"])
                found[shared_key] = Shared(row.jti, row.key_id, row.expires_at, scope, token)
        return found

    def _sign(
        self,
        waiting_request: PendingRequest,
        control: Control,
        rules: Mapping[Plan, int],
        shares: dict[SharedKey, Shared],
        now: datetime,
    ) -> Iterator[TokenRow]:
        """Build, sign and check every token that one new request needs; yield their rows."""
        key, client = waiting_request.signing_key, waiting_request.client
        if key is None:
            return  # every file was refused, or is a provider's
        signer, issuer = self.unlock(key), control.issuers[client.vo]
        seconds = int(now.timestamp())
        first = str(waiting_request.row.first_jti)[:-5]

        def make(planned: PlannedToken, jti: str) -> tuple[bytes, TokenRow]:
            payload = build_claims(planned, issuer, client.sub, client.name, seconds, jti)
            token = signer.sign(payload)
            check_token(token, planned, issuer, client.sub, client.name, seconds, jti, key.kid, key.algorithm)
            row = waiting_request.token_row(planned, rules[planned.plan], jti, payload, token, key, seconds)
            if row.fts_token_id % _SAMPLE == 0:
                keys.verify(token, key.public_jwk)
            return token, row

        beyond = len(
            waiting_request.decision.planned_tokens
        )  # the ids of new shared tokens follow those of the grants
        for number, planned in enumerate(waiting_request.decision.planned_tokens):
            jti = f"{first}{number:05x}"
            if planned.managed:
                continue
            if not planned.shared:
                token, row = make(planned, jti)
                waiting_request.add(planned, jti, row.expires_at, token)
                yield row
                continue
            shared_key = SharedKey(client.client_id, rules[planned.plan], planned.shared)
            shared = shares.get(shared_key)
            if shared is None or not shared.serves(planned, key.key_id, seconds):
                token, row = make(planned.whole(), f"{first}{beyond:05x}")
                shared = shares[shared_key] = Shared(
                    row.jti, key.key_id, row.expires_at, planned.scope, token
                )
                beyond += 1
                yield row
            waiting_request.use(planned, jti, shared)

    def _repeat(
        self,
        waiting_request: PendingRequest,
        row: RequestRow,
        tokens: Sequence[TokenRow],
        managed_tokens: Mapping[UUID, ManagedToken],
        control: Control,
        now: datetime,
    ) -> None:
        """Answer a repeated request_id from what was recorded (I4)."""
        try:
            self._answer_again(waiting_request, row, tokens, managed_tokens, control, now)
        except (RequestError, NoUsableKey) as error:
            waiting_request.outcome.withhold(error)

    def _answer_again(
        self,
        waiting_request: PendingRequest,
        row: RequestRow,
        tokens: Sequence[TokenRow],
        managed_tokens: Mapping[UUID, ManagedToken],
        control: Control,
        now: datetime,
    ) -> None:
        outcome = waiting_request.outcome
        outcome.issued, outcome.refusals, outcome.repeated = [], list(row.refusals), True
        outcome.client, outcome.decision = waiting_request.client, waiting_request.decision
        outcome.error = from_dict(row.error) if row.error else None
        if row.digest != outcome.submission.request.digest:
            raise Conflict(f"request_id {row.request_id} was used before with other content; make a new one")
        for file in outcome.submission.request.files:
            control.bans.check(waiting_request.client.vo, activity=file.activity)
        check_reply_queue(outcome.submission.request.reply_queue, waiting_request.client)
        if isinstance(waiting_request.decision.error, ReplyNotAllowed):
            raise waiting_request.decision.error
        if outcome.error is None:
            self._reissue_all(outcome, row, tokens, managed_tokens, control, now)

    def fetch(self, request_id: UUID, name: str, now: datetime) -> Outcome:
        """Give again what a request was granted, known by its id alone (I3, I4).

        Raises UnknownRequest if this client made none, Expired and Banned as a repetition would be
        refused, and the request's own error if it was refused whole.
        """
        with self.store.recording() as tx:
            control, skew = tx.control()
            check_clock(skew)
            client = known_client(control, name)
            found = tx.recorded([(request_id, client.client_id)])
            managed_tokens = _managed_rows(tx, (token for _, tokens in found.values() for token in tokens))
        if not found:
            raise UnknownRequest(f"client {name!r} has made no request {request_id} that is still kept")
        ((row, tokens),) = found.values()
        if row.kind in OWN_KINDS:
            raise UnknownRequest("a token of the token endpoint is not given again; ask for a new one")
        if row.error:
            raise from_dict(row.error)
        _check_several(row, control, client)
        request = Request(request_id, "mint", row.digest, ())  # a job's content is not recorded
        outcome = Outcome(Submission(request, name), [], list(row.refusals), repeated=True, client=client)
        self._reissue_all(outcome, row, tokens, managed_tokens, control, now)
        outcome.keep_whole(all_or_nothing=row.all_or_nothing)
        return outcome

    def fetch_handles(self, handles: Sequence[UUID], name: str, now: datetime) -> tuple[Outcome, list[UUID]]:
        """Give what managed tokens hold now, to their client or to the consumer that it named.

        Also returns the handles that are not this client's to fetch, or nobody's: it does not learn which.
        """
        with self.store.recording() as tx:
            control, skew = tx.control()
            check_clock(skew)
            client = known_client(control, name)
            known = {c.name for c in control.clients.values() if c.vo == client.vo and not c.disabled}
            used = [
                token
                for owner, consumer, token in tx.used(handles)
                if owner in known and name in (owner, consumer)
            ]
            requests = tx.recorded(list({(t.request_id, t.client_id) for t in used}))
            managed_tokens = _managed_rows(tx, used)
        request = Request(handles[0], "mint", b"", ())
        outcome = Outcome(Submission(request, name), [], [], repeated=True, client=client)
        for token in used:
            row, _ = requests[token.request_id, token.client_id]
            try:
                _check_several(row, control, client)
                self._reissue_all(outcome, row, [token], managed_tokens, control, now)
            except RequestError as error:  # the others are not its trouble
                where = {"file": token.file, "side": token.side, "index": token.index}
                outcome.refusals.append(where | {"error": error.as_dict()})
        found = {token.use_id for token in used}
        return outcome, [handle for handle in handles if str(handle) not in found]

    def _reissue_all(
        self,
        outcome: Outcome,
        row: RequestRow,
        tokens: Sequence[TokenRow],
        managed_tokens: Mapping[UUID, ManagedToken],
        control: Control,
        now: datetime,
    ) -> None:
        """Give the tokens of a request again; raises Banned for what was banned since (I9).

        A request is withheld whole: half of a chain, or a copy without its source, helps nobody.
        """
        assert outcome.client is not None
        bans, vo = control.bans, outcome.client.vo
        owner = next((c.name for c in control.clients.values() if c.client_id == row.client_id), "")
        bans.check(vo, vo=vo, client=outcome.client.name)
        bans.check(vo, client=owner, activity=row.activity, on_behalf_of=row.on_behalf_of)
        for token in tokens:
            bans.check(vo, storage=token.storage)
            for scope in parse_scopes(str(json.loads(token.payload)["scope"])):
                if scope.path is not None:
                    bans.check_path(vo, scope.path)
        for token in tokens:
            if token.mode == "mint":
                outcome.issued.append(self.reissue(token, control, now))
            else:
                self._give_again(outcome, token, managed_tokens.get(UUID(token.jti)), now)

    def _give_again(self, outcome: Outcome, row: TokenRow, token: ManagedToken | None, now: datetime) -> None:
        """Give what a managed token holds, say that it is waited for, or why it never comes."""
        need = (row.file, row.side, row.index)
        ended = row.state in ("cancelled", "finished")
        given = None
        if not ended and token is not None and token.shows(now):
            given = self._given(token, need, row.storage, row.use_id)
        if given is not None:
            outcome.issued.append(given)
            return
        error = token.error if token is not None and token.state == "failed" else None
        waits = token is not None and token.state in ("queued", "issued") and token.deadline > now
        if waits and not ended:
            scope = str(json.loads(row.payload)["scope"])
            outcome.pending.append(Pending(need, row.storage, scope, row.use_id))
            return
        over = f"was {row.state}" if ended else "is past its deadline"
        expired = Expired(f"token {row.id} {over}; renew it under a new request_id", renew=True)
        where = dict(zip(("file", "side", "index"), need, strict=True))
        outcome.refusals.append(where | {"error": error or expired.as_dict()})

    def reissue(self, row: TokenRow, control: Control, now: datetime) -> Issued:
        """Sign a recorded token again, byte for byte; raises Expired if it is of no use any more."""
        if row.state == "cancelled":
            raise Expired(f"token {row.jti} was cancelled; renew it under a new request_id", renew=True)
        key = next((k for k in control.ring if k.key_id == row.key_id), None)
        left = row.expires_at - now.timestamp()
        if key is None or not keys.may_resign(key, now, self.rotation) or left < COVER_SECONDS:
            raise Expired(
                f"token {row.jti} cannot be given again ({max(0, int(left))} s of life left, key "
                f"{key.state if key else 'gone'}); renew it under a new request_id",
                renew=True,
            )
        token = self.unlock(key).sign(row.payload.encode())
        scope = str(unverified_claims(token)[1]["scope"])
        return Issued((row.file, row.side, row.index), row.storage, scope, row.jti, row.expires_at, token)

    def _observe(self, stage: Any, outcomes: Sequence[Outcome], now: datetime) -> None:
        self.observe(Observed(stage, outcomes, now))


class _Lookups:
    """What the wishes of a batch are on: tokens of others, and refresh families, which change with it."""

    def __init__(self, tx: Recording, outcomes: Sequence[Outcome]) -> None:
        token_requests = [w for o in outcomes if (w := o.submission.request.token_request) is not None]
        subjects = [w.subject[0] for w in token_requests if w.subject]
        families = [w.refresh[0] for w in token_requests if w.refresh]
        self.families = tx.families(families) if families else {}
        subjects += [family.subject_jti for family in self.families.values()]
        self.subjects = tx.subjects(subjects) if subjects else {}


def _managed_rows(tx: Recording, tokens: Iterable[TokenRow]) -> dict[UUID, ManagedToken]:
    """Read what is kept of the managed ones among tokens."""
    jtis = {UUID(token.jti) for token in tokens if token.mode != "mint"}
    return tx.managed(jtis) if jtis else {}


def _check_several(row: RequestRow, control: Control, client: Client) -> None:
    """Raise Banned where the record does not say which of several activities each file had."""
    if row.activity == SEVERAL and control.bans.has("activity", client.vo):
        raise Banned(
            "an activity of this VO is banned, and the request's files have several; repeat it instead",
            kind="activity",
        )


def check_clock(skew: float) -> None:
    """Raise ClockSkew if this process's clock and Postgres's differ by more than 5 s."""
    if abs(skew) > MAX_CLOCK_SKEW_SECONDS:
        raise ClockSkew(
            f"clocks of this worker and of Postgres differ by {skew:.0f} s, expected at most "
            f"{MAX_CLOCK_SKEW_SECONDS:.0f}; repair NTP, then the request can be sent again"
        )


def known_client(control: Control, name: str) -> Client:
    """Return a client that may ask; raises UnknownClient."""
    client = control.clients.get(name)
    if client is None or client.disabled:
        raise UnknownClient(f"client {name!r} is not registered, or disabled; run: minter clients add")
    return client


def _activity(request: Request) -> str:
    """Return the activity that a request has as a whole, SEVERAL if its files differ."""
    activities = {file.activity or request.activity for file in request.files} or {request.activity}
    return activities.pop() if len(activities) == 1 else SEVERAL


def _client(control: Control, request: Request, name: str) -> Client:
    client = known_client(control, name)
    if request.client is not None and request.client != name:
        raise ClientMismatch(
            f"the request names client {request.client!r}, but the broker authenticated {name!r}"
        )
    return client
