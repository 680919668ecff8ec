"""Limits of a token's lifetime and size, each with its source."""

from datetime import timedelta

HARD_MAX_SECONDS = 192 * 3600
"""Longest lifetime on any route: Rucio lets FTS queue a file for 168 h, and the transfer takes time, too.
A key that no longer signs stays published for the same time (I6)."""
LAST_EXPIRY = timedelta(seconds=HARD_MAX_SECONDS) + timedelta(days=1)
"""Age of a jti from which on its token has expired in any case."""
PROFILE_MIN_SECONDS = 15 * 60
"""Shortest lifetime of an access token (WLCG §4.3.1)."""
PROFILE_MAX_SECONDS = 6 * 3600
"""Longest lifetime of an access token without an agreed mitigation (WLCG §4.3.1)."""
BACKDATE_SECONDS = 60
"""How far iat and nbf lie in the past (WLCG §4.3.1): FTS and XRootD have no leeway."""
FTS_QUEUE_SECONDS = 3600
"""FTS counts `max_time_in_queue` in whole hours, and reads 0 as no limit."""
FTS_DEFAULT_STAGING_SECONDS = 7 * 86400
"""How long FTS stages a file whose job names a pin lifetime only (DefaultBringOnlineTimeout, 3.14.4)."""
FTS_ARCHIVING_SLACK_SECONDS = 800
"""FTS gives up a file that is not on tape this long after its `archive_timeout` (3.14.4)."""
MAX_CLAIM_CHARACTERS = 1_024
"""FTS stores scope and audience in columns of this width."""
GRACE = timedelta(hours=24)
"""How long a refresh token works after its successor was handed out, if the successor was never used."""
EXCHANGE_REPEAT = timedelta(minutes=1)
"""How long an equal exchange of a subject token gets the first one's refresh token, if that is unused."""
MAX_ACT_DEPTH = 2
"""Most actors that may be nested in `act` (RFC 8693 §4.1)."""
ANY_SECONDS = 3600
"""Longest lifetime of a token that every storage of the VO takes."""
MIN_LEFT_SECONDS = 60
MAX_AHEAD_SECONDS = 5 * 60
"""How far a request_id may lie in the future."""
MAX_CLOCK_SKEW_SECONDS = 5.0
"""Largest difference from Postgres's clock, in seconds, at which a process still signs."""
COVER_SECONDS = 300
"""A recorded token with less life left than this no longer covers any need."""

MAX_DATE = 253_402_300_799
"""The last second of the year 9999: no date that Python and Postgres both can hold is later."""
