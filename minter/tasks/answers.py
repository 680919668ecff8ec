"""Conversion of outcomes to answers, which are divided into parts if they are large."""

from collections.abc import Iterable
from datetime import datetime

import msgspec
from msgspec import structs

from minter.contract.messages import MAX_BODY_BYTES, Answer, PendingToken, RefusedNeed, TokenAnswer
from minter.errors import Expired, InvalidRequest, MinterError, RequestError, ServerError, Unavailable
from minter.fts.jobs import fill_job
from minter.policy.limits import BACKDATE_SECONDS
from minter.policy.requests import Request
from minter.tokens.outcomes import Issued, Outcome

_DEFAULT_FIXED_SECONDS = BACKDATE_SECONDS + 600
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
    return Answer(
        request_id=str(request.request_id),
        tokens=[] if request.kind == "fill_job" else [_token(i) for i in outcome.issued],
        pending=pending,
        refusals=refusals,
    )


def _token(issued: Issued) -> TokenAnswer:
    file, side, index = issued.slot
    return TokenAnswer(
        file, side, index, issued.storage, issued.scope, issued.jti, issued.exp,
        issued.token.decode(), issued.handle,
    )  # fmt: skip


def _filled(request: Request, outcome: Outcome, refusals: list[RefusedNeed], now: datetime) -> Answer:
    tokens: dict[tuple[int, str, int], str] = {
        i.slot: i.token.decode() for i in outcome.issued if i.slot[1] != "service"
    }
    kept = {file for file, _, _ in tokens}
    refused = [f for f in range(len(request.files)) if f not in kept]
    hours = _queue_hours(request, outcome, now) if tokens else 0
    job = fill_job(request.job or {}, tokens, refused, hours)
    if sum(map(len, tokens.values())) > MAX_FILLED_BYTES - MAX_BODY_BYTES:
        raise InvalidRequest(
            f"the job with its {len(tokens)} tokens exceeds {MAX_FILLED_BYTES} bytes, which brokers do not "
            "carry; split it"
        )
    bearer = next((i for i in outcome.issued if i.slot[1] == "service"), None)
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
    )


def _cause(refusals: Iterable[RefusedNeed]) -> dict[str, object]:
    """Return the error of a file that caused the other refusals of the file."""
    errors = [r.error for r in refusals]
    return next((e for e in errors if e["reason"] != "neighbour_refused"), errors[0])


def _queue_hours(request: Request, outcome: Outcome, now: datetime) -> int:
    """Return the `max_time_in_queue`, in hours from `now`, that every token of the job outlives.

    FTS counts from the job's submission, so a repeated answer gets the hours that are left. Raises
    Expired if less than one hour is left.
    """
    planned_tokens = outcome.decision.planned_tokens if outcome.decision else ()
    fixed = {(g.need.file, g.need.side, g.need.index): g.lifetime.fixed for g in planned_tokens}
    left = min(
        i.exp - int(now.timestamp()) - fixed.get(i.slot, _DEFAULT_FIXED_SECONDS) + BACKDATE_SECONDS
        for i in outcome.issued
        if i.slot[1] != "service"
    )
    if left < 3600:  # noqa: PLR2004 - FTS reads whole hours, and 0 as "no limit"
        raise Expired("the job's tokens do not last an hour of queue; use a new request_id", renew=True)
    asked = request.files[0].needs[0].wait_seconds
    return min(left, asked or left) // 3600 or 1


def parts(whole: Answer, max_bytes: int = MAX_BODY_BYTES) -> list[bytes]:
    """Encode an answer; an answer larger than `max_bytes` is divided into numbered parts.

    A filled job is never divided: a job of at most 2 000 files fits in one AMQP message.
    """
    body = encode(whole)
    if len(body) <= max_bytes or len(whole.tokens) + len(whole.pending) + len(whole.refusals) < 2:  # noqa: PLR2004
        return [body]
    count = len(body) // max_bytes + 1
    return [
        encode(
            structs.replace(
                whole,
                tokens=whole.tokens[number::count],
                pending=whole.pending[number::count],
                refusals=whole.refusals[number::count],
                part=number,
                parts=count,
            )
        )
        for number in range(count)
    ]
