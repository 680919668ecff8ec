"""The Python client: tokens for files, over AMQP.

    with MinterClient("amqps://rucio-prod:secret@broker/minter") as minter:
        result = minter.mint([FileRequest(sources=(url,), destinations=(other,), size=10**9)])
        for token in result.tokens:
            send(token.side, token.reveal())

A request keeps its `request_id` through every retry, so asking twice gives the same tokens. All
errors are of the tree in `minter.errors`: one file's refusal is in `result.refusals`, a request
refused as a whole raises.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import kombu
import msgspec
import uuid_utils
from msgspec import Struct, structs

from minter.amqp import Outgoing, Publisher
from minter.contract import (
    FILL_JOB,
    MINT,
    REQUEST_EXCHANGE,
    REQUEST_QUEUE,
    reply_prefix,
)
from minter.errors import InvalidRequest, MinterError, Unavailable, from_dict
from minter.requests import (
    MAX_FILES,
    Answer,
    FileOperation,
    FileRequest,
    FillRequest,
    MintRequest,
    TokenAnswer,
)

__all__ = [
    "FileOperation", "FileRequest", "FilledJob", "MintResult", "MinterClient", "MinterError",
    "Refusal", "Token", "new_request_id",
]  # fmt: skip

DEFAULT_TIMEOUT_SECONDS = 60.0
RECONNECT_SECONDS = 0.5
FIRST_RESEND_SECONDS = 5.0
"""The embedded broker loses the message that it was handing to a worker as that was killed, so
there what has no answer is sent again after this time, then after twice as long, and so on."""


def new_request_id() -> uuid.UUID:
    """Return a fresh request_id (UUIDv7); keep it to repeat the request."""
    return uuid.UUID(int=uuid_utils.uuid7().int)


class Token:
    """One token. `str` and `repr` hide it; `reveal()` gives it to whoever sends it on."""

    __slots__ = ("_token", "exp", "file", "index", "jti", "scope", "side", "storage")

    def __init__(self, answer: TokenAnswer, first_file: int = 0) -> None:
        self._token = answer.token
        self.file = answer.file + first_file if answer.file >= 0 else answer.file
        self.side = answer.side
        self.index = answer.index
        self.storage = answer.storage
        self.scope = answer.scope
        self.jti = answer.jti
        self.exp = answer.exp

    def reveal(self) -> str:
        """Return the compact JWS itself: a secret."""
        return self._token

    def __repr__(self) -> str:
        """Name the token without showing it."""
        return f"<Token {self.jti} for {self.side}[{self.index}] of file {self.file}>"

    __str__ = __repr__


class Refusal(Struct, frozen=True):
    """One file's side that got no token, and the typed reason."""

    file: int
    side: str
    index: int
    error: MinterError


class MintResult(Struct, frozen=True):
    """What a request got; files are numbered as they were given."""

    request_ids: tuple[uuid.UUID, ...]
    tokens: tuple[Token, ...]
    refusals: tuple[Refusal, ...]


class FilledJob(Struct, frozen=True):
    """An FTS job with tokens in it, `None` if every file was refused, and the token for FTS."""

    request_id: uuid.UUID
    job: dict[str, Any] | None
    bearer: Token | None
    refused: tuple[dict[str, Any], ...]
    dropped_sources: tuple[dict[str, Any], ...]

    def __repr__(self) -> str:
        """Count the files without showing their tokens."""
        files = len(self.job["files"]) if self.job else 0
        return f"<FilledJob {self.request_id}: {files} files, {len(self.refused)} refused>"


Progress = Callable[[int, int], None]


class MinterClient:
    """A connection to the engine's broker; not for use by several threads at once.

    `client` is the name that the operators registered; on RabbitMQ it is the AMQP user of the URL.
    """

    def __init__(
        self,
        broker_url: str,
        client: str | None = None,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        ssl: Mapping[str, Any] | bool = False,
        window: int = 64,
    ) -> None:
        user = unquote(urlsplit(broker_url).username or "")
        self.client = client or user
        if not self.client:
            raise InvalidRequest("no client: name it, or put the AMQP user into the broker URL")
        self.timeout_seconds = timeout_seconds
        self.window = window
        self._user_id = user or None
        self._connection = kombu.Connection(broker_url, ssl=ssl, connect_timeout=5)
        self._publisher = Publisher(self._connection)
        self._consumer: kombu.Consumer | None = None
        self._reply_to = ""
        self._parts: dict[str, dict[int, Answer]] = {}
        self._answers: dict[str, Answer] = {}
        self._expected: set[str] = set()

    def __repr__(self) -> str:
        """Name the client; the URL may hold a password."""
        return f"<MinterClient {self.client}>"

    def __enter__(self) -> Self:
        """Connect at the first request."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; the reply queue goes with it."""
        if self._consumer is not None:
            with suppress(*self._publisher.errors):  # the queue goes with the connection anyway
                self._consumer.cancel()
        self._consumer = None
        self._publisher.close()

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def mint(
        self,
        files: Sequence[FileRequest],
        *,
        request_id: uuid.UUID | None = None,
        **options: Any,
    ) -> MintResult:
        """Return tokens for up to 2 000 files in one request.

        `options` are those of `MintRequest`: vo, activity, on_behalf_of, all_or_nothing,
        lifetime_seconds. Raises RequestError if the request is refused whole, Unavailable if the
        engine cannot answer in time; then the same `request_id` may be sent again.
        """
        request = MintRequest(request_id=request_id or new_request_id(), files=tuple(files), **options)
        (answer,) = self.ask(MINT, [request])
        return _result([request], [answer])

    def mint_many(
        self,
        files: Iterable[FileRequest],
        *,
        chunk: int = 100,
        progress: Progress | None = None,
        **options: Any,
    ) -> MintResult:
        """Return tokens for any number of files, in requests of `chunk` files (at most 2 000).

        `progress` is called with the number of files done and the number known. A request that is
        refused whole refuses its files: they are in `refusals`, the other requests go on.
        """
        if not 1 <= chunk <= MAX_FILES:
            raise InvalidRequest(f"chunk {chunk} is out of bounds, expected 1 to {MAX_FILES}")
        requests = [
            MintRequest(request_id=new_request_id(), files=group, **options)
            for group in _chunks(files, chunk)
        ]
        total = sum(len(r.files) for r in requests)
        done = 0
        answers: list[Answer] = []
        for request, answer in zip(requests, self.ask(MINT, requests), strict=True):
            answers.append(answer)
            done += len(request.files)
            if progress is not None:
                progress(done, total)
        return _result(requests, answers, whole=False)

    def fill_job(
        self,
        job: Mapping[str, Any],
        *,
        request_id: uuid.UUID | None = None,
        fts: str | None = None,
        **options: Any,
    ) -> FilledJob:
        """Return an FTS job filled with tokens, and the bearer token to submit it with."""
        (filled,) = self.fill_jobs(
            [job], request_ids=[request_id] if request_id else None, fts=fts, **options
        )
        if isinstance(filled, MinterError):
            raise filled
        return filled

    def fill_jobs(
        self,
        jobs: Sequence[Mapping[str, Any]],
        *,
        request_ids: Sequence[uuid.UUID] | None = None,
        fts: str | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list["FilledJob | MinterError"]:
        """Fill many jobs, several under way at once; a job refused whole gives its error."""
        ids = request_ids or [new_request_id() for _ in jobs]
        requests = [
            FillRequest(request_id=i, job=dict(job), fts=fts, **options)
            for i, job in zip(ids, jobs, strict=True)
        ]
        filled: list[FilledJob | MinterError] = []
        for request, answer in zip(requests, self.ask(FILL_JOB, requests), strict=True):
            filled.append(
                from_dict(answer.error)
                if answer.error
                else FilledJob(
                    request.request_id,
                    answer.job,
                    Token(answer.bearer) if answer.bearer else None,
                    tuple(answer.refused),
                    tuple(answer.dropped_sources),
                )
            )
            if progress is not None:
                progress(len(filled), len(requests))
        return filled

    # ── the wire ─────────────────────────────────────────────────────────────────────────────

    def ask(self, task: str, requests: Sequence[MintRequest | FillRequest]) -> Iterator[Answer]:
        """Send requests, `window` of them under way at once, and yield their answers in order.

        A lost connection is made again and what has no answer is sent again, under the same ids.
        Raises Unavailable when nothing arrived for `timeout_seconds`.
        """
        waiting: dict[str, Outgoing] = {}
        numbered = [(str(number), request) for number, request in enumerate(requests)]
        salt = uuid.uuid4().hex
        unsent = iter(numbered)
        for number, _ in numbered:
            correlation_id = f"{salt}.{number}"
            last_news = time.monotonic()
            resend_after = FIRST_RESEND_SECONDS
            while correlation_id not in self._answers:
                try:
                    self._connect(waiting)
                    fresh = [
                        self._message(task, f"{salt}.{n}", r)
                        for n, r in islice(unsent, max(0, self.window - len(waiting)))
                    ]
                    self._expected.update(str(m.properties["correlation_id"]) for m in fresh)
                    waiting |= {str(m.properties["correlation_id"]): m for m in fresh}
                    if fresh and (lost := self._publisher.publish(fresh)):
                        raise Unavailable(
                            f"the broker has no queue behind {lost[0].exchange}; is the engine set up?"
                        )
                    if not self._publisher.confirms and time.monotonic() - last_news > resend_after:
                        resend_after *= 2
                        self._publisher.publish(waiting.values())
                    before = len(self._answers)
                    if correlation_id not in self._answers:
                        self._connection.drain_events(timeout=1.0)
                    if len(self._answers) != before:
                        last_news = time.monotonic()
                        resend_after = FIRST_RESEND_SECONDS
                except TimeoutError:
                    pass
                except self._publisher.errors as error:
                    self._consumer = None
                    self._publisher.close()
                    self._check_time(last_news, error)
                    time.sleep(RECONNECT_SECONDS)
                self._check_time(last_news, None)
                for answered in [c for c in waiting if c in self._answers]:
                    del waiting[answered]
            self._expected.discard(correlation_id)
            yield self._answers.pop(correlation_id)

    def _check_time(self, since: float, error: Exception | None) -> None:
        if time.monotonic() - since > self.timeout_seconds:
            raise Unavailable(
                f"no answer within {self.timeout_seconds:.0f} s; the same request_id may be sent again"
            ) from error

    def _connect(self, waiting: Mapping[str, Outgoing]) -> None:
        """Make sure that there is a reply queue; after a loss, send again what has no answer."""
        if self._consumer is not None and self._connection.connected:
            return
        self._publisher.close()
        self._connection.connect()
        self._reply_to = f"{reply_prefix(self.client)}{uuid.uuid4().hex}"
        channel = self._connection.channel()
        queue = kombu.Queue(self._reply_to, channel=channel, durable=False, exclusive=True, auto_delete=True)
        consumer = kombu.Consumer(channel, [queue], on_message=self._receive, no_ack=True)
        consumer.consume()
        self._consumer = consumer
        again = list(waiting.values())
        for message in again:
            message.properties = {**message.properties, "reply_to": self._reply_to}
        if again:
            self._publisher.publish(again)

    def _message(self, task: str, correlation_id: str, request: MintRequest | FillRequest) -> Outgoing:
        properties = {"reply_to": self._reply_to, "correlation_id": correlation_id}
        if self._user_id:
            properties["user_id"] = self._user_id
        body = msgspec.json.encode([[request], {}, {}])
        headers = {"task": task, "id": correlation_id, "lang": "py", "argsrepr": "", "kwargsrepr": ""}
        return Outgoing(body, REQUEST_QUEUE, REQUEST_EXCHANGE, properties, headers, persistent=True)

    def _receive(self, message: Any) -> None:
        body = message.body if isinstance(message.body, bytes) else message.body.encode()
        correlation_id = message.properties.get("correlation_id") or ""
        if correlation_id not in self._expected:
            return  # a second answer to what was sent twice
        answer = _envelope.decode(body).result
        if answer.parts > 1:
            arrived = self._parts.setdefault(correlation_id, {})
            arrived[answer.part] = answer
            if len(arrived) < answer.parts:
                return
            del self._parts[correlation_id]
            answer = structs.replace(
                answer,
                tokens=[t for a in arrived.values() for t in a.tokens],
                refusals=[r for a in arrived.values() for r in a.refusals],
            )
        self._answers[correlation_id] = answer


class _Envelope(Struct):
    result: Answer


_envelope = msgspec.json.Decoder(_Envelope)


def _chunks(files: Iterable[FileRequest], size: int) -> Iterator[tuple[FileRequest, ...]]:
    remaining = iter(files)
    while group := tuple(islice(remaining, size)):
        yield group


def _result(requests: Sequence[MintRequest], answers: Sequence[Answer], *, whole: bool = True) -> MintResult:
    tokens: list[Token] = []
    refusals: list[Refusal] = []
    first = 0
    for request, answer in zip(requests, answers, strict=True):
        if answer.error is not None:
            error = from_dict(answer.error)
            if whole:
                raise error
            refusals += [Refusal(first + n, "request", -1, error) for n in range(len(request.files))]
        tokens += sorted((Token(t, first) for t in answer.tokens), key=lambda t: (t.file, t.side, t.index))
        refusals += [Refusal(r.file + first, r.side, r.index, from_dict(r.error)) for r in answer.refusals]
        first += len(request.files)
    return MintResult(tuple(r.request_id for r in requests), tuple(tokens), tuple(refusals))
