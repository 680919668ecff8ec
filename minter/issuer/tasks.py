"""The tasks of the contract over HTTP, each at `{issuer}v1/…`, and traces of the caller's own tokens.

`POST {issuer}v1/mint` takes the same argument as the task `minter.mint` over AMQP and returns the same
answer, in one piece; so do the other tasks. A request keeps its request_id through every retry (I4).
"""

from datetime import timedelta
from typing import Any
from uuid import UUID

from falcon import asgi
from msgspec import structs

from minter import logs
from minter.contract import names
from minter.contract.messages import MAX_BODY_BYTES, Answer, instant_of
from minter.database import traces
from minter.errors import InvalidRequest, ReplyNotAllowed, from_dict
from minter.issuer.app import Web, send, status_of
from minter.issuer.client_authentication import Account
from minter.issuer.hosts import mounted
from minter.issuer.openapi import document
from minter.tasks import answers, dispatch
from minter.tasks.lifecycle import Lifecycle
from minter.tokens.outcomes import Outcome, Submission

TRACE_DAYS, TRACE_LIMIT = 30, 1_000
_QUESTIONS = ("jti", "path", "external_id", "request_id")


def add_routes(app: "asgi.App[Any, Any]", web: Web) -> None:
    """Add every issuer's endpoints for transfers."""
    lifecycle = Lifecycle(web.service.engine, web.service.store)
    for vo, issuer in web.service.loaded.endpoints.items():
        for task in names.PUBLIC_TASKS:
            app.add_route(f"{mounted(issuer)}v1/{names.endpoint(task)}", _Task(web, lifecycle, vo, task))
        app.add_route(f"{mounted(issuer)}v1/trace", _Trace(web, vo))
        app.add_route(f"{mounted(issuer)}openapi.json", _OpenAPI(issuer))


class _Task:
    """Endpoint of one task of the contract."""

    def __init__(self, web: Web, lifecycle: Lifecycle, vo: str, task: str) -> None:
        self._web = web
        self._lifecycle = lifecycle
        self._vo = vo
        self._task = task

    async def on_post(self, req: asgi.Request, resp: asgi.Response) -> None:
        req.context.answers = True
        account = await self._web.authenticate(req, self._vo, {})
        with self._web.room.of(account.name) as take:
            body = await self._web.body(req, MAX_BODY_BYTES, "application/json", take)
            answer, outcome = await self._answer(account, body)
            self._note(req, account, answer, outcome)
            send(resp, answer, status_of(from_dict(answer.error)) if answer.error else 200)

    async def _answer(self, account: Account, body: bytes) -> tuple[Answer, Outcome | None]:
        batcher, now = self._web.batcher, self._web.service.clock()
        made = await batcher.call(
            dispatch.submission, self._lifecycle, self._task, account.name, body, private=True
        )
        if made is not None:
            self._web.charge(account, made.request.weight)
        if made is not None and made.request.subject is not None:
            subject = await self._web.verify_subject(self._vo, made.request.subject)
            made = Submission(structs.replace(made.request, subject=subject), made.client)
        if made is None:
            return await batcher.call(
                dispatch.follow_up, self._lifecycle, self._task, account.name, body, now
            ), None
        if made.request.reply_queue is not None:
            raise ReplyNotAllowed("reply_queue is for requests over AMQP; over HTTP the answer comes at once")
        outcome = await batcher.mint(Submission(made.request, account.name))
        return await batcher.call(answers.answer, outcome, now), outcome

    def _note(self, req: asgi.Request, account: Account, answer: Answer, outcome: Outcome | None) -> None:
        reason = answer.error["reason"] if answer.error else None
        done = "refused" if reason else "repeated" if outcome and outcome.repeated else "served"
        if outcome is None:
            self._web.metrics.follow_up(self._task, done)
        logs.request_event(
            task=self._task,
            client=account.name,
            vo=self._vo,
            request_id=answer.request_id,
            traceparent=req.get_header("traceparent"),
            outcome=done,
            reason=reason,
            tokens=len(outcome.issued) if outcome else None,
            refused=len(outcome.refusals) if outcome else None,
            changed=answer.changed or None,
        )


class _OpenAPI:
    """Endpoint of an issuer's OpenAPI document."""

    def __init__(self, issuer: str) -> None:
        self._document = document(issuer)

    async def on_get(self, _req: asgi.Request, resp: asgi.Response) -> None:
        send(resp, self._document)


class _Trace:
    """Endpoint of traces: claims and states of the caller's own tokens, never a token."""

    def __init__(self, web: Web, vo: str) -> None:
        self._web = web
        self._vo = vo

    async def on_get(self, req: asgi.Request, resp: asgi.Response) -> None:
        account = await self._web.authenticate(req, self._vo, {})
        by, value = next(iter(req.params.items()), ("", ""))
        if len(req.params) != 1 or by not in _QUESTIONS or not isinstance(value, str):
            raise InvalidRequest(f"expected exactly one parameter, one of {', '.join(_QUESTIONS)}")
        found = await self._web.batcher.call(self._find, by, value, account.name)
        send(resp, {"tokens": [story for story in found if story.client == account.name]})

    def _find(self, by: str, value: str, client: str) -> list[traces.TraceRecord]:
        pool, now = self._web.service.pool, self._web.service.clock()
        asked: Any = _uuid(by, value) if by in ("jti", "request_id") else value
        if by == "request_id":
            return traces.find_request(pool, asked)[0]
        since = now - timedelta(days=TRACE_DAYS)
        if by == "jti":
            since = min(since, (instant_of(asked) or since) - timedelta(seconds=1))
        return traces.find(pool, by, asked, since, now + timedelta(days=1), TRACE_LIMIT, client)


def _uuid(by: str, value: str) -> UUID:
    try:
        found = UUID(value)
    except ValueError:
        found = None
    if found is None or instant_of(found) is None:  # all of Minter's ids are UUIDv7
        raise InvalidRequest(f"{by} is not a UUIDv7 of a date before the year 10000")
    return found
