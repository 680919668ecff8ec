"""The tasks. Public tasks are served in batches and never run as Celery tasks."""

import logging
from collections.abc import Callable
from typing import Any

from celery import Task

from minter import alive
from minter.contract import names
from minter.errors import InvalidRequest, ServerError
from workers.app import app

logger = logging.getLogger("minter.tasks")


class BatchedTask(Task):
    """A public task; its strategy hands each message, undecoded, to the batcher."""

    def start_strategy(self, _app: Any, _consumer: Any, **_: Any) -> Callable[..., None]:
        """Return the function that Celery calls for each message of this task."""
        name = self.name

        def take(message: Any, *_: Any, **__: Any) -> None:
            app.batcher.add(message, name)

        return take


class InternalTask(Task):
    """An internal task, which runs in place, and only from the exchange that clients cannot write to."""

    def start_strategy(self, _app: Any, _consumer: Any, **_: Any) -> Callable[..., None]:
        """Return the function that Celery calls for each message of this task."""

        def take(message: Any, *_: Any, **__: Any) -> None:
            if message.delivery_info.get("exchange") != names.INTERNAL_EXCHANGE:
                app.batcher.reject(message, InvalidRequest(f"{self.name} is not a public task"))
                return
            try:
                self.run()
            except Exception:  # beat sends the task again; a batch must not wait for it
                logger.exception("%s failed", self.name)
            message.ack_log_error(logger, app.batcher.outbox.errors)

        return take


def _public(name: str, schema: str) -> None:
    """Register a public task: its argument follows schemas/`schema`, its answer schemas/answer.json."""

    @app.task(name=name, base=BatchedTask)
    def serve(_argument: dict[str, Any]) -> None:
        raise ServerError(f"{name} is served in batches, not called")

    serve.__doc__ = f"{name} takes schemas/{schema} and answers with schemas/answer.json."


for _name in names.PUBLIC_TASKS:
    _public(_name, names.SCHEMAS[_name])


@app.task(name="minter.maintain", base=InternalTask)
def maintain() -> None:
    """Maintain the database and the keys, once an hour."""
    alive.rest()  # one of its statements may take longer than a turn
    for change in app.service.maintain("beat"):
        logger.info(change)
