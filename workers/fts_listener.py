"""The reader of FTS's monitoring messages, `minter events`: they make tokens active and finished.

A message is acknowledged when its event is committed, so the broker delivers it again after a crash; to
record it twice changes nothing. Each broker has one connection, made again with back-off when it breaks.
"""

import logging
import signal
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

import stomp
from msgspec import Struct
from prometheus_client import CollectorRegistry, Histogram

from minter import alive, logs
from minter.backoff import Backoff
from minter.database.ended import EndedToken
from minter.errors import InvalidRequest, SettingsError, Unavailable
from minter.fts.events import FTSEvent, read_event
from minter.heartbeats import Heartbeat
from minter.metrics import EVENTS, LAST_EVENT, LIFE_LEFT, WAITED, new_counter, new_gauge, serve_process
from minter.sections import FTSEventsSettings
from minter.service import Service, load_settings
from minter.storages.urls import host_of
from minter.tasks.lifecycle import Lifecycle

logger = logging.getLogger("minter.events")

TOGETHER, TOGETHER_SECONDS = 500, 0.5
"""One transaction records at most so many messages, or those that arrive in so many seconds."""
PREFETCH = 2 * TOGETHER
CONNECT_SECONDS = 10.0
HEARTBEAT_MILLISECONDS = 15_000
SOCKET_SECONDS = 60.0
"""A broker that is silent for longer, heartbeats included, is given up; so is a TLS handshake."""
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 1.0, 60.0
LIFE_BUCKETS = (0, 60, 300, 1800, 3600, 7200, 14_400, 28_800, 86_400, 172_800, 345_600, 691_200)
"""Upper bounds of the histograms of waits and lifetimes, in seconds."""
MAX_FOREIGN = 100
"""Names of foreign VOs that are logged, at most."""


class Message(Struct, frozen=True):
    """One message, and the connection on which it must be acknowledged."""

    source: "Source"
    connection: Any
    ack: str
    body: bytes


class Listener(stomp.ConnectionListener):
    """Puts messages into the queue; slow work here would delay the connection's heartbeats."""

    def __init__(self, source: "Source", connection: Any) -> None:
        self._source = source
        self._connection = connection
        self.connected, self.lost, self.answered = Event(), Event(), Event()

    def on_connected(self, _frame: Any) -> None:
        """Note that the broker has accepted the connection."""
        self.connected.set()
        self.answered.set()

    def on_message(self, frame: Any) -> None:
        """Put a message into the queue."""
        body = frame.body if isinstance(frame.body, bytes) else frame.body.encode()
        self._source.queue.put(Message(self._source, self._connection, frame.headers["ack"], body))

    def on_error(self, frame: Any) -> None:
        """Log the broker's error, whose cause may be in its body; the broker then closes the connection."""
        body = frame.body.decode(errors="replace") if isinstance(frame.body, bytes) else str(frame.body or "")
        told = f"{frame.headers.get('message', '')}: {' '.join(body.split())}"
        logger.warning("broker %s: %s", self._source.address, told.strip(": ")[:300])
        self.on_disconnected()

    def on_disconnected(self) -> None:
        """Note that the connection is lost."""
        self.lost.set()
        self.answered.set()


class Source:
    """One broker of one VO's FTS; `run` needs a thread of its own."""

    def __init__(
        self,
        wanted: FTSEventsSettings,
        address: str,
        folder: Path,
        password: str,
        queue: "Queue[Message]",
        issuer: str,
    ) -> None:
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal():
            raise SettingsError(f"fts_events: broker {address!r} is not host:port")
        self.wanted = wanted
        self.fts_vo = wanted.fts_vo or host_of(issuer)
        """FTS's name of the VO: the issuer's host, unless FTS or these settings say otherwise."""
        self.address = address
        self.queue = queue
        self._place = (host, int(port))
        self._folder = folder
        self._password = password

    def __repr__(self) -> str:
        """Name the broker; the password stays hidden."""
        return f"Source({self.address})"

    def run(self, stopped: Event) -> None:
        """Stay connected to the broker until `stopped`."""
        backoff = Backoff(FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS)
        while not stopped.is_set():
            started = time.monotonic()
            try:
                self._consume(stopped)
            except (stomp.exception.StompException, OSError, ValueError) as error:
                logger.warning("broker %s cannot be reached (%s)", self.address, type(error).__name__)
            if time.monotonic() - started > MAX_DELAY_SECONDS:
                backoff.reset()
            stopped.wait(backoff.pause())

    def _consume(self, stopped: Event) -> None:
        wanted = self.wanted
        connection = stomp.Connection12(
            [self._place], auto_decode=False, reconnect_attempts_max=1, vhost=wanted.host or self._place[0],
            heartbeats=(HEARTBEAT_MILLISECONDS, HEARTBEAT_MILLISECONDS), timeout=SOCKET_SECONDS,
        )  # fmt: skip
        if wanted.tls:
            connection.set_ssl(
                for_hosts=[self._place], ca_certs=self._path(wanted.ca),
                cert_file=self._path(wanted.certificate), key_file=self._path(wanted.key),
            )  # fmt: skip
        listener = Listener(self, connection)
        connection.set_listener("", listener)
        login = {"username": wanted.user, "passcode": self._password} if wanted.user else {}
        connection.connect(**login, wait=False)
        try:
            if not listener.answered.wait(CONNECT_SECONDS):
                raise TimeoutError("no answer")
            if not listener.connected.is_set():
                raise ConnectionAbortedError("the broker ended the connection")
            for number, destination in enumerate(wanted.destinations):
                many = {"prefetch-count": str(PREFETCH), "activemq.prefetchSize": str(PREFETCH)}
                connection.subscribe(destination, id=str(number), ack="client-individual", headers=many)
            logger.info("listening to %s", self.address)
            while not stopped.is_set() and not listener.lost.wait(1.0):
                pass
        finally:
            if connection.is_connected():
                connection.disconnect()
            connection.transport.disconnect_socket()  # also of a broker that gave no answer

    def _path(self, name: str) -> str | None:
        return str(self._folder / name) if name else None


class TransferMetrics:
    """How long the tokens of transfers that ended had waited, and what was left of their lifetimes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._waited, self._left = (
            Histogram(spec.name, spec.help, spec.labels, buckets=LIFE_BUCKETS, registry=registry)
            for spec in (WAITED, LIFE_LEFT)
        )

    def observe(self, token: EndedToken) -> None:
        """Count one token whose transfer ended."""
        if token.waited is not None:
            self._waited.labels(token.vo, token.mode).observe(token.waited)
        self._left.labels(token.vo, token.mode).observe(max(0.0, token.left_at_end))


class EventConsumer:
    """Records the events of messages in batches, in the order of arrival."""

    def __init__(self, lifecycle: Lifecycle, registry: CollectorRegistry, clock: Any) -> None:
        self._lifecycle = lifecycle
        self._clock = clock
        self._count = new_counter(EVENTS, registry)
        self._last = new_gauge(LAST_EVENT, registry)
        self.queue: Queue[Message] = Queue(4 * PREFETCH)
        self.stopped = Event()
        self._foreign: set[str] = set()
        self._seen: dict[str, datetime] = {}

    def facts(self) -> dict[str, object]:
        """Return when each broker's last message came, for `minter status`."""
        return {"last_events": {address: at.isoformat() for address, at in self._seen.copy().items()}}

    def run(self) -> None:
        """Record events until `stopped`; while Postgres is down, no message is acknowledged."""
        backoff = Backoff(FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS)
        batch: list[Message] = []
        while not self.stopped.is_set():
            alive.turn()
            batch = batch or self._next_batch()
            try:
                self._note(batch)
            except Unavailable as error:
                pause = backoff.pause()
                logger.warning("events cannot be recorded, trying again in %.0f s: %s", pause, error)
                self.stopped.wait(pause)
                continue
            except Exception as error:  # noqa: BLE001 - logged by `_alone`
                self._alone(batch, error)
            batch = []
            backoff.reset()

    def _alone(self, batch: Sequence[Message], error: Exception) -> None:
        """Record each message of a failed batch alone; drop a message that fails alone."""
        if len(batch) > 1:
            logger.warning("a batch of %d messages failed, recording each alone: %s", len(batch), error)
            for message in batch:
                try:
                    self._note([message])
                except Unavailable:
                    logger.warning("Postgres is down: a message is not recorded, and will come again")
                except Exception as alone:  # noqa: BLE001 - logged below
                    self._alone([message], alone)
            return
        (message,) = batch
        logger.error("a message of %s is dropped: %s", message.source.address, type(error).__name__)
        self._count.labels(message.source.wanted.vo, "broken").inc()
        _acknowledge(message)

    def _next_batch(self) -> list[Message]:
        batch: list[Message] = []
        until = time.monotonic() + TOGETHER_SECONDS
        while len(batch) < TOGETHER and (left := until - time.monotonic()) > 0:
            try:
                batch.append(self.queue.get(timeout=left))
            except Empty:
                break
        return batch

    def _note(self, batch: Sequence[Message]) -> None:
        """Record one batch, then acknowledge its messages; raises Unavailable, with none acknowledged."""
        by_vo: dict[str, list[FTSEvent]] = {}
        outcomes: list[tuple[str, str, int]] = []
        for message in batch:
            vo, fts_vo = message.source.wanted.vo, message.source.fts_vo
            try:
                event = read_event(message.body)
            except InvalidRequest as error:
                logger.warning("a message of %s is dropped: %s", message.source.address, error)
                outcomes.append((vo, "broken", 1))
                continue
            if event is None:
                outcomes.append((vo, "nothing", 1))
            elif event.vo == fts_vo:
                by_vo.setdefault(vo, []).append(event)
            else:
                outcomes.append((vo, "foreign", 1))
                self._tell_foreign(event.vo, vo, fts_vo)
        for vo, events in by_vo.items():
            changed, unknown = self._lifecycle.events(vo, events, self._clock())
            outcomes += [(vo, "noted", len(events) - unknown), (vo, "unknown", unknown)]
            logs.event(logger, "events noted", vo=vo, events=len(events), unknown=unknown, changed=changed)
        for vo, outcome, count in outcomes:
            self._count.labels(vo, outcome).inc(count)
        for message in batch:
            self._last.labels(message.source.address).set_to_current_time()
            self._seen[message.source.address] = self._clock()
            _acknowledge(message)

    def _tell_foreign(self, foreign: str, vo: str, fts_vo: str) -> None:
        """Log a VO that is not ours once: where FTS names ours otherwise, every event is foreign."""
        if foreign not in self._foreign and len(self._foreign) < MAX_FOREIGN:
            self._foreign.add(foreign)
            logger.warning(
                "events of VO %s are not for VO %s, which FTS is expected to call %s; else set fts_vo",
                foreign[:100], vo, fts_vo,
            )  # fmt: skip


def _acknowledge(message: Message) -> None:
    try:
        message.connection.ack(message.ack)
    except (stomp.exception.StompException, OSError):
        logger.info("a connection was lost before a message was acknowledged; the broker delivers it again")


def run() -> None:
    """Record the events of FTS's monitoring messages until SIGTERM."""
    logs.configure(logging.INFO)
    logging.getLogger("stomp.py").setLevel(logging.WARNING)  # its debug lines show passwords and bodies
    service = Service(load_settings())
    registry = CollectorRegistry()
    lifecycle = Lifecycle(service.engine, service.store, TransferMetrics(registry).observe)
    consumer = EventConsumer(lifecycle, registry, service.clock)
    loaded = service.loaded
    sources = [
        Source(
            wanted,
            address,
            service.loaded.folder,
            password,
            consumer.queue,
            service.loaded.issuers[wanted.vo],
        )
        for wanted in loaded.settings.fts_events
        for password in [loaded.secret(wanted.password_file) if wanted.password_file else ""]
        for address in wanted.brokers
    ]
    if not sources:
        raise SettingsError("no [[fts_events]] in the settings: there is nothing to listen to")
    serve_process(registry, service.loaded.settings.metrics, "events")
    Heartbeat("events", service, facts=consumer.facts).start()
    alive.ready()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: consumer.stopped.set())
    threads = [Thread(target=source.run, args=(consumer.stopped,), daemon=True) for source in sources]
    for thread in threads:
        thread.start()
    consumer.run()
    for thread in threads:
        thread.join(CONNECT_SECONDS)
