"""Conversion of a contract task and its argument to a call of the engine, for AMQP and HTTP alike."""

from collections.abc import Callable
from datetime import datetime

import msgspec
from msgspec import Raw

from minter.contract import followups, names
from minter.contract.messages import MAX_NEEDS, Answer
from minter.errors import InvalidRequest
from minter.fts.jobs import decode_fill
from minter.policy.requests import Request, decode_mint, decode_urls
from minter.tasks.lifecycle import Lifecycle
from minter.tokens.outcomes import Submission

_arguments = msgspec.json.Decoder(tuple[list[Raw], dict[str, Raw], Raw])

_NEW: dict[str, Callable[[Raw | bytes], Request]] = {
    names.MINT: decode_mint,
    names.FILL_JOB: decode_fill,
    names.URLS: decode_urls,
}


def argument_of(task: str, body: bytes) -> Raw:
    """Return the one argument of a task from Celery's body `[args, kwargs, embed]`; raises InvalidRequest."""
    try:
        args, kwargs, _ = _arguments.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"body is not Celery's [args, kwargs, embed] in JSON: {error}"[:300]) from None
    values = [*args, *kwargs.values()]
    if len(values) != 1:
        raise InvalidRequest(f"{task} takes one argument, the request; got {len(values)}")
    return values[0]


def submission(
    lifecycle: Lifecycle, task: str, client: str, argument: Raw | bytes, *, private: bool = False
) -> Submission | None:
    """Return the submission of a task to the engine, None if the task is about an earlier request.

    `private` is True if nobody else can read the argument, False on a broker, where others could. Only a
    private argument may contain a subject token, which is not verified here. Raises InvalidRequest, and the
    errors of `Lifecycle.renewal`.
    """
    if task in _NEW:
        request = _NEW[task](argument)
    elif task == names.RENEW:
        request = lifecycle.renewal(client, followups.decode_renew(argument))
    else:
        return None
    if request.weight > MAX_NEEDS:
        raise InvalidRequest(
            f"request names {request.weight} sources, destinations and operations, expected at most "
            f"{MAX_NEEDS}; split it"
        )
    if request.subject is not None and not private:
        raise InvalidRequest(
            "a subject_token is accepted over HTTP only; or store one for the client, with: minter clients "
            "subject-token"
        )
    return Submission(request, client)


def follow_up(lifecycle: Lifecycle, task: str, client: str, argument: Raw | bytes, now: datetime) -> Answer:
    """Answer a task about an earlier request: fetch, report or cancel; raises the errors of `Lifecycle`."""
    if task == names.FETCH:
        return lifecycle.fetch(client, followups.decode_fetch(argument), now)
    if task == names.REPORT:
        return lifecycle.report(client, followups.decode_report(argument), now)
    return lifecycle.cancel(client, followups.decode_cancel(argument), now)
