"""What clients send about requests that were made before: renew, fetch, report, cancel.

These structs are the contract (schemas/*.json are generated from them), as `requests` has it for
new requests.
"""

from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from minter.contract.messages import MAX_FILES, Name, Seconds, Token, decode
from minter.errors import InvalidRequest

FileNumbers = Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_FILES)], ...], Meta(max_length=MAX_FILES)]
ExternalId = Annotated[str, Meta(min_length=1, max_length=255)]


class RenewRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`minter.renew`: new tokens for a resubmission of what request `renews` was granted.

    `files` are numbers of its files, all if none. Everything is decided again; a token is asked for
    with `wait_seconds` to wait, or else with the life that the old one had. What was exchanged with its own
    `subject_token` needs a fresh one; a consumer stays, if no other is named.
    """

    request_id: UUID
    renews: UUID
    files: FileNumbers = ()
    wait_seconds: Seconds | None = None
    reply_queue: Name | None = None
    subject_token: Token | UnsetType = UNSET
    consumer: Name | UnsetType = UNSET

    def __repr__(self) -> str:
        """Name the requests: a subject token is not to be shown."""
        return f"RenewRequest({self.request_id}, renews {self.renews})"


class FetchRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`minter.fetch`: the tokens that a request was granted, the same bytes (I4), or those of handles.

    A handle may be fetched by the client that asked for its token, and by the consumer that it named.
    """

    request_id: UUID | UnsetType = UNSET
    handles: Annotated[tuple[UUID, ...], Meta(max_length=MAX_FILES)] = ()


class FileReport(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What became of one file, named in one of four ways.

    By its `external_id`, by a token's `jti`, by `request_id` and `file`, or by FTS's `job_id` and
    `file_id` (or `file`, its place in the job as it was submitted).
    """

    state: Literal["active", "finished"]
    external_id: ExternalId | None = None
    jti: UUID | None = None
    request_id: UUID | None = None
    job_id: UUID | None = None
    file: Annotated[int, Meta(ge=0, lt=MAX_FILES)] | None = None
    file_id: Annotated[int, Meta(ge=0)] | None = None


class JobReport(Struct, frozen=True, forbid_unknown_fields=True):
    """An FTS job that was submitted with a request's tokens.

    `files` has the number in the request of each file of the job, in the job's order; `file_ids`
    FTS's ids of them, if known.
    """

    job_id: UUID
    request_id: UUID
    files: FileNumbers
    file_ids: Annotated[tuple[int, ...], Meta(max_length=MAX_FILES)] = ()


class ReportRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`minter.report`: jobs that were submitted, and files that became active or finished."""

    jobs: Annotated[tuple[JobReport, ...], Meta(max_length=MAX_FILES)] = ()
    files: Annotated[tuple[FileReport, ...], Meta(max_length=MAX_FILES)] = ()


class CancelRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`minter.cancel`: tokens that are not needed any more, by request and files, or external ids.

    They are not given again; what is out already works until it expires, and is listed.
    """

    request_id: UUID | None = None
    files: FileNumbers = ()
    external_ids: Annotated[tuple[ExternalId, ...], Meta(max_length=MAX_FILES)] = ()


Followup = RenewRequest | FetchRequest | ReportRequest | CancelRequest

_renew = msgspec.json.Decoder(RenewRequest)
_fetch = msgspec.json.Decoder(FetchRequest)
_report = msgspec.json.Decoder(ReportRequest)
_cancel = msgspec.json.Decoder(CancelRequest)


def decode_renew(body: Raw | bytes) -> RenewRequest:
    """Decode a `minter.renew` argument; raises InvalidRequest with the place of the fault."""
    wire: RenewRequest = decode(_renew, body)
    if wire.renews == wire.request_id:
        raise InvalidRequest("request_id and renews are equal; a renewal needs a new request_id")
    return wire


def decode_fetch(body: Raw | bytes) -> FetchRequest:
    """Decode a `minter.fetch` argument; raises InvalidRequest with the place of the fault."""
    wire: FetchRequest = decode(_fetch, body)
    if isinstance(wire.request_id, UUID) == bool(wire.handles):
        raise InvalidRequest("expected either request_id or handles")
    return wire


def decode_report(body: Raw | bytes) -> ReportRequest:
    """Decode a `minter.report` argument; raises InvalidRequest with the place of the fault."""
    wire: ReportRequest = decode(_report, body)
    for number, report in enumerate(wire.files):
        _check_name(report, f"`$.files[{number}]`")
    for number, job in enumerate(wire.jobs):
        if job.file_ids and len(job.file_ids) != len(job.files):
            raise InvalidRequest(
                f"file_ids has {len(job.file_ids)} entries and files {len(job.files)}, expected as many"
                f" - at `$.jobs[{number}]`"
            )
    return wire


def decode_cancel(body: Raw | bytes) -> CancelRequest:
    """Decode a `minter.cancel` argument; raises InvalidRequest with the place of the fault."""
    wire: CancelRequest = decode(_cancel, body)
    if (wire.request_id is None) == (not wire.external_ids) or (wire.files and wire.external_ids):
        raise InvalidRequest("expected either request_id, with files or without, or external_ids")
    return wire


def _check_name(report: FileReport, where: str) -> None:
    given: dict[str, Any] = {
        name: getattr(report, name)
        for name in ("external_id", "jti", "request_id", "job_id", "file", "file_id")
        if getattr(report, name) is not None
    }
    ways = ({"external_id"}, {"jti"}, {"request_id", "file"}, {"job_id", "file"}, {"job_id", "file_id"})
    if given.keys() not in ways:
        raise InvalidRequest(
            f"a file is named by {', '.join(sorted(given)) or 'nothing'}, expected external_id, or jti, or "
            f"request_id and file, or job_id and file or file_id - at {where}"
        )
