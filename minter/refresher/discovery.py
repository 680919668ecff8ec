"""A provider's discovery document and JWKS, fetched by one process for all and kept in Postgres.

They cost the provider two requests an hour, within its budget, and stay known while the IAM is away.
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec
from sqlalchemy.engine import Engine as Pool

from minter import logs
from minter.database import providers
from minter.errors import ProviderAway, Unavailable
from minter.providers.answers import Documents
from minter.providers.dialects import Provider
from minter.providers.iam import IAM

logger = logging.getLogger("minter.refresher")

FRESH = timedelta(hours=1)
"""Documents older than this are fetched again."""
NEWS = timedelta(seconds=60)
"""Minimum interval between fetches triggered by an unknown kid."""
FAILED = timedelta(seconds=5)
"""Delay until the next fetch after one that failed."""
MOST_DELAY_SECONDS = 1.0
KEPT_SECONDS = 30.0
"""How long, in seconds, a process uses the documents in its memory before it reads Postgres again."""


class SharedDocuments:
    """The documents of one provider, which `IAM` gets by calling this object."""

    def __init__(self, pool: Pool, provider: Provider, clock: Callable[[], datetime]) -> None:
        self._pool = pool
        self._provider = provider
        self._clock = clock
        self._known: Documents | None = None
        self._asked = float("-inf")
        self.iam: IAM

    def __call__(self, *, fresh: bool = False) -> Documents:
        """Return the documents, with `fresh` not older than NEWS if they can be fetched.

        Raises Unavailable or ProviderAway while no documents are known.
        """
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
            raise Unavailable(f"provider {self._provider.name}: its discovery document was not fetched yet")
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


def probe(iam: IAM) -> bool:
    """Return whether a paused provider answers with its documents."""
    try:
        iam.fetch_documents()
    except Exception as error:  # noqa: BLE001 - any error means that it is not back
        logger.warning("provider %s is not back (%s)", iam.provider.name, type(error).__name__)
        return False
    logs.event(logger, "provider is back", provider=iam.provider.name, until=None)
    return True
