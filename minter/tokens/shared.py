"""Shared tokens: one signed token that serves many files of one client (design decision 7).

What a process shared before is kept here with its bytes, so that one more file costs a use row and
no signature. Nothing here decides: bans, limits and the key are looked at for each use, so a token
that may not be handed out any more is simply not found.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from msgspec import Struct

from minter.policy.limits import BACKDATE_SECONDS
from minter.policy.plans import PlannedToken

KEPT = 4_096
"""Shared tokens whose bytes a process keeps, of about 1 kB each."""


class SharedKey(NamedTuple):
    """What a shared token is for: its client, the rule that made it, and the path of its scopes."""

    client_id: int
    rule_id: int
    path: str


class Shared(Struct, frozen=True, gc=False):
    """One shared token whose row is committed, or will be with this transaction."""

    jti: str
    key_id: int
    expires_at: int
    scope: str
    token: bytes

    def __repr__(self) -> str:
        """Name the token without showing it."""
        return f"Shared({self.jti})"

    def serves(self, planned: PlannedToken, key_id: int, now: int) -> bool:
        """Say whether its life left covers the grant's need, in the same words, under the same key."""
        covers = self.expires_at >= now - BACKDATE_SECONDS + planned.lifetime.seconds
        return covers and (self.scope, self.key_id) == (planned.scope, key_id)


class SharedTokenCache:
    """The shared tokens that a process used last."""

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._tokens: OrderedDict[SharedKey, Shared] = OrderedDict()

    def get(self, shared_keys: Iterable[SharedKey]) -> dict[SharedKey, Shared]:
        """Return what is kept for these places."""
        return {
            shared_key: self._tokens[shared_key] for shared_key in shared_keys if shared_key in self._tokens
        }

    def remember(self, used: Mapping[SharedKey, Shared]) -> None:
        """Keep what was used now, whose rows are committed, and forget what was not for longest."""
        for shared_key, shared in used.items():
            self._tokens[shared_key] = shared
            self._tokens.move_to_end(shared_key)
        while len(self._tokens) > self._limit:
            self._tokens.popitem(last=False)
