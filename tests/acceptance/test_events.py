"""FTS's monitoring messages over a real STOMP broker (RabbitMQ's plugin) end tokens or keep them fresh."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
import stomp

from minter.contract.followups import JobReport, ReportRequest
from minter.contract.messages import FileRequest, MintRequest
from minter.policy.requests import from_mint
from minter.service import Service
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock
from minter.tokens.outcomes import Submission
from tests.conftest import EXAMPLES, MASTER_KEY, ROOT, rows
from tests.integration.test_mint import SE
from tests.servers import RabbitMQ, installed, lacking
from tests.unit.test_fts_events import told

pytestmark = pytest.mark.rabbitmq
ME = "rucio-alpen"
QUEUE = "/queue/Consumer.minter.transfer.fts_monitoring_complete"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    if not installed():
        lacking("RabbitMQ is not installed (apt-get install rabbitmq-server)")
    server = RabbitMQ(tmp_path_factory.mktemp("stomp") / "node")
    server.start()
    yield server
    server.stop()


class Events:
    """Run `minter events` as a process."""

    def __init__(self, node: RabbitMQ, dsn: str, folder: Path) -> None:
        (folder / "secret").touch(mode=0o600)
        (folder / "secret").write_text("guest")
        text = (EXAMPLES / "settings.toml").read_text().replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
        text += f'\n[[fts_events]]\nvo = "alpen"\nfts_vo = "minter"\ntls = false\nhost = "/"\nuser = "guest"\npassword_file = "secret"\nbrokers = ["127.0.0.1:{node.stomp_port}"]\n'
        (folder / "settings.toml").write_text(text)
        self.environ = {
            **os.environ, "MINTER_SETTINGS": str(folder / "settings.toml"), "MINTER_DSN": dsn,
            "MINTER_MASTER_KEY_ALPEN": MASTER_KEY, "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.log = folder / "events.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "minter.cli", "events"],
                env=self.environ,
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(30)


@pytest.fixture
def events(node: RabbitMQ, dsn: str, tmp_path: Path) -> Iterator[Events]:
    made = Events(node, dsn, tmp_path)
    yield made
    made.stop()


@pytest.fixture
def send(node: RabbitMQ) -> Iterator[Callable[[bytes], None]]:
    connection = stomp.Connection12([("127.0.0.1", node.stomp_port)], vhost="/")
    connection.connect("guest", "guest", wait=True)
    yield lambda body: connection.send(QUEUE, body, headers={"persistent": "true"})
    connection.disconnect()


def issue(service: Service, name: str, external_id: str) -> UUID:
    file = FileRequest(sources=(SE + name,), destinations=(SE + name + "2",), external_id=external_id)
    request = from_mint(MintRequest(request_id=clock.new_uuid7(), files=(file,)))
    (outcome,) = service.engine.mint_many([Submission(request, ME)], clock.now())
    assert len(outcome.issued) == 2
    return request.request_id


def of(name: str, kind: str, **changes: object) -> bytes:
    """Return FTS's message about the file that `issue` named."""
    return told(kind, src_url=SE + name, dst_url=SE + name + "2", **changes)


def states(service: Service) -> list[str]:
    return sorted(s for (s,) in rows(service, "SELECT state::text FROM token_states"))


def until(what: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def test_tokens_follow_their_transfers(
    service: Service, events: Events, send: Callable[[bytes], None]
) -> None:
    external_id = uuid.uuid4().hex
    issue(service, "a", external_id)
    by_job = issue(service, "b", "")
    job = uuid.uuid4()
    Lifecycle(service.engine, service.store).report(
        ME, ReportRequest(jobs=(JobReport(job, by_job, (0,), (77,)),)), clock.now()
    )
    send(of("a", "start", file_metadata={"request_id": external_id}) + b" ")
    until(lambda: states(service) == ["active", "active"])
    send(b"not a message \x04")
    send(told("complete", vo="another", file_metadata={"request_id": external_id}))
    send(told("complete", file_metadata={"request_id": "nobody's"}))
    send(of("b", "complete", job_id=str(job), file_id=77, file_metadata=None) + b"\x04")
    until(lambda: states(service) == ["active", "active", "finished", "finished"])
    send(told("complete", file_metadata={"request_id": external_id}))  # other URLs: another user's file
    send(of("a", "complete", file_metadata={"request_id": external_id}))
    send(of("a", "complete", file_metadata={"request_id": external_id}))  # messages may come twice
    until(lambda: states(service) == ["finished"] * 4)
    text = events.log.read_text()
    assert "guest" not in text
    ended = [line for line in map(json.loads, text.splitlines()) if line["message"] == "transfer ended"]
    assert [[t["side"] for t in line["tokens"]] for line in ended] == [["source", "destination"]] * 2
    began = ["waited_seconds" in line["tokens"][0] for line in ended]
    assert began == [False, True]  # nobody told when b's transfer began
    assert any(json.loads(line).get("unknown") == 1 for line in text.splitlines() if '"unknown"' in line)


def test_what_was_not_noted_comes_again(
    service: Service, events: Events, send: Callable[[bytes], None], node: RabbitMQ
) -> None:
    first, second = uuid.uuid4().hex, uuid.uuid4().hex
    issue(service, "c", first)
    issue(service, "d", second)
    until(lambda: "listening" in events.log.read_text())
    events.stop(signal.SIGKILL)
    send(of("c", "complete", file_metadata={"request_id": first}))
    events.start()
    until(lambda: states(service) == ["finished", "finished"])
    node.kill()
    node.start()
    connection = stomp.Connection12([("127.0.0.1", node.stomp_port)], vhost="/")
    connection.connect("guest", "guest", wait=True)
    connection.send(
        QUEUE, of("d", "complete", file_metadata={"request_id": second}), headers={"persistent": "true"}
    )
    until(lambda: states(service) == ["finished"] * 4, 60)
    connection.disconnect()


def test_fts_is_silent_as_on_call_has_it(
    service: Service, events: Events, send: Callable[[bytes], None], node: RabbitMQ
) -> None:
    """docs/on-call.md, "FTS silent": what `minter status` says, and what the log of `minter events` names."""

    def line(part: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "minter.cli", "status", "--json"],
            env=events.environ, capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        return next((o["level"], o["text"]) for o in json.loads(done.stdout)["lines"] if o["part"] == part)

    broker = f"127.0.0.1:{node.stomp_port}"
    until(lambda: line("events") == ("ok", "1 running"))
    assert line("FTS events") == ("warning", f"no message of {broker} since minter events started")
    send(told("complete", file_metadata={"request_id": "nobody's"}))
    until(lambda: line("FTS events")[0] == "ok", 60)
    assert f"last message of {broker}" in line("FTS events")[1]
    events.stop()
    assert line("events") == ("warning", "none running; start: minter events")
    (events.log.parent / "secret").write_text("wrong")
    events.log.write_text("")
    events.start()
    until(lambda: "Access refused" in events.log.read_text())
    assert "wrong" not in events.log.read_text()
    (events.log.parent / "secret").write_text("guest")
