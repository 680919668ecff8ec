"""A provider's discovery and JWKS, fetched by one process for all and kept in Postgres.

So they cost the provider two requests an hour, within its budget, and an IAM that is away is still known.
"""

import time
from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec
from sqlalchemy.engine import Engine as Pool

from minter.database import providers
from minter.errors import ProviderAway, Unavailable
from minter.providers.dialects import Provider
from minter.providers.iam import IAM, Documents

FRESH = timedelta(hours=1)
"""Documents are fetched again when they are older."""
NEWS = timedelta(seconds=60)
"""So often at most they are fetched because of a key that nobody knows."""
FAILED = timedelta(seconds=5)
"""Until the next try when they could not be had."""
MOST_DELAY_SECONDS = 1.0
KEPT_SECONDS = 30.0
"""For so long a process does not ask Postgres again."""


class SharedDocuments:
    """What is known of one provider; called for it by `IAM`."""

    def __init__(self, pool: Pool, provider: Provider, clock: Callable[[], datetime]) -> None:
        self._pool = pool
        self._provider = provider
        self._clock = clock
        self._known: Documents | None = None
        self._asked = float("-inf")
        self.iam: IAM

    def __call__(self, *, fresh: bool = False) -> Documents:
        """Return the documents; raises Unavailable, or ProviderAway, while there are none."""
        if self._known is not None and not fresh and time.monotonic() - self._asked < KEPT_SECONDS:
            return self._known
        found, at = providers.documents(self._pool, self._provider.name)
        self._known = None if found is None else msgspec.convert(found, Documents)
        self._asked = time.monotonic()
        now = self._clock()
        older_than = now - (NEWS if fresh else FRESH)
        if at is None or at < older_than:
            delay = providers.lease_documents(self._pool, self._provider, now, older_than)
            if delay is not None:
                time.sleep(min(delay.total_seconds(), MOST_DELAY_SECONDS))
                self._fetch(now)
        if self._known is None:
            raise Unavailable(f"provider {self._provider.name}: its discovery document could not be had yet")
        return self._known

    def _fetch(self, now: datetime) -> None:
        try:
            self._known = self.iam.fetch_documents()
        except ProviderAway:
            providers.save_documents(self._pool, self._provider.name, None, now - FRESH + FAILED)
            if self._known is None:
                raise
        else:
            found = msgspec.to_builtins(self._known)
            providers.save_documents(self._pool, self._provider.name, found, now)
