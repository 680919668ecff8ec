"""The Celery application of `minter worker` and `minter beat`.

Only the tasks of `workers.tasks` can be run, and only from their own queues. Any other message is
answered with a typed error and dead-lettered. Bodies are never logged.
"""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from celery.beat import PersistentScheduler
from celery.signals import beat_init, setup_logging, worker_init, worker_ready
from celery.worker.consumer import Consumer
from kombu import compression
from prometheus_client import CollectorRegistry

from minter import alive, logs, status
from minter.broker.connections import TRANSPORT_OPTIONS, Connection, connect, opened, tls
from minter.broker.publisher import Publisher, client_queue, declare, queues
from minter.contract import names
from minter.database import control_changes, partitions
from minter.errors import InvalidRequest, MinterError, Unavailable
from minter.heartbeats import Heartbeat
from minter.lines import LEVELS
from minter.metrics import PART, Metrics, StateCollector, new_gauge, serve_process
from minter.service import Service, load_settings, tune_gc
from minter.settings import Loaded
from minter.tasks.lifecycle import Lifecycle
from minter.tokens.outcomes import Observed
from workers.batching import Intake, MessageBatcher
from workers.redeliveries import Redeliveries

logger = logging.getLogger("minter.app")

MAINTAIN_SECONDS = 3600.0
CLIENTS_SECONDS = 5.0
"""A worker looks for the queues of new clients in this interval."""
CLIENTS_PATIENCE_SECONDS = 1.0
"""Longest wait for Postgres then: no message is served meanwhile."""
PARTS_SECONDS = 60.0
"""Beat asks every part of the system for its state in this interval."""
START_FAILED = 3
"""Exit code of a process that could not start: try again later."""


class RequestConsumer(Consumer):
    """A Celery consumer that answers every message and logs no body."""

    _repeated: Any = None
    task_consumer: Any
    _left_out: set[str] = set()  # noqa: RUF012 - one consumer in each process

    class Blueprint(Consumer.Blueprint):
        """Celery's steps without delayed delivery, which would declare 28 queues for ETAs."""

        default_steps = [  # noqa: RUF012 - Celery's own form
            step for step in Consumer.Blueprint.default_steps if "delayed_delivery" not in step
        ]

    def update_strategies(self) -> None:
        """Install the batching strategy; called at each new connection."""
        app.batcher.reset(self.timer, Intake(self._stop_intake, self._resume_intake, self._read))
        self._taking = True
        self.task_consumer = None  # the consumer of the connection before
        self.timer.call_repeatedly(alive.TURN_SECONDS, alive.turn)
        if _on_amqp(app.loaded):
            self._add_client_queues()
            if self._repeated is not None:  # of the connection before
                self._repeated.cancel()
            self._repeated = self.timer.call_repeatedly(CLIENTS_SECONDS, self._add_client_queues)
        self.strategies = {
            name: task.start_strategy(self.app, self)
            for name, task in self.app.tasks.items()
            if name.startswith("minter.")
        }

    def on_close(self) -> None:
        """Forget the connection that broke; until there is another one, nothing makes turns."""
        super().on_close()
        alive.rest()

    def _add_client_queues(self) -> None:
        """Consume from the queue of each registered client; one that cannot be declared is left out."""
        try:
            clients = control_changes.client_names(app.service.pool, CLIENTS_PATIENCE_SECONDS)
        except Unavailable as error:
            logger.warning("queues of new clients are looked for later: %s", error)
            return
        for queue in map(client_queue, clients):
            if queue.name in self.app.amqp.queues or queue.name in self._left_out:
                continue
            try:
                with self.connection.channel() as channel:  # an error closes the channel
                    queue(channel).declare()
            except self.connection.channel_errors as error:
                self._left_out.add(queue.name)
                logger.error("queue %s cannot be used, delete it: %s", queue.name, error)  # noqa: TRY400 - told
                continue
            self.app.amqp.queues.select_add(queue)
            if self.task_consumer is not None:
                self.task_consumer.add_queue(queue)
                self._consume()

    def _consume(self) -> None:
        if self._taking:
            self.task_consumer.consume()

    def _read(self) -> bool:
        """Take one message that has arrived; the embedded broker's loop hands them over by itself."""
        if not _on_amqp(app.loaded):
            return False
        try:
            self.connection.drain_events(timeout=0)
        except TimeoutError:
            return False
        except self.connection.channel_errors as error:
            # Celery reconnects on connection errors only, so a broken channel is raised as one.
            raise ConnectionError(f"messages could not be read: {type(error).__name__}") from error
        return True

    def _stop_intake(self) -> None:
        self._taking = False
        self.task_consumer.cancel()

    def _resume_intake(self) -> None:
        self._taking = True
        self._consume()

    def create_task_handler(self, *_: Any, **__: Any) -> Callable[[Any], None]:
        """Return the message handler, which serves or answers each message, whatever its headers hold."""
        strategies = self.strategies

        def take(message: Any) -> None:
            headers = message.headers
            name = headers.get("task") if isinstance(headers, dict) else None
            if isinstance(name, str) and name in strategies:
                strategies[name](message)
            else:
                public = ", ".join(names.PUBLIC_TASKS)
                _reject(message, f"the task header names no public task, expected one of {public}")

        return take

    def on_decode_error(self, message: Any, _error: Exception) -> None:
        """Answer a message that Celery cannot decode."""
        _reject(message, "the message body cannot be decoded, expected JSON in UTF-8")


def _reject(message: Any, why: str) -> None:
    error: MinterError = InvalidRequest(why)
    app.batcher.reject(message, error)


# A sender's `compression` header would make kombu inflate a body before its size can be limited.
compression._decoders.clear()  # noqa: SLF001 - kombu has no setting for it


class Amqp(AMQP):
    """Celery's AMQP layer with our connections."""

    Connection = Connection


class App(Celery):
    """A Celery application with the engine and the batcher of its worker process."""

    amqp_cls = Amqp

    loaded: Loaded
    service: Service
    batcher: MessageBatcher
    heartbeat: Heartbeat


class Scheduler(PersistentScheduler):
    """Sends timed tasks from the beat that acts; the others wait in case it ends."""

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        """Send the task of an entry whose time has come."""
        if app.heartbeat.acts():
            super().apply_entry(entry, producer)


def create_app(loaded: Loaded) -> App:
    """Return the application for these settings, without connecting to anything."""
    made = App("minter", broker=loaded.broker_url, include=["workers.tasks"])
    made.loaded = loaded
    made.conf.update(
        task_queues=queues(),
        task_default_queue=names.INTERNAL_QUEUE,
        task_default_exchange=names.INTERNAL_EXCHANGE,
        task_default_routing_key=names.INTERNAL_QUEUE,
        task_create_missing_queues=False,
        task_acks_late=True,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        worker_consumer="workers.app:RequestConsumer",
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_prefetch_multiplier=loaded.settings.worker.prefetch,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_use_ssl=tls(loaded.broker_url, loaded.broker_ca),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_heartbeat=60,
        broker_transport_options=_transport_options(loaded),
        beat_scheduler="workers.app:Scheduler",
        beat_schedule={"maintain": {"task": "minter.maintain", "schedule": MAINTAIN_SECONDS}},
        timezone="UTC",
    )
    return made


def _transport_options(loaded: Loaded) -> dict[str, float]:
    """Return options of connections: the embedded broker soon redelivers a dead worker's messages.

    With kombu's defaults the redelivery takes 100 s.
    """
    if not loaded.broker_url.startswith("redis"):
        return dict(TRANSPORT_OPTIONS)
    visibility = loaded.settings.broker.visibility_seconds
    return {
        "visibility_timeout": visibility,
        "unacked_restore_interval": min(10, max(1, visibility / 4)),
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 10,  # a worker may die while it holds the mutex
    }


@worker_init.connect
def _start(**_: Any) -> None:
    """Open the engine before the worker consumes messages; end the process if the engine cannot be opened.

    After an exception here Celery would go on, and fail later with an error that does not name the cause.
    """
    try:
        _open_engine()
    except MinterError as error:
        logger.error("the worker cannot start: %s: %s", error.reason, error)  # noqa: TRY400 - the message says it
        raise SystemExit(START_FAILED) from error


@worker_ready.connect
def _say_ready(**_: Any) -> None:
    alive.ready()
    alive.turn()


def _open_engine() -> None:
    metrics = Metrics()
    app.service = service = Service(app.loaded, _observe(metrics))
    service.prepare()
    tune_gc()
    settings = app.loaded.settings
    with opened(app.connection_for_write()) as connection:
        declare(connection)  # the consumer declares the clients' queues
    app.batcher = MessageBatcher(
        service.engine,
        Lifecycle(service.engine, service.store),
        Publisher(app.connection_for_write()),
        Redeliveries(
            lambda digest: partitions.count_redelivery(service.pool, digest),
            lambda digest: partitions.clear_redelivery(service.pool, digest),
        ),
        service.clock,
        lambda stage: on_stage(stage),  # noqa: PLW0108 - tests replace on_stage, so each call looks it up
        metrics.follow_up,
        batch_seconds=settings.worker.batch_seconds,
        batch_messages=settings.worker.batch_messages,
        batch_bytes=settings.worker.batch_bytes,
        local_client=_local_client(app.loaded),
    )
    serve_process(metrics.registry, settings.metrics, "worker")
    Heartbeat("worker", service, metrics.counted).start()


@beat_init.connect
def _start_beat(**_: Any) -> None:
    """Do the hourly work once, then export the gauges of database and queues, while this beat acts.

    The first hourly task would come after an hour. The process ends if the database cannot be reached.
    """
    service = Service(app.loaded)
    try:
        service.prepare()
        alive.ready()  # the first work may take longer than systemd waits
        for change in service.maintain("beat"):
            logger.info(change)
    except MinterError as error:
        logger.error("beat cannot start: %s: %s", error.reason, error)  # noqa: TRY400 - the message says it
        raise SystemExit(START_FAILED) from error
    app.heartbeat = Heartbeat("beat", service).start()
    registry = CollectorRegistry()
    registry.register(
        StateCollector(
            service.pool,
            lambda: connect(app.loaded.broker_url, app.loaded.broker_ca),
            lambda: (*_request_queues(service), names.INTERNAL_QUEUE, names.DEAD_LETTER_QUEUE),
            service.engine.rotation,
            service.clock,
            app.heartbeat.acts,
        )
    )
    serve_process(registry, app.loaded.settings.metrics, "beat")
    level = new_gauge(PART, registry)

    def look() -> None:
        """Export the lines of `minter status`."""
        found = status.lines(app.loaded) if app.heartbeat.acts() else []
        level.clear()
        for part, worst in status.by_part(found).items():
            level.labels(part).set(LEVELS.index(worst))

    status.keep_looking(look, PARTS_SECONDS)


def _request_queues(service: Service) -> list[str]:
    """Return the queues of requests: while Postgres is away, the common one can be asked all the same."""
    clients: list[str] = []
    if _on_amqp(app.loaded):
        with suppress(Unavailable):
            clients = control_changes.client_names(service.pool, CLIENTS_PATIENCE_SECONDS)
    return [names.REQUEST_QUEUE, *map(names.client_requests, clients)]


def _observe(metrics: Metrics) -> Callable[[Observed], None]:
    def observe(observed: Observed) -> None:
        on_stage(observed.stage)
        metrics.observe(observed)

    return observe


@setup_logging.connect
def _set_up_logging(loglevel: int = logging.INFO, **_: Any) -> None:
    """Replace Celery's logging, which writes text and does not redact secrets."""
    logs.configure(loglevel)


def _on_amqp(loaded: Loaded) -> bool:
    return loaded.broker_url.startswith(("amqp", "pyamqp"))


def _local_client(loaded: Loaded) -> str | None:
    """Return the only client of a broker that checks no user_id; None on AMQP."""
    if _on_amqp(loaded):
        return None
    return loaded.settings.broker.local_client or None


def on_stage(stage: str) -> None:
    """Do nothing at a stage of a batch; fault tests replace this function."""


def run_worker(name: str) -> None:
    """Run one worker process, single-threaded, until SIGTERM."""
    app.worker_main(
        [
            "--quiet", "worker", "--pool", "solo", "--concurrency", "1", "--without-gossip",
            "--without-mingle", "--without-heartbeat", "--loglevel", "INFO", "--hostname", name,
        ]
    )  # fmt: skip


def run_beat(schedule: Path) -> None:
    """Run beat until SIGTERM."""
    app.start(["beat", "--loglevel", "INFO", "--schedule", str(schedule)])


app = create_app(load_settings()) if os.environ.get("MINTER_SETTINGS") else App("minter")
