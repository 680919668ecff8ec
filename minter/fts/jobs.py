"""FTS jobs: read the parts of a job that decide its tokens, and fill a job with its tokens.

Flags, numbers and durations are read as FTS's REST server reads them (fts-rest-flask a8b49830c): a token must
serve what FTS does. Where FTS reads a value otherwise than its writer can mean it, the answer has a note.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct

from minter.contract.messages import (
    MAX_BYTES,
    MAX_FILES,
    MAX_SECONDS,
    MAX_SOURCES,
    FillRequest,
    Slot,
    Url,
    decode,
)
from minter.contract.operations import Operation
from minter.errors import InvalidRequest, RequestError
from minter.policy.limits import FTS_ARCHIVING_SLACK_SECONDS, FTS_DEFAULT_STAGING_SECONDS
from minter.policy.requests import File, Need, Request, content_digest, subject_of
from minter.storages.urls import split_url

MAX_RETRIES = 100

_fill_decoder = msgspec.json.Decoder(FillRequest)


def decode_fill(body: bytes | msgspec.Raw) -> Request:
    """Decode a `minter.fill_job` argument; raises InvalidRequest, which names the wrong place."""
    return from_fill(decode(_fill_decoder, body))


class JobFile(Struct, frozen=True):
    """The parts of a job's file that decide its tokens; all other parts stay untouched."""

    sources: Annotated[tuple[Url, ...], Meta(min_length=1, max_length=MAX_SOURCES)]
    destinations: Annotated[tuple[Url, ...], Meta(min_length=1, max_length=MAX_SOURCES)]
    filesize: Any = None
    activity: Annotated[str, Meta(max_length=255)] | None = None
    metadata: Any = None


class Job(Struct, frozen=True):
    """The parts of an FTS job (POST /jobs) that decide its tokens."""

    files: Annotated[tuple[JobFile, ...], Meta(min_length=1, max_length=MAX_FILES)]
    params: dict[str, Any] | None = None


class JobParams(NamedTuple):
    """A job's params as FTS understands them; durations in seconds, 0 for what is not set."""

    overwrite: bool
    overwrite_on_retry: bool
    overwrite_hop: bool
    only_on_disk: bool
    multihop: bool
    reuse: bool
    dst_file_report: bool
    retries: int
    queue_seconds: int
    staging_seconds: int
    archiving_seconds: int
    archives: bool
    account: str
    notes: tuple[str, ...]


# ── values as FTS reads them ─────────────────────────────────────────────────────────────────


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WITH_UNIT = re.compile(r"-?\d+[smhd]", re.IGNORECASE).fullmatch


class _JobReader:
    """Reads the values of a job's params; `notes` collects what their writer should know."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self.notes: list[str] = []

    def truth(self, name: str) -> bool:
        """Read a flag that FTS takes by Python's truth; text other than Y… is refused: "N" is true."""
        value = self._params.get(name)
        if isinstance(value, str) and value:
            if value[:1].lower() == "y":
                return True
            raise _wrong(name, value, 'true, false, 1, 0 or "Y": FTS reads any other text as true')
        return bool(value)

    def flag(self, name: str) -> bool:
        """Read a flag of which FTS takes text by its first letter."""
        value = self._params.get(name)
        return value[:1].lower() == "y" if isinstance(value, str) else bool(value)

    def count(self, name: str) -> int:
        """Read a number as FTS does: whole numbers, floats that are cut, and text of a whole number."""
        value = self._params.get(name)
        if value is None:
            return 0
        try:
            return int(value)
        except (TypeError, ValueError, OverflowError):
            raise _wrong(name, value, "a whole number") from None

    def seconds(self, name: str) -> int:
        """Read a duration in seconds; FTS takes text with a unit for not set. Negative means not set, too."""
        value = self._params.get(name)
        if isinstance(value, str) and _WITH_UNIT(value.strip()):
            self.notes.append(f"{name} {value!r} is read by FTS as not set: it takes seconds, without a unit")
            return -1
        return self._bounded(name, self.count(name) if value not in (None, "") else -1)

    def queue(self, name: str) -> int:
        """Read `max_time_in_queue`: hours, or text with a unit s, m, h or d; 0 where it sets no limit."""
        value = self._params.get(name)
        if value in (None, ""):
            return 0
        if isinstance(value, str) and _WITH_UNIT(value.strip()):
            text = value.strip()
            return max(self._bounded(name, int(text[:-1]) * _UNITS[text[-1].lower()]), 0)
        return max(self._bounded(name, self.count(name) * 3600), 0)  # writers put -1 for "not set"

    def _bounded(self, name: str, seconds: int) -> int:
        if seconds > MAX_SECONDS:
            raise _wrong(name, self._params[name], f"at most {MAX_SECONDS} s")
        return seconds


def _wrong(name: str, value: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{str(value)[:60]!r} is wrong, expected {expected} - at `$.job.params.{name}`")


def _params(given: Mapping[str, Any]) -> JobParams:
    read = _JobReader(given)
    multihop = read.truth("multihop")
    archiving = read.seconds("archive_timeout")
    staging = read.seconds("bring_online")
    if staging <= 0 and read.seconds("copy_pin_lifetime") > 0:
        staging = FTS_DEFAULT_STAGING_SECONDS
        read.notes.append(
            f"copy_pin_lifetime without bring_online lets FTS stage for its default of {staging // 3600} h"
        )
    only_on_disk = read.truth("overwrite_when_only_on_disk")
    if only_on_disk and archiving <= 0:
        read.notes.append("overwrite_when_only_on_disk needs an archive_timeout, and FTS refuses it without")
        only_on_disk = False
    reuse = read.flag("reuse")
    if reuse:
        read.notes.append("reuse was switched off: FTS's session reuse passes no tokens")
    account = given.get("account")
    if account is not None and not (isinstance(account, str) and len(account) <= 255):  # noqa: PLR2004
        raise _wrong("account", account, "text of at most 255 characters")
    return JobParams(
        overwrite=read.truth("overwrite"),
        overwrite_on_retry=read.truth("overwrite_on_retry"),
        overwrite_hop=read.truth("overwrite_hop"),
        only_on_disk=only_on_disk,
        multihop=multihop,
        reuse=reuse,
        dst_file_report=read.flag("dst_file_report"),
        retries=min(max(read.count("retry"), 0), MAX_RETRIES),
        queue_seconds=read.queue("max_time_in_queue"),
        staging_seconds=max(staging, 0),
        archiving_seconds=archiving + FTS_ARCHIVING_SLACK_SECONDS if archiving > 0 else 0,
        archives=archiving > 0,
        account=account or "",
        notes=tuple(read.notes),
    )


def _size(value: object, number: int) -> int | None:
    """Read a file's size as FTS does, a number or its text; None where it is not known."""
    if value is None:
        return None
    try:
        size = float(value) if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(
            f"{str(value)[:60]!r} is not a size in bytes - at `$.job.files[{number}].filesize`"
        ) from None
    if not 0 < size <= MAX_BYTES:  # also not a number
        return None
    return value if isinstance(value, int) else int(size)


# ── from a job to its needs ──────────────────────────────────────────────────────────────────


def from_fill(wire: FillRequest) -> Request:
    """Convert an FTS job into the frozen form; raises InvalidRequest, which names the wrong place."""
    if "Files" in wire.job and "files" not in wire.job:
        raise InvalidRequest(
            "`Files` is read by FTS's command line only, its REST server takes `files` - at `$.job.Files`"
        )
    try:
        job = msgspec.convert(wire.job, Job)
    except msgspec.ValidationError as error:
        where = str(error).replace("`$", "`$.job")
        raise InvalidRequest(f"job does not follow FTS's form: {where}"[:400]) from None
    params = _params(job.params or {})
    return Request(
        request_id=wire.request_id,
        kind="fill_job",
        digest=content_digest(wire),
        files=tuple(_job_file(i, f, params, len(job.files)) for i, f in enumerate(job.files)),
        vo=wire.vo,
        client=wire.client,
        on_behalf_of=wire.on_behalf_of or params.account,
        all_or_nothing=wire.all_or_nothing or params.multihop,
        reply_queue=wire.reply_queue,
        service=Need(-1, "service", 0, wire.fts or "", ()),
        via="fts",
        job=wire.job,
        subject=subject_of(wire.subject_token),
        consumer=wire.consumer or "",
        notes=params.notes,
    )


def _job_file(number: int, file: JobFile, params: JobParams, files: int) -> File:
    first = not params.multihop or number == 0
    last = not params.multihop or number == files - 1
    stages = params.staging_seconds > 0 and first  # FTS stages the first hop only
    if _is_one_file(file):
        source, destination, if_able = _operations_in_place(params, stages=stages, last=last)
    else:
        source = ("read", "stage", "poll") if stages else ("read",)
        destination, if_able = _operations_at_destination(params, len(file.sources), last=last)
    # A later hop waits, in the same queue, for the staging of the first.
    wait = params.queue_seconds or None
    staging, archiving = params.staging_seconds, params.archiving_seconds if last else 0
    needs = [
        Need(number, "source", i, url, source, wait, 0, True, staging_seconds=staging)
        for i, url in enumerate(file.sources)
    ]
    needs += [
        Need(number, "destination", i, url, destination, wait, archiving, True, None, if_able, staging)
        for i, url in enumerate(file.destinations)
    ]
    metadata = file.metadata if isinstance(file.metadata, dict) else {}
    external_id = metadata.get("request_id")
    return File(
        needs=tuple(needs),
        size=_size(file.filesize, number),
        # FTS retries no hop; a later hop starts when the hops before it, of the same file, are done.
        retries=number if params.multihop else 0 if len(file.sources) > 1 else params.retries,
        activity=file.activity or "",
        external_id=external_id[:255] if isinstance(external_id, str) else "",
    )


_Operations = tuple[Operation, ...]


def _operations_at_destination(
    params: JobParams, sources: int, *, last: bool
) -> tuple[_Operations, _Operations]:
    """Return what FTS does at the destination of a copy, and what of it the storage may lack."""
    overwrites = params.overwrite or (params.overwrite_hop and not last) or (params.only_on_disk and last)
    operations: _Operations = ("overwrite",) if overwrites else ("write",)
    retried = params.retries > 0 and not params.multihop and sources == 1
    if retried:
        operations += ("retry",)
    if last and params.archives:
        return (*operations, "poll"), ()
    if last and params.dst_file_report:
        return (*operations, "poll"), ("poll",)
    return operations, ()


def _operations_in_place(
    params: JobParams, *, stages: bool, last: bool
) -> tuple[_Operations, _Operations, _Operations]:
    """Return what FTS does for a file that is its own destination: it stages (Rucio STAGEIN), or it polls.

    Nothing else is asked of such a file. The decision refuses a copy of a file onto itself.
    """
    if stages:
        return ("stage", "poll"), ("stage", "poll"), ()
    if last and params.archives:
        return ("poll",), ("poll",), ()
    return ("read",), ("overwrite" if params.overwrite else "write",), ()


def _is_one_file(file: JobFile) -> bool:
    """Say whether a file's only source is its only destination, however the two URLs are spelt."""
    if len(file.sources) != 1 or len(file.destinations) != 1:
        return file.sources == file.destinations
    try:
        return split_url(file.sources[0]) == split_url(file.destinations[0])
    except RequestError:  # it is refused when it is decided
        return file.sources == file.destinations


# ── the filled job ───────────────────────────────────────────────────────────────────────────


def fill_job(
    job: Mapping[str, Any],
    tokens: Mapping[Slot, str],
    refused: Iterable[int],
    max_time_in_queue: int,
    monitored: Mapping[Slot, Mapping[str, str]] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """Return the job with `tokens` in their slots; None if no file is left.

    The result omits refused files, and sources and destinations without a token. `tokens` replaces all
    tokens that the job had before. `max_time_in_queue` is in hours. Session reuse is switched off: FTS passes
    no tokens through it. `monitored` has what the metadata should say of the tokens in their slots: FTS
    passes metadata on to its messages and dashboards. Metadata that are no object stay as they are.
    """
    left_out = frozenset(refused)
    files = [
        _fill_file(number, file, tokens, monitored)
        for number, file in enumerate(job["files"])
        if number not in left_out
    ]
    if not files:
        return None
    given = job.get("params") or {}
    params = {
        **given,
        "unmanaged_tokens": True,
        "max_time_in_queue": max_time_in_queue,
        **({"reuse": False} if given.get("reuse") else {}),
    }
    if monitored and isinstance(given.get("job_metadata") or {}, dict):
        params["job_metadata"] = {**(given.get("job_metadata") or {}), "auth": "minter"}
    return {**job, "files": files, "params": params}


def _fill_file(
    number: int,
    file: Mapping[str, Any],
    tokens: Mapping[Slot, str],
    monitored: Mapping[Slot, Mapping[str, str]],
) -> dict[str, Any]:
    filled, told = dict(file), dict[str, list[Mapping[str, str]]]()
    for side in ("source", "destination"):
        urls: Sequence[str] = file[f"{side}s"]
        kept = [i for i in range(len(urls)) if (number, side, i) in tokens]
        filled[f"{side}s"] = [urls[i] for i in kept]
        filled[f"{side}_tokens"] = [tokens[Slot(number, side, i)] for i in kept]
        told[side] = [monitored[slot] for i in kept if (slot := Slot(number, side, i)) in monitored]
    metadata = file.get("metadata") or {}
    if any(told.values()) and isinstance(metadata, dict):
        filled["metadata"] = {**metadata, "auth": "minter", "minter": told}
    return filled
