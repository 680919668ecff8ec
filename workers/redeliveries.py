"""Tries of redelivered messages, counted so that a message that kills workers ends somewhere (ADR 4).

A try is counted before it starts. The count is cleared when the process has survived the try: the message was
served, or Postgres or the broker went away, whose fault is not the message's.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minter.errors import Unavailable
from workers.outbox import BrokerAway

logger = logging.getLogger("minter.batching")

MAX_TRIES = 3
"""Deliveries of a message that may end with a dead worker; at the next one it is dead-lettered."""


class Redeliveries:
    """Counts by functions that count and clear the tries of a message, which its SHA-256 digest names."""

    def __init__(self, count: Callable[[bytes], int], clear: Callable[[bytes], None]) -> None:
        self._count = count
        self._clear = clear
        self._survived: set[bytes] = set()

    @contextmanager
    def counted(self, digest: bytes) -> Iterator[int]:
        """Yield how often the message was tried, this try included; raises Unavailable before the try."""
        self._clear_survived()
        tries = self._count(digest)
        try:
            yield tries
            self._survived.add(digest)
        except (Unavailable, BrokerAway):
            if tries < MAX_TRIES:
                self._survived.add(digest)
            raise
        finally:
            self._clear_survived()  # at once: the broker may hand the message to another worker

    def _clear_survived(self) -> None:
        try:
            for digest in list(self._survived):
                self._clear(digest)
                self._survived.discard(digest)
        except Unavailable:
            logger.warning("redelivery counts are not cleared yet: Postgres is away")
