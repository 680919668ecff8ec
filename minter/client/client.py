"""The Python client: tokens for files, over HTTP or AMQP.

    with MinterClient("https://tokens.example.org/atlas/", "rucio-prod", secret) as minter:
        result = minter.mint([FileRequest(sources=(url,), destinations=(other,), size=10**9)])
        for token in result.tokens:
            send(token.side, token.reveal())

A request keeps its `request_id` through every retry, so asking twice gives the same tokens. All
errors belong to the tree in `minter.errors`: the refusal of one file is in `result.refusals`, and a
request refused as a whole raises its error.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import uuid_utils
from msgspec import Struct

from minter.client.http import HttpTransport
from minter.client.results import (
    Changed,
    FilledJob,
    MintResult,
    SignedURL,
    Token,
    minted,
    shifted,
    whole_result,
)
from minter.contract.followups import (
    CancelRequest,
    FetchRequest,
    FileReport,
    JobReport,
    RenewRequest,
    ReportRequest,
)
from minter.contract.messages import (
    MAX_FILES,
    MAX_NEEDS,
    Answer,
    FileRequest,
    FillRequest,
    MintRequest,
    URLsRequest,
)
from minter.contract.names import CANCEL, FETCH, FILL_JOB, MINT, RENEW, REPORT, URLS
from minter.errors import InvalidRequest, MinterError, SettingsError, Unavailable, from_dict

DEFAULT_TIMEOUT_SECONDS = 60.0
PENDING_POLL_SECONDS = 0.2


def new_request_id() -> uuid.UUID:
    """Return a fresh request_id (UUIDv7); keep it to repeat the request."""
    return uuid.UUID(int=uuid_utils.uuid7().int)


Progress = Callable[[int, int], None]


class Transport(Protocol):
    """Carries requests to the engine and answers back; a request that is repeated keeps its id."""

    client: str

    def ask(self, task: str, requests: Sequence[Struct]) -> Iterator[Answer]:
        """Send the requests, and yield their answers in order."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class MinterClient:
    """A connection to the engine; over AMQP not for use by several threads at once.

    `url` is the issuer's (`https://host/vo/`), or a broker's (`amqps://…`). `client` and `secret` are those
    that operators registered; either may be in the URL instead, and for a broker the URL must hold the
    password. On RabbitMQ the client is the AMQP user. `ca` is the file or hashed directory (such as
    /etc/grid-security/certificates) that the server's certificate is verified with; None means the system's
    CAs. At most `window` requests are under way at once.
    """

    def __init__(
        self,
        url: str,
        client: str | None = None,
        secret: str | None = None,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        ca: str | None = None,
        window: int = 64,
    ) -> None:
        self._transport = _transport(
            url, client, secret, timeout_seconds=timeout_seconds, ca=ca, window=window
        )
        self.client = self._transport.client
        self._timeout_seconds = timeout_seconds

    def __repr__(self) -> str:
        """Name the client; the URL may hold a password."""
        return f"<MinterClient {self.client}>"

    def __enter__(self) -> Self:
        """Return the client, which connects at the first request."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; over AMQP this deletes the reply queue."""
        self._transport.close()

    def ask(self, task: str, requests: Sequence[Struct]) -> Iterator[Answer]:
        """Send structs of `minter.contract`, several under way at once; yield their answers in order."""
        return self._transport.ask(task, requests)

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
        lifetime_seconds, subject_token (over HTTP) and consumer (another client, which may fetch the
        tokens that a provider signs). Raises RequestError if the request is refused as a whole, Unavailable
        if the engine does not answer in time; then the same `request_id` may be sent again.
        """
        request = MintRequest(request_id=request_id or new_request_id(), files=tuple(files), **options)
        (answer,) = self.ask(MINT, [request])
        return whole_result([request], [answer])

    def mint_many(
        self,
        files: Iterable[FileRequest],
        *,
        chunk: int = 100,
        progress: Progress | None = None,
        **options: Any,
    ) -> MintResult:
        """Return tokens for any number of files, in requests of `chunk` files (at most 2 000).

        `progress` is called with the number of files done and the number of all files. If a request is
        refused as a whole, each of its files is in `refusals`, and the other requests go on.
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
        return whole_result(requests, answers, whole=False)

    def fill_job(
        self,
        job: Mapping[str, Any],
        *,
        request_id: uuid.UUID | None = None,
        fts: str | None = None,
        **options: Any,
    ) -> FilledJob:
        """Return an FTS job filled with tokens, and the bearer token to submit it with.

        The call waits for pending tokens of providers. Raises Unavailable if some are still pending after
        the client's timeout; then the same `request_id` may be sent again.
        """
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
        """Fill many jobs, several under way at once; a job that is refused as a whole gives its error."""
        ids = request_ids or [new_request_id() for _ in jobs]
        requests = [
            FillRequest(request_id=i, job=dict(job), fts=fts, **options)
            for i, job in zip(ids, jobs, strict=True)
        ]
        filled: list[FilledJob | MinterError] = []
        for request, first in zip(requests, self.ask(FILL_JOB, requests), strict=True):
            answer = self._complete(request, first)
            filled.append(
                from_dict(answer.error)
                if answer.error
                else FilledJob(
                    request.request_id,
                    answer.job,
                    Token(answer.bearer) if answer.bearer else None,
                    tuple(answer.refused),
                    tuple(answer.dropped_sources),
                    tuple(answer.notes),
                )
            )
            if progress is not None:
                progress(len(filled), len(requests))
        return filled

    def sign_url(
        self, url: str, lifetime_seconds: int = 3600, *, request_id: uuid.UUID | None = None, **options: Any
    ) -> SignedURL:
        """Return a URL with which anybody may read this one file for a time, at most 6 hours.

        Of a directory it reads all that is below. A route with `via = "url"` must allow it. `options` are
        those of `URLsRequest`: vo, activity and on_behalf_of. Raises OperationNotAllowed for tape and for
        storages whose URLs must hold no tokens. For many URLs, send `URLsRequest`s by `ask(URLS, …)`.
        """
        wanted = URLsRequest(
            request_id=request_id or new_request_id(),
            urls=(url,),
            lifetime_seconds=lifetime_seconds,
            **options,
        )
        answer = self._one(URLS, wanted)
        for refused in answer.refusals:
            raise from_dict(refused.error)
        return SignedURL(answer.urls[0], answer.notes)

    def _complete(self, request: FillRequest, answer: Answer) -> Answer:
        """Repeat a request until none of its tokens is pending, or the client's timeout has passed."""
        until = time.monotonic() + self._timeout_seconds
        while answer.pending:
            if time.monotonic() > until:
                error = Unavailable(f"{len(answer.pending)} tokens of providers are still pending; ask again")
                return Answer(request_id=answer.request_id, error=error.as_dict())
            time.sleep(PENDING_POLL_SECONDS)
            (answer,) = self.ask(FILL_JOB, [request])
        return answer

    # ── earlier requests ─────────────────────────────────────────────────────────────────────

    def renew(
        self,
        renews: uuid.UUID,
        *,
        files: Sequence[int] = (),
        wait_seconds: int | None = None,
        request_id: uuid.UUID | None = None,
        **fields: Any,
    ) -> MintResult:
        """Return new tokens to submit files of the earlier request `renews` again.

        `files` are numbers of files in that request; none means all. Every token is decided again, with
        the old token's lifetime, or for a file that waits `wait_seconds`. `fields` are `subject_token` (over
        HTTP; a fresh one if the old one was exchanged) and `consumer` (to name another one).
        """
        request = RenewRequest(
            request_id=request_id or new_request_id(),
            renews=renews,
            files=tuple(files),
            wait_seconds=wait_seconds,
            **fields,
        )
        return minted(request.request_id, self._one(RENEW, request))

    def fetch(self, request_id: uuid.UUID | None = None, *, handles: Sequence[str] = ()) -> MintResult:
        """Return the tokens of an earlier request, byte for byte, while they are of use.

        Of a token that a provider signs, the current one is returned. By `handles`, the consumer that the
        request named fetches such tokens; a handle that is unknown, or not for this client, is left out.
        Raises UnknownRequest, or Expired with an offer to renew.
        """
        if request_id is None:
            wanted = FetchRequest(handles=tuple(map(uuid.UUID, handles)))
            return minted(None, self._one(FETCH, wanted))
        return minted(request_id, self._one(FETCH, FetchRequest(request_id)))

    def report(self, files: Sequence[FileReport] = (), *, jobs: Sequence[JobReport] = ()) -> Changed:
        """Report files that became active or finished, and submitted FTS jobs; may be repeated."""
        changed, unknown = 0, []
        for start in range(0, max(len(files), len(jobs), 1), MAX_FILES):
            end = start + MAX_FILES
            answer = self._one(REPORT, ReportRequest(tuple(jobs[start:end]), tuple(files[start:end])))
            changed += answer.changed
            unknown += [shifted(where, start) for where in answer.unknown]
        return Changed(changed, tuple(unknown), ())

    def cancel(
        self,
        request_id: uuid.UUID | None = None,
        *,
        files: Sequence[int] = (),
        external_ids: Sequence[str] = (),
    ) -> Changed:
        """Cancel tokens of a request, or of files by external_id, that are no longer needed.

        Cancelled tokens are not given again; `alive` lists those that still work until they expire.
        """
        answer = self._one(CANCEL, CancelRequest(request_id, tuple(files), tuple(external_ids)))
        return Changed(answer.changed, tuple(answer.unknown), tuple(answer.alive))

    def trace(
        self,
        *,
        request_id: uuid.UUID | None = None,
        external_id: str | None = None,
        path: str | None = None,
        jti: uuid.UUID | None = None,
    ) -> list[dict[str, Any]]:
        """Return the traces of this client's tokens, found by one of the four arguments; HTTP only."""
        if not isinstance(self._transport, HttpTransport):
            raise InvalidRequest("a trace is asked for over HTTP; connect to the issuer's URL")
        asked = {"request_id": request_id, "external_id": external_id, "path": path, "jti": jti}
        return self._transport.trace({name: str(value) for name, value in asked.items() if value is not None})

    def _one(self, task: str, request: Struct) -> Answer:
        (answer,) = self.ask(task, [request])
        if answer.error is not None:
            raise from_dict(answer.error)
        return answer


def _transport(url: str, client: str | None, secret: str | None, **options: Any) -> Transport:
    if url.startswith(("https:", "http:")):
        return HttpTransport(url, client, secret, **options)
    if secret is not None:
        raise InvalidRequest("`secret` is for HTTP only; put the broker's password into its URL")
    try:
        from minter.client.amqp import AmqpTransport  # noqa: PLC0415 - kombu is an extra
    except ImportError as error:
        raise SettingsError("AMQP needs kombu; run: pip install 'gridminter[amqp]'") from error
    return AmqpTransport(url, client, **options)


def _chunks(files: Iterable[FileRequest], size: int) -> Iterator[tuple[FileRequest, ...]]:
    """Yield groups of at most `size` files and MAX_NEEDS sources, destinations and operations."""
    group: list[FileRequest] = []
    needs = 0
    for file in files:
        own = len(file.sources) + len(file.destinations) + len(file.operations)
        if group and (len(group) == size or needs + own > MAX_NEEDS):
            yield tuple(group)
            group, needs = [], 0
        group.append(file)
        needs += own
    if group:
        yield tuple(group)
