"""One process of the HTTP service: limits, authentication, errors, and the public documents.

The modules `tasks` and `oauth` have the endpoints for clients. Every answer is JSON and repeats no input
that a browser could take for a page. Bodies are never logged.
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec
from falcon import HTTPError, HTTPNotFound, asgi
from falcon.uri import parse_query_string

from minter import alive, logs
from minter.database.connection import QUICK_SECONDS, transaction
from minter.database.control import read_keys
from minter.errors import (
    Conflict,
    Expired,
    InvalidClient,
    InvalidRequest,
    MinterError,
    NoUsableKey,
    RequestError,
    ServerError,
    TooManyRequests,
    Unavailable,
    UnknownRequest,
)
from minter.heartbeats import Heartbeat
from minter.issuer import well_known
from minter.issuer.batches import Batcher
from minter.issuer.client_authentication import WRONG, Account, Credentials, Presented, presented
from minter.issuer.hosts import Hosts, endpoint
from minter.issuer.ratelimits import RateLimit, Room
from minter.metrics import Metrics
from minter.policy.token_requests import SubjectToken
from minter.providers.subject_tokens import Subjects
from minter.service import Service
from minter.tokens import keys

logger = logging.getLogger(__name__)

HEALTH, READY = "/health", "/ready"
MAX_FORM_BYTES = 64 * 1024
MAX_FORM_FIELDS = 32
MAX_HELD_BYTES = 64 * 1024 * 1024
"""Bodies of requests that one process holds, at most; a quarter of them may be one client's."""
PIECE_BYTES = 64 * 1024
WATCH_SECONDS = 1.0
"""Every process reads changed keys and clients at this interval."""
STUCK_SECONDS = 60.0
"""An event loop that serves nobody for so long is stuck."""
READY_SECONDS = 1.5
"""`/ready` answers within this time, whatever Postgres does."""
REBUILD = timedelta(minutes=1)
"""Documents are built again after this time even without a change: keys also leave the JWKS by time."""
KEYS_CACHE = "public, max-age=600"
"""How long HTTP caches may keep discovery and keys: as long as XRootD keeps them, so `keys revoke` holds."""

FAILURES_PER_SECOND = 20
"""So many failed authentications a second, and a burst of as many, are answered to each peer."""
NEEDS_OF_A_CALL = 20
"""So many tokens cost as much as one request."""
SEVERAL = ("audience", "resource")
"""Parameters that may come more than once (RFC 8693 §2.1, RFC 8707 §2)."""

_STATUS_OF_CLASS: dict[type[MinterError], int] = {
    UnknownRequest: 404, Conflict: 409, Expired: 410, TooManyRequests: 429,
}  # fmt: skip
_STATUS_OF_CODE = {
    "invalid_client": 401, "access_denied": 403, "server_error": 500, "temporarily_unavailable": 503,
}  # fmt: skip
"""All other errors are faults of the request and have status 400 (RFC 6749 §5.2)."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Pragma": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_NOT_DESCRIBABLE = re.compile(r"[^\x20\x21\x23-\x5b\x5d-\x7e]")
encode = msgspec.json.Encoder().encode


def status_of(error: MinterError) -> int:
    """Return the HTTP status of an error."""
    return _STATUS_OF_CLASS.get(type(error), _STATUS_OF_CODE.get(error.code, 400))


def shown(error: MinterError) -> dict[str, Any]:
    """Return an error for the client: its own faults in detail, internal ones without (RFC 6749 §5.2)."""
    if not isinstance(error, RequestError | Unavailable):
        error = ServerError("the engine failed on this request; its operators have the log")
    told = error.as_dict()
    return {**told, "error_description": _NOT_DESCRIBABLE.sub("'", error.message)[:400]}


def send(resp: asgi.Response, content: object, status: int = 200) -> None:
    """Answer with a JSON value, which caches may not keep unless the endpoint sets another header."""
    resp.status = status
    resp.content_type = "application/json"
    resp.data = content if isinstance(content, bytes) else encode(content)


def peer_of(req: asgi.Request) -> str:
    """Return the address that a request comes from, empty if a proxy on this machine does not tell it.

    A peer elsewhere may write anything into X-Forwarded-For, so only the proxy's own last entry counts.
    """
    peer = req.remote_addr
    if peer not in ("127.0.0.1", "::1"):
        return peer
    return (req.get_header("X-Forwarded-For") or "").rpartition(",")[2].strip()


class Web:
    """State and helpers that the endpoints of one process share."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service = service
        self.settings = service.loaded.settings.http
        self.metrics = metrics
        self.batcher = Batcher(service.engine, service.clock, self.settings.waiting_requests)
        self.credentials = Credentials(
            service.pool, service.keystore, service.loaded.endpoints, service.clock
        )
        self._subjects = Subjects(service.loaded.endpoints, service.iams, lambda: [k.kid for k in self.ring])
        self.ring: list[keys.Key] = []
        self.documents: Mapping[well_known.Place, bytes] = {}
        self._built: tuple[int, datetime] | None = None
        self._ready_at = float("-inf")
        self.heartbeat = Heartbeat("serve", service, metrics.counted)
        self.room = Room(MAX_HELD_BYTES)
        self._limit = RateLimit(self.settings.requests_per_second)
        self._failures = RateLimit(FAILURES_PER_SECOND)

    async def verify_subject(self, vo: str, subject: SubjectToken) -> SubjectToken:
        """Verify a provider's token outside the engine's thread, because the provider may be slow."""
        return await asyncio.to_thread(self._subjects.verify, vo, subject)

    # ── changed keys and clients ──────────────────────────────────────────────────────────────

    def look(self) -> None:
        """Read changed clients and keys, in the engine's thread; raises Unavailable, NoUsableKey."""
        now = self.service.clock()
        self.credentials.refresh(time.monotonic())
        version, at = self._built or (-1, now)
        if version != self.credentials.version or now - at > REBUILD:
            with transaction(self.service.pool, QUICK_SECONDS) as connection:
                self.ring = read_keys(connection)
            self.documents = self._published(now)
            self._built = self.credentials.version, now

    def _published(self, now: datetime) -> Mapping[well_known.Place, bytes]:
        """Return the documents of every issuer that is Minter's alone: `publish` merges the others."""
        own = self.service.loaded.own_issuers
        return well_known.by_place(self.ring, own, now) if own else {}

    async def watch(self) -> None:
        """Read changes once a second, without end; while Postgres is down, the last values stay in use."""
        while True:
            try:
                await self.batcher.call(self.look)
            except (Unavailable, NoUsableKey) as error:
                logger.warning("keys and clients stay as they were: %s", error)
            except Exception:
                logger.exception("keys and clients could not be read")
            await asyncio.sleep(WATCH_SECONDS)

    async def ready(self) -> None:
        """Check within READY_SECONDS that rows can be written, that clocks agree, and that keys can sign.

        Raises Unavailable with the cause. A successful check is not repeated within a second.
        """
        if time.monotonic() - self._ready_at < WATCH_SECONDS:
            return
        try:
            async with asyncio.timeout(READY_SECONDS):
                await asyncio.to_thread(self.heartbeat.beat, READY_SECONDS)
                await self.batcher.call(self._unlock)
        except TimeoutError:
            raise self.heartbeat.problem or Unavailable(
                f"Postgres or the engine gives no answer within {READY_SECONDS} s", retry_after=2
            ) from None
        self._ready_at = time.monotonic()

    def _unlock(self) -> None:
        """Unlock every key that signs, in the engine's thread; raises NoUsableKey.

        Under the IAM's issuer the first keys do not sign for two days, which is no other VO's trouble.
        """
        for vo in self.service.loaded.issuers:
            waits = vo in self.service.loaded.co_issuers
            if waits and not any(k.vo == vo and k.state == "active" for k in self.ring):
                continue
            for key in keys.active(self.ring, vo).values():
                self.service.engine.unlock(key)

    # ── reading requests ─────────────────────────────────────────────────────────────────────

    async def body(
        self, req: asgi.Request, most: int, kind: str, take: Callable[[int], None] = lambda _: None
    ) -> bytes:
        """Read a body of content type `kind`; raises InvalidRequest if it is too large or too slow.

        `take` is told the number of bytes of each piece that has arrived.
        """
        if (req.content_type or "").partition(";")[0].strip().lower() != kind:
            raise InvalidRequest(f"the content type is not {kind}")
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while len(body) <= most and (
                    piece := await req.stream.read(min(PIECE_BYTES, most + 1 - len(body)))
                ):
                    take(len(piece))
                    body += piece
        except TimeoutError:
            raise InvalidRequest(f"the body did not come within {self.settings.body_seconds} s") from None
        if len(body) > most:
            raise InvalidRequest(f"the body is too large, expected at most {most} bytes")
        return bytes(body)

    async def form(self, req: asgi.Request) -> dict[str, str]:
        """Read a form (RFC 6749 §3.2) without empty parameters; raises InvalidRequest for repeated ones.

        Values of the parameters in `SEVERAL`, which may be repeated, are joined by a space.
        """
        body = await self.body(req, MAX_FORM_BYTES, "application/x-www-form-urlencoded")
        found = parse_query_string(body.decode(errors="replace"))
        form = {
            name: value if isinstance(value, str) else " ".join(value)
            for name, value in found.items()
            if isinstance(value, str) or name in SEVERAL
        }
        # Bytes that are not UTF-8, percent-encoded or not, were decoded to replacement characters.
        if body.count(b"&") >= MAX_FORM_FIELDS or "\ufffd" in "".join([*form, *form.values()]):
            raise InvalidRequest(f"the body is not a form in UTF-8 of at most {MAX_FORM_FIELDS} fields")
        if len(form) != len(found):
            raise InvalidRequest("a parameter comes more than once (RFC 6749 §3.2)")
        return form

    async def authenticate(self, req: asgi.Request, vo: str, form: Mapping[str, str]) -> Account:
        """Return the authenticated client; raises InvalidClient, TooManyRequests, InvalidRequest."""
        arrived = time.monotonic()
        peer = peer_of(req)
        if wait := self._failures.early(peer, arrived) if peer else 0:
            raise TooManyRequests("too many failed authentications", retry_after=max(1, round(wait)))
        who = presented(req.get_header("Authorization"), form)
        account = await self._known(req, who, vo)
        if account is None:
            await asyncio.sleep(self.credentials.fresh_for())  # a client registered just now is known then
            await self.batcher.call(self.credentials.refresh, arrived)
            account = await self._known(req, who, vo)
        if account is None or form.get("client_id", account.name) != account.name:
            self._failures.charge(peer, arrived)
            raise InvalidClient(WRONG)
        if wait := self._limit.wait(account.name, time.monotonic()):
            raise TooManyRequests(
                f"client {account.name!r} sends over {self.settings.requests_per_second} requests a second",
                retry_after=max(1, round(wait)),
            )
        return account

    def charge(self, account: Account, needs: int) -> None:
        """Count the needs of a request in its client's rate, beside the request itself."""
        self._limit.charge(account.name, time.monotonic(), needs / NEEDS_OF_A_CALL)

    async def _known(self, req: asgi.Request, who: Presented, vo: str) -> Account | None:
        if not who.assertion:
            return self.credentials.by_secret(who, vo)
        issuer = self.service.loaded.endpoints[vo]
        audience = [issuer, f"{issuer}token", issuer + req.path.rpartition("/")[2]]
        return await self.batcher.call(self.credentials.by_assertion, who, vo, audience)


# ── the application ──────────────────────────────────────────────────────────────────────────


class _Shell:
    """Middleware: corrects paths, sets headers and counts requests; starts and stops `Web.watch`."""

    def __init__(self, web: Web) -> None:
        self._web = web
        self._hosts = Hosts(web.service.loaded.endpoints.values())
        self._watch: asyncio.Future[Any] | None = None

    async def process_startup(self, _scope: object, _event: object) -> None:
        self._watch = asyncio.gather(self._web.watch(), alive.turns(STUCK_SECONDS))

    async def process_shutdown(self, _scope: object, _event: object) -> None:
        if self._watch is not None:
            self._watch.cancel()
            alive.rest()

    async def process_request(self, req: asgi.Request, resp: asgi.Response) -> None:
        resp.set_headers(_HEADERS)
        # ftstokenrefresherd asks for //.well-known/openid-configuration.
        path = re.sub("/{2,}", "/", req.path)
        if path.startswith("/@"):
            raise HTTPNotFound
        req.path = path if path in (HEALTH, READY) else self._hosts.place(req.get_header("Host"), path)

    async def process_response(
        self, req: asgi.Request, resp: asgi.Response, _resource: object, _succeeded: bool
    ) -> None:
        self._web.metrics.http(endpoint(req.uri_template), int(resp.status_code))


class _Document:
    """Endpoint of a public document, JWKS or discovery, as built last."""

    def __init__(self, web: Web, place: well_known.Place) -> None:
        self._web = web
        self._place = place

    async def on_get(self, _req: asgi.Request, resp: asgi.Response, **_: str) -> None:
        document = self._web.documents.get(self._place)
        if document is None:
            raise Unavailable("this issuer has published no key yet")
        send(resp, document)
        resp.set_header("Cache-Control", KEYS_CACHE)
        resp.delete_header("Pragma")
        resp.set_header("Access-Control-Allow-Origin", "*")

    on_head = on_get


class _Health:
    """`/health` says that the process serves, `/ready` that tokens can be recorded and signed now."""

    def __init__(self, web: Web) -> None:
        self._web = web

    async def on_get(self, _req: asgi.Request, resp: asgi.Response) -> None:
        send(resp, {"status": "alive"})

    on_head = on_get

    async def on_get_ready(self, _req: asgi.Request, resp: asgi.Response) -> None:
        await self._web.ready()
        send(resp, {"status": "ready"})

    on_head_ready = on_get_ready


async def _refuse(req: asgi.Request, resp: asgi.Response, error: MinterError, _params: object) -> None:
    """Answer with a MinterError, and log it with its cause if it is not the caller's fault.

    The endpoints of tasks return the error inside an answer of the contract (schemas/answer.json).
    """
    status = status_of(error)
    if not isinstance(error, RequestError | Unavailable):
        logger.error("%s failed", endpoint(req.uri_template), exc_info=error)
    told = shown(error)
    send(resp, {"error": told} if getattr(req.context, "answers", False) else told, status)
    if status == _STATUS_OF_CODE["invalid_client"]:
        resp.set_header("WWW-Authenticate", 'Basic realm="minter"')
    if isinstance(error, Unavailable):
        resp.set_header("Retry-After", str(max(1, math.ceil(error.fields.get("retry_after", 5)))))
    if not getattr(req.context, "noted", False):
        logs.event(logs.requests_logger, "refused", task=endpoint(req.uri_template), reason=error.reason)


async def _fail(req: asgi.Request, resp: asgi.Response, error: Exception, _params: object) -> None:
    """Answer an unexpected exception with an opaque server_error, and log it with its cause."""
    logger.error("%s failed", endpoint(req.uri_template), exc_info=error)
    send(resp, shown(ServerError("")), 500)


async def _http_error(_req: asgi.Request, resp: asgi.Response, error: HTTPError, _params: object) -> None:
    """Answer a request that falcon refuses, such as one for an unknown path or method."""
    send(resp, InvalidRequest(error.title or "").as_dict(), error.status_code)
    for name, value in dict(error.headers or {}).items():
        resp.set_header(name, value)


def application(web: Web) -> "asgi.App[Any, Any]":
    """Return the application with every issuer's documents, `/health` and `/ready`."""
    app: asgi.App[Any, Any] = asgi.App(middleware=_Shell(web))
    app.add_error_handler(Exception, _fail)
    app.add_error_handler(HTTPError, _http_error)
    app.add_error_handler(MinterError, _refuse)
    app.add_route(HEALTH, _Health(web))
    app.add_route(READY, _Health(web), suffix="ready")
    for host, path in well_known.places(web.service.loaded.own_issuers.values()):
        app.add_route(f"/@{host}/{path}", _Document(web, (host, path)))
    return app
