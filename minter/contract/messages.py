"""Messages of new requests, and the answers to all requests, as typed structs.

The JSON Schemas in schemas/ are generated from these structs.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from minter.contract.operations import Operation
from minter.errors import InvalidRequest

MAX_FILES = 2_000
MAX_NEEDS = 8_000
"""Sources, destinations and operations of one request, at most: each may need a token."""
"""Most files in one request; the client library splits larger requests."""
MAX_BODY_BYTES = 8 * 1024 * 1024
"""Largest message that is decoded, in bytes; larger answers are sent in parts of about this size."""
MAX_SOURCES = 64
MAX_SECONDS = 400 * 24 * 3600
"""Longest duration in a request: that of the profile's longest refresh token (WLCG §4.3.1)."""
Name = Annotated[str, Meta(min_length=1, max_length=255)]
Token = Annotated[str, Meta(min_length=1, max_length=16_384)]
Url = Annotated[str, Meta(min_length=1, max_length=8_192)]
Seconds = Annotated[int, Meta(ge=0, le=MAX_SECONDS)]
MAX_BYTES = 2**63 - 1
Bytes = Annotated[int, Meta(ge=0, le=MAX_BYTES)]
Side = Literal["source", "destination", "operation", "service"]


class Slot(NamedTuple):
    """Where a token belongs in its request: a file's number, a side, and the position on that side."""

    file: int
    side: Side
    position: int

    def as_dict(self) -> dict[str, Any]:
        """Return the slot under the names that messages use."""
        return {"file": self.file, "side": self.side, "index": self.position}


def unix_time(uuid7: UUID) -> float:
    """Return the seconds since the epoch that a UUIDv7 holds (RFC 9562 §5.7)."""
    return (uuid7.int >> 80) / 1000


def instant_of(any_uuid: UUID) -> datetime | None:
    """Return the instant that a UUIDv7 holds; None for another UUID, and for one beyond the year 9999."""
    if any_uuid.version != 7:  # noqa: PLR2004 - RFC 9562's number
        return None
    try:
        return datetime.fromtimestamp(unix_time(any_uuid), UTC)
    except ValueError:
        return None


class FileOperation(Struct, frozen=True, forbid_unknown_fields=True):
    """One operation outside a copy; `download` means read, `upload` means write."""

    operation: Operation | Literal["download", "upload"]
    url: Url


class FileRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """One file: a copy from any of `sources` to each of `destinations`, and other operations.

    `size` is in bytes. `wait_seconds` is how long the file may wait before the copy starts,
    `transfer_seconds` how long the copy may take (by default computed from size and the route's rate).
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
        """Count the files without showing a subject token."""
        return f"MintRequest({self.request_id}, {len(self.files)} files)"


class FillRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`minter.fill_job`: an FTS job, as Rucio or DIRAC would POST it, filled with tokens.

    `fts` is the URL of the FTS that will receive the job, by default the issuer's first FTS.
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
        """Name the request without showing a subject token."""
        return f"FillRequest({self.request_id})"


class URLsRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`minter.urls`: for each URL of a file, the URL with which anybody may read it for a time.

    The URL of a directory reads all that is below. `lifetime_seconds` begin a minute before the answer.
    """

    request_id: UUID
    urls: Annotated[tuple[Url, ...], Meta(min_length=1, max_length=MAX_FILES)]
    lifetime_seconds: Annotated[int, Meta(ge=120, le=6 * 3600)] = 3600
    vo: Name | None = None
    client: Name | None = None
    on_behalf_of: Annotated[str, Meta(max_length=255)] = ""
    activity: Annotated[str, Meta(max_length=255)] = ""


def decode(decoder: "msgspec.json.Decoder[Any]", body: bytes | msgspec.Raw) -> Any:
    """Decode a client's message; raises InvalidRequest with the place of the fault."""
    if len(body) > MAX_BODY_BYTES:
        raise InvalidRequest(
            f"request of {len(body)} bytes is too large, expected at most {MAX_BODY_BYTES}; split it"
        )
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # msgspec's message names the place and the expected type; it repeats no values but enum words.
        raise InvalidRequest(f"request does not follow its schema: {error}"[:400]) from None


class TokenAnswer(Struct, frozen=True):
    """One token of an answer; `token` is the only secret in it. `exp` is a NumericDate.

    A provider's token has a `handle`, which fetches the refreshed token later.
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


class URLAnswer(Struct, frozen=True):
    """One URL that reads one file until `exp`, a NumericDate; `signed` holds a token and is a secret."""

    file: int
    storage: str
    jti: str
    exp: int
    signed: str

    def __repr__(self) -> str:
        """Name the token without showing the URL."""
        return f"URLAnswer({self.jti}, file={self.file})"


class PendingToken(Struct, frozen=True):
    """A provider's token that is still pending; fetch it by its handle, which is not a secret."""

    file: int
    side: Side
    index: int
    storage: str
    scope: str
    handle: str


class RefusedNeed(Struct, frozen=True):
    """One refused need with its error; file and index are -1 if the whole request is refused."""

    file: int
    side: Side | Literal["request"]
    index: int
    error: dict[str, Any]


class Note(Struct, frozen=True):
    """Something that the requester should know of a token, or, with file -1, of the whole request."""

    file: int
    side: Side | Literal["request"]
    index: int
    text: str


class LiveToken(Struct, frozen=True):
    """A cancelled token that still works until it expires; `exp` is a NumericDate."""

    jti: str
    storage: str
    exp: int


class Answer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to every task (schemas/answer.json).

    `error` is set when the whole request is refused. `pending` are tokens that providers have not given
    yet; a job with pending tokens is filled when the same request is sent again. `job`, `refused` and
    `bearer` come with a filled job, `urls` with a request for URLs. `changed` counts the tokens that a report
    or a cancellation changed, `unknown` lists the places in the message that name nothing known, `alive` the
    cancelled tokens that still work, `notes` what the requester should know of tokens that were issued. A
    large answer comes in `parts` messages, numbered from 0 by `part`.
    """

    request_id: str | None = None
    tokens: list[TokenAnswer] = []
    urls: list[URLAnswer] = []
    pending: list[PendingToken] = []
    refusals: list[RefusedNeed] = []
    error: dict[str, Any] | None = None
    job: dict[str, Any] | None = None
    refused: list[dict[str, Any]] = []
    dropped_sources: list[dict[str, Any]] = []
    bearer: TokenAnswer | None = None
    changed: int = 0
    unknown: list[str] = []
    alive: list[LiveToken] = []
    notes: list[Note] = []
    part: int = 0
    parts: int = 1

    def __repr__(self) -> str:
        """Count tokens and files without showing the tokens of a filled job."""
        files = len(self.job["files"]) if self.job else 0
        return f"Answer({self.request_id}, {len(self.tokens)} tokens, {files} filled files)"
