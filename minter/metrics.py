"""Every metric of every process, made from what the engine observes (docs/metrics.md lists them).

Labels are bounded: VOs, storages and operations come from the settings, reasons and stages from
closed lists. No sub, jti, path or request_id is ever a label.
"""

import logging
import platform
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from functools import cache
from typing import Literal, NamedTuple

import kombu
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.engine import Engine as Pool

from minter import __version__
from minter.broker.publisher import count_waiting
from minter.database import counts, partitions, processes
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.database.live_tokens import count_live
from minter.errors import SettingsError, Unavailable
from minter.policy.plans import Plan
from minter.sections import MetricsSettings
from minter.tokens import keys
from minter.tokens.keys import RotationPolicy
from minter.tokens.outcomes import Observed, Outcome
from minter.tokens.records import OWN_KINDS

logger = logging.getLogger(__name__)


class Spec(NamedTuple):
    """One metric, as docs/metrics.md lists it."""

    kind: Literal["counter", "histogram", "gauge"]
    name: str
    labels: tuple[str, ...]
    help: str


TOKENS = Spec(
    "counter", "minter_tokens", ("vo", "mode", "operation", "storage", "outcome"),
    "Tokens handed out: issued anew, or repeated from their rows.",
)  # fmt: skip
REQUESTS = Spec(
    "counter", "minter_requests", ("vo", "kind", "outcome"),
    "Requests served: granted, refused as a whole, repeated.",
)  # fmt: skip
REFUSALS = Spec(
    "counter", "minter_refusals", ("vo", "reason", "storage"),
    "Refused tokens and requests, by reason, and by storage where it is known.",
)  # fmt: skip
FOLLOW_UPS = Spec(
    "counter", "minter_follow_ups", ("task", "outcome"),
    "Messages about earlier requests: fetches, reports, cancellations.",
)  # fmt: skip
HTTP = Spec(
    "counter", "minter_http_responses", ("endpoint", "status"),
    "HTTP responses, by the endpoint's path in the settings; the label is empty for unknown paths.",
)  # fmt: skip
FTS_JOBS = Spec(
    "counter", "minter_fts_jobs", ("outcome",),
    "Messages that an FTS consumer finished or will try again, by outcome: submitted, nothing, refused,"
    " retried, unreported, set_aside.",
)  # fmt: skip
EVENTS = Spec(
    "counter", "minter_fts_events", ("vo", "outcome"),
    "FTS monitoring messages, by outcome: noted, unknown (no token matches), nothing (no change), broken.",
)  # fmt: skip
LAST_EVENT = Spec(
    "gauge", "minter_fts_last_event_timestamp_seconds", ("broker",),
    "Time of the last message from a broker, in seconds since the epoch.",
)  # fmt: skip
WAITED = Spec(
    "histogram", "minter_transfer_wait_seconds", ("vo", "mode"),
    "Time from the request of a token until its transfer began, for transfers that ended (events).",
)  # fmt: skip
LIFE_LEFT = Spec(
    "histogram", "minter_transfer_life_left_seconds", ("vo", "mode"),
    "Lifetime that a token had left when its transfer ended; 0 if it had expired (events).",
)  # fmt: skip
PROVIDER = Spec(
    "counter", "minter_provider_requests", ("provider", "grant", "outcome"),
    "Requests to external IAMs, by outcome: ok, outrun (the lease was lost), or the error's reason.",
)  # fmt: skip
PROVIDER_SECONDS = Spec(
    "histogram", "minter_provider_request_seconds", ("provider",), "Duration of requests to an external IAM.",
)  # fmt: skip
STAGE = Spec(
    "histogram", "minter_stage_seconds", ("stage",),
    "Time of a batch from the previous stage to this stage; the first stage, received, has no value.",
)  # fmt: skip
BATCH = Spec("histogram", "minter_batch_requests", (), "Requests that were decided and recorded together.")
AGE = Spec(
    "histogram", "minter_request_age_seconds", (),
    "Age of a request when processing starts, from the time in its request_id: its time in the queue.",
)  # fmt: skip
QUEUE = Spec("gauge", "minter_queue_messages", ("queue",), "Messages that wait in a queue (beat).")
PROCESSES = Spec(
    "gauge", "minter_processes_alive", ("role",),
    "Processes with a heartbeat, by role: worker, beat, serve, refresher, events, console (beat).",
)  # fmt: skip
LIVE = Spec(
    "gauge", "minter_tokens_alive", ("vo",),
    "Tokens that have not expired; estimated from a sample where there are many (beat).",
)  # fmt: skip
EXPIRING = Spec("gauge", "minter_tokens_expiring", ("vo",), "Tokens that expire within an hour (beat).")
SIGNS_UNTIL = Spec(
    "gauge", "minter_key_signs_until_timestamp_seconds", ("vo", "algorithm"),
    "When the active key is due to be replaced, in seconds since the epoch (beat).",
)  # fmt: skip
STANDBY = Spec(
    "gauge", "minter_key_standby_ready_timestamp_seconds", ("vo", "algorithm"),
    "When the standby key may sign, in seconds since the epoch; no value means no standby key (beat).",
)  # fmt: skip
PARTITIONS = Spec("gauge", "minter_partitions_ahead_days", (), "Days after today with partitions (beat).")
PART = Spec(
    "gauge", "minter_part_level", ("part",),
    "Worst line of `minter status` about a part: 0 ok, 1 warning, 2 failed; asked once a minute (beat).",
)  # fmt: skip
BUILD = Spec(
    "gauge",
    "minter_build_info",
    ("role", "version", "python"),
    "1 for each process, by role and version.",
)

SPECS = (
    TOKENS, REQUESTS, REFUSALS, FOLLOW_UPS, HTTP, FTS_JOBS, EVENTS, LAST_EVENT, WAITED, LIFE_LEFT,
    PROVIDER, PROVIDER_SECONDS, STAGE, BATCH, AGE, QUEUE, PROCESSES, LIVE, EXPIRING, SIGNS_UNTIL, STANDBY,
    PARTITIONS, PART, BUILD,
)  # fmt: skip

OF_BEAT = (QUEUE, PROCESSES, LIVE, EXPIRING, SIGNS_UNTIL, STANDBY, PARTITIONS)
"""Gauges of `StateCollector`."""

_STAGE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_AGE_BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 1800, 7200)
_BATCH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200)

COLLECT_SECONDS = 15.0
"""Maximum age, in seconds, of the values read from the database and the broker."""


class Metrics:
    """The metrics of one worker; `observe` is called at every stage of every batch."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self._since = 0.0
        self._tokens = self._counter(TOKENS)
        self._requests = self._counter(REQUESTS)
        self._refusals = self._counter(REFUSALS)
        self._follow_ups = self._counter(FOLLOW_UPS)
        self._http_of = cache(self._counter(HTTP).labels)  # few: endpoints and statuses
        self._provider = self._counter(PROVIDER)
        self._provider_seconds = self._histogram(PROVIDER_SECONDS, _STAGE_BUCKETS)
        self._stage = self._histogram(STAGE, _STAGE_BUCKETS)
        self._batch = self._histogram(BATCH, _BATCH_BUCKETS)
        self._age = self._histogram(AGE, _AGE_BUCKETS)
        ProcessCollector(registry=self.registry)

    def _counter(self, spec: Spec) -> Counter:
        return new_counter(spec, self.registry)

    def _histogram(self, spec: Spec, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(spec.name, spec.help, spec.labels, buckets=buckets, registry=self.registry)

    def observe(self, observed: Observed) -> None:
        """Count one stage of one batch."""
        now = self._clock()
        if observed.stage == "received":
            self._batch.observe(len(observed.outcomes))
            at = observed.at.timestamp()
            for outcome in observed.outcomes:
                request = outcome.submission.request
                if request.kind not in OWN_KINDS:  # clients made the ids of other kinds
                    self._age.observe(max(0.0, at - request.unix_time))
        else:
            self._stage.labels(observed.stage).observe(now - self._since)
        self._since = now
        if observed.stage == "answered":
            self._count(observed.outcomes)

    def follow_up(self, task: str, outcome: str) -> None:
        """Count one message about an earlier request."""
        self._follow_ups.labels(task, outcome).inc()

    def http(self, endpoint: str, status: int) -> None:
        """Count one HTTP response."""
        self._http_of(endpoint, status).inc()

    def provider(self, provider: str, grant: str, outcome: str, seconds: float) -> None:
        """Count one request to an external IAM."""
        self._provider.labels(provider, grant, outcome).inc()
        self._provider_seconds.labels(provider).observe(seconds)

    def counted(self) -> Tally[tuple[str, str, str]]:
        """Return what this process counted since its start, as `minter.database.counts` keeps it."""
        found: Tally[tuple[str, str, str]] = Tally()
        for counter, kind, name in (
            (self._tokens, "tokens", "mode"),
            (self._requests, "requests", "outcome"),
            (self._refusals, "refusals", "reason"),
        ):
            for labels, value in _samples(counter, "_total"):
                label = "repeated" if labels.get("outcome") == "repeated" else labels[name]
                found[labels["vo"], kind, label] += int(value)
                if labels.get("storage") and label != "repeated" and kind in counts.OF_STORAGES:
                    found[labels["vo"], counts.OF_STORAGES[kind], labels["storage"]] += int(value)
        for histogram, times, numbers in ((self._stage, "stage_us", "stages"), (self._age, "age_us", "ages")):
            for labels, value in _samples(histogram, "_sum"):
                found["", times, labels.get("stage", "")] += int(value * 1_000_000)
            for labels, value in _samples(histogram, "_count"):
                found["", numbers, labels.get("stage", "")] += int(value)
        return found

    def _count(self, outcomes: Iterable[Outcome]) -> None:
        """Count a batch: equal labels are added up, then counted at once."""
        requests: Tally[tuple[str, ...]] = Tally()
        refusals: Tally[tuple[str, ...]] = Tally()
        tokens: Tally[tuple[str, str, Plan]] = Tally()
        for outcome in outcomes:
            vo = outcome.client.vo if outcome.client else ""
            kind = outcome.submission.request.kind
            if outcome.error is not None:
                requests[vo, kind, "refused"] += 1
                refusals[vo, outcome.error.reason, outcome.error.fields.get("storage", "")] += 1
                continue
            requests[vo, kind, "repeated" if outcome.repeated else "granted"] += 1
            for refusal in outcome.refusals:
                refusals[vo, refusal["error"]["reason"], refusal["error"].get("storage", "")] += 1
            what = "repeated" if outcome.repeated else "issued"
            for planned in outcome.decision.planned_tokens if outcome.decision else ():
                tokens[vo, what, planned.plan] += 1
        for labels, count in requests.items():
            self._requests.labels(*labels).inc(count)
        for labels, count in refusals.items():
            self._refusals.labels(*labels).inc(count)
        for (vo, what, plan), count in tokens.items():
            operation = "+".join(plan.operations) or plan.rule
            mode = plan.route.mode if plan.route else "mint"
            self._tokens.labels(vo, mode, operation, plan.area.storage, what).inc(count)


def _samples(metric: Counter | Histogram, suffix: str) -> Iterator[tuple[dict[str, str], float]]:
    for family in metric.collect():
        for sample in family.samples:
            if sample.name.endswith(suffix):
                yield sample.labels, sample.value


def new_gauge(spec: Spec, registry: CollectorRegistry) -> Gauge:
    """Return the gauge of one specification, in a registry."""
    return Gauge(spec.name, spec.help, spec.labels, registry=registry)


def new_counter(spec: Spec, registry: CollectorRegistry) -> Counter:
    """Return the counter of one specification, in a registry."""
    return Counter(spec.name, spec.help, spec.labels, registry=registry)


class StateCollector(Collector):
    """Gauges of the beat that acts, read from the database and the broker at most every 15 s."""

    def __init__(
        self, pool: Pool, broker: Callable[[], kombu.Connection],
        queues: Callable[[], Iterable[str]],
        rotation: RotationPolicy, now: Callable[[], datetime],
        acts: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._acts = acts
        self._broker = broker
        self._queues = queues
        self._rotation = rotation
        self._now = now
        self._last: list[Metric] = []
        self._at = float("-inf")

    def describe(self) -> Iterator[Metric]:
        """Name the metrics without reading the database or the broker."""
        for spec in SPECS:
            if spec in OF_BEAT:
                yield GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)

    def collect(self) -> Iterator[Metric]:
        """Return the gauges."""
        if time.monotonic() - self._at > COLLECT_SECONDS:
            asked = (self._of_database, self._of_broker) if self._acts() else ()
            self._last = [metric for ask in asked for metric in _what_answers(ask)]
            self._at = time.monotonic()
        yield from self._last

    def _of_database(self) -> Iterator[Metric]:
        now = self._now()
        with transaction(self._pool) as connection:
            ring = read_keys(connection)
        running = processes.known(self._pool)
        alive = Tally(process.role for process, ago in running if ago < processes.ALIVE_SECONDS)
        roles: dict[tuple[str, ...], float] = {(role,): alive[role] for role in processes.ROLES}
        yield _gauge(PROCESSES, roles)
        living = count_live(self._pool, now, timedelta(hours=1))
        active = {
            (k.vo, k.algorithm): keys.signs_until(k, self._rotation) for k in ring if k.state == "active"
        }
        standby: dict[tuple[str, str], datetime] = {}
        for key in (k for k in ring if k.state == "prepared"):  # the oldest is the next to sign
            ready = keys.may_sign_from(key, self._rotation)
            standby.setdefault((key.vo, key.algorithm), ready)
        yield _gauge(LIVE, {(vo,): valid for vo, (valid, _) in living.items()})
        yield _gauge(EXPIRING, {(vo,): expiring for vo, (_, expiring) in living.items()})
        yield _gauge(SIGNS_UNTIL, {where: at.timestamp() for where, at in active.items() if at})
        yield _gauge(STANDBY, {where: at.timestamp() for where, at in standby.items()})
        yield _gauge(PARTITIONS, {(): partitions.partitions_ahead(self._pool, now.date())})

    def _of_broker(self) -> Iterator[Metric]:
        waiting: dict[tuple[str, ...], float] = {}
        connection = self._broker()
        try:
            for queue in self._queues():
                waiting[queue,] = count_waiting(connection, queue) or 0
        except connection.connection_errors as error:
            raise Unavailable(f"the broker cannot be reached ({type(error).__name__})") from error
        finally:
            connection.release()
        yield _gauge(QUEUE, waiting)


def _what_answers(ask: Callable[[], Iterator[Metric]]) -> list[Metric]:
    """Return the gauges of a server; while it is unavailable, return none and log a warning."""
    try:
        return list(ask())
    except Unavailable as error:
        logger.warning("metrics: %s", error)
        return []


def _gauge(spec: Spec, values: Mapping[tuple[str, ...], float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


_PORTS = {"beat": (0, 1), "events": (1, 1), "refresher": (2, 8), "serve": (10, 20)}
"""First port of each role, counted from `first_port`, and how many ports it has."""
_WORKER_PORTS = 30


def ports_of(role: str, wanted: MetricsSettings) -> range:
    """Return the ports of [metrics] on which processes of a role serve Prometheus."""
    first, count = _PORTS.get(role, (_WORKER_PORTS, wanted.ports))
    return range(wanted.first_port + first, wanted.first_port + first + count)


def serve_process(registry: CollectorRegistry, wanted: MetricsSettings, role: str) -> None:
    """Serve the registry of this process on a port of its role, if [metrics] of the settings has a port."""
    if wanted.first_port:
        port = serve(registry, role, wanted.listen, ports_of(role, wanted))
        logger.info("metrics are on port %d", port)


def serve(registry: CollectorRegistry, role: str, host: str, ports: range) -> int:
    """Serve a registry, with the role and version of this process, on the first free port; return the port.

    Raises SettingsError if no port is free.
    """
    new_gauge(BUILD, registry).labels(role, __version__, platform.python_version()).set(1)
    for port in ports:
        try:
            start_http_server(port, host, registry)
        except OSError:
            continue  # another process of this machine uses the port
        return port
    raise SettingsError(
        f"no free port for metrics of {role} in {ports.start} to {ports.stop - 1}; see [metrics]"
    )
