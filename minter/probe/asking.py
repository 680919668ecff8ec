"""Ask a storage with tokens of one minute: each is minted by the engine and on record like any other.

A token that the storage must refuse is minted under settings that are wrong on purpose, or in the past.
"""

from datetime import datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from http import HTTPStatus
from typing import Literal, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

import urllib3
from msgspec import structs

from minter import logs
from minter.bounded_http import pool_manager, read
from minter.contract.operations import Operation
from minter.errors import InvalidRequest
from minter.policy.limits import BACKDATE_SECONDS
from minter.policy.requests import File, Need, Request
from minter.policy.routes import Route
from minter.policy.transfers import Policy
from minter.service import Service
from minter.storages.dialects import HTTPS_PORT
from minter.storages.directory import Area, Directory, Endpoint, Storage
from minter.storages.urls import host_key, host_of, signed_url, squash
from minter.tokens.clock import new_uuid7
from minter.tokens.mint import Engine
from minter.tokens.outcomes import Submission

TOKEN_SECONDS = 60
"""How long a token of a probe can be used."""
ANSWER_SECONDS = 20.0
MAX_ANSWER_BYTES = 1_000_000
MAX_REDIRECTS = 5
CONTENT = b"A file of `minter storages probe`, to be removed.\n"
_NOT_SENT = (
    urllib3.exceptions.NewConnectionError,
    urllib3.exceptions.ConnectTimeoutError,
    urllib3.exceptions.SSLError,
)
_REDIRECTS = {301, 302, 303, 307, 308}
_OPERATIONS: tuple[Operation, ...] = ("read", "write", "overwrite", "delete", "stat")
_ROUTE = Route(name="probe", via="direct", operations=_OPERATIONS, margin_seconds=0)

Method = Literal["GET", "PUT", "DELETE", "PROPFIND"]


class StorageAnswer(NamedTuple):
    """A storage's status and the first bytes of a file; status 0 if there was no answer, and `why`."""

    status: int
    why: str = ""
    content: bytes = b""
    sent: bool = True
    """Whether the request may have reached the storage."""

    @property
    def done(self) -> bool:
        """Whether the storage did what it was asked."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES

    @property
    def refused(self) -> bool:
        """Whether the storage did not take the token, or none."""
        return self.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)

    @property
    def missing(self) -> bool:
        """Whether there is no such file, as the storage says."""
        return self.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)

    def __str__(self) -> str:
        return str(self.status or self.why)


def place_of(endpoint: Endpoint) -> str:
    """Return the host and port of an endpoint."""
    return f"{host_key(endpoint.host)}:{endpoint.port or HTTPS_PORT}"


class Asker:
    """Mints tokens for one endpoint of a storage, as one client, and asks the endpoint with them."""

    def __init__(
        self, service: Service, storage: Storage, endpoint: Endpoint, area: Area, client: str, ca: str | None
    ) -> None:
        self.service = service
        self.storage = storage
        self.endpoint = endpoint
        self.area = area
        self.skew: float | None = None
        """Seconds that the storage's clock is ahead of ours, as its last answer said."""
        self._client = client
        self._ca = ca
        shared = service.loaded.policy.directories[storage.vo].shared
        same = {name for pair in shared if storage.name in pair for name in pair} | {storage.name}
        self._others = [s for s in service.loaded.storages if s.vo == storage.vo and s.name not in same]

    def token(
        self,
        operations: Operation | tuple[Operation, ...],
        path: str,
        storage: Storage | None = None,
        at: datetime | None = None,
    ) -> str:
        """Mint a token for operations on a path, at `at` and with the settings of `storage` if given.

        Raises the error for which the engine refuses the token.
        """
        policy = Policy(
            {self.storage.vo: Directory([storage or self.storage, *self._others])},
            [_ROUTE],
            prefixes=self.service.engine.policy.prefixes,
        )
        engine = Engine(self.service.store, policy, self.service.keystore.unlock, new_uuid7, lambda _: None)
        wanted = (operations,) if isinstance(operations, str) else operations
        request_id = new_uuid7()
        request = Request(
            request_id=request_id,
            kind="mint",
            digest=sha256(request_id.bytes).digest(),
            files=(File((Need(0, "operation", 0, self.url(path), wanted),)),),
            activity="probe",
            lifetime_seconds=BACKDATE_SECONDS + TOKEN_SECONDS,
        )
        (outcome,) = engine.mint_many([Submission(request, self._client)], at or self.service.clock())
        if outcome.error is not None:
            raise outcome.error
        if not outcome.issued:
            why = outcome.refusals[0]["error"]["error_description"]
            raise InvalidRequest(f"no token to {' and '.join(wanted)} {path}: {why}")
        return outcome.issued[0].token.decode()

    def url(self, path: str) -> str:
        """Return the unencoded URL of a VO-relative path at this endpoint."""
        return f"davs://{place_of(self.endpoint)}{squash(f'{self.area.base_path}/{path}')}"

    def ask(self, method: Method, path: str, token: str | None) -> StorageAnswer:
        """Send one request for a path, with a token in its header."""
        return self._send(f"https{quote(self.url(path).removeprefix('davs'), ':/[]')}", method, token)

    def takes(self, path: str, token: str, *, in_url: bool = False) -> bool:
        """Say whether a token to read a file is taken, which is read or is missing.

        That a file is missing proves it only where nobody is told so without a token.
        """
        parameter = self.area.dialect.url_parameter
        if in_url and not parameter:
            return False
        told = (
            self._send(signed_url(self.url(path), parameter, token))
            if in_url
            else self.ask("GET", path, token)
        )
        return told.done or (told.missing and self.ask("GET", path, None).refused)

    def reads(self, path: str, **settings: object) -> bool:
        """Say whether a token that is minted with other settings of the storage is taken for a file."""
        storage = structs.replace(self.storage, **settings)
        return self.takes(path, self.token("read", path, storage))

    def _send(self, url: str, method: Method = "GET", token: str | None = None) -> StorageAnswer:
        """Send one request on a connection of its own, which a storage closes that refuses a body.

        Redirects to servers of the same domain are followed with the token, as gfal2 follows them.
        """
        headers = {"Depth": "0"} if method == "PROPFIND" else {}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        for _ in range(MAX_REDIRECTS):
            try:
                with pool_manager(ANSWER_SECONDS, self._ca).request(
                    method,
                    url,
                    body=CONTENT if method == "PUT" else None,
                    headers=headers,
                    preload_content=False,
                ) as told:
                    content = told.read(len(CONTENT)) if method == "GET" else read(told, MAX_ANSWER_BYTES)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                why = f"{type(error).__name__}: {logs.redact(str(error))[:300]}"
                return StorageAnswer(0, why, sent=not isinstance(error, _NOT_SENT))
            self._note_clock(told.headers.get("Date", ""))
            if told.status not in _REDIRECTS or "Location" not in told.headers:
                return StorageAnswer(told.status, content=content)
            url = urljoin(url, told.headers["Location"])
            if not self._is_ours(url):
                to = urlsplit(url)
                why = f"it redirects to {to.scheme}://{to.hostname}, where no token of the probe goes"
                return StorageAnswer(0, why)
        return StorageAnswer(0, f"more than {MAX_REDIRECTS} redirects")

    def _is_ours(self, url: str) -> bool:
        """Say whether a URL is of the storage: https, and a host of the endpoint's domain."""
        here, there = host_key(self.endpoint.host), host_of(url)
        domain = here.partition(".")[2]
        same = here == there or ("." in domain and there.endswith(f".{domain}"))
        return same and urlsplit(url).scheme == "https"

    def _note_clock(self, date: str) -> None:
        try:
            told = parsedate_to_datetime(date)
        except ValueError:  # the storage sends no date, as XRootD does
            return
        self.skew = told.timestamp() - self.service.clock().timestamp()
