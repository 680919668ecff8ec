"""TCP options with which a connection notices that its peer's machine vanished: nobody says goodbye then."""

import socket

IDLE_SECONDS, PROBE_SECONDS, PROBES = 5, 2, 3
"""A machine that vanished is noticed after IDLE_SECONDS + PROBES * PROBE_SECONDS."""
UNACKNOWLEDGED_SECONDS = 10.0
"""The same where something was sent to it."""

_VALUES = {
    "TCP_KEEPIDLE": IDLE_SECONDS,
    "TCP_KEEPINTVL": PROBE_SECONDS,
    "TCP_KEEPCNT": PROBES,
    "TCP_USER_TIMEOUT": int(UNACKNOWLEDGED_SECONDS * 1000),
}
TCP_OPTIONS: dict[int, int] = {
    getattr(socket, name): value for name, value in _VALUES.items() if hasattr(socket, name)
}
"""Values of TCP's options; those that only Linux has are left out elsewhere."""
