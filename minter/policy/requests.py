"""Requests: the one frozen form of every submission, which decisions are made on.

A message becomes a `Request` of `File`s, with one `Need` for each token.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Struct, UnsetType, structs

from minter.contract.messages import (
    FileRequest,
    MintRequest,
    RefusedNeed,
    Side,
    Slot,
    URLsRequest,
    decode,
    unix_time,
)
from minter.contract.operations import Operation
from minter.errors import InvalidRequest, RequestError
from minter.policy.limits import MAX_AHEAD_SECONDS
from minter.policy.routes import Via
from minter.policy.token_requests import SubjectToken, TokenRequest

SEVERAL = "(several)"
"""The recorded activity of a request whose files have different ones."""
MAX_DESCRIPTION_CHARACTERS = 500
"""Longest description of one refusal; a longer one loses its middle."""
BRIEF = "refused; this request has too many refusals to describe each, so send fewer files at once"
_OF_REQUEST = {"path", "url"}
"""Fields of errors that repeat what the request says."""


class Need(Struct, frozen=True, gc=False):
    """The use of one token. With `one_token`, all operations must be in the same token.

    `if_able` are the operations that are left out where the storage cannot do them by token. FTS may take
    `staging_seconds` to bring the file online while it waits, and `after_seconds` to see it on tape.
    `life_seconds` is the lifetime of the token to be renewed, which is requested again.
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
    if_able: tuple[Operation, ...] = ()
    staging_seconds: int = 0

    @property
    def slot(self) -> Slot:
        """The slot of the token in the request."""
        return Slot(self.file, self.side, self.index)


class File(Struct, frozen=True):
    """One file of a request in the frozen form."""

    needs: tuple[Need, ...]
    size: int | None = None
    retries: int = 0
    transfer_seconds: int | None = None
    activity: str = ""
    external_id: str = ""


class Request(Struct, frozen=True):
    """One submission, native or an FTS job, in the form that decisions are made on.

    `subject` is a token to exchange at a provider, `consumer` another client that may fetch the provider's
    tokens; `routes`, if not empty, names the only routes that may be used.
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
    via: Via = "direct"
    job: Mapping[str, Any] | None = None
    renews: UUID | None = None
    token_request: TokenRequest | None = None
    subject: SubjectToken | None = None
    consumer: str = ""
    routes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def via_fts(self) -> bool:
        """Whether the tokens go into an FTS job."""
        return self.via == "fts"

    @property
    def weight(self) -> int:
        """How many tokens may be needed: what a request costs to decide, sign and record."""
        return sum(len(file.needs) for file in self.files) or 1

    @property
    def unix_time(self) -> float:
        """Seconds since the epoch, as the client wrote them into the request_id."""
        return unix_time(self.request_id)


_mint_decoder = msgspec.json.Decoder(MintRequest)


def decode_mint(body: bytes | msgspec.Raw) -> Request:
    """Decode a `minter.mint` argument; raises InvalidRequest with the place of the fault."""
    return from_mint(decode(_mint_decoder, body))


_urls_decoder = msgspec.json.Decoder(URLsRequest)


def decode_urls(body: bytes | msgspec.Raw) -> Request:
    """Decode a `minter.urls` argument; raises InvalidRequest with the place of the fault."""
    wire = decode(_urls_decoder, body)
    return Request(
        request_id=wire.request_id,
        kind="mint",
        digest=content_digest(wire),
        files=tuple(
            File((Need(number, "operation", 0, url, ("read",)),)) for number, url in enumerate(wire.urls)
        ),
        vo=wire.vo,
        client=wire.client,
        on_behalf_of=wire.on_behalf_of,
        activity=wire.activity,
        lifetime_seconds=wire.lifetime_seconds,
        via="url",
    )


def content_digest(request: Struct) -> bytes:
    """Return the digest that identifies repetitions of a request (I4)."""
    if getattr(request, "subject_token", UNSET) is not UNSET:  # a repetition may bring a fresh one
        request = structs.replace(request, subject_token=UNSET)
    return sha256(msgspec.json.encode(request, order="deterministic")).digest()


def check_request_id(request: Request, now: float, retention_seconds: int) -> None:
    """Raise InvalidRequest unless the request_id is a UUIDv7 of an acceptable time."""
    if request.request_id.version != 7:  # noqa: PLR2004 - UUIDv7
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
    """Return a native request as a `Request`."""
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
    """Return the subject token that came with a request, not verified yet, or None."""
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


def refusal(need: Need | None, error: RequestError, *, brief: bool = False) -> RefusedNeed:
    """Return a refusal as it is recorded and sent; if `need` is None, it refuses the whole request.

    The path and URL of a need are not repeated: file, side and index name them in the request. A description
    has at most MAX_DESCRIPTION_CHARACTERS; with `brief` it is BRIEF.
    """
    told = error.as_dict()
    if need is None:
        return RefusedNeed(-1, "request", -1, told)
    for field in _OF_REQUEST & told.keys():
        del told[field]
    text = BRIEF if brief else told["error_description"]
    if len(text) > MAX_DESCRIPTION_CHARACTERS:
        half = MAX_DESCRIPTION_CHARACTERS // 2 - 2
        text = f"{text[:half]} … {text[-half:]}"
    told["error_description"] = text
    return RefusedNeed(need.file, need.side, need.index, told)
