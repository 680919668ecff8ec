"""The client's AMQP transport: sends requests to the engine and receives the answers.

The transport has one connection, a reply queue that is deleted with the connection, and overlapping
confirms. After a lost connection it connects again, and sends unanswered requests again under the same ids.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import kombu
import msgspec
from msgspec import Struct, structs

from minter.broker.connections import cause, connect, user
from minter.broker.publisher import CONFIRM_SECONDS, Outgoing, Publisher
from minter.contract.messages import Answer
from minter.contract.names import REQUEST_EXCHANGE, client_requests, reply_prefix
from minter.errors import InvalidRequest, Unavailable

CONNECT_SECONDS = 5.0
RECONNECT_SECONDS = 0.5
FIRST_RESEND_SECONDS = 5.0
"""Time until an unanswered request is sent again on the embedded broker; it doubles at each repetition.
This broker loses the message that it is handing to a worker at the moment when the worker is killed."""
_NO_EXCHANGE = (403, 404)
"""AMQP's codes for an exchange that the client may not write to, and for one that does not exist."""


class AmqpTransport:
    """A connection to the engine's broker; not for use by several threads at once.

    `client` is the name that the operators registered; on RabbitMQ it is the AMQP user of the URL.
    At most `window` requests are under way at once.
    """

    def __init__(
        self,
        broker_url: str,
        client: str | None = None,
        *,
        timeout_seconds: float,
        ca: str | None = None,
        window: int = 64,
    ) -> None:
        sender = user(broker_url)
        self.client = client or sender
        if not self.client:
            raise InvalidRequest("no client: name it, or put the AMQP user into the broker URL")
        self.timeout_seconds = timeout_seconds
        self.window = window
        self._user_id = sender or None
        self._exchange = self._own = client_requests(sender) if sender else REQUEST_EXCHANGE
        self._connection = connect(broker_url, ca, min(CONNECT_SECONDS, timeout_seconds))
        self._publisher = Publisher(self._connection, min(CONFIRM_SECONDS, timeout_seconds))
        self._consumer: kombu.Consumer | None = None
        self._reply_to = ""
        self._parts: dict[str, dict[int, Answer]] = {}
        self._answers: dict[str, Answer] = {}
        self._expected: set[str] = set()

    def __repr__(self) -> str:
        """Name the client; the URL may hold a password."""
        return f"<AmqpTransport of {self.client}>"

    def close(self) -> None:
        """Close the connection, which deletes the reply queue."""
        self._consumer = None
        self._publisher.close()

    def ask(self, task: str, requests: Sequence[Struct]) -> Iterator[Answer]:
        """Send requests, at most `window` of them under way at once, and yield their answers in order.

        After a lost connection it connects again, and sends unanswered requests again under the same ids.
        Raises Unavailable if no answer arrives for `timeout_seconds`.
        """
        waiting: dict[str, Outgoing] = {}
        numbered = [(str(number), request) for number, request in enumerate(requests)]
        salt = uuid.uuid4().hex
        unsent = iter(numbered)
        for number, _ in numbered:
            correlation_id = f"{salt}.{number}"
            last_news = time.monotonic()
            resend_after = FIRST_RESEND_SECONDS
            while correlation_id not in self._answers:
                trouble: Exception | None = None
                try:
                    self._connect(waiting)
                    fresh = [
                        self._message(task, f"{salt}.{n}", r)
                        for n, r in islice(unsent, max(0, self.window - len(waiting)))
                    ]
                    self._expected.update(str(m.properties["correlation_id"]) for m in fresh)
                    waiting |= {str(m.properties["correlation_id"]): m for m in fresh}
                    if fresh:
                        self._publish(fresh)
                    if not self._publisher.confirms and time.monotonic() - last_news > resend_after:
                        resend_after *= 2
                        self._publish(list(waiting.values()))
                    before = len(self._answers)
                    if correlation_id not in self._answers:
                        self._connection.drain_events(timeout=1.0)
                    if len(self._answers) != before:
                        last_news = time.monotonic()
                        resend_after = FIRST_RESEND_SECONDS
                except TimeoutError:
                    pass
                except self._publisher.errors as error:
                    trouble = error
                    self._disconnected(error)
                    self._check_time(last_news, error)
                    time.sleep(min(RECONNECT_SECONDS, self.timeout_seconds))
                self._check_time(last_news, trouble)
                for answered in [c for c in waiting if c in self._answers]:
                    del waiting[answered]
            self._expected.discard(correlation_id)
            yield self._answers.pop(correlation_id)

    def _disconnected(self, error: Exception) -> None:
        """Forget the connection; use the common exchange if the client's own is not set up yet.

        After the loss of a later connection its own is tried again.
        """
        self._consumer = None
        self._publisher.close()
        missing = getattr(error, "code", None) in _NO_EXCHANGE and self._own in str(error)
        self._exchange = REQUEST_EXCHANGE if missing else self._own

    def _check_time(self, since: float, error: Exception | None) -> None:
        if time.monotonic() - since > self.timeout_seconds:
            why = f" ({cause(error)})" if error else ""
            raise Unavailable(
                f"no answer within {self.timeout_seconds:.0f} s{why}; the same request_id may be sent again"
            ) from error

    def _connect(self, waiting: Mapping[str, Outgoing]) -> None:
        """Make sure that there is a reply queue; after a lost connection, send `waiting` requests again."""
        if self._consumer is not None and self._connection.connected:
            return
        self._publisher.close()
        self._connection.connect()
        self._reply_to = f"{reply_prefix(self.client)}{uuid.uuid4().hex}"
        channel = self._connection.channel()
        queue = kombu.Queue(self._reply_to, channel=channel, durable=False, exclusive=True, auto_delete=True)
        consumer = kombu.Consumer(channel, [queue], on_message=self._receive, no_ack=True)
        consumer.consume()
        self._consumer = consumer
        again = list(waiting.values())
        for message in again:
            message.properties = {**message.properties, "reply_to": self._reply_to}
            message.exchange = message.routing_key = self._exchange
        if again:
            self._publish(again)

    def _publish(self, messages: Sequence[Outgoing]) -> None:
        lost = self._publisher.publish(messages)
        if lost.gone:
            raise Unavailable(
                f"the broker has no queue behind {lost.gone[0].exchange}; is the engine set up?"
            )
        if lost.refused:
            raise ConnectionError("the broker refused requests (nack): its queue is full or has no leader")

    def _message(self, task: str, correlation_id: str, request: Struct) -> Outgoing:
        properties = {"reply_to": self._reply_to, "correlation_id": correlation_id}
        if self._user_id:
            properties["user_id"] = self._user_id
        body = msgspec.json.encode([[request], {}, {}])
        headers = {"task": task, "id": correlation_id, "lang": "py", "argsrepr": "", "kwargsrepr": ""}
        return Outgoing(body, self._exchange, self._exchange, properties, headers, persistent=True)

    def _receive(self, message: Any) -> None:
        body = message.body if isinstance(message.body, bytes) else message.body.encode()
        correlation_id = message.properties.get("correlation_id") or ""
        if correlation_id not in self._expected:
            return  # a second answer to a request that was sent twice
        answer = _envelope.decode(body).result
        if answer.parts > 1:
            arrived = self._parts.setdefault(correlation_id, {})
            arrived[answer.part] = answer
            if len(arrived) < answer.parts:
                return
            del self._parts[correlation_id]
            answer = structs.replace(
                answer,
                tokens=[t for a in arrived.values() for t in a.tokens],
                urls=[u for a in arrived.values() for u in a.urls],
                pending=[w for a in arrived.values() for w in a.pending],
                refusals=[r for a in arrived.values() for r in a.refusals],
            )
        self._answers[correlation_id] = answer


class _Envelope(Struct):
    result: Answer


_envelope = msgspec.json.Decoder(_Envelope)
