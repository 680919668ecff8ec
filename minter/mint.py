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
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from msgspec import Struct, structs

from minter import capabilities, keys
from minter.claims import build_claims, check_token, unverified_claims
from minter.clients import Client
from minter.errors import (
    Banned,
    ClientMismatch,
    ClockSkew,
    Conflict,
    Expired,
    MinterError,
    NoUsableKey,
    ReplyNotAllowed,
    RequestError,
    UnknownClient,
    UnknownRequest,
    from_dict,
)
from minter.keys import Key, RotationPolicy, Signer
from minter.plans import BACKDATE_SECONDS, Decision, Grant, Plan
from minter.policy import Policy, check_reply_queue
from minter.records import (
    OWN_KINDS,
    SEVERAL,
    Control,
    Recording,
    RequestRow,
    Store,
    TokenRow,
    UseRow,
    fts_token_id,
)
from minter.requests import Request, Side, check_request_id
from minter.scopes import parse_scopes
from minter.sharing import Kept, Place, Shared
from minter.wishes import Family

MAX_CLOCK_SKEW_SECONDS = 5.0
"""Beyond this difference to Postgres's clock a process refuses to sign."""
COVER_SECONDS = 300
"""A recorded token with less life left than this no longer covers any need."""
_SAMPLE = 256
"""The signature of every such token, told by FTS's id of it, is verified; the claims of every one
are checked."""
_JTI_NUMBERS = (1 << 20) - 1
"""The bits, five hex digits, of a jti that count a request's tokens: no request has 2^20."""


class Submission(Struct, frozen=True, eq=False):
    """One request and who, by the broker's word, sent it."""

    request: Request
    client: str


class Issued(Struct, frozen=True, gc=False):
    """One token on its way out; its `repr` hides the bytes."""

    need: tuple[int, Side, int]
    storage: str
    scope: str
    jti: str
    exp: int
    token: bytes

    def __repr__(self) -> str:
        """Name the token without showing it."""
        return f"Issued({self.jti}, {self.need})"


class Outcome(Struct, eq=False):
    """What became of one submission. `error` means that no token was issued for it."""

    submission: Submission
    issued: list[Issued]
    refusals: list[dict[str, Any]]
    error: MinterError | None = None
    repeated: bool = False
    client: Client | None = None
    decision: Decision | None = None
    family: Family | None = None


class Observed(Struct, frozen=True):
    """One record for `observe`: metrics, logs and audit lines are made from it, never secrets."""

    stage: Literal["received", "decided", "inserted", "copied", "committed", "answered"]
    outcomes: Sequence[Outcome]
    at: datetime


Observe = Callable[[Observed], None]


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
        rotation: RotationPolicy | None = None,
        retention_seconds: int = 30 * 86400,
    ) -> None:
        self.store = store
        self.policy = policy
        self.unlock = unlock
        self.new_jti = new_jti
        self.observe = observe
        self.rotation = rotation or RotationPolicy()
        self.retention_seconds = retention_seconds
        self._kept = Kept()

    def mint_many(self, submissions: Sequence[Submission], now: datetime) -> list[Outcome]:
        """Give each submission its outcome; equal ones are served once.

        Raises what the store raises when it is away: then nothing was recorded or handed out.
        """
        outcomes = [Outcome(s, [], []) for s in submissions]
        # Lock order: every batch inserts its request_ids sorted, so two batches cannot deadlock.
        pending = sorted(outcomes, key=lambda o: (o.submission.request.request_id, o.submission.client))
        self._observe("received", outcomes, now)
        works: dict[tuple[UUID, str], _Work] = {}
        twins: list[tuple[Outcome, _Work]] = []
        with self.store.recording() as tx:
            control, skew = tx.control()
            try:
                check_clock(skew)
            except ClockSkew as error:
                return [structs.replace(o, error=error) for o in outcomes]
            held = _Held(tx, pending)
            for outcome in pending:
                self._begin(outcome, control, now, works, twins, held)
            self._observe("decided", outcomes, now)
            ready = [w for w in works.values() if self._ready(w, control, now)]
            rules = tx.rules({g.plan for w in ready for g in w.decision.grants})
            new = tx.insert_requests([w.row for w in ready])
            self._observe("inserted", outcomes, now)
            fresh = [w for w in ready if w.key in new]
            # The rows stream into COPY while the next ones are signed.
            shares = self._shares(tx, fresh, rules, now)
            tx.copy_tokens(row for w in fresh for row in self._sign(w, control, rules, shares, now))
            tx.copy_uses([use for w in fresh for use in w.uses])
            tx.save_families(list({f.family_id: f for w in fresh if (f := w.outcome.family)}.values()))
            self._observe("copied", outcomes, now)
            known = [w for w in works.values() if w.key not in new]
            recorded = tx.recorded([w.key for w in known]) if known else {}
        self._kept.keep(shares)
        self._observe("committed", outcomes, now)
        for work in known:
            if work.key in recorded:
                self._repeat(work, *recorded[work.key], control, now)
        for outcome, work in twins:
            if work.key in recorded:
                self._repeat(work.twin(outcome), *recorded[work.key], control, now)
            else:
                _share(outcome, work)
        self._observe("answered", outcomes, now)
        return outcomes

    # ── the steps ────────────────────────────────────────────────────────────────────────────

    def _begin(
        self,
        outcome: Outcome,
        control: Control,
        now: datetime,
        works: "dict[tuple[UUID, str], _Work]",
        twins: "list[tuple[Outcome, _Work]]",
        held: "_Held",
    ) -> None:
        """Decide one submission, or set it beside its equal one in the same batch."""
        request, name = outcome.submission.request, outcome.submission.client
        first = works.get((request.request_id, name))
        if first is not None:
            twins.append((outcome, first))
            return
        try:
            client = _client(control, request, name)
            check_request_id(request, now.timestamp(), self.retention_seconds)
        except RequestError as error:  # not a client, or no id to record it under
            outcome.error = error
            return
        on_behalf_of, activity = request.on_behalf_of, _activity(request)
        if request.wish is None:
            decision = self.policy.decide(request, client, control.bans)
        else:
            granted = capabilities.decide(
                self.policy, request, client, control.clients, control.bans, now, held.subjects, held.families
            )
            decision, outcome.family, on_behalf_of, activity = granted
            if outcome.family is not None:
                held.families[outcome.family.family_id] = outcome.family
        outcome.client, outcome.decision, outcome.error = client, decision, decision.error
        outcome.refusals = [structs.asdict(r.record()) for r in decision.refused]
        works[request.request_id, name] = _Work(outcome, client, decision, on_behalf_of, activity)

    def _ready(self, work: "_Work", control: Control, now: datetime) -> bool:
        """Make the request's row; False if no key may sign, so that nothing can be recorded."""
        request, client, grants = work.outcome.submission.request, work.client, work.decision.grants
        base = self.new_jti().int & ~_JTI_NUMBERS
        shared = {(g.plan, g.shared) for g in grants if g.shared}
        work.row = RequestRow(
            request.request_id, client.client_id, request.digest, request.kind, work.activity,
            work.on_behalf_of, UUID(int=base), len(grants) + len(shared), work.outcome.refusals,
            work.decision.error.as_dict() if work.decision.error else None, now, request.renews,
            request.all_or_nothing,
        )  # fmt: skip
        if not grants:
            return True
        try:
            work.signing_key = keys.active(control.ring, client.vo)
            self.unlock(work.signing_key)
        except NoUsableKey as error:
            work.outcome.error, work.outcome.refusals = error, []
            return False
        return True

    def _shares(
        self, tx: Recording, fresh: "Sequence[_Work]", rules: Mapping[Plan, int], now: datetime
    ) -> dict[Place, Shared]:
        """Return the shared tokens that may serve these requests: kept here, or recorded elsewhere."""
        wanted = {
            Place(w.client.client_id, rules[g.plan], g.shared): (w, g)
            for w in fresh
            for g in w.decision.grants
            if g.shared
        }
        if not wanted:
            return {}
        found, seconds = self._kept.get(wanted), int(now.timestamp())
        missing = [
            place
            for place, (work, grant) in wanted.items()
            if place not in found or not found[place].serves(grant, work.key_id, seconds)
        ]
        for place, row in tx.shared_tokens(missing, now).items() if missing else ():
            key = wanted[place][0].signing_key
            if key is not None and row.key_id == key.key_id:
                token = self.unlock(key).sign(row.payload.encode())
                scope = str(unverified_claims(token)[1]["scope"])
                found[place] = Shared(row.jti, row.key_id, row.expires_at, scope, token)
        return found

    def _sign(
        self,
        work: "_Work",
        control: Control,
        rules: Mapping[Plan, int],
        shares: dict[Place, Shared],
        now: datetime,
    ) -> Iterator[TokenRow]:
        """Build, sign and check every token that one new request needs; yield their rows."""
        key, client = work.signing_key, work.client
        if key is None:
            return  # every file was refused
        signer, issuer = self.unlock(key), control.issuers[client.vo]
        seconds = int(now.timestamp())
        first = str(work.row.first_jti)[:-5]

        def make(grant: Grant, jti: str) -> tuple[bytes, TokenRow]:
            payload = build_claims(grant, issuer, client.sub, client.name, seconds, jti)
            token = signer.sign(payload)
            check_token(token, grant, issuer, client.sub, client.name, seconds, jti, key.kid, key.algorithm)
            row = work.token_row(grant, rules[grant.plan], jti, payload, token, key, seconds)
            if row.fts_token_id % _SAMPLE == 0:
                keys.verify(token, key.public_jwk)
            return token, row

        beyond = len(work.decision.grants)  # the ids of new shared tokens follow those of the grants
        for number, grant in enumerate(work.decision.grants):
            jti = f"{first}{number:05x}"
            if not grant.shared:
                token, row = make(grant, jti)
                work.add(grant, jti, row.expires_at, token)
                yield row
                continue
            place = Place(client.client_id, rules[grant.plan], grant.shared)
            shared = shares.get(place)
            if shared is None or not shared.serves(grant, key.key_id, seconds):
                token, row = make(grant.whole(), f"{first}{beyond:05x}")
                shared = shares[place] = Shared(row.jti, key.key_id, row.expires_at, grant.scope, token)
                beyond += 1
                yield row
            work.use(grant, jti, shared)

    def _repeat(
        self,
        work: "_Work",
        row: RequestRow,
        tokens: Sequence[TokenRow],
        control: Control,
        now: datetime,
    ) -> None:
        """Answer a repeated request_id from what was recorded (I4)."""
        try:
            self._answer_again(work, row, tokens, control, now)
        except (RequestError, NoUsableKey) as error:
            work.outcome.issued, work.outcome.refusals, work.outcome.error = [], [], error

    def _answer_again(
        self, work: "_Work", row: RequestRow, tokens: Sequence[TokenRow], control: Control, now: datetime
    ) -> None:
        outcome = work.outcome
        outcome.issued, outcome.refusals, outcome.repeated = [], row.refusals, True
        outcome.client, outcome.decision = work.client, work.decision
        outcome.error = from_dict(row.error) if row.error else None
        if row.digest != outcome.submission.request.digest:
            raise Conflict(f"request_id {row.request_id} was used before with other content; make a new one")
        for file in outcome.submission.request.files:
            control.bans.check(work.client.vo, activity=file.activity)
        check_reply_queue(outcome.submission.request.reply_queue, work.client)
        if isinstance(work.decision.error, ReplyNotAllowed):
            raise work.decision.error
        if outcome.error is None:
            outcome.issued = self._reissue_all(row, tokens, work.client, control, now)

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
        if not found:
            raise UnknownRequest(f"client {name!r} has made no request {request_id} that is still kept")
        ((row, tokens),) = found.values()
        if row.kind in OWN_KINDS:
            raise UnknownRequest("a token of the token endpoint is not given again; ask for a new one")
        if row.error:
            raise from_dict(row.error)
        if row.activity == SEVERAL and control.bans.has("activity", client.vo):
            raise Banned(
                "an activity of this VO is banned, and the request's files have several; repeat it instead",
                kind="activity",
            )
        request = Request(request_id, "mint", row.digest, ())  # a job's content is not recorded
        issued = self._reissue_all(row, tokens, client, control, now)
        return Outcome(Submission(request, name), issued, row.refusals, repeated=True, client=client)

    def _reissue_all(
        self, row: RequestRow, tokens: Sequence[TokenRow], client: Client, control: Control, now: datetime
    ) -> list[Issued]:
        """Sign the tokens of a request again; raises Banned for what was banned since (I9).

        A request is withheld whole: half of a chain, or a copy without its source, helps nobody.
        """
        bans, vo = control.bans, client.vo
        bans.check(vo, vo=vo, client=client.name, activity=row.activity, on_behalf_of=row.on_behalf_of)
        for token in tokens:
            bans.check(vo, storage=token.storage)
            for scope in parse_scopes(str(json.loads(token.payload)["scope"])):
                if scope.path is not None:
                    bans.check_path(vo, scope.path)
        return [self.reissue(t, control, now) for t in tokens]

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


class _Work:
    """One request on its way through the steps."""

    __slots__ = (
        "activity",
        "client",
        "decision",
        "key",
        "on_behalf_of",
        "outcome",
        "row",
        "signing_key",
        "uses",
    )

    def __init__(
        self,
        outcome: Outcome,
        client: Client,
        decision: Decision,
        on_behalf_of: str = "",
        activity: str = "",
    ) -> None:
        self.outcome = outcome
        self.client = client
        self.decision = decision
        self.on_behalf_of = on_behalf_of
        self.activity = activity
        self.key = (outcome.submission.request.request_id, client.client_id)
        self.row: RequestRow
        self.signing_key: Key | None = None
        self.uses: list[UseRow] = []

    @property
    def key_id(self) -> int:
        """The key that signs for it, 0 if none may."""
        return self.signing_key.key_id if self.signing_key else 0

    def twin(self, outcome: Outcome) -> "_Work":
        """Return an equal id of the same batch, to be answered from the row."""
        return _Work(outcome, self.client, self.decision)

    def add(self, grant: Grant, jti: str, exp: int, token: bytes) -> None:
        """Note a token for handing out."""
        need = grant.need
        where: tuple[int, Side, int] = (need.file, need.side, need.index)
        self.outcome.issued.append(Issued(where, grant.plan.area.storage, grant.scope, jti, exp, token))

    def use(self, grant: Grant, use_id: str, shared: Shared) -> None:
        """Note a use of a shared token, which is handed out like one of its own."""
        self.add(grant, shared.jti, shared.expires_at, shared.token)
        need = grant.need
        self.uses.append(
            UseRow(
                use_id, shared.jti, self.row.request_id, self.client.client_id, grant.path,
                need.file, need.side, need.index, grant.external_id,
            )
        )  # fmt: skip

    def token_row(
        self, grant: Grant, rule_id: int, jti: str, payload: bytes, token: bytes, key: Key, now: int
    ) -> TokenRow:
        """Return the row of a token, a shared one's as that of no file."""
        need = grant.need
        file, index, external_id = (-1, 0, "") if grant.shared else (need.file, need.index, grant.external_id)
        return TokenRow(
            jti, self.row.request_id, self.client.client_id, grant.plan.area.storage, key.key_id,
            now - BACKDATE_SECONDS + grant.lifetime.seconds, grant.path, fts_token_id(token), file,
            need.side, index, external_id, payload.decode(), rule_id,
        )  # fmt: skip


class _Held:
    """What the wishes of a batch are on: tokens of others, and refresh families, which change with it."""

    def __init__(self, tx: Recording, outcomes: Sequence[Outcome]) -> None:
        wishes = [w for o in outcomes if (w := o.submission.request.wish) is not None]
        subjects = [w.subject[0] for w in wishes if w.subject]
        families = [w.refresh[0] for w in wishes if w.refresh]
        self.families = tx.families(families) if families else {}
        subjects += [family.subject_jti for family in self.families.values()]
        self.subjects = tx.subjects(subjects) if subjects else {}


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


def _share(outcome: Outcome, work: _Work) -> None:
    """Give an equal request of the same batch what the first one got (I4)."""
    outcome.repeated = True
    outcome.client = work.client
    if isinstance(work.outcome.error, NoUsableKey):  # nothing was recorded that could differ
        outcome.error = work.outcome.error
        return
    if outcome.submission.request.digest != work.outcome.submission.request.digest:
        outcome.error = Conflict("request_id was used before with other content; make a new one")
        return
    first = work.outcome
    outcome.issued, outcome.refusals, outcome.error = first.issued, first.refusals, first.error
    outcome.decision = first.decision
