"""Batching: small requests that wait together are decided, recorded and signed together.

A Celery task strategy hands messages over undecoded. A batch is served when its time is over or when it is
full. Messages are acknowledged when their answers are confirmed, so the unacknowledged message is the
outbox (I3). While Postgres is down, the same batch is tried again later, and heartbeats go on. If the broker
is down, the error makes Celery reconnect, and the broker delivers all messages again. After any other error
each message is served alone; a message that fails alone is dead-lettered with its reason.
"""

import logging
import random
from collections.abc import Callable, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any

from msgspec import Struct

from minter import logs
from minter.broker.publisher import Publisher, Undelivered, acknowledge
from minter.contract import names
from minter.contract.messages import MAX_BODY_BYTES, Answer
from minter.errors import (
    ClockSkew,
    InvalidRequest,
    MinterError,
    NoUsableKey,
    ReplyNotAllowed,
    RequestError,
    ServerError,
    Unavailable,
    Undeliverable,
    UnknownClient,
)
from minter.tasks import answers, dispatch
from minter.tasks.lifecycle import Lifecycle
from minter.tokens.mint import Engine
from minter.tokens.outcomes import Outcome, Submission
from workers import replies
from workers.messages import PendingMessage, outgoing, queued, request_id_of

logger = logging.getLogger("minter.batching")

MAX_TRIES = 3
"""Deliveries of a message that may end with a dead worker; at the next one it is dead-lettered."""
FIRST_DELAY_SECONDS = 0.1
MAX_DELAY_SECONDS = 10.0
REFUSED_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""After these delays an answer is offered again to a durable queue that refused it, because it is full."""
MAX_REFUSED = 16
"""Answers of one client that wait for its full queue, at most: they hold places of the prefetch."""
MAX_HELD_BYTES = 64 * 1024 * 1024
"""Bodies of messages that one worker holds while Postgres is away, at most; the broker keeps the others."""
CLOCK_SECONDS = 5.0
"""A worker whose clock is off looks at it again after this time."""
MAX_EXTENSIONS = 16
"""How often the time of a batch may be extended while messages keep arriving."""


class RedeliveryCounts(Struct, eq=False):
    """Functions that count and clear the redeliveries of a message, which its SHA-256 digest names."""

    count: Callable[[bytes], int]
    clear: Callable[[bytes], None]


class Intake(Struct, eq=False):
    """Functions that stop and resume the broker's deliveries to this worker."""

    stop: Callable[[], None]
    resume: Callable[[], None]


NO_INTAKE = Intake(lambda: None, lambda: None)


class MessageBatcher:
    """Collects messages and serves them in batches; runs in the consumer's thread."""

    def __init__(
        self,
        engine: Engine,
        lifecycle: Lifecycle,
        publisher: Publisher,
        redeliveries: RedeliveryCounts,
        clock: Callable[[], datetime],
        on_stage: Callable[[str], None] = lambda _: None,
        on_follow_up: Callable[[str, str], None] = lambda *_: None,
        *,
        batch_seconds: float = 0.002,
        batch_messages: int = 64,
        batch_bytes: int = 1024 * 1024,
        local_client: str | None = None,
    ) -> None:
        self.engine = engine
        self.lifecycle = lifecycle
        self.publisher = publisher
        self.redeliveries = redeliveries
        self.clock = clock
        self.on_stage = on_stage
        self.on_follow_up = on_follow_up
        self.batch_seconds = batch_seconds
        self.batch_messages = batch_messages
        self.batch_bytes = batch_bytes
        self.local_client = local_client
        self.reset(None)

    def reset(self, timer: Any, intake: Intake = NO_INTAKE) -> None:
        """Drop all waiting messages for a new connection: the broker delivers them again."""
        self._timer = timer
        self._intake = intake
        self._stopped = self._clock_off = False
        self._waiting: list[PendingMessage] = []
        self._bytes = 0
        self._armed = False
        self._retrying = False
        self._refused: list[PendingMessage] = []
        self._delay = FIRST_DELAY_SECONDS

    def client_of(self, message: Any) -> str | None:
        """Return the sender: the user_id that the broker checked, or the only client of a local broker."""
        return self.local_client or message.properties.get("user_id")

    def add(self, message: Any, task: str) -> None:
        """Add a message to the batch; serve the batch at once when it is full."""
        pending = PendingMessage(message, task, self.client_of(message))
        full = self._retrying and self._waiting and self._bytes + len(pending.body) > MAX_HELD_BYTES
        if full or self._stopped:
            self._leave(message)
            return
        pending.redelivered = bool(
            (message.delivery_info or {}).get("redelivered") or pending.headers.get("x-delivery-count")
        )
        self._waiting.append(pending)
        self._bytes += len(pending.body)
        if self._retrying:
            return  # Postgres is down: all messages wait for the same timer
        if len(self._waiting) >= self.batch_messages or self._bytes >= self.batch_bytes:
            self.serve()
        elif not self._armed:
            self._arm(self.batch_seconds, self._still_coming, len(self._waiting), MAX_EXTENSIONS)

    def _leave(self, message: Any) -> None:
        """Give a message back to the broker, and take no others until Postgres answers."""
        if not self._stopped:
            self._stopped = True
            logger.warning("%d bytes of requests wait here, leaving others to the broker", self._bytes)
            self._intake.stop()
        message.requeue()

    def _leave_all(self, waiting: Sequence[PendingMessage], error: ClockSkew) -> None:
        """Give all messages back to the broker for other workers, until this worker's clock is right."""
        logger.error("this worker takes no requests: %s", error)
        self._waiting, self._bytes, self._stopped, self._clock_off = [], 0, True, True
        self._retrying, self._delay = False, FIRST_DELAY_SECONDS
        self._intake.stop()
        for pending in waiting:
            pending.message.requeue()
        self._timer.call_after(CLOCK_SECONDS, self._look_at_clock, (self._timer,))

    def _look_at_clock(self, timer: Any) -> None:
        if timer is not self._timer:
            return  # a new connection: its own messages show whether the clock is right
        try:
            self.engine.check_clock()
        except Unavailable as error:
            logger.error("this worker still takes no requests: %s", error)  # noqa: TRY400 - its message says it
            self._timer.call_after(CLOCK_SECONDS, self._look_at_clock, (timer,))
            return
        logger.info("this worker takes requests again")
        self._stopped = self._clock_off = False
        self._intake.resume()

    def reject(self, message: Any, error: MinterError) -> None:
        """Answer a message that is not of a public task with an error, and dead-letter it."""
        self._dead_letter(PendingMessage(message, "", self.client_of(message)), error)

    def _arm(self, seconds: float, callback: Callable[..., None], *arguments: int) -> None:
        # Never hub.call_soon: from inside a callback it waits for the next poll, up to 2 s.
        self._armed = True
        self._timer.call_after(seconds, callback, arguments)

    def _still_coming(self, seen: int, extensions: int) -> None:
        """Serve the batch unless more messages came: the embedded broker delivers them one by one."""
        if extensions and len(self._waiting) > seen:
            self._arm(self.batch_seconds, self._still_coming, len(self._waiting), extensions - 1)
        else:
            self.serve()

    def serve(self) -> None:
        """Serve all waiting messages; on `Unavailable`, keep them and try again later."""
        self._armed = False
        if self._clock_off:
            return
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        try:
            while waiting := [p for p in waiting if not p.message.acknowledged]:
                batch = _take(waiting, self.batch_messages, self.batch_bytes)
                self._serve_batch(batch)
                waiting = waiting[len(batch) :]
        except ClockSkew as error:
            self._leave_all([p for p in waiting if not p.message.acknowledged] + self._waiting, error)
        except Unavailable as error:
            self._waiting = [p for p in waiting if not p.message.acknowledged] + self._waiting
            self._bytes = sum(len(p.body) for p in self._waiting)
            self._retrying = True
            logger.warning("requests cannot be recorded, trying again in %.1f s: %s", self._delay, error)
            self._arm(self._delay * random.uniform(0.5, 1.5), self.serve)  # noqa: S311 - jitter
            self._delay = min(2 * self._delay, MAX_DELAY_SECONDS)
        else:
            self._retrying, self._delay = False, FIRST_DELAY_SECONDS
            if self._stopped:
                self._stopped = False
                self._intake.resume()

    def _serve_batch(self, batch: Sequence[PendingMessage]) -> None:
        try:
            if batch[0].redelivered:
                self._serve_redelivered(batch[0])
            else:
                self._finish(self._mint(batch))
        except Unavailable:
            raise
        except self.publisher.errors:
            raise
        except Exception as error:
            if len(batch) > 1:
                logger.exception("a batch of %d failed, serving each alone", len(batch))
                for pending in batch:
                    if not pending.message.acknowledged:
                        self._serve_batch([pending])
                return
            logger.exception("a message failed alone, dead-lettered")
            cause = error if isinstance(error, MinterError) else ServerError("see the worker's log")
            self._dead_letter(batch[0], cause)

    def _dead_letter(self, pending: PendingMessage, why: MinterError) -> None:
        """Answer a message with an error, and publish the message to the dead-letter queue."""
        pending.queued = []
        failed = answers.failure(request_id_of(pending.body), why)
        try:
            self._finish([(pending, failed)], dead={id(pending): why})
        except self.publisher.errors:
            raise
        except Exception:
            logger.exception("a message could not be answered, rejected to the broker's dead-letter queue")
            if not pending.message.acknowledged:
                pending.message.reject_log_error(logger, self.publisher.errors)

    def _serve_redelivered(self, pending: PendingMessage) -> None:
        """Serve a redelivered message alone; the attempt is counted before it starts."""
        digest = sha256(f"{pending.client} {pending.task}".encode() + pending.body).digest()
        # A delivery counts once; waiting for Postgres does not count as an attempt.
        self.engine.check_clock()  # a worker whose clock is off did not try
        pending.tries = pending.tries or self.redeliveries.count(digest)
        if pending.tries < MAX_TRIES:
            self._finish(self._mint([pending]))
        else:
            error = Undeliverable(
                f"the request stopped a worker at {pending.tries} deliveries; it is kept on "
                f"{names.DEAD_LETTER_QUEUE} for the operators"
            )
            self._dead_letter(pending, error)
        try:
            self.redeliveries.clear(digest)
        except Unavailable:
            logger.warning("the redelivery count of a served message is not cleared; beat removes it later")

    def _mint(self, batch: Sequence[PendingMessage]) -> list[tuple[PendingMessage, Answer]]:
        self.on_stage("received")
        done: list[tuple[PendingMessage, Answer]] = []
        decoded: list[tuple[PendingMessage, Submission]] = []
        for pending in batch:
            try:
                made = self._decode(pending)
            except (RequestError, NoUsableKey) as error:
                done.append((pending, answers.failure(request_id_of(pending.body), error)))
                self._note(pending, done[-1][1])
                continue
            if isinstance(made, Submission):
                decoded.append((pending, made))
            else:
                done.append((pending, made))
                self._note(pending, made)
        if decoded:
            now = self.clock()
            outcomes = self.engine.mint_many([s for _, s in decoded], now)
            for (pending, _), outcome in zip(decoded, outcomes, strict=True):
                if isinstance(outcome.error, ClockSkew):
                    raise outcome.error
                if isinstance(outcome.error, NoUsableKey):
                    logger.error("request not served: %s", outcome.error)
                answer = answers.answer(outcome, now)
                self._note(pending, answer, outcome)
                client, queue = outcome.client, outcome.submission.request.reply_queue
                denied = isinstance(outcome.error, ReplyNotAllowed)
                if queue and client and queue in client.reply_queues and not denied:
                    pending.queued, failed = queued(pending, answer, queue, client.jwe_key)
                    answer = Answer(request_id=answer.request_id, error=failed or answer.error)
                done.append((pending, answer))
        return done

    def _note(self, pending: PendingMessage, answer: Answer, outcome: Outcome | None = None) -> None:
        """Log the event of a request; count a follow-up, which is about an earlier request."""
        reason = answer.error["reason"] if answer.error else None
        done = "refused" if reason else "repeated" if outcome and outcome.repeated else "served"
        if outcome is None:
            self.on_follow_up(pending.task if pending.task in names.PUBLIC_TASKS else "", done)
        logs.request_event(
            task=pending.task,
            client=pending.client,
            vo=outcome.client.vo if outcome and outcome.client else None,
            request_id=answer.request_id,
            traceparent=str(pending.headers.get("traceparent", "")),
            outcome=done,
            reason=reason,
            tokens=len(outcome.issued) if outcome else None,
            refused=len(outcome.refusals) if outcome else None,
            changed=answer.changed or None,
        )

    def _decode(self, pending: PendingMessage) -> Submission | Answer:
        """Return the submission of a message, or the answer if it is about an earlier request."""
        body = pending.body
        if len(body) > MAX_BODY_BYTES:
            raise InvalidRequest(
                f"message of {len(body)} bytes is too large, expected at most {MAX_BODY_BYTES}; split it"
            )
        if pending.client is None:
            raise UnknownClient(
                "the message has no user_id; set it to the AMQP user, which the broker checks"
            )
        client, argument = pending.client, dispatch.argument_of(pending.task, body)
        made = dispatch.submission(self.lifecycle, pending.task, client, argument)
        if made is None or made.request.reply_queue is None:
            replies.check_reply_to(pending.message.properties.get("reply_to"), client)
        return made or dispatch.follow_up(self.lifecycle, pending.task, client, argument, self.clock())

    def _finish(
        self, done: Sequence[tuple[PendingMessage, Answer]], dead: dict[int, MinterError] | None = None
    ) -> None:
        """Publish the answers, wait for the confirms, then acknowledge the messages."""
        everything = [m for pending, answer in done for m in outgoing(pending, answer, dead or {})]
        letters = [message for message in everything if message.routing_key == names.DEAD_LETTER_QUEUE]
        replied = [message for message in everything if message.routing_key != names.DEAD_LETTER_QUEUE]
        try:
            lost = self.publisher.publish(replied, lambda: self.on_stage("half_replied"))
            buried = self.publisher.publish(letters) if letters else Undelivered()
        except self.publisher.errors as error:
            self.publisher.close()
            # Celery reconnects on connection errors only, so a broken channel is raised as one.
            raise ConnectionError(f"answers could not be published: {type(error).__name__}") from error
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
            acknowledge(served, self.publisher.errors)
        for pending in again:
            self._offer_again(pending)

    def _offer_again(self, pending: PendingMessage) -> None:
        """Serve a message again later, from the record: its client's durable queue refused the answer."""
        waiting = sum(other.client == pending.client for other in self._refused)
        if pending.refusals >= len(REFUSED_SECONDS) or waiting >= MAX_REFUSED:
            queue = pending.queued[0].routing_key
            logs.event(logger, "answer refused", queue=queue, client=pending.client)
            why = Undeliverable(f"queue {queue} refuses the answer: is it full? The tokens can be fetched")
            self._dead_letter(pending, why)
            return
        self._refused.append(pending)
        self._timer.call_after(REFUSED_SECONDS[pending.refusals], self._return, (pending,))
        pending.refusals += 1

    def _return(self, pending: PendingMessage) -> None:
        if pending not in self._refused:
            return  # a new connection: the broker delivers the message again
        self._refused.remove(pending)
        if self._clock_off:
            pending.message.requeue()
            return
        self._waiting.append(pending)
        self._bytes += len(pending.body)
        if not self._retrying:
            self.serve()


def _take(waiting: Sequence[PendingMessage], most: int, most_bytes: int) -> list[PendingMessage]:
    """Return the next batch: one redelivered message, or the messages before the next redelivered one.

    After an outage many messages wait; a batch has `most`, and is full with `most_bytes`.
    """
    batch = [waiting[0]]
    size = len(waiting[0].body)
    for pending in waiting[1:most]:
        if batch[0].redelivered or pending.redelivered or size >= most_bytes:
            break
        batch.append(pending)
        size += len(pending.body)
    return batch
