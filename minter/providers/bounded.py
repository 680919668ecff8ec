"""HTTP with a server that may misbehave: urllib3, whose answers are bounded in time and size as a whole."""

import http.client
import io
import socket
import time
from functools import partial
from typing import Any

import urllib3

MAX_ANSWER_BYTES = 256 * 1024


class _Reader(io.RawIOBase):
    """Reads a socket until an instant: each wait ends there, however little came before it."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)  # holds the socket open, as http.client expects
        self._until = until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(max(0.001, self._until - time.monotonic()))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Bounded:
    """A connection whose answer, head and all, must come within a time: a server may let it trickle."""

    seconds = 0.0

    def getresponse(self) -> Any:
        """Return the response; raises TimeoutError, as reading it does."""
        self.response_class = partial(_Response, until=time.monotonic() + self.seconds)
        return super().getresponse()  # type: ignore[misc]


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, until: float, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_Reader(sock, until))


def pools(seconds: float) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """Return urllib3's pools by scheme, of connections that are bounded."""
    made: dict[str, type[urllib3.HTTPConnectionPool]] = {}
    for scheme, pool in (("http", urllib3.HTTPConnectionPool), ("https", urllib3.HTTPSConnectionPool)):
        bounded = type("Bounded", (_Bounded, pool.ConnectionCls), {"seconds": seconds})
        made[scheme] = type("BoundedPool", (pool,), {"ConnectionCls": bounded})
    return made


def read(response: urllib3.BaseHTTPResponse) -> bytes:
    """Return the body of an answer; raises TimeoutError for one of more than MAX_ANSWER_BYTES."""
    parts, size = [], 0
    while chunk := response.read1(16_384):
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise TimeoutError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
    return b"".join(parts)
