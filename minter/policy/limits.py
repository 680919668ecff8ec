"""Limits of a token's life and size, each with its source."""

from datetime import timedelta

HARD_MAX_SECONDS = 192 * 3600
"""Longest token of any route: Rucio lets FTS queue for 168 h, and a transfer takes its time. A key
that signs no more stays public for as long (I6)."""
LAST_EXPIRY = timedelta(seconds=HARD_MAX_SECONDS) + timedelta(days=1)
"""Tokens whose jti is older than this have all expired."""
PROFILE_MIN_SECONDS = 15 * 60
"""Shortest access token (WLCG §4.3.1)."""
PROFILE_MAX_SECONDS = 6 * 3600
"""Longest access token without an agreed mitigation (WLCG §4.3.1)."""
BACKDATE_SECONDS = 60
"""How far iat and nbf lie in the past (WLCG §4.3.1): FTS and XRootD have no leeway."""
FTS_QUEUE_SECONDS = 3600
"""FTS counts `max_time_in_queue` in whole hours, and reads 0 as no limit."""
MAX_CLAIM_CHARACTERS = 1_024
"""FTS stores scope and audience in columns of this width."""
GRACE = timedelta(hours=24)
"""How long a refresh token works after another was given out for it, if that was never used."""
MAX_ACT_DEPTH = 2
"""How many actors may be named in `act`, one in the other (RFC 8693 §4.1)."""
ANY_SECONDS = 3600
"""Longest token that every storage of the VO would take."""
MIN_LEFT_SECONDS = 60
MAX_AHEAD_SECONDS = 5 * 60
"""How far a request_id may lie in the future."""
MAX_CLOCK_SKEW_SECONDS = 5.0
"""Beyond this difference to Postgres's clock a process refuses to sign."""
COVER_SECONDS = 300
"""A recorded token with less life left than this no longer covers any need."""
