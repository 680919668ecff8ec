"""The FTS forwarder: takes filled jobs from a durable queue and submits them to FTS.

    MINTER_BROKER_URL=amqps://rucio-prod:…@broker/minter \
    minter fts --queue rucio-prod.jobs --key jwe.json --fts https://fts3.example.org:8446

A message stays unacknowledged, so that it cannot be lost, until FTS has accepted the job and the engine knows
of it (`minter.report`). If FTS refuses the job for good, its tokens are cancelled (`minter.cancel`) and the
message is dead-lettered. FTS makes the job's id from the request_id, so a job that is sent again after a lost
answer is found in FTS (409) and not made twice. While FTS is down, the forwarder waits and tries again.
"""

import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import kombu
import msgspec
from joserfc import jwe, jwk
from joserfc.errors import JoseError
from prometheus_client import CollectorRegistry

from minter import alive, logs
from minter.backoff import Backoff
from minter.broker.connections import cause, connect
from minter.client import JobReport, MinterClient
from minter.contract.messages import Answer, TokenAnswer
from minter.errors import (
    FTSBlocked,
    InvalidRequest,
    JobBroken,
    JobRefused,
    JobTooLate,
    MinterError,
    SettingsError,
    Unavailable,
)
from minter.fts.rest import FTSClient, Submitted
from minter.metrics import FTS_JOBS, new_counter, serve

logger = logging.getLogger("minter.fts")

FIRST_DELAY_SECONDS = 1.0
MAX_DELAY_SECONDS = 60.0
MAX_HOLD_SECONDS = 25 * 60.0
"""A message is requeued after this time, before RabbitMQ takes it back after 30 minutes."""


class _Registry(jwe.JWERegistry):
    """A joserfc registry for messages of up to 16 MiB; joserfc's default limit is 64 kB."""

    max_ciphertext_length = 16 * 1024 * 1024


_registry = _Registry(algorithms=["ECDH-ES+A256KW", "RSA-OAEP-256", "A256GCM"])


class Forwarder:
    """Submits the job of an answer to FTS, and reports the submission to the engine."""

    def __init__(
        self,
        minter: MinterClient,
        fts: Mapping[str, FTSClient] | FTSClient,
        private_key: Mapping[str, Any] | None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._minter = minter
        self._fts = fts
        self._key = jwk.import_key(dict(private_key)) if private_key else None
        self._now = now

    def open(self, body: bytes, content_type: str) -> Answer:
        """Return the answer in a message; raises InvalidRequest if the message holds no answer."""
        try:
            if content_type == "application/jose":
                if self._key is None:
                    raise InvalidRequest("the message is encrypted, and no key was named with --key")
                body = jwe.decrypt_compact(body.decode(), self._key, registry=_registry).plaintext or b""
            return msgspec.json.decode(body, type=Answer)
        except (JoseError, ValueError, msgspec.DecodeError) as error:
            raise InvalidRequest(f"not an answer of the engine ({type(error).__name__})") from None

    def forward(self, answer: Answer, done: dict[str, Submitted] | None = None) -> Submitted | None:
        """Submit an answer's job and report it; return None if the answer has no job.

        `done` keeps submitted jobs between attempts. Raises JobRefused if FTS refuses the job, FTSAway while
        FTS is down, and Unavailable while the engine is down; after the last two, call this again.
        """
        request_id = answer.request_id
        if answer.error is not None or answer.job is None or answer.bearer is None or request_id is None:
            reason = answer.error["reason"] if answer.error else "no_job"
            logs.event(logger, "nothing to submit", request_id=request_id, reason=reason)
            return None
        done = {} if done is None else done
        if request_id not in done:
            done[request_id] = self._service(answer.bearer).submit(answer.job, answer.bearer, request_id)
        submitted = done[request_id]
        left_out = {int(entry["index"]) for entry in answer.refused}
        total = len(answer.job["files"]) + len(left_out)
        numbers = tuple(n for n in range(total) if n not in left_out)
        self._minter.report(
            jobs=[
                JobReport(
                    submitted.job_id,
                    uuid.UUID(request_id),
                    numbers,
                    tuple(ids[0] for ids in submitted.replica_ids),
                    submitted.replica_ids,
                )
            ]
        )
        logs.event(
            logger, "job submitted", request_id=request_id, job_id=str(submitted.job_id), files=len(numbers)
        )
        return submitted

    def refused(self, answer: Answer, error: JobRefused) -> None:
        """Cancel a refused job's request, unless the job may be in FTS, or is only set aside."""
        logs.event(logger, "job refused", request_id=answer.request_id, reason=error.reason, error=str(error))
        if answer.request_id is not None and not isinstance(error, JobTooLate | JobBroken):
            self._minter.cancel(uuid.UUID(answer.request_id))

    def _service(self, bearer: TokenAnswer) -> FTSClient:
        if bearer.exp <= self._now():
            raise JobTooLate("the token for FTS expired on the queue; renew the request")
        if isinstance(self._fts, FTSClient):
            return self._fts
        if bearer.storage not in self._fts:
            raise JobRefused(f"no URL of FTS {bearer.storage!r} was named with --fts")
        return self._fts[bearer.storage]


class JobConsumer:
    """Consumes one durable queue, one message at a time; start more processes for more at once."""

    def __init__(
        self,
        broker_url: str,
        queue: str,
        forwarder: Forwarder,
        ca: str | None = None,
        count: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._count = count
        self._url = broker_url
        self._ca = ca
        self._queue = queue
        self._forwarder = forwarder
        self.stopped = False

    def run(self) -> None:
        """Consume until `stopped`; reconnect when the connection breaks."""
        backoff = Backoff(FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS)
        while not self.stopped:
            connection = connect(self._url, self._ca)
            try:
                self._consume(connection)
                backoff.reset()
            except (*connection.connection_errors, *connection.channel_errors) as error:
                pause = backoff.pause()
                logger.warning("trying again in %.0f s: %s", pause, cause(error))
                time.sleep(pause)
            finally:
                connection.release()

    def _consume(self, connection: kombu.Connection) -> None:
        channel = connection.channel()
        channel.basic_qos(0, 1, False)
        queue = kombu.Queue(self._queue, channel=channel, no_declare=True)
        with kombu.Consumer(channel, [queue], on_message=self._take, accept=None):
            while not self.stopped:
                try:
                    connection.drain_events(timeout=1.0)
                except TimeoutError:
                    continue

    def _take(self, message: Any) -> None:
        """Forward one message until it is settled; requeue it after MAX_HOLD_SECONDS."""
        body = message.body if isinstance(message.body, bytes) else message.body.encode()
        try:
            answer = self._forwarder.open(body, str(message.content_type))
        except InvalidRequest as error:
            logger.warning("message dead-lettered: %s", error)
            self._count("set_aside")
            message.reject()
            return
        started, backoff = time.monotonic(), Backoff(FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS)
        done: dict[str, Submitted] = {}
        while not self.stopped and time.monotonic() - started < MAX_HOLD_SECONDS:
            try:
                self._settle(message, answer, done)
            except Unavailable as error:
                blocked = isinstance(error, FTSBlocked)
                say = logger.error if blocked else logger.warning
                pause = backoff.pause()
                say("request %s: %s; trying again in %.0f s", answer.request_id, error, pause)
                self._count("blocked" if blocked else "retried")
                time.sleep(pause)
            else:
                return
        message.requeue()

    def _settle(self, message: Any, answer: Answer, done: dict[str, Submitted]) -> None:
        """Forward one message, then acknowledge or reject it; raises Unavailable to be tried again."""
        try:
            try:
                submitted = self._forwarder.forward(answer, done)
            except JobRefused as error:
                self._forwarder.refused(answer, error)
                self._count("set_aside" if isinstance(error, JobBroken) else "refused")
                message.reject()  # dead-lettered: operators may inspect or resend the message
                return
        except Unavailable:
            raise
        except MinterError as error:
            # The engine no longer knows the request or has banned this client; FTS has decided on the job.
            logger.warning("request %s cannot be reported: %s", answer.request_id, error)
            self._count("unreported")
        except Exception:
            logger.exception("request %s failed here and is dead-lettered", answer.request_id)
            self._count("set_aside")
            message.reject()
            return
        else:
            self._count("submitted" if submitted else "nothing")
        message.ack()


def run(
    queue: str, fts: Sequence[str], key: Path | None, ca: str | None, client: str | None, metrics_port: int
) -> None:
    """Submit filled jobs until SIGTERM; `fts` has REST URLs, or NAME=URL for each of several."""
    logs.configure(logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.WARNING)
    url = os.environ.get("MINTER_BROKER_URL")
    if not url:
        raise SettingsError("MINTER_BROKER_URL is not set; it names the broker and this client's user")
    private = msgspec.json.decode(key.read_bytes()) if key else None
    named = dict(entry.split("=", 1) for entry in fts if "=" in entry.partition("://")[0])
    services = {name: FTSClient(address, ca=ca) for name, address in named.items()} or FTSClient(
        fts[0], ca=ca
    )
    registry = CollectorRegistry()
    jobs = new_counter(FTS_JOBS, registry)
    if metrics_port:
        serve(registry, "fts", "127.0.0.1", range(metrics_port, metrics_port + 1))
    with MinterClient(url, client, ca=ca) as minter:
        forwarder = Forwarder(minter, services, private)
        consumer = JobConsumer(url, queue, forwarder, ca, lambda outcome: jobs.labels(outcome).inc())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(consumer, "stopped", True))
        alive.ready()
        consumer.run()
