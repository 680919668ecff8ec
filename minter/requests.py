"""Requests: what clients send, as typed structs, and the one frozen form that is decided on.

`MintRequest` and `FillRequest` are the contract (schemas/*.json are generated from them). Both
become a `Request` of `File`s with one `Need` for each token. An FTS job is filled by `fill_job`.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, structs

from minter.dialects import Operation
from minter.errors import InvalidRequest, RequestError
from minter.wishes import SubjectToken, Wish

MAX_FILES = 2_000
"""Files in one request; the client library splits larger ones."""
MAX_BODY_BYTES = 8 * 1024 * 1024
"""A larger message is refused before it is decoded; answers go out in parts of this size."""
MAX_SOURCES = 64
MAX_SECONDS = 400 * 24 * 3600
"""Bound of every duration in a request: the profile's longest refresh token (§4.3.1)."""
MAX_AHEAD_SECONDS = 5 * 60
"""How far a request_id may lie in the future."""

SEVERAL = "(several)"
"""The recorded activity of a request whose files have different ones."""
Name = Annotated[str, Meta(min_length=1, max_length=255)]
Token = Annotated[str, Meta(min_length=1, max_length=16_384)]
Url = Annotated[str, Meta(min_length=1, max_length=8_192)]
Seconds = Annotated[int, Meta(ge=0, le=MAX_SECONDS)]
MAX_BYTES = 2**63 - 1
Bytes = Annotated[int, Meta(ge=0, le=MAX_BYTES)]
Side = Literal["source", "destination", "operation", "service"]


def unix_time(uuid7: UUID) -> float:
    """Return the seconds since the epoch that a UUIDv7 holds (RFC 9562 §5.7)."""
    return (uuid7.int >> 80) / 1000


class FileOperation(Struct, frozen=True, forbid_unknown_fields=True):
    """One operation outside a copy; `download` and `upload` are a client's words for read, write."""

    operation: Operation | Literal["download", "upload"]
    url: Url


class FileRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """One file: copy it from any of `sources` to each of `destinations`, and other operations.

    `size` is in bytes. `wait_seconds` is how long it may wait before the copy starts,
    `transfer_seconds` how long the copy may take (else from the size and the route's rate).
    """

    sources: Annotated[tuple[Url, ...], Meta(max_length=MAX_SOURCES)] = ()
    destinations: Annotated[tuple[Url, ...], Meta(max_length=MAX_SOURCES)] = ()
    operations: Annotated[tuple[FileOperation, ...], Meta(max_length=MAX_SOURCES)] = ()
    size: Bytes | None = None
    overwrite: bool = False
    retry: bool = False
    wait_seconds: Seconds | None = None
    transfer_seconds: Seconds | None = None
    external_id: Annotated[str, Meta(max_length=255)] = ""


class MintRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`minter.mint`: a token for each source, destination and operation of each file."""

    request_id: UUID
    files: Annotated[tuple[FileRequest, ...], Meta(min_length=1, max_length=MAX_FILES)]
    vo: Name | None = None
    client: Name | None = None
    on_behalf_of: Annotated[str, Meta(max_length=255)] = ""
    activity: Annotated[str, Meta(max_length=255)] = ""
    all_or_nothing: bool = False
    lifetime_seconds: Seconds | None = None
    reply_queue: Name | None = None
    subject_token: Token | UnsetType = UNSET
    consumer: Name | UnsetType = UNSET

    def __repr__(self) -> str:
        """Count the files: a subject token is not to be shown."""
        return f"MintRequest({self.request_id}, {len(self.files)} files)"


class FillRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`minter.fill_job`: an FTS job, as Rucio or DIRAC would POST it, filled with tokens.

    `fts` is the URL that the job will be sent to; without it, the issuer's first FTS.
    """

    request_id: UUID
    job: dict[str, Any]
    vo: Name | None = None
    client: Name | None = None
    fts: Url | None = None
    on_behalf_of: Annotated[str, Meta(max_length=255)] = ""
    all_or_nothing: bool = False
    reply_queue: Name | None = None
    subject_token: Token | UnsetType = UNSET
    consumer: Name | UnsetType = UNSET

    def __repr__(self) -> str:
        """Name the request: a subject token is not to be shown."""
        return f"FillRequest({self.request_id})"


class Need(Struct, frozen=True, gc=False):
    """What one token is for. `one_token`: the grant cannot be split over several tokens.

    `life_seconds` is the life of the token that it renews, which is asked for again.
    """

    file: int
    side: Side
    index: int
    url: str
    operations: tuple[Operation, ...]
    wait_seconds: int | None = None
    after_seconds: int = 0
    one_token: bool = False
    life_seconds: int | None = None


class File(Struct, frozen=True):
    """One file of a request in the frozen form."""

    needs: tuple[Need, ...]
    size: int | None = None
    retries: int = 0
    transfer_seconds: int | None = None
    activity: str = ""
    external_id: str = ""


class Request(Struct, frozen=True):
    """One submission, native or an FTS job, in the form that is decided on.

    `subject` is a token to exchange at a provider, `consumer` another client that may fetch what it gives;
    `routes`, if there are any, are the only ones that may be taken.
    """

    request_id: UUID
    kind: Literal["mint", "fill_job", "renew", "token", "exchange", "refresh"]
    digest: bytes
    files: tuple[File, ...]
    vo: str | None = None
    client: str | None = None
    on_behalf_of: str = ""
    activity: str = ""
    all_or_nothing: bool = False
    lifetime_seconds: int | None = None
    reply_queue: str | None = None
    service: Need | None = None
    via_fts: bool = False
    job: Mapping[str, Any] | None = None
    renews: UUID | None = None
    wish: Wish | None = None
    subject: SubjectToken | None = None
    consumer: str = ""
    routes: tuple[str, ...] = ()

    @property
    def unix_time(self) -> float:
        """Seconds since the epoch, as the client wrote them into the request_id."""
        return unix_time(self.request_id)


_mint_decoder = msgspec.json.Decoder(MintRequest)
_fill_decoder = msgspec.json.Decoder(FillRequest)


def decode_mint(body: bytes | msgspec.Raw) -> Request:
    """Decode a `minter.mint` argument; raises InvalidRequest with the place of the fault."""
    return from_mint(decode(_mint_decoder, body))


def decode_fill(body: bytes | msgspec.Raw) -> Request:
    """Decode a `minter.fill_job` argument; raises InvalidRequest with the place of the fault."""
    return from_fill(decode(_fill_decoder, body))


def decode(decoder: "msgspec.json.Decoder[Any]", body: bytes | msgspec.Raw) -> Any:
    """Decode what a client sent; raises InvalidRequest with the place of the fault."""
    if len(body) > MAX_BODY_BYTES:
        raise InvalidRequest(
            f"request of {len(body)} bytes is too large, expected at most {MAX_BODY_BYTES}; split it"
        )
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # msgspec names the place and the expectation, and of the value only enum words.
        raise InvalidRequest(f"request does not follow its schema: {error}"[:400]) from None


def content_digest(request: Struct) -> bytes:
    """Return the digest by which an equal request is known again (I4)."""
    if getattr(request, "subject_token", UNSET) is not UNSET:  # a credential, which may be a fresh one
        request = structs.replace(request, subject_token=UNSET)
    return sha256(msgspec.json.encode(request, order="deterministic")).digest()


def check_request_id(request: Request, now: float, retention_seconds: int) -> None:
    """Raise InvalidRequest unless the request_id is a UUIDv7 of an acceptable time."""
    if request.request_id.version != 7:  # noqa: PLR2004 - the version that is meant
        raise InvalidRequest(
            "request_id is not a UUIDv7 (RFC 9562 §5.7); make it from the time of the request"
        )
    age = now - request.unix_time
    if age > retention_seconds:
        raise InvalidRequest(
            f"request_id is {age / 86400:.1f} days old, expected at most "
            f"{retention_seconds / 86400:.0f}; use a new one"
        )
    if age < -MAX_AHEAD_SECONDS:
        raise InvalidRequest(
            f"request_id lies {-age:.0f} s in the future, expected at most {MAX_AHEAD_SECONDS}; "
            "check the clock"
        )


def from_mint(wire: MintRequest) -> Request:
    """Bring a native request into the frozen form."""
    return Request(
        request_id=wire.request_id,
        kind="mint",
        digest=content_digest(wire),
        files=tuple(_native_file(i, f) for i, f in enumerate(wire.files)),
        vo=wire.vo,
        client=wire.client,
        on_behalf_of=wire.on_behalf_of,
        activity=wire.activity,
        all_or_nothing=wire.all_or_nothing,
        lifetime_seconds=wire.lifetime_seconds,
        reply_queue=wire.reply_queue,
        subject=subject_of(wire.subject_token),
        consumer=wire.consumer or "",
    )


def subject_of(token: str | UnsetType) -> SubjectToken | None:
    """Return a subject token that came with a request, not verified yet."""
    return SubjectToken(token) if isinstance(token, str) else None


def _native_file(number: int, file: FileRequest) -> File:
    wait = file.wait_seconds
    put: Operation = "overwrite" if file.overwrite else "write"
    write: tuple[Operation, ...] = (put, "retry") if file.retry else (put,)
    words: dict[str, tuple[Operation, ...]] = {"download": ("read",), "upload": write}
    if not (file.sources or file.destinations or file.operations):
        raise InvalidRequest(f"file names no source, destination or operation - at `$.files[{number}]`")
    needs = [Need(number, "source", i, url, ("read",), wait) for i, url in enumerate(file.sources)]
    needs += [Need(number, "destination", i, url, write, wait) for i, url in enumerate(file.destinations)]
    needs += [
        Need(number, "operation", i, o.url, words.get(o.operation, (o.operation,)), wait)  # type: ignore[arg-type]
        for i, o in enumerate(file.operations)
    ]
    return File(tuple(needs), file.size, int(file.retry), file.transfer_seconds, "", file.external_id)


# ── FTS jobs ─────────────────────────────────────────────────────────────────────────────────

_Number = int | str | None


class JobFile(Struct, frozen=True):
    """What of a job's file decides its tokens; all else is passed through untouched."""

    sources: Annotated[tuple[Url, ...], Meta(min_length=1, max_length=MAX_SOURCES)]
    destinations: Annotated[tuple[Url, ...], Meta(min_length=1, max_length=MAX_SOURCES)]
    filesize: float | int | None = None
    activity: Annotated[str, Meta(max_length=255)] | None = None
    metadata: Any = None


class JobParams(Struct, frozen=True):
    """What of a job's params decides its tokens. `max_time_in_queue` is in hours, or has a unit."""

    overwrite: bool | None = None
    overwrite_when_only_on_disk: bool | None = None
    overwrite_hop: bool | None = None
    multihop: bool | None = None
    retry: _Number = None
    max_time_in_queue: _Number = None
    bring_online: _Number = None
    copy_pin_lifetime: _Number = None
    archive_timeout: _Number = None
    account: Annotated[str, Meta(max_length=255)] | None = None


class Job(Struct, frozen=True):
    """An FTS job (POST /jobs) as far as tokens are concerned."""

    files: Annotated[tuple[JobFile, ...], Meta(min_length=1, max_length=MAX_FILES)]
    params: JobParams | None = None


_UNITS = {"s": 1, "m": 60, "h": 3600}


def _seconds(value: _Number, name: str, unit_seconds: int = 1) -> int:
    """Read one of FTS's durations: a number in the field's unit, or text that may end in s, m, h."""
    if value is None or value == "":
        return 0
    text = str(value).strip()
    unit = _UNITS.get(text[-1:].lower())
    digits = text[:-1] if unit else text
    try:
        seconds = int(digits) * (unit or unit_seconds)
    except ValueError:
        raise InvalidRequest(f"{value!r} is not a duration - at `$.job.params.{name}`") from None
    if seconds > MAX_SECONDS:
        raise InvalidRequest(f"{value!r} is longer than {MAX_SECONDS} s - at `$.job.params.{name}`")
    return max(seconds, 0)  # FTS writes -1 for "not set"


def from_fill(wire: FillRequest) -> Request:
    """Bring an FTS job into the frozen form; raises InvalidRequest with the place of the fault."""
    try:
        job = msgspec.convert(wire.job, Job)
    except msgspec.ValidationError as error:
        where = str(error).replace("`$", "`$.job")
        raise InvalidRequest(f"job does not follow FTS's form: {where}"[:400]) from None
    params = job.params or JobParams()
    multihop = bool(params.multihop)
    return Request(
        request_id=wire.request_id,
        kind="fill_job",
        digest=content_digest(wire),
        files=tuple(_job_file(i, f, params, len(job.files)) for i, f in enumerate(job.files)),
        vo=wire.vo,
        client=wire.client,
        on_behalf_of=wire.on_behalf_of or params.account or "",
        all_or_nothing=wire.all_or_nothing or multihop,
        reply_queue=wire.reply_queue,
        service=Need(-1, "service", 0, wire.fts or "", ()),
        via_fts=True,
        job=wire.job,
        subject=subject_of(wire.subject_token),
        consumer=wire.consumer or "",
    )


def _overwrites(params: JobParams, number: int, files: int) -> bool:
    """Say whether a file's destination may be overwritten, in FTS's three ways of asking for it.

    `overwrite`; `overwrite_when_only_on_disk` (a tape file that is not on tape yet); and
    `overwrite_hop`, which means every hop of a chain but the last.
    """
    is_hop = bool(params.multihop) and number < files - 1
    return bool(params.overwrite or params.overwrite_when_only_on_disk or (params.overwrite_hop and is_hop))


def _job_file(number: int, file: JobFile, params: JobParams, files: int) -> File:
    metadata = file.metadata if isinstance(file.metadata, dict) else {}
    staged = _seconds(params.bring_online, "bring_online")
    stages = staged > 0 or _seconds(params.copy_pin_lifetime, "copy_pin_lifetime") > 0
    archive = _seconds(params.archive_timeout, "archive_timeout")
    wait = _seconds(params.max_time_in_queue, "max_time_in_queue", 3600) or None
    retries = min(_seconds(params.retry, "retry"), 100)

    # FTS has one token slot for each URL, so a slot's token carries all that FTS does with it.
    source: tuple[Operation, ...] = ("read",)
    destination: tuple[Operation, ...] = ("overwrite" if _overwrites(params, number, files) else "write",)
    if stages:
        source = ("read", "stage", "poll")
    if retries:
        destination += ("retry",)
    last = not params.multihop or number == files - 1
    if archive and last:
        destination += ("poll",)
    if stages and file.sources == file.destinations:  # FTS's way of saying "only bring online", Rucio STAGEIN
        source = destination = ("stage", "poll")

    after = archive if last else 0
    needs = [Need(number, "source", i, url, source, wait, staged, True) for i, url in enumerate(file.sources)]
    needs += [
        Need(number, "destination", i, url, destination, wait, staged + after, True)
        for i, url in enumerate(file.destinations)
    ]
    external_id = metadata.get("request_id")
    size = file.filesize
    return File(
        needs=tuple(needs),
        size=int(size) if size and 0 < size <= MAX_BYTES else None,
        # A later hop starts when the ones before it, of the same file, are done.
        retries=(1 + retries) * (1 + number) - 1 if params.multihop else retries,
        activity=file.activity or "",
        external_id=external_id[:255] if isinstance(external_id, str) else "",
    )


def fill_job(
    job: Mapping[str, Any],
    tokens: Mapping[tuple[int, str, int], str],
    refused: Iterable[int],
    max_time_in_queue: int,
) -> dict[str, Any] | None:
    """Return the job with `tokens` (by file, side, index) in their slots; None if no file is left.

    Refused files are left out, and so are sources and destinations without a token. Tokens that
    the job held before are replaced. `max_time_in_queue` is in hours.
    """
    left_out = frozenset(refused)
    files = [
        _fill_file(number, file, tokens) for number, file in enumerate(job["files"]) if number not in left_out
    ]
    if not files:
        return None
    params = {
        **(job.get("params") or {}),
        "unmanaged_tokens": True,
        "max_time_in_queue": max_time_in_queue,
    }
    return {**job, "files": files, "params": params}


def _fill_file(
    number: int, file: Mapping[str, Any], tokens: Mapping[tuple[int, str, int], str]
) -> dict[str, Any]:
    filled = dict(file)
    for side in ("source", "destination"):
        urls: Sequence[str] = file[f"{side}s"]
        kept = [i for i in range(len(urls)) if (number, side, i) in tokens]
        filled[f"{side}s"] = [urls[i] for i in kept]
        filled[f"{side}_tokens"] = [tokens[number, side, i] for i in kept]
    return filled


class TokenAnswer(Struct, frozen=True):
    """One token of an answer; `token` is the only secret in it. `exp` is a NumericDate.

    One of a provider has a `handle`, by which the one that follows it is fetched.
    """

    file: int
    side: Side
    index: int
    storage: str
    scope: str
    jti: str
    exp: int
    token: str
    handle: str = ""

    def __repr__(self) -> str:
        """Name the token without showing it."""
        return f"TokenAnswer({self.jti}, file={self.file}, {self.side}[{self.index}])"


class AwaitedToken(Struct, frozen=True):
    """A provider's token that is not there yet: to be fetched by its handle, which is no secret."""

    file: int
    side: Side
    index: int
    storage: str
    scope: str
    handle: str


class RefusedNeed(Struct, frozen=True):
    """One refusal, with the need that it refuses; file and index are -1 for the whole request."""

    file: int
    side: Side | Literal["request"]
    index: int
    error: dict[str, Any]


class Alive(Struct, frozen=True):
    """A cancelled token that works until it expires; `exp` is a NumericDate."""

    jti: str
    storage: str
    exp: int


class Answer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to every task (schemas/answer.json).

    `error` is set when the whole request is refused. `awaited` are tokens of providers that are not there
    yet; a job with any of them is filled when the same request is sent again. `job`, `refused` and
    `bearer` come with a filled job. `changed` counts the tokens that a report or a cancellation changed,
    `unknown` has the places of what it named and nobody knows, `alive` what works on. A large answer
    comes in `parts` messages, numbered from 0 by `part`.
    """

    request_id: str | None = None
    tokens: list[TokenAnswer] = []
    awaited: list[AwaitedToken] = []
    refusals: list[RefusedNeed] = []
    error: dict[str, Any] | None = None
    job: dict[str, Any] | None = None
    refused: list[dict[str, Any]] = []
    dropped_sources: list[dict[str, Any]] = []
    bearer: TokenAnswer | None = None
    changed: int = 0
    unknown: list[str] = []
    alive: list[Alive] = []
    part: int = 0
    parts: int = 1

    def __repr__(self) -> str:
        """Count what is in it: the tokens of a filled job are not to be shown."""
        files = len(self.job["files"]) if self.job else 0
        return f"Answer({self.request_id}, {len(self.tokens)} tokens, {files} filled files)"


def refusal(need: Need | None, error: RequestError) -> RefusedNeed:
    """Return a refusal as it is recorded and sent; None means the whole request."""
    if need is None:
        return RefusedNeed(-1, "request", -1, error.as_dict())
    return RefusedNeed(need.file, need.side, need.index, error.as_dict())
