"""The time and fresh ids, for entry points: everything below takes them as arguments."""

import uuid
from datetime import UTC, datetime

import uuid_utils


def now() -> datetime:
    """Return the time: the one clock of all entry points."""
    return datetime.now(UTC)


def new_uuid7() -> uuid.UUID:
    """Return a fresh UUIDv7 (RFC 9562 §5.7)."""
    return uuid.UUID(int=uuid_utils.uuid7().int)
