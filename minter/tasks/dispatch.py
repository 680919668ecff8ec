"""From a task of the contract and its argument to what the engine shall do: the same over AMQP and HTTP."""

from collections.abc import Callable
from datetime import datetime

from msgspec import Raw

from minter.contract import followups, names
from minter.contract.messages import Answer
from minter.errors import InvalidRequest
from minter.fts.jobs import decode_fill
from minter.policy.requests import Request, decode_mint
from minter.tasks.lifecycle import Lifecycle
from minter.tokens.outcomes import Submission

_NEW: dict[str, Callable[[Raw | bytes], Request]] = {
    names.MINT: decode_mint,
    names.FILL_JOB: decode_fill,
}


def submission(
    lifecycle: Lifecycle, task: str, client: str, argument: Raw | bytes, *, private: bool = False
) -> Submission | None:
    """Return what a task submits to the engine, None if it is about an earlier request.

    `private`: nobody else can read what was sent, as on a broker, so there may be a subject token in it;
    it is not verified yet. Raises InvalidRequest, and what `Lives.renewal` raises.
    """
    if task in _NEW:
        request = _NEW[task](argument)
    elif task == names.RENEW:
        request = lifecycle.renewal(client, followups.decode_renew(argument))
    else:
        return None
    if request.subject is not None and not private:
        raise InvalidRequest(
            "a subject_token is taken over HTTP only; or have the client's stored, with: minter clients "
            "subject-token"
        )
    return Submission(request, client)


def follow_up(lifecycle: Lifecycle, task: str, client: str, argument: Raw | bytes, now: datetime) -> Answer:
    """Answer a task about an earlier request: fetch, report or cancel; raises as `Lives` does."""
    if task == names.FETCH:
        return lifecycle.fetch(client, followups.decode_fetch(argument), now)
    if task == names.REPORT:
        return lifecycle.report(client, followups.decode_report(argument), now)
    return lifecycle.cancel(client, followups.decode_cancel(argument), now)
