"""Pages of docs/on-call.md, followed from symptom to cure."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from minter.client import FileRequest, new_request_id
from minter.contract import names
from minter.status import QUEUE_LONG
from tests.acceptance.conftest import Raw, Running
from tests.acceptance.test_operations import status
from tests.acceptance.test_workers import OTHER, SE
from tests.conftest import ROOT
from tests.servers import RabbitMQ

pytestmark = pytest.mark.slow


@pytest.fixture
def idle(broker: RabbitMQ, database_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An engine without workers."""
    engine = Running(broker, database_dsn, tmp_path_factory.mktemp("on-call"))
    yield engine
    engine.close()


def line(engine: Running, part: str) -> dict[str, Any]:
    return status(engine)[2][part]


def until(true: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.parametrize("broker", [pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)], indirect=True)
def test_queue_grows(idle: Running) -> None:
    greedy = Raw(idle)
    own = names.client_requests("rucio-alpen")
    for _ in range(QUEUE_LONG + 10):
        body = {"request_id": str(new_request_id()), "files": [{"sources": [f"{SE}{uuid.uuid4()}"]}]}
        greedy.send(body, exchange=own, key=own)
    until(lambda: line(idle, names.REQUEST_QUEUE)["level"] == "warning")
    assert line(idle, names.REQUEST_QUEUE)["text"] == f"{QUEUE_LONG + 10} waiting, most of client rucio-alpen"
    assert line(idle, "worker")["text"].startswith("none running")
    idle.minter("ban", "client", "rucio-alpen", "--reason", "a loop")
    for _ in range(2):
        idle.start_worker()
    with idle.client("dirac") as other:
        assert other.mint([FileRequest(sources=(f"{SE}other",), destinations=(f"{OTHER}other",))]).tokens
    refused = "SELECT count(*) FROM requests JOIN clients USING (client_id) WHERE name = 'rucio-alpen'"
    assert idle.rows(refused)[0][0] < QUEUE_LONG  # the other client did not wait for all of them
    until(lambda: idle.rows(refused) == [(QUEUE_LONG + 10,)])
    until(lambda: line(idle, names.REQUEST_QUEUE)["text"] == "0 waiting")
    assert line(idle, names.REQUEST_QUEUE)["level"] == "ok"
    assert idle.rows(refused.replace("requests", "tokens")) == [(0,)]
    idle.minter("unban", "client", "rucio-alpen")
    greedy.connection.release()


def test_key_leaked() -> None:
    """By the commands that the page names; the recovery is killed in the middle."""
    words = ["drill", "--fault", "key-leak", "--transfers", "6000", "--json"]
    command = [sys.executable, "-m", "minter.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    counted = (report["transfers"], report["tokens"], report["banned"], report["killed"])
    assert counted == (6000, 3000, 300, True)
    assert not any(report[name] for name in ("lost", "twice", "unverified", "let_through"))
