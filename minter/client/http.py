"""The client's HTTP transport, the default: repeats a request, under the same id, until it is answered."""

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

import msgspec
import urllib3
from msgspec import Struct
from urllib3.connection import HTTPConnection

from minter.backoff import Backoff
from minter.contract.messages import Answer
from minter.contract.names import endpoint
from minter.errors import InvalidRequest, MinterError, ServerError, SettingsError, Unavailable, from_dict
from minter.keepalive import TCP_OPTIONS

FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.2, 10.0
PASSING = frozenset({429, 502, 503, 504})
"""HTTP statuses that are tried again; the request keeps its id, so no token is made twice."""
CONNECT_SECONDS = 3.0
"""How long one address of the service is tried before its next one."""
MAX_THREADS = 8
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_SOCKET_OPTIONS = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, option, value) for option, value in TCP_OPTIONS.items()),
]

_answer = msgspec.json.Decoder(Answer)


class HttpTransport:
    """Connections to one issuer's HTTP service; may be used by several threads.

    `url` is the issuer's (`https://host/vo/`); plain http is allowed only on this machine. `client` and
    `secret` are those that operators registered; either may be in the URL instead.
    """

    def __init__(
        self,
        url: str,
        client: str | None,
        secret: str | None,
        *,
        timeout_seconds: float,
        ca: str | None = None,
        window: int = 64,
    ) -> None:
        parts = urlsplit(url)
        self.client = client or unquote(parts.username or "")
        secret = secret or unquote(parts.password or "")
        if not (self.client and secret):
            raise InvalidRequest("no client or no secret: name both, or put them into the URL")
        if parts.scheme != "https" and parts.hostname not in _LOOPBACK:
            raise SettingsError("plain http would show secrets and tokens to others, expected an https URL")
        self.timeout_seconds = timeout_seconds
        self.window = window
        host = parts.netloc.rpartition("@")[2]
        self._base = urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/v1/", "", ""))
        folder = ca is not None and Path(ca).is_dir()
        self._pool = urllib3.PoolManager(
            maxsize=MAX_THREADS,
            ca_certs=None if folder else ca,
            ca_cert_dir=ca if folder else None,
            headers=urllib3.make_headers(basic_auth=f"{self.client}:{secret}"),
            retries=False,
            socket_options=_SOCKET_OPTIONS,
        )

    def __repr__(self) -> str:
        """Name the client; the URL may hold a secret."""
        return f"<HttpTransport of {self.client}>"

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def ask(self, task: str, requests: Sequence[Struct]) -> Iterator[Answer]:
        """Send requests, several under way at once, and yield their answers in order.

        Raises Unavailable if a request gets no answer within `timeout_seconds`.
        """
        path = endpoint(task)
        if len(requests) == 1:
            yield self._post(path, requests[0])
            return
        with ThreadPoolExecutor(min(MAX_THREADS, self.window)) as threads:
            yield from threads.map(lambda request: self._post(path, request), requests)

    def trace(self, question: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the traces of this client's tokens for one of the query parameters of `/v1/trace`."""
        status, body = self._until_answered("GET", f"trace?{urlencode(question)}")
        if status != 200:  # noqa: PLR2004
            raise _refusal(status, body)
        return list(msgspec.json.decode(body)["tokens"])

    def _post(self, path: str, request: Struct) -> Answer:
        status, body = self._until_answered("POST", path, msgspec.json.encode(request))
        try:
            return _answer.decode(body)
        except msgspec.DecodeError:
            raise _refusal(status, body) from None

    def _until_answered(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Repeat a request until its answer is final; return the answer's status and body."""
        started, backoff = time.monotonic(), Backoff(FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS)
        headers = {**self._pool.headers, "Content-Type": "application/json"}
        said_last = ""
        while True:
            left = self.timeout_seconds - (time.monotonic() - started)
            cause: Exception
            wait = backoff.pause()
            try:
                response = self._pool.request(
                    method, self._base + path, body=body, headers=headers,
                    timeout=urllib3.Timeout(connect=CONNECT_SECONDS, total=max(left, 0.1)),
                )  # fmt: skip
                if response.status not in PASSING:
                    return response.status, response.data
                said = response.headers.get("Retry-After", "")
                wait = max(wait, float(said)) if said.isdecimal() else wait
                cause = refused = _refusal(response.status, response.data)
                said_last = f"; the service said: {refused.message}"
            except urllib3.exceptions.HTTPError as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise SettingsError(f"the engine's certificate is not trusted: {error}"[:300]) from None
                cause = error
            if left <= wait:
                raise Unavailable(
                    f"no answer within {self.timeout_seconds:g} s ({type(cause).__name__}); the same "
                    f"request_id may be sent again{said_last}"
                ) from cause
            time.sleep(wait)


def _refusal(status: int, body: bytes) -> MinterError:
    """Return the error of an answer that is not an `Answer`: the request did not reach the engine."""
    try:
        told = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return ServerError(f"HTTP status {status} without an answer of Minter; is a proxy in between?")
    inner = told.get("error")
    return from_dict(inner if isinstance(inner, dict) else told)
