"""The outbox of a worker: answers are published and confirmed before their messages are acknowledged (I3).

A queue that refuses an answer, because it is full, delays the messages of its client only: the answer is
offered again later, from the record, and at last dead-lettered.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from minter import logs
from minter.broker.publisher import Publisher, Undelivered, acknowledge
from minter.contract import names
from minter.contract.messages import Answer
from minter.errors import MinterError, ServerError, Undeliverable
from minter.tasks import answers
from workers.messages import PendingMessage, outgoing, request_id_of

logger = logging.getLogger("minter.batching")

REFUSED_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""After these delays an answer is offered again to a durable queue that refused it, because it is full."""
MAX_REFUSED = 16
"""Answers of one client that wait for its full queue, at most: they hold places of the prefetch."""


class BrokerAway(ConnectionError):
    """The connection to the broker was lost; the broker did not refuse what was published."""


class Outbox:
    """Publishes answers and dead letters; runs in the consumer's thread."""

    def __init__(self, publisher: Publisher, on_stage: Callable[[str], None]) -> None:
        self.publisher = publisher
        self.on_stage = on_stage
        self._refused: list[PendingMessage] = []

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Exceptions that mean that the broker is not reachable."""
        return self.publisher.errors

    def reset(self, timer: Any, serve_again: Callable[[PendingMessage], None]) -> None:
        """Forget the refused answers of the last connection: the broker delivers their requests again."""
        self._timer = timer
        self._serve_again = serve_again
        self._refused = []

    def holds(self, pending: PendingMessage) -> bool:
        """Say whether the answer to a message waits to be offered again."""
        return pending in self._refused

    def finish(
        self, done: Sequence[tuple[PendingMessage, Answer]], dead: dict[int, MinterError] | None = None
    ) -> None:
        """Publish the answers, wait for the confirms, then acknowledge the messages."""
        everything = [m for pending, answer in done for m in outgoing(pending, answer, dead or {})]
        letters = [message for message in everything if message.routing_key == names.DEAD_LETTER_QUEUE]
        replied = [message for message in everything if message.routing_key != names.DEAD_LETTER_QUEUE]
        try:
            lost = self.publisher.publish(replied, lambda: self.on_stage("half_replied"))
            buried = self.publisher.publish(letters) if letters else Undelivered()
        except self.errors as error:
            self.publisher.close()
            # Celery reconnects on connection errors only, so a broken channel is raised as one.
            kind = BrokerAway if self.publisher.is_away(error) else ConnectionError
            raise kind(f"answers could not be published: {type(error).__name__}") from error
        if missing := [m for m in (*lost.gone, *buried.gone) if m.persistent]:
            raise ServerError(f"queue {missing[0].routing_key} does not exist; run: minter broker setup")
        if lost:
            logger.info(
                "%d answers were not delivered: the callers' reply queues are gone, %d: they refuse",
                len(lost.gone), len(lost.refused),
            )  # fmt: skip
        refused = {id(m) for m in lost.refused}
        again = [pending for pending, _ in done if refused & {id(m) for m in pending.queued}]
        if buried.refused:
            raise ServerError(f"queue {names.DEAD_LETTER_QUEUE} refuses: is it full?")
        self.on_stage("confirmed")
        if served := [pending.message for pending, _ in done if pending not in again]:
            try:
                acknowledge(served, self.errors)
            except self.errors as error:
                why = f"messages could not be acknowledged: {type(error).__name__}"
                raise BrokerAway(why) from error
        for pending in again:
            self._offer_again(pending)

    def _offer_again(self, pending: PendingMessage) -> None:
        """Serve a message again later, from the record: its client's durable queue refused the answer."""
        waiting = sum(other.client == pending.client for other in self._refused)
        if pending.refusals >= len(REFUSED_SECONDS) or waiting >= MAX_REFUSED:
            queue = pending.queued[0].routing_key
            logs.event(logger, "answer refused", queue=queue, client=pending.client)
            why = Undeliverable(f"queue {queue} refuses the answer: is it full? The tokens can be fetched")
            self.dead_letter(pending, why)
            return
        self._refused.append(pending)
        self._timer.call_after(REFUSED_SECONDS[pending.refusals], self._return, (pending,))
        pending.refusals += 1

    def _return(self, pending: PendingMessage) -> None:
        if pending in self._refused:  # not in the refused answers of an earlier connection
            self._refused.remove(pending)
            self._serve_again(pending)

    def dead_letter(self, pending: PendingMessage, why: MinterError) -> None:
        """Answer a message with an error, and publish the message to the dead-letter queue."""
        pending.queued = []
        failed = answers.failure(request_id_of(pending.body), why)
        try:
            self.finish([(pending, failed)], dead={id(pending): why})
        except self.errors:
            raise
        except Exception:
            logger.exception("a message could not be answered, rejected to the broker's dead-letter queue")
            if not pending.message.acknowledged:
                pending.message.reject_log_error(logger, self.errors)
