"""Issue recorded tokens again: to a repeated request, to a fetch, and by handle (I3, I4).

A minted token is signed again from its row and has the same bytes. Current bans apply, and a request whose
tokens include a banned one is withheld as a whole (I9).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from minter.contract.messages import Slot
from minter.errors import (
    Banned,
    Conflict,
    Expired,
    NoUsableKey,
    ReplyNotAllowed,
    RequestError,
    UnknownRequest,
    from_dict,
)
from minter.policy.clients import Client
from minter.policy.limits import COVER_SECONDS
from minter.policy.permissions import check_reply_queue
from minter.policy.requests import SEVERAL, Request
from minter.scopes import parse_scopes
from minter.storages.dialects import Matching
from minter.tokens import keys
from minter.tokens.claims import unverified_claims
from minter.tokens.clock import check_clock
from minter.tokens.keys import Key, RotationPolicy, Signer
from minter.tokens.managed import ManagedToken
from minter.tokens.outcomes import Issued, Outcome, PendingManaged, PendingRequest, Submission
from minter.tokens.records import OWN_KINDS, Control, Recording, RequestRow, Store, TokenRow, known_client
from minter.tokens.replacements import follow


class Repeats(NamedTuple):
    """Recorded requests and their tokens by (request_id, client_id), and their managed tokens by jti."""

    requests: Mapping[tuple[UUID, int], tuple[RequestRow, list[TokenRow]]]
    managed: Mapping[UUID, ManagedToken]


def read_repeats(tx: Recording, keys: Sequence[tuple[UUID, int]], ring: Sequence[Key]) -> Repeats:
    """Read the records of requests, with the replacements of tokens whose key is revoked (ADR 17).

    Requests that were not recorded are missing.
    """
    requests, _ = follow(tx.recorded, tx.recorded(keys), _revoked(ring)) if keys else ({}, {})
    return Repeats(requests, read_managed(tx, (t for _, tokens in requests.values() for t in tokens)))


def opens_none(*_: object) -> str:
    """Raise NoUsableKey: the `open_token` of a process without providers."""
    raise NoUsableKey("this process opens no tokens of providers")


class Reissuer:
    """Issues recorded tokens again; `open_token` decrypts a provider's token, `unlock` a signing key."""

    def __init__(
        self,
        store: Store,
        unlock: Callable[[Key], Signer],
        open_token: Callable[[str, UUID, str, bytes], str],
        rotation: RotationPolicy,
        matching_of: Callable[[str, str], Matching],
    ) -> None:
        self._store = store
        self._unlock = unlock
        self._open_token = open_token
        self._rotation = rotation
        self._matching_of = matching_of

    def repeat(self, one: PendingRequest, repeats: Repeats, control: Control, now: datetime) -> None:
        """Answer a repeated request_id from what was recorded under it (I4)."""
        try:
            self._answer_again(one, repeats, control, now)
        except (RequestError, NoUsableKey) as error:
            one.outcome.withhold(error)

    def _answer_again(self, one: PendingRequest, repeats: Repeats, control: Control, now: datetime) -> None:
        outcome, request = one.outcome, one.outcome.submission.request
        row, tokens = repeats.requests[one.key]
        outcome.issued, outcome.refusals, outcome.repeated = [], list(row.refusals), True
        outcome.client, outcome.decision = one.client, one.decision
        outcome.error = from_dict(row.error) if row.error else None
        if row.digest != request.digest:
            raise Conflict(f"request_id {row.request_id} was used before with other content; make a new one")
        for file in request.files:
            control.bans.check(one.client.vo, activity=file.activity)
        check_reply_queue(request.reply_queue, one.client)
        if isinstance(one.decision.error, ReplyNotAllowed):
            raise one.decision.error
        if request.via == "url" and _replaced(row, tokens):
            raise Expired(
                "the tokens in these URLs were replaced; sign them under a new request_id", renew=True
            )
        if outcome.error is None:
            self._reissue_all(outcome, row, tokens, repeats.managed, control, now)

    def fetch(self, request_id: UUID, name: str, now: datetime) -> Outcome:
        """Issue the tokens of a request again, by its request_id alone (I3, I4).

        Raises UnknownRequest if this client made no such request, Expired or Banned where a repeated
        request is refused with them, and the recorded error if the request was refused as a whole.
        """
        with self._store.recording() as tx:
            control, skew = tx.control()
            check_clock(skew)
            client = known_client(control, name)
            found, managed_tokens = read_repeats(tx, [(request_id, client.client_id)], control.ring)
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
        """Hand out the current access tokens of handles, to their client or to the consumer that it named.

        Also returns the handles that this client may not fetch or that do not exist, without telling which.
        """
        with self._store.recording() as tx:
            control, skew = tx.control()
            check_clock(skew)
            client = known_client(control, name)
            known = {c.name for c in control.clients.values() if c.vo == client.vo and not c.disabled}
            used = [
                token
                for owner, consumer, token in tx.used(handles)
                if owner in known and name in (owner, consumer)
            ]
            recorded = tx.recorded(list({(t.request_id, t.client_id) for t in used}))
            requests, _ = follow(tx.recorded, recorded, _revoked(control.ring))
            current = [_current(token, requests[token.request_id, token.client_id][1]) for token in used]
            managed_tokens = read_managed(tx, current)
        request = Request(handles[0], "mint", b"", ())
        outcome = Outcome(Submission(request, name), [], [], repeated=True, client=client)
        for old, token in zip(used, current, strict=True):
            row, _ = requests[old.request_id, old.client_id]
            try:
                _check_several(row, control, client)
                self._reissue_all(outcome, row, [token], managed_tokens, control, now)
            except RequestError as error:  # the other tokens are handed out
                outcome.refusals.append(token.slot.as_dict() | {"error": error.as_dict()})
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
        """Issue the tokens of a request again; raises Banned if one of them was banned since (I9).

        A request is withheld as a whole: a part of a chain, or a copy without its source, is of no use. But
        where tokens were replaced (ADR 17), those that cannot be given again are refused one by one.
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
                    bans.check_path(vo, scope.path, self._matching_of(vo, token.storage))
        lost: list[tuple[TokenRow, Expired]] = []
        for token in tokens:
            if token.mode == "mint":
                try:
                    outcome.issued.append(self.reissue(token, control, now))
                except Expired as error:
                    if not _replaced(row, tokens):
                        raise
                    lost.append((token, error))
            else:
                self._give_again(outcome, token, managed_tokens.get(UUID(token.jti)), now)
        if lost and not outcome.issued and not outcome.pending:
            raise lost[0][1]
        outcome.refusals += [token.slot.as_dict() | {"error": error.as_dict()} for token, error in lost]

    def _give_again(self, outcome: Outcome, row: TokenRow, token: ManagedToken | None, now: datetime) -> None:
        """Hand out a managed token's access token, note the token as pending, or add its refusal."""
        ended = row.state in ("cancelled", "finished")
        given = None
        if not ended and token is not None and token.shows(now):
            given = self.given(token, row.slot, row.storage, row.use_id)
        if given is not None:
            outcome.issued.append(given)
            return
        error = token.error if token is not None and token.state == "failed" else None
        waits = token is not None and token.state in ("queued", "issued") and token.deadline > now
        if waits and not ended:
            scope = str(json.loads(row.payload)["scope"])
            outcome.pending.append(PendingManaged(row.slot, row.storage, scope, row.use_id))
            return
        over = f"was {row.state}" if ended else "is past its deadline"
        expired = Expired(f"token {row.id} {over}; renew it under a new request_id", renew=True)
        outcome.refusals.append(row.slot.as_dict() | {"error": error or expired.as_dict()})

    def reissue(self, row: TokenRow, control: Control, now: datetime) -> Issued:
        """Sign a recorded token again, with the same bytes; raises Expired if this is no longer possible.

        Reasons are a cancelled token, less than COVER_SECONDS of life left, or a key that may not re-sign.
        """
        if row.state == "cancelled":
            raise Expired(f"token {row.jti} was cancelled; renew it under a new request_id", renew=True)
        key = next((k for k in control.ring if k.key_id == row.key_id), None)
        left = row.expires_at - now.timestamp()
        if key is None or not keys.may_resign(key, now, self._rotation) or left < COVER_SECONDS:
            raise Expired(
                f"token {row.jti} cannot be given again ({max(0, int(left))} s of life left, key "
                f"{key.state if key else 'gone'}); renew it under a new request_id",
                renew=True,
            )
        token = self._unlock(key).sign(row.payload.encode())
        claims = unverified_claims(token)[1]
        return Issued(
            row.slot,
            row.storage,
            str(claims["scope"]),
            row.jti,
            row.expires_at,
            token,
            iat=int(claims["iat"]),
        )

    def given(self, token: ManagedToken, slot: Slot, storage: str, handle: str) -> Issued | None:
        """Return the access token of a managed token, None if it cannot be decrypted."""
        assert token.access is not None
        assert token.expires_at is not None
        try:
            access = self._open_token(token.vo, token.jti, "access", token.access)
        except NoUsableKey:
            return None
        exp = int(token.expires_at.timestamp())
        return Issued(slot, storage, token.scope, handle, exp, access.encode(), handle)


def read_managed(tx: Recording, tokens: Iterable[TokenRow]) -> dict[UUID, ManagedToken]:
    """Read the managed tokens among the given token rows, by jti."""
    jtis = {UUID(token.jti) for token in tokens if token.mode != "mint"}
    return tx.managed(jtis) if jtis else {}


def _check_several(row: RequestRow, control: Control, client: Client) -> None:
    """Raise Banned for a request of several activities while one is banned: no file's own is recorded."""
    if row.activity == SEVERAL and control.bans.has("activity", client.vo):
        raise Banned(
            "an activity of this VO is banned, and the request has several activities; repeat the request",
            kind="activity",
        )


def _revoked(ring: Sequence[Key]) -> dict[int, str]:
    """Return the kids of the revoked keys by key_id."""
    return {key.key_id: key.kid for key in ring if key.state == "revoked"}


def _current(token: TokenRow, tokens: Iterable[TokenRow]) -> TokenRow:
    """Return what stands for a token in its slot now: itself, or its replacement."""
    return next((one for one in tokens if one.slot == token.slot), token)


def _replaced(row: RequestRow, tokens: Iterable[TokenRow]) -> bool:
    """Say whether some tokens of a request are replacements, which another request recorded."""
    return any(token.request_id != row.request_id for token in tokens)
