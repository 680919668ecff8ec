"""One message of a batch: what it says, and everything that is published for it."""

import logging
from typing import Any

import msgspec
from msgspec import Raw, Struct

from minter.broker.publisher import Outgoing
from minter.contract import names
from minter.contract.messages import MAX_BODY_BYTES, Answer
from minter.errors import InvalidRequest, MinterError, RequestError, UnknownClient
from minter.tasks import dispatch
from minter.tokens.jwe import CANNOT_ENCRYPT
from workers import replies

logger = logging.getLogger("minter.batching")


class PendingMessage(Struct, eq=False):
    """A message that waits to be served; `client` is the sender that the broker names.

    `refusals` counts how often the client's durable queue refused the answer.
    """

    message: Any
    task: str
    client: str | None
    redelivered: bool = False
    refusals: int = 0
    queued: list[Outgoing] = []
    rejected: MinterError | None = None
    """Why the message is no request, so that it is answered and dead-lettered in its turn."""

    @property
    def headers(self) -> dict[str, Any]:
        """The headers, or an empty dict if they are not a table."""
        headers = self.message.headers
        return headers if isinstance(headers, dict) else {}

    @property
    def body(self) -> bytes:
        """The body of the message in bytes."""
        body = self.message.body
        # py-amqp may have decoded the body by the sender's charset; bad UTF-8 gets a typed error later.
        return body if isinstance(body, bytes) else str(body).encode("utf-8", "surrogatepass")

    @property
    def correlation_id(self) -> str:
        """The sender's correlation id, cut to the 255 bytes of UTF-8 that AMQP can send back."""
        text = str(self.message.properties.get("correlation_id") or "")
        return text.encode("utf-8", "replace")[:255].decode("utf-8", "ignore")


def outgoing(pending: PendingMessage, answer: Answer, dead: dict[int, MinterError]) -> list[Outgoing]:
    """Return everything to publish for one message: its answers, and itself if it is dead-lettered."""
    why = dead.get(id(pending))
    told = [*pending.queued]
    try:
        reply_to = replies.check_reply_to(pending.message.properties.get("reply_to"), pending.client)
    except RequestError as error:
        why = why or (None if pending.queued else error)
    else:
        told += replies.messages(answer, reply_to, pending.correlation_id)
    if why is not None:
        unknown = (answer.error or {}).get("reason") == UnknownClient.reason
        body = pending.body if _is_request(pending) and not unknown else replies.NO_REQUEST
        told.append(replies.dead_letter(body, pending.headers, pending.client, why))
    return told


def _is_request(pending: PendingMessage) -> bool:
    """Say whether a message is a client's request, which operators may want to see and to serve again."""
    if pending.task not in names.PUBLIC_TASKS or pending.client is None or len(pending.body) > MAX_BODY_BYTES:
        return False
    try:
        dispatch.argument_of(pending.task, pending.body)
    except InvalidRequest:
        return False
    return True


def queued(
    pending: PendingMessage, answer: Answer, queue: str, key: dict[str, str] | None
) -> tuple[list[Outgoing], dict[str, Any] | None]:
    """Return the messages for a client's durable queue, or the error if its key cannot be encrypted to."""
    try:
        return replies.queued(answer, queue, pending.correlation_id, key), None
    except CANNOT_ENCRYPT:
        logger.exception("answers for client %s cannot be encrypted to its jwe_key", pending.client)
        why = (
            "the answer cannot be encrypted to the client's jwe_key; register another, then fetch the tokens"
        )
        return [], InvalidRequest(why).as_dict()


class _Identified(Struct):
    request_id: str | None = None


_identified = msgspec.json.Decoder(tuple[list[_Identified], Raw, Raw])


def request_id_of(body: bytes) -> str | None:
    """Return the request_id in the body of a message that may be invalid otherwise, or None."""
    try:
        args, _, _ = _identified.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return args[0].request_id[:64] if args and args[0].request_id else None
