"""FTS jobs: read the fields that decide the tokens of a job, and fill a job with tokens."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from minter.contract.messages import MAX_BYTES, MAX_FILES, MAX_SECONDS, MAX_SOURCES, FillRequest, Url, decode
from minter.contract.operations import Operation
from minter.errors import InvalidRequest
from minter.policy.requests import File, Need, Request, content_digest, subject_of

_fill_decoder = msgspec.json.Decoder(FillRequest)


def decode_fill(body: bytes | msgspec.Raw) -> Request:
    """Decode a `minter.fill_job` argument; raises InvalidRequest with the place of the fault."""
    return from_fill(decode(_fill_decoder, body))


_Number = int | str | None


class JobFile(Struct, frozen=True):
    """Fields of a job's file that decide its tokens; all other fields are passed on unchanged."""

    sources: Annotated[tuple[Url, ...], Meta(min_length=1, max_length=MAX_SOURCES)]
    destinations: Annotated[tuple[Url, ...], Meta(min_length=1, max_length=MAX_SOURCES)]
    filesize: float | int | None = None
    activity: Annotated[str, Meta(max_length=255)] | None = None
    metadata: Any = None


class JobParams(Struct, frozen=True):
    """Fields of a job's params that decide its tokens; `max_time_in_queue` is in hours, or has a unit."""

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
    """Return an FTS job as a `Request`; raises InvalidRequest with the place of the fault."""
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

    # FTS takes one token for each URL, so this token must allow everything that FTS does with the URL.
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
        # A later hop starts when the earlier hops of the same file are done.
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
