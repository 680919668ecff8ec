"""The program of `minter refresher`; all its processes share the budget of each provider."""

import logging
import signal
from collections.abc import Sequence
from typing import Any

from minter import alive, logs
from minter.broker.connections import connect
from minter.broker.publisher import Outgoing, Publisher
from minter.errors import SettingsError, Unavailable
from minter.heartbeats import Heartbeat
from minter.metrics import Metrics, serve_process
from minter.refresher.notifications import Push
from minter.refresher.refresher import Refresher
from minter.service import Service, load_settings
from minter.settings import Loaded
from minter.tasks.lifecycle import Lifecycle
from minter.tokens.jwe import CANNOT_ENCRYPT
from workers import replies

logger = logging.getLogger("minter.refresher")


class Sender:
    """Sends answers to clients' durable queues, each a JWE to its client's key."""

    def __init__(self, loaded: Loaded) -> None:
        self._publisher = Publisher(connect(loaded.broker_url, loaded.broker_ca))

    def __call__(self, pushes: Sequence[Push]) -> set[str]:
        """Publish, wait for the confirms, and return the queues that refused; raises Unavailable.

        A queue that does not exist gets nothing, nor does a client whose key cannot be encrypted to: the
        client can fetch the tokens instead.
        """
        messages = [message for push in pushes for message in _messages(push)]
        try:
            lost = self._publisher.publish(messages)
        except self._publisher.errors as error:
            self._publisher.close()
            raise Unavailable(f"tokens could not be pushed ({type(error).__name__})") from error
        for queue in {message.routing_key for message in lost.gone}:
            logger.error("queue %s does not exist; run: minter broker setup", queue)
        return {message.routing_key for message in lost.refused}


def _messages(push: Push) -> list[Outgoing]:
    key = push.client.jwe_key
    try:
        return replies.queued(push.answer, push.queue, str(push.answer.request_id), key)
    except CANNOT_ENCRYPT:
        logger.exception("nothing is pushed to client %s: is its jwe_key on its curve?", push.client.name)
        return []


def run() -> None:
    """Keep managed tokens fresh until SIGTERM, then wait for open requests to providers."""
    logs.configure(logging.INFO)
    metrics = Metrics()
    service = Service(load_settings(), metrics.observe)
    service.prepare()
    iams = service.iams()
    if not iams:
        raise SettingsError("no [[providers]] in the settings: there is nothing to refresh")
    serve_process(metrics.registry, service.loaded.settings.metrics, "refresher")
    Heartbeat("refresher", service, metrics.counted).start()
    lifecycle = Lifecycle(service.engine, service.store)
    send = Sender(service.loaded) if service.loaded.broker_url else None
    scale = service.loaded.settings.drill.time_scale
    refresher = Refresher(
        service.pool, service.keystore, lifecycle, iams, service.clock, metrics.provider, send, scale,
        checks_clock=scale == 1,
    )  # fmt: skip

    def stop(*_: Any) -> None:
        refresher.stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    logger.info("refreshing tokens of %s", ", ".join(iams))
    alive.ready()
    refresher.run()
