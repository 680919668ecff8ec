"""Reply messages: the check of reply addresses, and the messages of answers and dead letters.

An answer's body is Celery's result envelope, so any Celery client understands it. Minter publishes answers
itself: Celery's result backend acknowledges a request even if the reply failed, and logs results.
"""

from typing import Any

import msgspec

from minter.broker.publisher import Outgoing
from minter.contract.messages import Answer
from minter.contract.names import DEAD_LETTER_QUEUE, DIRECT_REPLY, REPLY_PREFIX, reply_prefix
from minter.errors import InvalidRequest, MinterError, ReplyNotAllowed
from minter.jws import without_tokens
from minter.tasks.answers import MAX_FILLED_BYTES, failure, parts
from minter.tokens.jwe import encrypted

MAX_DEAD_LETTER_HEADER = 500
NO_REQUEST = b'"removed: it was no request of a client"'
"""Body of a dead letter for a message that anyone may have sent: only its headers are kept."""
MAX_ENCRYPTED_BYTES = MAX_FILLED_BYTES * 3 // 4
"""Limit of a body before encryption: a JWE is a third longer (base64url), and a job cannot be split."""


def check_reply_to(reply_to: object, client: str | None) -> str:
    """Return the reply address if it is the caller's own; raises ReplyNotAllowed.

    Without a client name, only the general prefix of reply queues can be checked; such a sender gets
    nothing but the error that the message has no user_id.
    """
    if not isinstance(reply_to, str) or not reply_to:
        raise ReplyNotAllowed("the message has no reply_to, expected a queue of the caller's")
    if reply_to.startswith(DIRECT_REPLY):
        return reply_to
    prefix = reply_prefix(client) if client is not None else REPLY_PREFIX
    if not reply_to.startswith(prefix) or not reply_to.isascii() or len(reply_to) > 255:  # noqa: PLR2004 - AMQP short string
        raise ReplyNotAllowed(
            f"reply_to {reply_to[:80]!r} is not the caller's, expected a queue named {prefix}*"
        )
    return reply_to


def messages(answer: Answer, reply_to: str, correlation_id: str) -> list[Outgoing]:
    """Return the reply messages of one answer, in Celery's result envelope."""
    head = b'{"task_id":' + msgspec.json.encode(correlation_id) + b',"status":"SUCCESS","result":'
    return [
        Outgoing(
            head + body + b',"traceback":null,"children":[]}',
            reply_to,
            properties={"correlation_id": correlation_id},
        )
        for body in parts(answer)
    ]


def queued(answer: Answer, queue: str, correlation_id: str, key: dict[str, str] | None) -> list[Outgoing]:
    """Return the messages of one answer for a durable queue, each a JWE to the client's key (I5).

    Without a key they are plain; the policy has checked that every token's route allows this.
    """
    bodies = parts(answer)
    if key is not None and max(map(len, bodies)) > MAX_ENCRYPTED_BYTES:
        too_large = InvalidRequest(f"the job exceeds {MAX_ENCRYPTED_BYTES} bytes with its tokens; split it")
        bodies = parts(failure(answer.request_id, too_large))
    return [
        Outgoing(
            body if key is None else encrypted(body, key),
            queue,
            properties={"correlation_id": correlation_id},
            headers={"minter-client-key": str(key.get("kid", "")) if key else ""},
            persistent=True,
            content_type="application/json" if key is None else "application/jose",
        )
        for body in bodies
    ]


def dead_letter(body: bytes, headers: dict[str, Any], client: str | None, why: MinterError) -> Outgoing:
    """Return a message for the dead-letter queue: the unchanged request, with the reason in its headers.

    Only an FTS job may hold tokens, if its sender left some in it. A body that seems to hold a token is
    therefore dropped (I5).
    """
    return Outgoing(
        without_tokens(body),
        DEAD_LETTER_QUEUE,
        headers={
            "task": str(headers.get("task", ""))[:255],
            "minter-client": client or "",
            "minter-reason": why.reason,
            "minter-description": why.message[:MAX_DEAD_LETTER_HEADER],
        },
        persistent=True,
    )
