"""The current time and fresh ids, for entry points; all other code takes them as arguments."""

import uuid
from datetime import UTC, datetime

import uuid_utils

from minter.errors import ClockSkew
from minter.policy.limits import MAX_CLOCK_SKEW_SECONDS


def now() -> datetime:
    """Return the current time in UTC; all entry points use this clock."""
    return datetime.now(UTC)


def new_uuid7() -> uuid.UUID:
    """Return a fresh UUIDv7 (RFC 9562 §5.7)."""
    return uuid.UUID(int=uuid_utils.uuid7().int)


def check_clock(skew: float) -> None:
    """Raise ClockSkew if this process's clock and Postgres's differ by more than 5 s."""
    if abs(skew) > MAX_CLOCK_SKEW_SECONDS:
        raise ClockSkew(
            f"clocks of this worker and of Postgres differ by {skew:.0f} s, expected at most "
            f"{MAX_CLOCK_SKEW_SECONDS:.0f}; repair NTP, then the request can be sent again"
        )
