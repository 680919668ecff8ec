"""The queues, and publishing with confirms that do not wait for each other, on either broker.

RabbitMQ confirms a message to a queue that no longer exists; `mandatory` shows it, so publishing
returns the messages that reached nobody. A broker without confirms has taken a message when the
call returns.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kombu
from kombu import Exchange, Queue
from kombu.exceptions import BatchPublishError
from kombu.transport import virtual
from msgspec import Struct

from minter.contract import names

logger = logging.getLogger(__name__)

CONFIRM_SECONDS = 30.0
MAX_UNCONFIRMED = 1_000
"""Messages under way before publishing waits for the broker."""

PERSISTENT, TRANSIENT = 2, 1

DELIVERY_LIMIT = 1_000
"""RabbitMQ 4 would drop a message after 20 deliveries, which outages can cause (I3)."""

_QUORUM = {
    "x-queue-type": "quorum",
    "x-delivery-limit": DELIVERY_LIMIT,
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": names.DEAD_LETTER_QUEUE,
}


def queues() -> list[Queue]:
    """Return the engine's queues; `minter broker setup` declares them all."""
    return [
        Queue(name, Exchange(exchange, durable=True), routing_key=name, queue_arguments=_QUORUM)
        for name, exchange in (
            (names.REQUEST_QUEUE, names.REQUEST_EXCHANGE),
            (names.INTERNAL_QUEUE, names.INTERNAL_EXCHANGE),
        )
    ]


def dead_letter_queue() -> Queue:
    """Return the queue for messages that nobody can serve."""
    return Queue(names.DEAD_LETTER_QUEUE, queue_arguments={"x-queue-type": "quorum"})


def declare(connection: kombu.Connection, durable: Iterable[str] = ()) -> None:
    """Declare exchanges, queues and clients' `durable` ones; declaring again changes nothing."""
    listed = [Queue(name, queue_arguments=_QUORUM) for name in durable]
    with connection.channel() as channel:
        for queue in (dead_letter_queue(), *queues(), *listed):
            queue(channel).declare()


def trust(ca: str | None) -> dict[str, Any]:
    """Return what `ssl.create_default_context` is to trust: a file, a hashed directory, or the system's."""
    return {} if not ca else {"capath": ca} if Path(ca).is_dir() else {"cafile": ca}


def tls(broker_url: str, ca: str | None = None) -> dict[str, Any] | bool:
    """Return kombu's `ssl` option for an URL: over amqps the broker's certificate is always verified.

    kombu alone would take any certificate. `ca` is a file or a hashed directory, the system's if None.
    """
    if not broker_url.startswith("amqps"):
        return False
    return {
        "context": {**trust(ca), "check_hostname": True},
        "server_hostname": urlsplit(broker_url).hostname or "",
    }


def connect(broker_url: str, ca: str | None = None) -> kombu.Connection:
    """Return a connection to the broker, to be opened at first use."""
    return kombu.Connection(broker_url, ssl=tls(broker_url, ca), connect_timeout=5)


class Outgoing(Struct, eq=False):
    """One message on its way out; its `repr` hides the body."""

    body: bytes
    routing_key: str
    exchange: str = ""
    properties: Mapping[str, Any] = {}
    headers: Mapping[str, Any] = {}
    persistent: bool = False
    content_type: str = "application/json"

    def __repr__(self) -> str:
        """Name the message's way without showing what it carries."""
        return f"Outgoing({self.exchange!r}, {self.routing_key!r}, {len(self.body)} bytes)"


class Publisher:
    """A channel of its own for publishing; broken connections are the caller's to retry."""

    def __init__(self, connection: kombu.Connection) -> None:
        self.connection = connection
        self._channel: Any = None
        self._tag = 0
        self._waiting: dict[int, Outgoing] = {}
        self._returned: list[Outgoing] = []
        self._refused: list[Outgoing] = []

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What `publish` raises when the broker is away."""
        return (*self.connection.connection_errors, *self.connection.channel_errors)

    @property
    def confirms(self) -> bool:
        """Say whether the broker confirms messages and keeps them until they are acknowledged."""
        return hasattr(self._open(), "confirm_select")

    def publish(
        self, messages: Iterable[Outgoing], halfway: Callable[[], None] | None = None
    ) -> list[Outgoing]:
        """Publish all, wait for every confirm, and return those that no queue took.

        Raises one of `errors` if the broker goes away or refuses: then any of them may or may not
        have arrived, and all should be sent again.
        """
        messages = list(messages)
        channel = self._open()
        self._returned, self._refused = [], []
        if self.confirms:
            self._publish_confirmed(channel, messages, halfway)
        else:
            self._publish_batch(channel, messages, halfway)
        return self._returned

    def close(self) -> None:
        """Drop the connection; the next `publish` makes a new one."""
        self._channel = None
        self._waiting.clear()
        self.connection.release()

    def _open(self) -> Any:
        if not self.connection.connected:
            self._channel = None
            self.connection.release()  # a broken transport is not mended, only replaced
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
        if self._refused:
            self.close()
            raise ConnectionError(f"the broker refused {len(self._refused)} messages (nack)")

    def _publish_batch(
        self, channel: Any, messages: Sequence[Outgoing], halfway: Callable[[], None] | None
    ) -> None:
        """Publish in one round trip; what the broker took when it answers is on its disk."""
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
        deadline = time.monotonic() + CONFIRM_SECONDS
        while len(self._waiting) > most:
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise ConnectionError(f"no confirm from the broker within {CONFIRM_SECONDS:.0f} s")
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

    kombu would take one, with a write to disk, for each. A broker that is away is logged and
    raises; it delivers the messages again.
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
        message._state = "ACK"  # noqa: SLF001 - what kombu's own ack notes last


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
