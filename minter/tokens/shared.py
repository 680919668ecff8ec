"""Shared tokens: one signed token that serves many files of one client (ADR 10).

The cache of a process keeps shared tokens with their bytes, so that one more file costs a use row and no
signature. The cache decides nothing: bans, limits and the signing key are checked for each use, so a token
that may no longer be handed out is not found.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from msgspec import Struct

from minter.policy.limits import BACKDATE_SECONDS
from minter.policy.plans import PlannedToken

KEPT = 4_096
"""Number of shared tokens whose bytes a process keeps, about 1 kB each."""


class SharedKey(NamedTuple):
    """Key of a shared token: its client, the rule that made it, and the path of its scopes."""

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
        """Return whether this token covers a planned token: in life left, scope and signing key."""
        covers = self.expires_at >= now - BACKDATE_SECONDS + planned.lifetime.seconds
        return covers and (self.scope, self.key_id) == (planned.scope, key_id)


class SharedTokenCache:
    """The shared tokens that a process used most recently, `limit` at most."""

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._tokens: OrderedDict[SharedKey, Shared] = OrderedDict()

    def get(self, shared_keys: Iterable[SharedKey]) -> dict[SharedKey, Shared]:
        """Return the cached tokens of these keys."""
        return {
            shared_key: self._tokens[shared_key] for shared_key in shared_keys if shared_key in self._tokens
        }

    def remember(self, used: Mapping[SharedKey, Shared]) -> None:
        """Cache the tokens used now, whose rows are committed, and remove the least recently used ones."""
        for shared_key, shared in used.items():
            self._tokens[shared_key] = shared
            self._tokens.move_to_end(shared_key)
        while len(self._tokens) > self._limit:
            self._tokens.popitem(last=False)
