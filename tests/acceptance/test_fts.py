"""The FTS forwarder as a process: from the durable queue to FTS, with faults on both sides."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import kombu
import pytest

from minter.cli.demo import read_jobs
from minter.client import new_request_id
from minter.contract import names
from tests.acceptance.conftest import Raw, Running
from tests.acceptance.test_workers import OTHER, SE
from tests.conftest import EXAMPLES, ROOT
from tests.integration.test_metrics import scrape
from tests.servers import RabbitMQ, free_ports
from tests.simulators import FakeFTS

ME = "rucio-alpen"
QUEUE = "rucio-alpen.jobs"


@pytest.fixture(scope="module")
def key(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A client with a durable queue and a key with which its answers are encrypted."""
    path = tmp_path_factory.mktemp("fts") / "jwe.json"
    running.minter("clients", "change", ME, "--reply-queue", QUEUE, "--new-jwe-key", path)
    running.setup_users()
    yield path
    running.minter("clients", "change", ME, "--reply-queue", "none.jobs")


@pytest.fixture
def consume(
    running: Running, key: Path, fts: FakeFTS, tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start forwarders; all are stopped at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> subprocess.Popen[bytes]:
        url = running.url() if running.on_rabbitmq else running.broker.url
        with (tmp_path / f"fts-{len(started)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "minter.cli", "fts", "--queue", QUEUE, "--key", key, "--fts", fts.url, "--client", ME, *options],
                env={**os.environ, "MINTER_BROKER_URL": url, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, cwd=ROOT,
            )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
    logs = "".join(p.read_text() for p in tmp_path.glob("fts-*.log"))
    assert "eyJhbGciOi" not in logs
    assert "Traceback" not in logs


def submit(raw: Raw, job: dict[str, Any], **more: Any) -> UUID:
    request_id = new_request_id()
    body = {"request_id": str(request_id), "job": job, "reply_queue": QUEUE, **more}
    receipt = raw.ask(body, task=names.FILL_JOB)
    assert "error" not in receipt, receipt
    return request_id


def job(*names: str) -> dict[str, Any]:
    return {
        "files": [{"sources": [SE + n], "destinations": [OTHER + n], "filesize": 10} for n in names],
        "params": {},
    }


def until(condition: Callable[..., object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def reported(running: Running, request_id: UUID) -> list[tuple[Any, ...]]:
    return running.rows("SELECT job_id, files, file_ids FROM jobs WHERE request_id = %s", request_id)


def states(running: Running, request_id: UUID) -> set[str]:
    return {
        state
        for (state,) in running.rows(
            "SELECT coalesce(s.state, t.state)::text FROM tokens t LEFT JOIN token_states s USING (jti) WHERE request_id = %s",
            request_id,
        )
    }


def test_rucios_jobs_reach_fts_complete_and_the_engine_knows_their_ids(
    running: Running, raw: Raw, fts: FakeFTS, consume: Callable[..., subprocess.Popen[bytes]]
) -> None:
    (port,) = free_ports(1)
    consume("--metrics-port", str(port))
    # FTS 3.13's REST refuses tokens with tape jobs; its successor takes them, and so does the fake.
    jobs = [body for _, body in read_jobs(EXAMPLES / "rucio-41.5/jobs")][:25]
    ids = [submit(raw, body) for body in jobs]
    filled = [i for i in ids if running.rows("SELECT tokens FROM requests WHERE request_id = %s", i)[0][0]]
    until(lambda: all(reported(running, i) for i in filled))
    assert len(fts.jobs) == len(filled) > 15
    for request_id in filled:
        ((job_id, numbers, file_ids),) = reported(running, request_id)
        sent = fts.jobs[str(job_id)]
        assert len(sent["files"]) == len(numbers)
        assert len(file_ids) in (0, len(numbers))
    assert all(b.startswith("Bearer eyJ") for b in fts.bearers)
    until(lambda: scrape(port).get(("minter_fts_jobs_total", ("outcome", "submitted"))) == len(filled))


@pytest.mark.parametrize(
    "fault",
    [
        "lost",
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in ("503", "429", "401", "404", "302", "html", "odd")
        ),
    ],
)
def test_a_fault_of_fts_costs_a_retry_and_never_a_second_job(
    running: Running, raw: Raw, fts: FakeFTS, consume: Callable[..., subprocess.Popen[bytes]], fault: str
) -> None:
    fts.faults = [fault]
    consume()
    request_id = submit(raw, job(f"fault-{fault}"))
    until(lambda: reported(running, request_id))
    assert fts.posts == 2
    assert len(fts.jobs) == 1
    ((job_id, numbers, file_ids),) = reported(running, request_id)
    assert list(fts.jobs) == [str(job_id)]
    assert (numbers, file_ids) == ([0], [1000])


def test_a_job_that_fts_refuses_is_cancelled(
    running: Running, raw: Raw, fts: FakeFTS, consume: Callable[..., subprocess.Popen[bytes]]
) -> None:
    fts.faults = ["400"]
    consume()
    request_id = submit(raw, job("refused"))
    until(lambda: states(running, request_id) == {"cancelled"})
    assert fts.posts == 1
    assert not reported(running, request_id)
    if running.on_rabbitmq:  # the dead letter is the message, still encrypted
        assert isinstance(running.broker, RabbitMQ)
        with kombu.Connection(f"amqp://guest:guest@127.0.0.1:{running.broker.port}//") as admin:
            channel = admin.channel()

            def found() -> bool:
                dead = channel.basic_get(names.DEAD_LETTER_QUEUE, no_ack=True)
                return dead is not None and dead.properties["content_type"] == "application/jose"

            until(found)


def test_refused_files_keep_their_numbers(
    running: Running, raw: Raw, fts: FakeFTS, consume: Callable[..., subprocess.Popen[bytes]]
) -> None:
    consume()
    body = job("n0", "n1", "n2")
    body["files"][1]["sources"] = ["davs://nowhere.example.org/f"]
    request_id = submit(raw, body)
    until(lambda: reported(running, request_id))
    ((_, numbers, _),) = reported(running, request_id)
    assert numbers == [0, 2]


@pytest.mark.slow
def test_a_sid_that_another_job_has_is_not_taken_for_ours(
    running: Running, raw: Raw, fts: FakeFTS, consume: Callable[..., subprocess.Popen[bytes]]
) -> None:
    consume()
    bodies = [job("sid-a"), job("sid-b")]
    for body in bodies:
        body["params"] = {"id_generator": "deterministic", "sid": f"shared-{uuid.uuid4()}"}
    bodies[1]["params"]["sid"] = bodies[0]["params"]["sid"]
    first = submit(raw, bodies[0])
    until(lambda: reported(running, first))
    second = submit(raw, bodies[1])
    until(lambda: states(running, second) == {"cancelled"})
    assert len(fts.jobs) == 1


@pytest.mark.slow
def test_a_killed_consumer_loses_nothing_and_sends_nothing_twice(
    running: Running, raw: Raw, fts: FakeFTS, consume: Callable[..., subprocess.Popen[bytes]]
) -> None:
    ids = [submit(raw, job(f"kill-{n}")) for n in range(12)]
    fts.faults = ["lost", "503"] * 4
    for _ in range(3):
        process = consume()
        until(lambda before=fts.posts: fts.posts > before + 1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    consume()
    until(lambda: all(reported(running, i) for i in ids), seconds=120)
    assert len(fts.jobs) == 12


@pytest.mark.slow
def test_fts_down_and_back(
    running: Running, raw: Raw, consume: Callable[..., subprocess.Popen[bytes]], fts: FakeFTS
) -> None:
    fts.stop()
    consume()
    request_id = submit(raw, job("down"))
    time.sleep(3)
    assert not reported(running, request_id)
    fts.start()
    until(lambda: reported(running, request_id), seconds=60)


def test_what_is_no_answer_goes_to_the_dead_letters(
    running: Running, raw: Raw, fts: FakeFTS, consume: Callable[..., subprocess.Popen[bytes]]
) -> None:
    if not running.on_rabbitmq:
        pytest.skip("only RabbitMQ keeps dead letters")
    consume()
    assert isinstance(running.broker, RabbitMQ)
    with kombu.Connection(f"amqp://guest:guest@127.0.0.1:{running.broker.port}//") as admin:
        channel = admin.channel()
        message = channel.prepare_message("no JWE", content_type="application/jose", content_encoding="utf-8")
        channel.basic_publish(message, exchange="", routing_key=QUEUE)

        def found() -> bool:
            dead = channel.basic_get(names.DEAD_LETTER_QUEUE, no_ack=True)
            return dead is not None and "no JWE" in str(dead.body)

        until(found)
    assert fts.posts == 0
    assert not fts.jobs
