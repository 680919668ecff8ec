"""Messages of clients about earlier requests: renew, fetch, report, cancel.

These structs are the contract: schemas/*.json are generated from them. `messages` has the structs of
new requests.
"""

from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from minter.contract.messages import MAX_FILES, MAX_SOURCES, Name, Seconds, Token, decode
from minter.errors import InvalidRequest

FileNumbers = Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_FILES)], ...], Meta(max_length=MAX_FILES)]
ExternalId = Annotated[str, Meta(min_length=1, max_length=255)]


class RenewRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`minter.renew`: new tokens to submit files of the earlier request `renews` again.

    `files` are numbers of files in that request; none means all. Every token is decided again, for a file
    that waits `wait_seconds`, or else with the old token's lifetime. If the old request came with a
    `subject_token`, a fresh one is needed. The old consumer stays unless another one is named.
    """

    request_id: UUID
    renews: UUID
    files: FileNumbers = ()
    wait_seconds: Seconds | None = None
    reply_queue: Name | None = None
    subject_token: Token | UnsetType = UNSET
    consumer: Name | UnsetType = UNSET

    def __repr__(self) -> str:
        """Name the requests without showing a subject token."""
        return f"RenewRequest({self.request_id}, renews {self.renews})"


class FetchRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`minter.fetch`: the tokens of an earlier request, byte for byte (I4), or the tokens of handles.

    The token of a handle may be fetched by the client that requested it, and by the consumer that this
    client named.
    """

    request_id: UUID | UnsetType = UNSET
    handles: Annotated[tuple[UUID, ...], Meta(max_length=MAX_FILES)] = ()


class FileReport(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The new state of one file, which is named in one of four ways.

    These are its `external_id`, a token's `jti`, `request_id` and `file`, or FTS's `job_id` and
    `file_id` (or `file`, the file's place in the job as it was submitted).
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

    `files` has each file's number in the request, in the job's order; `file_ids` has FTS's ids of the
    same files, if known, and `replica_ids` all ids of each file: FTS gives one to each source of a file.
    """

    job_id: UUID
    request_id: UUID
    files: FileNumbers
    file_ids: Annotated[tuple[int, ...], Meta(max_length=MAX_FILES)] = ()
    replica_ids: Annotated[
        tuple[Annotated[tuple[int, ...], Meta(max_length=MAX_SOURCES**2)], ...], Meta(max_length=MAX_FILES)
    ] = ()


class ReportRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`minter.report`: jobs that were submitted, and files that became active or finished."""

    jobs: Annotated[tuple[JobReport, ...], Meta(max_length=MAX_FILES)] = ()
    files: Annotated[tuple[FileReport, ...], Meta(max_length=MAX_FILES)] = ()


class CancelRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`minter.cancel`: tokens that are no longer needed, by request and files, or by external ids.

    Cancelled tokens are not given again. Those that were handed out work until they expire; the answer
    lists them.
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
        for name in ("file_ids", "replica_ids"):
            if (found := len(getattr(job, name))) and found != len(job.files):
                raise InvalidRequest(
                    f"{name} has {found} entries and files {len(job.files)}, expected as many"
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
