"""HTTP client for servers that may misbehave: urllib3 with bounds on a response's total time and size."""

import http.client
import io
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import urllib3

CONNECT_SECONDS = 5.0
MAX_INFORMATIONAL = 16
_INFORMATIONAL, _SWITCHES, _FINAL = 100, 101, 200


class TooLarge(urllib3.exceptions.HTTPError):
    """A response has more bytes than its reader takes."""


class _Reader(io.RawIOBase):
    """Reads a socket until an instant: no wait goes beyond it, however slowly the bytes arrive."""

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
    """A connection whose response, with headers, must arrive within `seconds`, even from a slow server."""

    seconds = 0.0

    def getresponse(self) -> Any:
        """Return the response; this, and reading the response, raises TimeoutError when the time is over."""
        self.response_class = partial(_Response, until=time.monotonic() + self.seconds)
        return super().getresponse()  # type: ignore[misc]


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, until: float, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_Reader(sock, until))

    def begin(self) -> None:
        """Read the head of the final response: informational ones before it are skipped (RFC 9110 §15.2)."""
        super().begin()
        for _ in range(MAX_INFORMATIONAL):
            if not _INFORMATIONAL <= self.status < _FINAL or self.status == _SWITCHES:
                return
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()


def pool_manager(seconds: float, ca: str | None, connections: int = 10) -> urllib3.PoolManager:
    """Return a client whose responses must arrive within `seconds`; it follows no redirect, repeats nothing.

    `ca` is a file or a hashed directory; None means the system's CAs.
    """
    folder = ca is not None and Path(ca).is_dir()
    made = urllib3.PoolManager(
        maxsize=connections,
        ca_certs=None if folder else ca,
        ca_cert_dir=ca if folder else None,
        retries=False,
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=seconds),
    )
    classes: dict[str, type[urllib3.HTTPConnectionPool]] = {}
    for scheme, pool in (("http", urllib3.HTTPConnectionPool), ("https", urllib3.HTTPSConnectionPool)):
        connection = type("Bounded", (_Bounded, pool.ConnectionCls), {"seconds": seconds})
        classes[scheme] = type("BoundedPool", (pool,), {"ConnectionCls": connection})
    made.pool_classes_by_scheme = classes
    return made


def read(response: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """Return the body of a response; raises TooLarge if it has more than `most` bytes."""
    parts, size = [], 0
    while chunk := response.read1(16_384):
        parts.append(chunk)
        size += len(chunk)
        if size > most:
            raise TooLarge(f"an answer of more than {most} bytes")
    return b"".join(parts)
