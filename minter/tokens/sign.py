"""Build, sign and check the new tokens of one batch, and find the shared tokens that already serve.

This runs before the commit and before any token is handed out, so a failure here leaves nothing behind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime

from minter.policy.limits import BACKDATE_SECONDS
from minter.policy.plans import Plan, PlannedToken
from minter.tokens import keys
from minter.tokens.claims import build_claims, check_token, unverified_claims
from minter.tokens.keys import Key, Signer
from minter.tokens.outcomes import PendingRequest
from minter.tokens.records import Recording, TokenRow
from minter.tokens.shared import Shared, SharedKey, SharedTokenCache

_SAMPLE = 256
"""The signature of one token in this many, chosen by FTS's id of the token, is verified. The claims of
every token are checked."""


class SigningBatch:
    """Signs the tokens of one batch. `shared` has the shared tokens that its requests use."""

    def __init__(
        self,
        unlock: Callable[[Key], Signer],
        issuers: Mapping[str, str],
        rules: Mapping[Plan, int],
        known: SharedTokenCache,
        now: datetime,
    ) -> None:
        self.shared: dict[SharedKey, Shared] = {}
        self._unlock = unlock
        self._issuers = issuers
        self._rules = rules
        self._known = known
        self._now = now
        self._seconds = int(now.timestamp())

    def find_shared(self, tx: Recording, requests: Sequence[PendingRequest]) -> None:
        """Find the shared tokens that may serve these requests: in this process, else in the database."""
        wanted = {
            self._key_of(one, planned): (one, planned)
            for one in requests
            for planned in one.decision.planned_tokens
            if planned.shared and not planned.managed
        }
        self.shared = self._known.get(wanted)
        missing = [
            key
            for key, (one, planned) in wanted.items()
            if key not in self.shared
            or not self.shared[key].serves(planned, one.key_for(planned).key_id, self._seconds)
        ]
        for key, row in tx.shared_tokens(missing, self._now).items() if missing else ():
            one, planned = wanted[key]
            signing_key = one.key_for(planned)
            if row.key_id == signing_key.key_id:
                token = self._unlock(signing_key).sign(row.payload.encode())
                scope = str(unverified_claims(token)[1]["scope"])
                self.shared[key] = Shared(row.jti, row.key_id, row.expires_at, scope, token)

    def sign(self, one: PendingRequest) -> Iterator[TokenRow]:
        """Sign every token that a new request needs, and yield the rows of those that are new."""
        new_shared = len(one.decision.planned_tokens)
        for number, planned in enumerate(one.decision.planned_tokens):
            if planned.managed:
                continue
            jti, key = one.jtis.text(number), one.key_for(planned)
            if not planned.shared:
                token, row = self._make(one, key, planned, jti)
                one.add(planned, jti, row.expires_at, token, self._seconds - BACKDATE_SECONDS)
                yield row
                continue
            place = self._key_of(one, planned)
            shared = self.shared.get(place)
            if shared is None or not shared.serves(planned, key.key_id, self._seconds):
                token, row = self._make(one, key, planned.whole(), one.jtis.text(new_shared))
                shared = Shared(row.jti, key.key_id, row.expires_at, planned.scope, token)
                self.shared[place] = shared
                new_shared += 1
                yield row
            one.use(planned, jti, shared, self._seconds)

    def _key_of(self, one: PendingRequest, planned: PlannedToken) -> SharedKey:
        return SharedKey(one.client.client_id, self._rules[planned.plan], planned.shared)

    def _make(self, one: PendingRequest, key: Key, planned: PlannedToken, jti: str) -> tuple[bytes, TokenRow]:
        """Build one token, sign it, check its bytes, and return it with its row."""
        client, issuer, now = one.client, self._issuers[one.client.vo], self._seconds
        payload = build_claims(planned, issuer, client.sub, client.name, now, jti)
        token = self._unlock(key).sign(payload)
        check_token(token, planned, issuer, client.sub, client.name, now, jti, key.kid, key.algorithm)
        row = one.token_row(planned, self._rules[planned.plan], jti, payload, token, key, now)
        if row.fts_token_id % _SAMPLE == 0:
            keys.verify(token, key.public_jwk)
        return token, row
