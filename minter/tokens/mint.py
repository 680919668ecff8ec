"""Mint: decide, record, sign, check, hand out.

`Engine.mint_many` takes submissions that wait together and gives each its outcome. Its steps keep
the invariants, so their order matters:

1. Open the recording transaction, and read clients, bans and keys under its lock: a change that an operator
   made before binds this batch, and a change made now waits for the end of the batch (I9). A batch that takes
   long takes the lock before step 5 only, and is made anew if there was a change meanwhile.
2. Decide each request. Decisions are pure functions.
3. Insert the requests. If a request_id is recorded already, read its record instead (I4).
4. Build, sign and check each new token, and COPY its row while the next token is signed. A shared token gets
   a row only if no earlier shared token serves. A failure in this step records nothing.
5. Commit: now the tokens are issued (I2).
6. Hand out new tokens as they were signed, and repeated tokens signed again from their rows.

A crash before step 5 leaves nothing behind. After it, the unacknowledged message is delivered again,
and its request is answered by step 6.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec import structs

from minter.errors import ClientMismatch, ClockSkew, NoUsableKey, RequestError
from minter.policy import token_endpoint
from minter.policy.clients import Client
from minter.policy.limits import EXCHANGE_REPEAT
from minter.policy.requests import SEVERAL, Request, check_request_id
from minter.policy.token_requests import Family
from minter.policy.transfers import Policy
from minter.tokens import keys
from minter.tokens.clock import check_clock
from minter.tokens.keys import Key, RotationPolicy, Signer
from minter.tokens.outcomes import Observe, Observed, Outcome, PendingRequest, Submission, copy_outcome
from minter.tokens.provider_tokens import record_provider_tokens
from minter.tokens.records import OWN_KINDS, Control, JtiRange, Recording, RequestRow, Store, known_client
from minter.tokens.reissue import Reissuer, Repeats, opens_none, read_repeats
from minter.tokens.shared import Shared, SharedKey, SharedTokenCache
from minter.tokens.sign import SigningBatch

MAX_LOCKED_NEEDS = 500
"""A batch with more needs takes so long that operators' changes do not wait for it."""


class _ControlChanged(Exception):
    """An operator changed the control tables while a batch was made."""


def _confirm(tx: Recording) -> None:
    if not tx.unchanged():
        raise _ControlChanged


class Engine:
    """The engine of one process: `mint_many` for new requests, `reissuer` for recorded ones."""

    def __init__(
        self,
        store: Store,
        policy: Policy,
        unlock: Callable[[Key], Signer],
        new_jti: Callable[[], UUID],
        observe: Observe,
        *,
        open_token: Callable[[str, UUID, str, bytes], str] = opens_none,
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
        self.reissuer = Reissuer(store, unlock, open_token, self.rotation, policy.matching_of)
        self._shared_tokens = SharedTokenCache()

    def check_clock(self) -> None:
        """Raise ClockSkew if this process's clock and the store's differ too much; may raise Unavailable."""
        with self.store.recording() as tx:
            _, skew = tx.control()
        check_clock(skew)

    def mint_many(self, submissions: Sequence[Submission], now: datetime) -> list[Outcome]:
        """Return the outcome of each submission, in their order; equal submissions are served once.

        If the store is unavailable, its error is raised, and nothing was recorded or handed out.
        """
        self._observe("received", [Outcome(s, [], []) for s in submissions], now)
        # Token requests lock rows of refresh families; an operator's change does so after the control tables.
        quick = sum(s.request.weight for s in submissions) <= MAX_LOCKED_NEEDS or any(
            s.request.token_request is not None for s in submissions
        )
        try:
            return self._mint_many(submissions, now, locked=quick)
        except _ControlChanged:
            return self._mint_many(submissions, now, locked=True)

    def _mint_many(self, submissions: Sequence[Submission], now: datetime, *, locked: bool) -> list[Outcome]:
        outcomes = [Outcome(s, [], []) for s in submissions]
        with self.store.recording() as tx:
            control, skew = tx.control(locked=locked)
            try:
                check_clock(skew)
            except ClockSkew as error:
                return [structs.replace(o, error=error) for o in outcomes]
            pending, duplicates = self._decide(tx, outcomes, control, now)
            self._observe("decided", outcomes, now)
            if not locked and any(p.managed for one in pending for p in one.decision.planned_tokens):
                _confirm(tx)  # so it is with rows of managed tokens
                locked = True
            shared, repeats = self._record(tx, pending, outcomes, control, now)
            if not locked:
                _confirm(tx)
        self._shared_tokens.remember(shared)
        self._observe("committed", outcomes, now)
        self._hand_out(pending, duplicates, repeats, control, now)
        for outcome in outcomes:
            outcome.keep_whole(all_or_nothing=outcome.submission.request.all_or_nothing)
        self._observe("answered", outcomes, now)
        return outcomes

    # ── decide ───────────────────────────────────────────────────────────────────────────────

    def _decide(
        self, tx: Recording, outcomes: Iterable[Outcome], control: Control, now: datetime
    ) -> tuple[list[PendingRequest], list[tuple[Outcome, PendingRequest]]]:
        """Decide each submission once; return them, and duplicates in the batch with the first of each."""
        # Every batch inserts its request_ids in this order, so two batches cannot deadlock.
        ordered = sorted(outcomes, key=lambda o: (o.submission.request.request_id, o.submission.client))
        pending: dict[tuple[UUID, str], PendingRequest] = {}
        duplicates: list[tuple[Outcome, PendingRequest]] = []
        lookups = _Lookups(tx, ordered, now)
        for outcome in ordered:
            key = (outcome.submission.request.request_id, outcome.submission.client)
            if key in pending:
                duplicates.append((outcome, pending[key]))
                continue
            try:
                client = self._admit(outcome.submission, control, now)
            except RequestError as error:  # no valid client or request_id to record it under
                outcome.error = error
                continue
            pending[key] = self._decide_one(outcome, client, control, now, lookups)
        return list(pending.values()), duplicates

    def _admit(self, submission: Submission, control: Control, now: datetime) -> Client:
        """Return the client of a submission; raises a RequestError that is not recorded."""
        request, name = submission.request, submission.client
        client = known_client(control, name)
        self.policy.check_prefix(client)
        if request.client is not None and request.client != name:
            raise ClientMismatch(
                f"the request names client {request.client!r}, but the broker authenticated {name!r}"
            )
        if request.kind not in OWN_KINDS:  # the token endpoint makes its ids itself
            check_request_id(request, now.timestamp(), self.retention_seconds)
        return client

    def _decide_one(
        self, outcome: Outcome, client: Client, control: Control, now: datetime, lookups: "_Lookups"
    ) -> PendingRequest:
        request = outcome.submission.request
        if request.token_request is None:
            on_behalf_of, activity = request.on_behalf_of, _activity(request)
            decision = self.policy.decide(request, client.at(now), control.bans, control.away)
        else:
            decision, outcome.family, on_behalf_of, activity = token_endpoint.decide(
                self.policy, request, client, control.clients, control.bans, now,
                lookups.subjects, lookups.families, lookups.exchanged,
            )  # fmt: skip
            if outcome.family is not None:
                lookups.note(outcome.family)
        outcome.client, outcome.decision, outcome.error = client, decision, decision.error
        outcome.refusals = decision.records()
        return PendingRequest(outcome, client, decision, on_behalf_of, activity)

    # ── record and sign ──────────────────────────────────────────────────────────────────────

    def _record(
        self,
        tx: Recording,
        pending: Sequence[PendingRequest],
        outcomes: Sequence[Outcome],
        control: Control,
        now: datetime,
    ) -> tuple[dict[SharedKey, Shared], Repeats]:
        """Insert the requests, sign and record the tokens of new ones, and read the records of the others."""
        ready = [one for one in pending if self._ready(one, control, now)]
        rules = tx.rules({p.plan for one in ready for p in one.decision.planned_tokens})
        new = tx.insert_requests([one.row for one in ready])
        self._observe("inserted", outcomes, now)
        fresh = [one for one in ready if one.key in new]
        record_provider_tokens(tx, fresh, rules, self.reissuer, now)
        signing = SigningBatch(self.unlock, control.issuers, rules, self._shared_tokens, now)
        signing.find_shared(tx, fresh)
        tx.copy_tokens(row for one in fresh for row in signing.sign(one))
        tx.add_uses([use for one in fresh for use in one.uses])
        of_families = [(one, family) for one in fresh if (family := one.outcome.family)]
        tx.save_families(
            list({family.family_id: family for _, family in of_families}.values()),
            [
                (family.family_id, one.jtis.first)
                for one, family in of_families
                if one.decision.planned_tokens
            ],
            now,
        )
        self._observe("copied", outcomes, now)
        repeated = [one.key for one in pending if one.key not in new]
        return signing.shared, read_repeats(tx, repeated, control.ring)

    def _ready(self, one: PendingRequest, control: Control, now: datetime) -> bool:
        """Make the request's row; return False if no key may sign, so that nothing can be recorded."""
        request, planned = one.outcome.submission.request, one.decision.planned_tokens
        one.jtis = JtiRange.at(self.new_jti(), planned)
        one.row = RequestRow(
            request.request_id, one.client.client_id, request.digest, request.kind, one.activity,
            one.on_behalf_of, one.jtis.first, one.jtis.count, one.outcome.refusals,
            one.decision.error.as_dict() if one.decision.error else None, now, request.renews,
            request.all_or_nothing,
        )  # fmt: skip
        if not planned:
            return True
        try:  # a managed token needs no signing key, but the master key, which unlocking a key proves
            one.choose_keys(keys.active(control.ring, one.client.vo))
            for key in one.signing_keys.values():
                self.unlock(key)
        except NoUsableKey as error:
            one.outcome.error, one.outcome.refusals = error, []
            return False
        return True

    # ── hand out ─────────────────────────────────────────────────────────────────────────────

    def _hand_out(
        self,
        pending: Iterable[PendingRequest],
        duplicates: Iterable[tuple[Outcome, PendingRequest]],
        repeats: Repeats,
        control: Control,
        now: datetime,
    ) -> None:
        """Answer repeated requests from their records, and duplicates; new requests have their tokens."""
        for one in pending:
            if one.key in repeats.requests:
                self.reissuer.repeat(one, repeats, control, now)
        for outcome, first in duplicates:
            if first.key in repeats.requests:
                self.reissuer.repeat(first.duplicate(outcome), repeats, control, now)
            else:
                copy_outcome(outcome, first)

    def _observe(self, stage: Any, outcomes: Sequence[Outcome], now: datetime) -> None:
        self.observe(Observed(stage, outcomes, now))


class _Lookups:
    """The subject tokens and refresh families that this batch's token requests refer to."""

    def __init__(self, tx: Recording, outcomes: Sequence[Outcome], now: datetime) -> None:
        token_requests = [w for o in outcomes if (w := o.submission.request.token_request) is not None]
        subjects = [w.subject[0] for w in token_requests if w.subject]
        families = [w.refresh[0] for w in token_requests if w.refresh]
        offline = {w.subject[0] for w in token_requests if w.subject and w.offline}
        since = now - EXCHANGE_REPEAT
        self.families: dict[UUID, Family] = {}
        if offline:
            self.families = tx.families_on(sorted(offline), since, families)
        elif families:
            self.families = tx.families(families)
        self.exchanged: dict[UUID, list[Family]] = {}
        """Families by subject token; an exchange that is asked again gets its unused family again."""
        for family in self.families.values():
            if family.subject_jti in offline and family.rotated_at > since:
                self.exchanged.setdefault(family.subject_jti, []).append(family)
        subjects += [family.subject_jti for family in self.families.values()]
        self.subjects = tx.subjects(subjects) if subjects else {}

    def note(self, family: Family) -> None:
        """Remember a family as a request of this batch leaves it, for the requests after it."""
        self.families[family.family_id] = family
        others = [f for f in self.exchanged.get(family.subject_jti, ()) if f.family_id != family.family_id]
        self.exchanged[family.subject_jti] = [*others, family]


def _activity(request: Request) -> str:
    """Return the activity of a request as a whole, SEVERAL if its files have different ones."""
    activities = {file.activity or request.activity for file in request.files} or {request.activity}
    return activities.pop() if len(activities) == 1 else SEVERAL
