"""I2, I3, I4 under faults: workers, Postgres and broker killed, a full disk, a poison message."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import kombu
import psycopg
import pytest

from minter.broker.publisher import declare
from minter.client import FileRequest, new_request_id
from minter.contract import names
from minter.contract.messages import Answer, MintRequest, Side, TokenAnswer
from minter.errors import Undeliverable, from_dict
from minter.local.servers import Postgres, Valkey
from minter.tokens.records import fts_token_id
from tests.acceptance.conftest import Running
from tests.acceptance.test_workers import OTHER, SE
from tests.conftest import EXAMPLES, prepare
from tests.servers import RabbitMQ, installed
from workers.batching import MAX_HELD_BYTES

pytestmark = pytest.mark.slow

STAGES = ["received", "decided", "inserted", "copied", "committed", "half_replied", "confirmed"]
KILLS = int(os.environ.get("MINTER_KILLS", "10"))
"""Kills at each stage; `make kills` does 20."""


@pytest.fixture(scope="module", params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Postgres, Valkey | RabbitMQ, Path]]:
    """Servers for this module only, because the tests kill them."""
    folder = tmp_path_factory.mktemp(f"faults-{request.param}")
    if request.param == "rabbitmq" and not installed():
        pytest.skip("RabbitMQ is not installed")
    postgres = Postgres(folder / "postgres")
    broker = RabbitMQ(folder / "node") if request.param == "rabbitmq" else Valkey(folder / "valkey")
    postgres.start()
    broker.start()
    with kombu.Connection(broker.url) as connection:
        declare(connection)
    declared = time.monotonic()
    prepare(postgres.dsn)
    time.sleep(max(0, 2.5 - (time.monotonic() - declared)))
    yield postgres, broker, folder
    broker.stop()
    postgres.stop()


@pytest.fixture
def engine(servers: tuple[Postgres, Valkey | RabbitMQ, Path], tmp_path: Path) -> Iterator[Running]:
    postgres, broker, _ = servers
    settings = tmp_path / "settings.toml"
    text = (EXAMPLES / "settings.toml").read_text().replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
    settings.write_text(text.replace("[broker]", "[broker]\nvisibility_seconds = 2"))
    made = Running(broker, postgres.dsn, tmp_path, app="tests.acceptance.fault_app", settings=settings)
    yield made
    made.stop(signal.SIGKILL)
    made.service.pool.dispose()


def requests(count: int, twice: bool = True) -> list[MintRequest]:
    """Return requests of one to three files, each request twice, in random order."""
    made = [
        MintRequest(
            request_id=new_request_id(),
            files=tuple(
                FileRequest(sources=(f"{SE}{uuid.uuid4()}",), destinations=(f"{OTHER}{n}",))
                for n in range(random.randint(1, 3))
            ),
        )
        for _ in range(count)
    ]
    both = made * 2 if twice else made
    random.shuffle(both)
    return both


class Driver(threading.Thread):
    """A client that sends requests and keeps every answer."""

    def __init__(self, engine: Running, asked: list[MintRequest]) -> None:
        super().__init__()
        self.engine, self.asked = engine, asked
        self.answers: list[tuple[MintRequest, Answer]] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with self.engine.client(timeout_seconds=120, window=32) as client:
                for request, answer in zip(self.asked, client.ask(names.MINT, self.asked), strict=False):
                    self.answers.append((request, answer))
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error


def audit(engine: Running, asked: list[MintRequest], answers: list[tuple[MintRequest, Answer]]) -> None:
    """Check I2 (a row for each token), I3 (one outcome for each request) and I4 (equal bytes for repeats)."""
    assert len(answers) == len(asked)
    by_id: dict[UUID | str | None, dict[tuple[int, Side, int], TokenAnswer]] = {}
    for request, answer in answers:
        assert answer.error is None, answer.error
        assert not answer.refusals
        tokens = {(t.file, t.side, t.index): t for t in answer.tokens}
        assert len(tokens) == len(answer.tokens) == 2 * len(request.files)
        known = by_id.setdefault(request.request_id, tokens)
        assert {k: t.token for k, t in known.items()} == {k: t.token for k, t in tokens.items()}
    ids = list(by_id)
    rows = dict(engine.rows("SELECT jti::text, fts_token_id FROM tokens WHERE request_id = ANY(%s)", ids))
    given = {t.jti: fts_token_id(t.token.encode()) for tokens in by_id.values() for t in tokens.values()}
    assert rows == given  # every token has a row, every row has its token, and no token occurs twice
    recorded = engine.rows(
        "SELECT count(*), count(DISTINCT request_id) FROM requests WHERE request_id = ANY(%s)", ids
    )
    assert recorded == [(len(ids), len(ids))]


def finish(engine: Running, driver: Driver, seconds: float = 240) -> None:
    """Keep two workers alive until the driver is done."""
    deadline = time.monotonic() + seconds
    while driver.is_alive() and time.monotonic() < deadline:
        for worker in [w for w in engine.workers if w.poll() is not None]:
            engine.workers.remove(worker)
            engine.start_worker()
        time.sleep(0.05)
    driver.join(1)
    assert not driver.is_alive()
    assert driver.error is None, driver.error


@pytest.mark.rabbitmq
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("servers", [pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)], indirect=True)
def test_killed_at_each_stage_again_and_again(engine: Running, stage: str) -> None:
    driver = Driver(engine, asked := requests(400))
    faults = iter([f"{stage}:{random.randint(1, 100)}" for _ in range(KILLS)])
    kills = 0
    for _ in range(3):
        engine.start_worker(MINTER_FAULT=next(faults))
    driver.start()
    deadline = time.monotonic() + 200
    while kills < KILLS and time.monotonic() < deadline:
        if not driver.is_alive():  # all requests are answered already: continue with new ones
            driver.join()
            assert driver.error is None, driver.error
            audit(engine, driver.asked, driver.answers)
            driver = Driver(engine, asked := requests(200))
            driver.start()
        for worker in [w for w in engine.workers if w.poll() is not None]:
            engine.workers.remove(worker)
            kills += worker.returncode == -signal.SIGKILL
            fault = next(faults, None)
            engine.start_worker(**({"MINTER_FAULT": fault} if fault else {}))
        time.sleep(0.02)
    assert kills >= KILLS
    finish(engine, driver)
    audit(engine, asked, driver.answers)


def test_random_deaths_of_workers_postgres_and_broker(
    engine: Running, servers: tuple[Postgres, Valkey | RabbitMQ, Path]
) -> None:
    postgres, broker, _ = servers
    for _ in range(2):
        engine.start_worker()
    beat = engine.start_beat()
    driver = Driver(engine, asked := requests(3000))
    driver.start()
    time.sleep(1)
    for victim in ("worker", "postgres", "worker", "broker", "beat", "postgres", "worker"):
        if victim == "worker":
            worker = random.choice(engine.workers)
            worker.kill()
            worker.wait()
            engine.workers.remove(worker)
            engine.start_worker()
        elif victim == "beat":
            beat.kill()
            beat.wait()
            beat = engine.start_beat()
        elif victim == "postgres":
            kill_postgres(postgres)
            time.sleep(0.5)
            postgres.start()
        elif isinstance(broker, RabbitMQ):
            broker.kill()
            broker.start()
        else:
            broker.stop(signal.SIGKILL)
            broker.start()
        time.sleep(random.uniform(0.2, 1.0))
    finish(engine, driver)
    beat.terminate()
    beat.wait(20)
    audit(engine, asked, driver.answers)


def kill_postgres(postgres: Postgres) -> None:
    """kill -9 of the postmaster and all its children: a crash, not a shutdown."""
    pid = int((postgres.folder / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for victim in (pid, *map(int, children)):
        try:
            subprocess.run(["kill", "-9", str(victim)], check=False, capture_output=True)
        except ProcessLookupError:
            continue
    assert postgres.process is not None
    postgres.process.wait()
    time.sleep(0.3)


def test_a_poison_message_is_told_and_set_aside_and_its_neighbours_are_served(engine: Running) -> None:
    poison = MintRequest(request_id=new_request_id(), files=(FileRequest(sources=(SE + "poison-pill",)),))
    asked = requests(50, twice=False)
    asked.insert(25, poison)
    for _ in range(2):
        engine.start_worker()
    driver = Driver(engine, asked)
    driver.start()
    finish(engine, driver)
    answers = {r.request_id: a for r, a in driver.answers}
    refused = answers.pop(poison.request_id)
    assert refused.error is not None
    assert isinstance(from_dict(refused.error), Undeliverable)
    audit(engine, asked[:25] + asked[26:], [(r, a) for r, a in driver.answers if r is not poison])
    assert engine.rows("SELECT count(*) FROM tokens WHERE request_id = %s", poison.request_id) == [(0,)]
    with kombu.Connection(engine.broker.url) as connection:
        reasons = []
        channel = connection.channel()
        while message := channel.basic_get(names.DEAD_LETTER_QUEUE, no_ack=True):
            reasons.append(message.headers["minter-reason"])
    assert "undeliverable" in reasons


def test_a_message_whose_worker_lives_is_never_set_aside(engine: Running) -> None:
    """The broker goes away again and again while the answer is published: no fault of the message.

    The broker hands it to one of the workers after the other.
    """
    with psycopg.connect(engine.service.loaded.dsn) as connection:  # of other tests, whose workers die
        connection.execute("DELETE FROM suspects")
    for cuts in ("3", "3", "3"):
        engine.start_worker(MINTER_CUTS=cuts)
    driver = Driver(engine, asked := requests(1, twice=False))
    driver.start()
    finish(engine, driver)
    audit(engine, asked, driver.answers)
    deadline = time.monotonic() + 30
    while engine.rows("SELECT count(*) FROM suspects") != [(0,)]:  # cleared after the answer
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_postgres_away_for_a_while_refuses_nothing(
    engine: Running, servers: tuple[Postgres, Valkey | RabbitMQ, Path]
) -> None:
    postgres, *_ = servers
    engine.start_worker()
    driver = Driver(engine, asked := requests(200))
    kill_postgres(postgres)
    driver.start()
    time.sleep(6)
    assert driver.is_alive()
    assert not driver.answers
    postgres.start()
    finish(engine, driver)
    audit(engine, asked, driver.answers)


def test_a_full_disk_only_delays(tmp_path: Path, servers: tuple[Postgres, Valkey | RabbitMQ, Path]) -> None:
    """Postgres on a small tmpfs that is filled and emptied again."""
    _, broker, _ = servers
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", mount], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("no tmpfs can be mounted here (needs root)")
    postgres = Postgres(
        mount / "postgres", settings=["wal_keep_size=0", "max_wal_size=32MB", "min_wal_size=32MB"]
    )
    engine = None
    try:
        postgres.start()
        prepare(postgres.dsn)
        engine = Running(broker, postgres.dsn, tmp_path, app="tests.acceptance.fault_app")
        engine.start_worker()
        with engine.client() as client:
            assert client.mint([FileRequest(sources=(SE + "x",))]).tokens
        filler = mount / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
            except OSError:
                pass
        driver = Driver(engine, asked := requests(1500))
        driver.start()
        time.sleep(8)
        assert driver.is_alive()
        filler.unlink()
        assert postgres.process is not None
        if postgres.process.poll() is not None:
            postgres.start()  # Postgres may have stopped for lack of WAL space: the operator starts it again
        finish(engine, driver)
        audit(engine, asked, driver.answers)
    finally:
        if engine is not None:
            engine.stop(signal.SIGKILL)
            engine.service.pool.dispose()
        postgres.stop()
        subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(mount, ignore_errors=True)


def test_a_worker_holds_bounded_bytes_while_postgres_is_away(
    engine: Running, servers: tuple[Postgres, Valkey | RabbitMQ, Path]
) -> None:
    """Requests of 4 MB each, 320 MB in all, come while Postgres is away: the broker keeps most of them."""
    postgres, *_ = servers
    engine.start_worker()
    with engine.client() as client:
        assert client.mint([FileRequest(sources=(SE + "x",))]).tokens
    files = tuple(FileRequest(sources=(f"davs://nowhere.example.org/{'x' * 1900}{n}",)) for n in range(2000))
    asked = [MintRequest(request_id=new_request_id(), files=files) for _ in range(80)]
    driver = Driver(engine, asked)
    status = Path(f"/proc/{engine.workers[-1].pid}/status")
    before = memory(status)
    kill_postgres(postgres)
    driver.start()
    deadline, peak = time.monotonic() + 15, 0
    while time.monotonic() < deadline:
        peak = max(peak, memory(status))
        time.sleep(0.2)
    postgres.start()
    finish(engine, driver)
    assert len(driver.answers) == len(asked)
    assert {len(answer.refusals) for _, answer in driver.answers} == {2000}
    assert peak - before < 4 * MAX_HELD_BYTES


def memory(status: Path) -> int:
    """Return the resident bytes of a process."""
    (line,) = (text for text in status.read_text().splitlines() if text.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_a_worker_whose_clock_is_off_takes_no_requests_until_it_is_right(
    engine: Running, tmp_path: Path
) -> None:
    """The other worker serves them all; the first one says why, and takes requests again by itself."""
    off = tmp_path / "off"
    off.write_text("30")
    engine.start_worker(MINTER_CLOCK_OFF=str(off))
    log = engine.folder / f"worker-{engine.started}.log"
    driver = Driver(engine, alone := requests(5, twice=False))
    driver.start()
    wait_for(lambda: "takes no requests" in log.read_text())
    assert not driver.answers
    engine.start_worker()
    finish(engine, driver)
    audit(engine, alone, driver.answers)
    off.write_text("0")
    wait_for(lambda: "takes requests again" in log.read_text())
    other = engine.workers.pop()
    other.kill()
    other.wait()
    driver = Driver(engine, again := requests(5, twice=False))
    driver.start()
    driver.join(60)
    audit(engine, again, driver.answers)


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
