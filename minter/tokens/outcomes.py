"""Input and output of the engine: submissions, outcomes, and the state of one request in between."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from msgspec import Struct

from minter.contract.messages import Slot
from minter.errors import Conflict, MinterError, NoUsableKey
from minter.policy.clients import Client
from minter.policy.limits import BACKDATE_SECONDS
from minter.policy.plans import Decision, PlannedToken
from minter.policy.requests import Request
from minter.policy.token_requests import Family
from minter.storages.dialects import Algorithm
from minter.tokens.keys import Key, signing_key
from minter.tokens.managed import Wanted
from minter.tokens.records import JtiRange, RequestRow, TokenRow, UseRow, fts_token_id
from minter.tokens.shared import Shared


class Submission(Struct, frozen=True, eq=False):
    """One request, and the authenticated name of the client that sent it."""

    request: Request
    client: str


class Issued(Struct, frozen=True, gc=False):
    """One token to be handed out; its `repr` does not show the token."""

    slot: Slot
    storage: str
    scope: str
    jti: str
    exp: int
    token: bytes
    handle: str = ""
    iat: int = 0
    """When it was issued, as the token says; 0 for a provider's."""

    def __repr__(self) -> str:
        """Name the token without showing it."""
        return f"Issued({self.jti}, {self.slot})"


class PendingManaged(Struct, frozen=True, gc=False):
    """A managed token that has no usable access token yet; it can be fetched later by its handle."""

    slot: Slot
    storage: str
    scope: str
    handle: str


class Outcome(Struct, eq=False):
    """The result of one submission. With an `error`, no token was issued for it, and none is pending."""

    submission: Submission
    issued: list[Issued]
    refusals: list[dict[str, Any]]
    error: MinterError | None = None
    repeated: bool = False
    client: Client | None = None
    decision: Decision | None = None
    family: Family | None = None
    pending: list[PendingManaged] = []

    def keep_whole(self, *, all_or_nothing: bool) -> None:
        """Withhold all tokens of an all-or-nothing request while some are pending, or refused on a repeat."""
        if all_or_nothing and (self.pending or (self.repeated and self.refusals)):
            self.issued = []

    def withhold(self, error: MinterError) -> None:
        """Replace all tokens and refusals by an error of the whole request."""
        self.issued, self.refusals, self.pending, self.error = [], [], [], error


class Observed(Struct, frozen=True):
    """One stage of a batch, from which `observe` makes metrics, logs and audit lines, without secrets."""

    stage: Literal["received", "decided", "inserted", "copied", "committed", "answered"]
    outcomes: Sequence[Outcome]
    at: datetime


Observe = Callable[[Observed], None]


class PendingRequest:
    """One request while it passes through the steps of the engine."""

    __slots__ = (
        "activity",
        "client",
        "decision",
        "jtis",
        "key",
        "on_behalf_of",
        "outcome",
        "row",
        "signing_keys",
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
        self.jtis: JtiRange
        self.row: RequestRow
        self.signing_keys: dict[frozenset[Algorithm], Key] = {}
        """The key for tokens whose audiences all verify these algorithms."""
        self.uses: list[UseRow] = []

    def choose_keys(self, active: Mapping[Algorithm, Key]) -> None:
        """Choose the key of each planned token among the issuer's active keys."""
        for planned in self.decision.planned_tokens:
            verifiable = planned.plan.area.dialect.algorithms
            if verifiable not in self.signing_keys:
                self.signing_keys[verifiable] = signing_key(active, verifiable)

    def key_for(self, planned: PlannedToken) -> Key:
        """Return the key that signs a planned token."""
        return self.signing_keys[planned.plan.area.dialect.algorithms]

    def duplicate(self, outcome: Outcome) -> "PendingRequest":
        """Return a duplicate of this request in the same batch, to be answered from the request's row."""
        return PendingRequest(outcome, self.client, self.decision)

    def add(self, planned: PlannedToken, jti: str, exp: int, token: bytes, iat: int) -> None:
        """Add a token to those that are handed out."""
        storage = planned.plan.area.storage
        self.outcome.issued.append(
            Issued(planned.need.slot, storage, planned.scope, jti, exp, token, iat=iat)
        )

    def use(self, planned: PlannedToken, use_id: str, shared: Shared, now: int) -> None:
        """Record a use of a shared token, which is handed out like a token of one file."""
        self.add(planned, shared.jti, shared.expires_at, shared.token, now - BACKDATE_SECONDS)
        self._note_use(planned, use_id, shared.jti)

    def manage(self, planned: PlannedToken, handle: str, jti: UUID) -> None:
        """Record a use of a managed token, with the consumer and the queue that may get the token, too."""
        request = self.outcome.submission.request
        self._note_use(planned, handle, str(jti), request.consumer, request.reply_queue or "")

    def _note_use(
        self, planned: PlannedToken, use_id: str, jti: str, consumer: str = "", queue: str = ""
    ) -> None:
        need = planned.need
        self.uses.append(
            UseRow(
                use_id, jti, self.row.request_id, self.client.client_id, planned.path,
                need.file, need.side, need.index, planned.external_id, consumer, queue,
            )
        )  # fmt: skip

    def managed_row(self, planned: PlannedToken, rule_id: int, wanted: Wanted) -> TokenRow:
        """Return the row of a managed token: it records the decision, and has no signing key."""
        return TokenRow(
            str(wanted.jti), self.row.request_id, self.client.client_id, wanted.storage, 0,
            int(wanted.deadline.timestamp()), planned.shared or planned.path, 0, -1, planned.need.side, 0, "",
            wanted.payload(self.client.name), rule_id, mode=wanted.mode, state="queued",
        )  # fmt: skip

    def token_row(
        self, planned: PlannedToken, rule_id: int, jti: str, payload: bytes, token: bytes, key: Key, now: int
    ) -> TokenRow:
        """Return the row of a token; the row of a shared token names no file (`file` is -1)."""
        need = planned.need
        file, index, external_id = (
            (-1, 0, "") if planned.shared else (need.file, need.index, planned.external_id)
        )
        return TokenRow(
            jti, self.row.request_id, self.client.client_id, planned.plan.area.storage, key.key_id,
            now - BACKDATE_SECONDS + planned.lifetime.seconds, planned.path, fts_token_id(token), file,
            need.side, index, external_id, payload.decode(), rule_id,
        )  # fmt: skip


def copy_outcome(outcome: Outcome, waiting_request: PendingRequest) -> None:
    """Give a duplicate in a batch the outcome of the first request (I4), or Conflict if contents differ."""
    outcome.repeated = True
    outcome.client = waiting_request.client
    if isinstance(waiting_request.outcome.error, NoUsableKey):  # nothing was recorded that could differ
        outcome.error = waiting_request.outcome.error
        return
    if outcome.submission.request.digest != waiting_request.outcome.submission.request.digest:
        outcome.error = Conflict("request_id was used before with other content; make a new one")
        return
    first = waiting_request.outcome
    outcome.issued, outcome.refusals, outcome.error = first.issued, first.refusals, first.error
    outcome.pending = first.pending
    outcome.decision = first.decision
