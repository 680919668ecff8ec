"""Conversion of outcomes to answers, which are divided into parts if they are large."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import msgspec
from msgspec import structs

from minter.contract.messages import (
    MAX_BODY_BYTES,
    MAX_FILES,
    Answer,
    Note,
    PendingToken,
    RefusedNeed,
    Slot,
    TokenAnswer,
    URLAnswer,
)
from minter.errors import Expired, InvalidRequest, MinterError, RequestError, ServerError, Unavailable
from minter.fts.jobs import fill_job
from minter.policy.limits import BACKDATE_SECONDS, FTS_QUEUE_SECONDS
from minter.policy.plans import PlannedToken
from minter.policy.requests import Request
from minter.storages.urls import signed_url
from minter.tokens.outcomes import Issued, Outcome

_DEFAULT_FIXED_SECONDS = BACKDATE_SECONDS + 600
_LOOSE_URL = "this storage compares paths as text: the URL opens every name that begins with this one"
_PATTERN_URL = f"{_LOOSE_URL}, and a dot in it stands for any character"
MAX_FILLED_BYTES = 15 * 1024 * 1024
"""RabbitMQ 4 takes messages of at most 16 MiB, and a job cannot be divided."""
encode = msgspec.json.Encoder().encode


def failure(request_id: str | None, error: MinterError) -> Answer:
    """Return the answer to a request refused as a whole; it hides the details of internal errors."""
    if not isinstance(error, RequestError | Unavailable):
        error = ServerError("the engine failed on this request; its operators have the log")
    return Answer(request_id=request_id, error=error.as_dict())


def answer(outcome: Outcome, now: datetime) -> Answer:
    """Return the answer to one submission."""
    request = outcome.submission.request
    if outcome.error is not None:
        return failure(str(request.request_id), outcome.error)
    refusals = [RefusedNeed(**r) for r in outcome.refusals]
    pending = [PendingToken(*a.slot, a.storage, a.scope, a.handle) for a in outcome.pending]
    if request.kind == "fill_job" and not pending:
        try:
            return _filled(request, outcome, refusals, now)
        except (Expired, InvalidRequest) as error:
            return failure(str(request.request_id), error)
    if request.via == "url":
        return _signed(request, outcome, refusals)
    return Answer(
        request_id=str(request.request_id),
        tokens=[] if request.kind == "fill_job" else [_token(i) for i in outcome.issued],
        pending=pending,
        refusals=refusals,
        notes=_notes(request, outcome),
    )


def _notes(request: Request, outcome: Outcome) -> list[Note]:
    """Return what the requester should know of the tokens that were planned, and of the request itself."""
    notes = [Note(-1, "request", -1, text) for text in request.notes]
    for planned in outcome.decision.planned_tokens if outcome.decision else ():
        slot = planned.need.slot
        if slot.side != "service":
            notes += [Note(*slot, text) for text in planned.lifetime.notes(planned.plan.cap_rule)]
            matching = planned.plan.area.matching
            if request.via == "url" and matching != "exact":
                notes.append(Note(*slot, _PATTERN_URL if matching == "pattern" else _LOOSE_URL))
    return notes


def _token(issued: Issued) -> TokenAnswer:
    return TokenAnswer(
        *issued.slot, issued.storage, issued.scope, issued.jti, issued.exp,
        issued.token.decode(), issued.handle,
    )  # fmt: skip


def _planned(outcome: Outcome) -> dict[Slot, PlannedToken]:
    return {p.need.slot: p for p in outcome.decision.planned_tokens} if outcome.decision else {}


def _signed(request: Request, outcome: Outcome, refusals: list[RefusedNeed]) -> Answer:
    """Return the signed URLs; those of a repeated request are refused if they would be by now."""
    assert outcome.decision is not None
    planned = _planned(outcome)
    urls = []
    for issued in outcome.issued:
        if plan := planned.get(issued.slot):
            url = signed_url(plan.need.url, plan.plan.area.dialect.url_parameter, issued.token.decode())
            urls.append(URLAnswer(issued.slot.file, issued.storage, issued.jti, issued.exp, url))
    told = {url.file for url in urls} | {refused.file for refused in refusals}
    refusals += [r for r in (RefusedNeed(**r) for r in outcome.decision.records()) if r.file not in told]
    notes = _notes(request, outcome)
    return Answer(request_id=str(request.request_id), urls=urls, refusals=refusals, notes=notes)


def _filled(request: Request, outcome: Outcome, refusals: list[RefusedNeed], now: datetime) -> Answer:
    tokens = {i.slot: i.token.decode() for i in outcome.issued if i.slot.side != "service"}
    kept = {slot.file for slot in tokens}
    refused = [f for f in range(len(request.files)) if f not in kept]
    hours = _queue_hours(request, outcome, now) if tokens else 0
    job = fill_job(request.job or {}, tokens, refused, hours, _monitored(outcome))
    if sum(map(len, tokens.values())) > MAX_FILLED_BYTES - MAX_BODY_BYTES:
        raise InvalidRequest(
            f"the job with its {len(tokens)} tokens exceeds {MAX_FILLED_BYTES} bytes, which brokers do not "
            "carry; split it"
        )
    bearer = next((i for i in outcome.issued if i.slot.side == "service"), None)
    notes = _notes(request, outcome)
    asked = request.files[0].needs[0].wait_seconds
    if job is not None and asked is not None and hours * 3600 != asked:
        notes.append(Note(-1, "request", -1, f"max_time_in_queue is {hours} h, asked for {asked / 3600:g} h"))
    return Answer(
        request_id=str(request.request_id),
        job=job,
        refused=[{"index": f, "error": _cause(r for r in refusals if r.file == f)} for f in refused],
        dropped_sources=[
            {"index": r.file, "side": r.side, "source": r.index, "error": r.error}
            for r in refusals
            if r.file in kept
        ],
        bearer=_token(bearer) if bearer else None,
        notes=notes,
    )


def _monitored(outcome: Outcome) -> dict[Slot, dict[str, str]]:
    """Return jti and mode of the tokens whose route wants them in FTS's monitoring."""
    modes = {
        slot: route.mode
        for slot, planned in _planned(outcome).items()
        if (route := planned.plan.route) is not None and route.monitoring
    }
    return {i.slot: {"jti": i.jti, "mode": modes[i.slot]} for i in outcome.issued if i.slot in modes}


def _cause(refusals: Iterable[RefusedNeed]) -> dict[str, object]:
    """Return the error of a file that caused the other refusals of the file."""
    errors = [r.error for r in refusals]
    return next((e for e in errors if e["reason"] != "neighbour_refused"), errors[0])


def _queue_hours(request: Request, outcome: Outcome, now: datetime) -> int:
    """Return the `max_time_in_queue` that every token of the job outlives, in whole hours.

    FTS counts from the job's submission. A repetition within the tokens' margin gives the same hours: the
    margin covers the delay. A later one gives what life is left. Raises Expired when that no longer covers
    staging and an hour of queue.
    """
    planned = _planned(outcome)
    hours = []
    for issued in outcome.issued:
        if issued.slot.side == "service":
            continue
        plan = planned.get(issued.slot)
        fixed = plan.lifetime.fixed if plan else _DEFAULT_FIXED_SECONDS
        least = FTS_QUEUE_SECONDS + (plan.lifetime.staging_seconds if plan else 0)
        margin = plan.plan.route.margin_seconds if plan and plan.plan.route else 0
        elapsed = int(now.timestamp()) - BACKDATE_SECONDS - issued.iat if issued.iat else 0
        left = issued.exp - int(now.timestamp()) + BACKDATE_SECONDS - fixed + min(max(elapsed, 0), margin)
        if left < least:
            raise Expired(
                f"the job's tokens do not last the {least} s of its queue and staging; use a new request_id",
                renew=True,
            )
        hours.append(left // 3600)
    needs = [need for file in request.files for need in file.needs]
    asked = max((need.wait_seconds or 0 for need in needs), default=0)
    if not asked:
        return min(hours)
    staging = max(need.staging_seconds for need in needs)
    enough = -(-staging // 3600) + 1  # a queue that ends while FTS stages would cancel the job
    return min(*hours, max(asked // 3600, enough if staging else 1))


def parts(whole: Answer, max_bytes: int = MAX_BODY_BYTES) -> list[bytes]:
    """Encode an answer; an answer larger than `max_bytes` is divided into numbered parts.

    A filled job is never divided: a job of at most 2 000 files fits in one AMQP message.
    """
    body = encode(whole)
    items = len(whole.tokens) + len(whole.urls) + len(whole.pending) + len(whole.refusals)
    if len(body) <= max_bytes or items < 2:  # noqa: PLR2004
        return [body]
    pieces = _packed(whole, max_bytes)
    return [
        encode(structs.replace(whole, **lists, part=number, parts=len(pieces)))
        for number, lists in enumerate(pieces)
    ]


def _packed(whole: Answer, max_bytes: int) -> list[dict[str, list[Any]]]:
    """Divide the lists of an answer so that each part has at most `max_bytes`, or a single item."""
    empty: dict[str, list[Any]] = {"tokens": [], "urls": [], "pending": [], "refusals": []}
    fixed = len(encode(structs.replace(whole, **empty, part=MAX_FILES, parts=MAX_FILES)))
    pieces, room = [{name: list[Any]() for name in empty}], max_bytes - fixed
    for name in empty:
        for item in getattr(whole, name):
            size = len(encode(item)) + len(name) + len('"":[],')
            if size > room and any(pieces[-1].values()):
                pieces.append({name: [] for name in empty})
                room = max_bytes - fixed
            pieces[-1][name].append(item)
            room -= size
    return pieces
