"""Batching: small requests that wait together are decided, recorded and signed together.

A Celery task strategy hands messages over undecoded. A batch is served when its time is over or when it is
full; clients take turns (minter.tasks.turns), and between batches newer messages are read. While Postgres is
down, the same batch is tried again later, and heartbeats go on. If the broker is down, the error makes Celery
reconnect, and the broker delivers all messages again. After any other error each message is served alone; a
message that fails alone is dead-lettered with its reason.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any

from msgspec import Struct

from minter import logs
from minter.backoff import Backoff
from minter.broker.publisher import Publisher
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
from minter.tasks.turns import Limits, Turns
from minter.tokens.mint import Engine
from minter.tokens.outcomes import Outcome, Submission
from workers import redeliveries, replies
from workers.messages import PendingMessage, queued, request_id_of
from workers.outbox import Outbox
from workers.redeliveries import Redeliveries

logger = logging.getLogger("minter.batching")

FIRST_DELAY_SECONDS = 0.1
MAX_DELAY_SECONDS = 2.0
SMALL_BYTES = 4_096
"""A message with a larger body, of about ten files and more, is large."""
MAX_HELD_BYTES = 64 * 1024 * 1024
"""Bodies of messages that one worker holds at most, but for the last one. Beyond, it serves before it reads
more; while Postgres is away, it leaves them to the broker."""
MAX_READ = 256
"""Messages read before one batch, at most: whoever sends faster than we serve must not stop the serving."""
PAUSE_SECONDS = 0.0002
"""Pause between two batches; without one, the event loop would do nothing else during ten of them."""
CLOCK_SECONDS = 5.0
"""A worker whose clock is off looks at it again after this time."""
MAX_EXTENSIONS = 16
"""How often the time of a batch may be extended while messages keep arriving."""


class Intake(Struct, eq=False):
    """Functions that stop and resume the broker's deliveries to this worker, and that read one.

    `read` hands over a message that has arrived, and returns False if there is none. The event loop would
    read one message between two batches.
    """

    stop: Callable[[], None]
    resume: Callable[[], None]
    read: Callable[[], bool]


NO_INTAKE = Intake(lambda: None, lambda: None, lambda: False)


class MessageBatcher:
    """Collects messages and serves them in batches; runs in the consumer's thread."""

    def __init__(
        self,
        engine: Engine,
        lifecycle: Lifecycle,
        publisher: Publisher,
        counts: Redeliveries,
        clock: Callable[[], datetime],
        on_stage: Callable[[str], None] = lambda _: None,
        on_follow_up: Callable[[str, str], None] = lambda *_: None,
        *,
        batch_seconds: float,
        batch_messages: int,
        batch_bytes: int,
        local_client: str | None,
    ) -> None:
        self.engine = engine
        self.lifecycle = lifecycle
        self.redeliveries = counts
        self.clock = clock
        self.on_stage = on_stage
        self.on_follow_up = on_follow_up
        self.batch_seconds = batch_seconds
        self.local_client = local_client
        self._limits = Limits(batch_messages, batch_bytes, SMALL_BYTES)
        self._backoff = Backoff(FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS)
        self.outbox = Outbox(publisher, on_stage)
        self.reset(None)

    def reset(self, timer: Any, intake: Intake = NO_INTAKE) -> None:
        """Drop all waiting messages for a new connection: the broker delivers them again."""
        self._timer = timer
        self._intake = intake
        self._stopped = self._clock_off = False
        self._turns: Turns[PendingMessage] = Turns(lambda p: p.client or "", self._weight, self._limits)
        self._bytes = 0
        self._armed: Any = None
        self._soon = self._pausing = False
        self._retrying = self._reading = False
        self.outbox.reset(timer, self._return)
        self._backoff.reset()

    def client_of(self, message: Any) -> str | None:
        """Return the sender: the user_id that the broker checked, or the only client of a local broker."""
        return self.local_client or message.properties.get("user_id")

    def _weight(self, pending: PendingMessage) -> int:
        """Return the size of a message; a redelivered one fills a batch, so it is served alone."""
        return self._limits.weight if pending.redelivered else max(1, len(pending.body))

    def add(self, message: Any, task: str) -> None:
        """Add a message to those that wait; arrange for a batch when its time is over or it is full."""
        pending = PendingMessage(message, task, self.client_of(message))
        full = self._retrying and self._turns and self._bytes + len(pending.body) > MAX_HELD_BYTES
        if full or self._stopped:
            self._leave(message)
            return
        pending.redelivered = bool(
            (message.delivery_info or {}).get("redelivered") or pending.headers.get("x-delivery-count")
        )
        self._add(pending)

    def _add(self, pending: PendingMessage) -> None:
        self._turns.add(pending)
        self._bytes += len(pending.body)
        if self._retrying or self._reading:
            return  # all messages wait until Postgres is back, or until the reading ends
        if self._bytes > MAX_HELD_BYTES:
            while self._turns and self._bytes > MAX_HELD_BYTES and not (self._retrying or self._clock_off):
                self.serve()
        elif len(self._turns) >= self._limits.requests or self._bytes >= self._limits.weight:
            self._serve_soon()
        elif self._armed is None or self._pausing:
            self._arm(self.batch_seconds, self._still_coming, len(self._turns), MAX_EXTENSIONS)

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
        self._bytes, self._stopped, self._clock_off = 0, True, True
        self._retrying = False
        self._backoff.reset()
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
        """Answer a message that is not of a public task with an error, and dead-letter it, in its turn."""
        self._add(PendingMessage(message, "", self.client_of(message), rejected=error))

    def _arm(self, seconds: float, callback: Callable[..., None], *arguments: int) -> None:
        # Never hub.call_soon: from inside a callback it waits for the next poll, up to 2 s.
        self._disarm()
        self._armed = self._timer.call_after(seconds, callback, arguments)

    def _disarm(self) -> None:
        if self._armed is not None:
            self._armed.cancel()
        self._armed, self._soon, self._pausing = None, False, False

    def _serve_soon(self) -> None:
        """Serve the next batch when the event loop has done what else there is to do."""
        wait = max(PAUSE_SECONDS, self._turns.wait_seconds(time.monotonic()))
        if not self._soon:
            self._arm(wait, self.serve)
            self._soon = wait == PAUSE_SECONDS
            self._pausing = not self._soon

    def _still_coming(self, seen: int, extensions: int) -> None:
        """Serve the batch unless more messages came: the embedded broker delivers them one by one."""
        if extensions and len(self._turns) > seen:
            self._arm(self.batch_seconds, self._still_coming, len(self._turns), extensions - 1)
        else:
            self.serve()

    def serve(self) -> None:
        """Serve one batch, and arrange for the next; on `Unavailable`, keep it and try again later."""
        self._disarm()
        if self._clock_off:
            return
        self._read()
        started = time.monotonic()
        batch = self._turns.take(math.inf if self._bytes > MAX_HELD_BYTES else started)
        try:
            if requests := self._requests(batch):
                self._serve_batch(requests)
        except ClockSkew as error:
            self._leave_all(self._unserved(batch) + self._turns.clear(), error)
        except Unavailable as error:
            unserved = self._unserved(batch)
            self._turns.put_back(unserved)
            self._bytes -= _size(batch) - _size(unserved)
            self._retrying = True
            pause = self._backoff.pause()
            logger.warning("requests cannot be recorded, trying again in %.1f s: %s", pause, error)
            self._arm(pause, self.serve)
        else:
            if batch:
                self._turns.served(started, time.monotonic())
                self._bytes -= _size(batch)
                self._retrying = False
                self._backoff.reset()
            if self._turns:
                self._serve_soon()
            elif self._stopped:
                self._stopped = False
                self._intake.resume()

    def _unserved(self, batch: Sequence[PendingMessage]) -> list[PendingMessage]:
        """Return the messages that are neither answered nor wait in the outbox."""
        return [p for p in batch if not (p.message.acknowledged or self.outbox.holds(p))]

    def _read(self) -> None:
        """Read the messages that have arrived, so that their clients take turns with the others."""
        self._reading = True
        try:
            for _ in range(MAX_READ):
                if self._retrying or self._bytes > MAX_HELD_BYTES or not self._intake.read():
                    break
        finally:
            self._reading = False

    def _requests(self, batch: Sequence[PendingMessage]) -> list[PendingMessage]:
        """Dead-letter the messages that are no requests; return the others."""
        for pending in batch:
            if pending.rejected is not None:
                self.outbox.dead_letter(pending, pending.rejected)
        return [pending for pending in batch if pending.rejected is None]

    def _serve_batch(self, batch: Sequence[PendingMessage]) -> None:
        try:
            if batch[0].redelivered:
                self._serve_redelivered(batch[0])
            else:
                self.outbox.finish(self._mint(batch))
        except Unavailable:
            raise
        except self.outbox.errors:
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
            self.outbox.dead_letter(batch[0], cause)

    def _serve_redelivered(self, pending: PendingMessage) -> None:
        """Serve a redelivered message alone; the attempt is counted before it starts."""
        digest = sha256(f"{pending.client} {pending.task}".encode() + pending.body).digest()
        self.engine.check_clock()  # a worker whose clock is off did not try
        with self.redeliveries.counted(digest) as tries:
            if tries < redeliveries.MAX_TRIES:
                self.outbox.finish(self._mint([pending]))
            else:
                error = Undeliverable(
                    f"the request stopped a worker at {tries} deliveries; it is kept on "
                    f"{names.DEAD_LETTER_QUEUE} for the operators"
                )
                self.outbox.dead_letter(pending, error)

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

    def _return(self, pending: PendingMessage) -> None:
        """Serve a message again whose answer was refused."""
        if self._clock_off:
            pending.message.requeue()
        else:
            self._add(pending)


def _size(batch: Sequence[PendingMessage]) -> int:
    return sum(len(pending.body) for pending in batch)
