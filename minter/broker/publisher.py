"""Queues, and publishing with overlapping confirms, on RabbitMQ and on the embedded broker.

RabbitMQ confirms even a message to a queue that no longer exists, but returns it if it is `mandatory`, and
it refuses a message (nack) that a full queue does not take. `publish` returns both, each by itself, so
one queue's trouble stays its own. A broker without confirms has taken a message when the call returns.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import kombu
from amqp.exceptions import FrameError, FrameSyntaxError, InvalidCommand, UnexpectedFrame
from kombu import Exchange, Queue
from kombu.exceptions import BatchPublishError
from kombu.transport import virtual
from msgspec import Struct

from minter.broker.connections import end
from minter.contract import names

logger = logging.getLogger(__name__)

CONFIRM_SECONDS = 30.0
MAX_UNCONFIRMED = 1_000
"""Number of unconfirmed messages at which publishing waits for the broker."""

PERSISTENT, TRANSIENT = 2, 1

DELIVERY_LIMIT = 1_000
"""Most deliveries of a message; RabbitMQ 4 would drop it after 20, which outages can cause (I3)."""

_OURS = (FrameError, FrameSyntaxError, InvalidCommand, UnexpectedFrame, KeyError)
"""Errors of a connection that what was sent may have caused; KeyError is one of kombu's for Valkey."""

_QUORUM = {
    "x-queue-type": "quorum",
    "x-delivery-limit": DELIVERY_LIMIT,
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": names.DEAD_LETTER_QUEUE,
}


def queues() -> list[Queue]:
    """Return the engine's queues; `minter broker setup` declares them all."""
    return [
        _bound(names.REQUEST_QUEUE, names.REQUEST_EXCHANGE),
        _bound(names.INTERNAL_QUEUE, names.INTERNAL_EXCHANGE),
    ]


def client_queue(client: str) -> Queue:
    """Return the queue for the requests of one client, with an exchange of its own."""
    name = names.client_requests(client)
    return _bound(name, name)


def _bound(name: str, exchange: str) -> Queue:
    return Queue(name, Exchange(exchange, durable=True), routing_key=name, queue_arguments=_QUORUM)


def dead_letter_queue() -> Queue:
    """Return the dead-letter queue, for messages that no worker can serve."""
    return Queue(names.DEAD_LETTER_QUEUE, queue_arguments={"x-queue-type": "quorum"})


def declare(connection: kombu.Connection, durable: Iterable[str] = (), clients: Iterable[str] = ()) -> None:
    """Declare exchanges and queues, the clients' `durable` queues and the queues for their requests.

    A repetition changes nothing.
    """
    listed = [Queue(name, queue_arguments=_QUORUM) for name in durable]
    with connection.channel() as channel:
        for queue in (dead_letter_queue(), *queues(), *map(client_queue, clients), *listed):
            queue(channel).declare()


def count_waiting(connection: kombu.Connection, queue: str) -> int | None:
    """Return how many messages wait in a queue, None if it does not exist."""
    try:
        with connection.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).message_count)
    except connection.channel_errors:
        return 0 if "redis" in str(connection.transport.driver_type) else None  # Valkey has no empty queues


class Outgoing(Struct, eq=False):
    """One message to publish; its `repr` hides the body."""

    body: bytes
    routing_key: str
    exchange: str = ""
    properties: Mapping[str, Any] = {}
    headers: Mapping[str, Any] = {}
    persistent: bool = False
    content_type: str = "application/json"

    def __repr__(self) -> str:
        """Name exchange and routing key without showing the body."""
        return f"Outgoing({self.exchange!r}, {self.routing_key!r}, {len(self.body)} bytes)"


class Undelivered(Struct, frozen=True):
    """Messages that did not arrive: no queue took those in `gone`, and a queue refused each of `refused`."""

    gone: list[Outgoing] = []
    refused: list[Outgoing] = []

    def __bool__(self) -> bool:
        """Whether any message did not arrive."""
        return bool(self.gone or self.refused)


class Publisher:
    """Publishes on a channel of its own; the caller must try again after a broken connection."""

    def __init__(self, connection: kombu.Connection, confirm_seconds: float = CONFIRM_SECONDS) -> None:
        self.connection = connection
        self._confirm_seconds = confirm_seconds
        self._channel: Any = None
        self._tag = 0
        self._waiting: dict[int, Outgoing] = {}
        self._returned: list[Outgoing] = []
        self._refused: list[Outgoing] = []

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Exceptions that `publish` raises when the broker is not reachable."""
        return (*self.connection.connection_errors, *self.connection.channel_errors)

    def is_away(self, error: Exception) -> bool:
        """Say whether one of `errors` says nothing about the messages: the connection was lost."""
        return isinstance(error, tuple(self.connection.connection_errors)) and not isinstance(error, _OURS)

    @property
    def confirms(self) -> bool:
        """Say whether the broker confirms messages and keeps them until they are acknowledged."""
        return hasattr(self._open(), "confirm_select")

    def publish(self, messages: Iterable[Outgoing], halfway: Callable[[], None] | None = None) -> Undelivered:
        """Publish all messages, wait for every confirm, and return the messages that no queue took.

        `halfway` is called when half of the messages are sent. Raises one of `errors` if the broker
        disconnects: then any message may or may not have arrived, and all should be sent again.
        """
        messages = list(messages)
        channel = self._open()
        self._returned, self._refused = [], []
        if self.confirms:
            self._publish_confirmed(channel, messages, halfway)
        else:
            self._publish_batch(channel, messages, halfway)
        return Undelivered(self._returned, self._refused)

    def close(self) -> None:
        """Drop the connection; the next `publish` makes a new one."""
        self._channel = None
        self._waiting.clear()
        end(self.connection)

    def _open(self) -> Any:
        if not self.connection.connected:
            self._channel = None
            end(self.connection)  # a broken transport cannot be repaired, only replaced
            self.connection.connect()
        if self._channel is None:
            self._waiting.clear()
            channel = self.connection.channel()
            if hasattr(channel, "confirm_select"):
                channel.confirm_select()
                channel.events["basic_ack"].add(self._on_ack)
                channel.events["basic_nack"].add(self._on_nack)
                channel.events["basic_return"].add(self._on_return)
            self._channel, self._tag = channel, 0
        return self._channel

    def _publish_confirmed(
        self, channel: Any, messages: Sequence[Outgoing], halfway: Callable[[], None] | None
    ) -> None:
        for number, message in enumerate(messages):
            if halfway is not None and number == len(messages) // 2:
                halfway()
            self._tag += 1
            self._waiting[self._tag] = message
            channel.basic_publish(
                _prepared(channel, message),
                exchange=message.exchange,
                routing_key=message.routing_key,
                mandatory=True,
            )
            if len(self._waiting) >= MAX_UNCONFIRMED:
                self._wait(MAX_UNCONFIRMED // 2)
        self._wait(0)

    def _publish_batch(
        self, channel: Any, messages: Sequence[Outgoing], halfway: Callable[[], None] | None
    ) -> None:
        """Publish in one round trip; messages are on the broker's disk when it answers."""
        batch = channel.create_publish_batch(MAX_UNCONFIRMED)
        try:
            for number, message in enumerate(messages):
                if halfway is not None and number == len(messages) // 2:
                    batch.flush()
                    halfway()
                batch.publish(
                    _prepared(channel, message),
                    exchange=message.exchange,
                    routing_key=message.routing_key,
                )
            batch.flush()
        except BatchPublishError as error:
            raise ConnectionError("the broker went away while publishing") from error
        finally:
            batch.close()

    def _wait(self, most: int) -> None:
        deadline = time.monotonic() + self._confirm_seconds
        while len(self._waiting) > most:
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise ConnectionError(
                    f"no confirm from the broker within {self._confirm_seconds:g} s: is it blocked?"
                )
            self.connection.drain_events(timeout=left)

    def _settle(self, tag: int, multiple: bool) -> list[Outgoing]:
        if not multiple:
            return [self._waiting.pop(tag)] if tag in self._waiting else []
        return [self._waiting.pop(t) for t in sorted(self._waiting) if t <= tag]

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._settle(tag, multiple)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused += self._settle(tag, multiple)

    def _on_return(self, _error: Any, _exchange: str, routing_key: str, message: Any) -> None:
        correlation = message.properties.get("correlation_id")
        self._returned += [
            m
            for m in self._waiting.values()
            if m.routing_key == routing_key and m.properties.get("correlation_id") == correlation
        ][:1]


def acknowledge(messages: Sequence[Any], errors: tuple[type[Exception], ...]) -> None:
    """Acknowledge served messages; on the embedded broker all in one round trip.

    kombu itself would make one round trip, with a write to disk, for each message. If the broker is not
    reachable, RabbitMQ's error is logged and the embedded broker's is raised; the messages are delivered
    again.
    """
    channel = messages[0].channel
    if not hasattr(channel, "conn_or_acquire"):
        for message in messages:
            message.ack_log_error(logger, errors)
        return
    qos, tags = channel.qos, [m.delivery_tag for m in messages]
    with channel.conn_or_acquire() as client:
        client.pipeline().zrem(qos.unacked_index_key, *tags).hdel(qos.unacked_key, *tags).execute()
    for message in messages:
        virtual.QoS.ack(qos, message.delivery_tag)
        message._state = "ACK"  # noqa: SLF001 - kombu's own ack sets this last


def _prepared(channel: Any, message: Outgoing) -> Any:
    return channel.prepare_message(
        message.body,
        content_type=message.content_type,
        content_encoding="utf-8",
        headers=dict(message.headers),
        properties={
            **message.properties,
            "delivery_mode": PERSISTENT if message.persistent else TRANSIENT,
        },
    )
