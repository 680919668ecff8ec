"""Fixtures with real worker processes on a real Postgres; the tests run on both brokers."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest

from minter import service
from minter.broker.publisher import declare
from minter.client import MinterClient
from minter.contract import names
from minter.local.servers import Valkey
from tests.acceptance.served import Served
from tests.conftest import EXAMPLES, MASTER_KEY, ROOT, _admin, _dsn, load_settings
from tests.servers import RabbitMQ, installed, lacking

CLIENTS = ("rucio-alpen", "dirac")
WORKER = [
    "worker", "--pool", "solo", "--concurrency", "1", "--without-gossip", "--without-mingle", "--without-heartbeat",
]  # fmt: skip


@pytest.fixture(scope="session", params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Valkey | RabbitMQ]:
    """A broker: Valkey from its wheel, or Debian's RabbitMQ."""
    folder = tmp_path_factory.mktemp(request.param)
    server: Valkey | RabbitMQ
    if request.param == "embedded":
        server = Valkey(folder / "valkey")
    elif not installed():
        lacking("RabbitMQ is not installed (apt-get install rabbitmq-server)")
    else:
        server = RabbitMQ(folder / "node")
    server.start()
    with kombu.Connection(server.url) as connection:
        declare(connection)
    time.sleep(
        2.5 if request.param == "rabbitmq" else 0
    )  # RabbitMQ 3.10 forgets fresh quorum queues when killed
    yield server
    server.stop()


class Running:
    """An engine: its database, its broker, and worker processes that can be killed."""

    def __init__(
        self,
        broker: Valkey | RabbitMQ,
        dsn: str,
        folder: Path,
        app: str = "workers.app",
        settings: Path = EXAMPLES / "settings.toml",
    ) -> None:
        self.broker, self.folder, self.app = broker, folder, app
        self.on_rabbitmq = isinstance(broker, RabbitMQ)
        self.service = service.Service(load_settings(dsn))
        self.environ = {
            **os.environ,
            "MINTER_SETTINGS": str(settings),
            "MINTER_DSN": dsn,
            "MINTER_BROKER_URL": broker.url,
            "MINTER_MASTER_KEY_ALPEN": MASTER_KEY,
            "PYTHONPATH": str(ROOT),
        }
        self.workers: list[subprocess.Popen[bytes]] = []
        self.passwords: dict[str, str] = {}
        self.started = 0
        self.setup_users()

    def setup_users(self) -> None:
        if not self.on_rabbitmq:
            return
        self.minter("clients", "add", "dirac", "--vo", "alpen", check=False)  # needed once on each server
        assert isinstance(self.broker, RabbitMQ)
        path = self.broker.folder / "passwords.json"
        out = self.broker.folder / "new-passwords.json"
        self.minter("broker", "setup", "--rabbitmqctl", str(self.broker.ctl), "--passwords", str(out))
        known = json.loads(path.read_text()) if path.exists() else {}
        if out.exists():
            known |= json.loads(out.read_text())
            out.unlink()
            path.write_text(json.dumps(known))
        self.passwords = known

    def minter(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "minter.cli", *map(str, arguments)],
            env=self.environ, capture_output=True, text=True, check=check, cwd=ROOT,
        )  # fmt: skip

    def url(self, name: str = "rucio-alpen") -> str:
        if not self.on_rabbitmq:
            return self.broker.url
        assert isinstance(self.broker, RabbitMQ)
        return f"amqp://{name}:{self.passwords[name]}@127.0.0.1:{self.broker.port}//"

    def client(self, name: str = "rucio-alpen", **options: Any) -> MinterClient:
        return MinterClient(
            self.url(name), name, timeout_seconds=options.pop("timeout_seconds", 60), **options
        )

    def start_worker(self, *options: str, **environ: str) -> subprocess.Popen[bytes]:
        self.started += 1
        path = self.folder / f"worker-{self.started}.log"
        with path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", self.app, *WORKER, "--loglevel", "DEBUG", *options,
                 "--hostname", f"w{self.started}@localhost"],
                env={**self.environ, **environ}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
            )  # fmt: skip
        self.workers.append(process)
        return process

    def start_beat(self) -> subprocess.Popen[bytes]:
        with (self.folder / "beat.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", self.app, "beat", "--schedule", str(self.folder / "schedule")],
                env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
            )  # fmt: skip

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        for process in self.workers:
            if process.poll() is None:
                process.send_signal(number)
        for process in self.workers:
            process.wait(30)
        self.workers.clear()

    def logs(self) -> str:
        return "\n".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        self.stop()
        self.service.pool.dispose()

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        from tests.conftest import rows

        return rows(self.service, statement, *values)


@pytest.fixture(scope="module")
def database_dsn(postgres_dsn: str, template: str, broker: Valkey | RabbitMQ) -> Iterator[str]:
    name = f"minter_acceptance_{uuid.uuid4().hex[:8]}"
    _admin(postgres_dsn, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _dsn(postgres_dsn, name)
    _admin(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def running(
    broker: Valkey | RabbitMQ, database_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    engine = Running(broker, database_dsn, tmp_path_factory.mktemp("workers"))
    for _ in range(2):
        engine.start_worker("-E")
    yield engine
    engine.close()


@pytest.fixture
def client(running: Running) -> Iterator[MinterClient]:
    with running.client() as made:
        yield made


class Raw:
    """A client that sends arbitrary messages and reads its own reply queue."""

    def __init__(self, running: Running, name: str = "rucio-alpen") -> None:
        self.running, self.name = running, name
        self.connection = kombu.Connection(running.url(name))
        self.reply_to = f"{names.reply_prefix(name)}{uuid.uuid4().hex}"
        self.channel = self.connection.channel()
        self.replies: list[Any] = []
        queue = kombu.Queue(
            self.reply_to, channel=self.channel, durable=False, exclusive=True, auto_delete=True
        )
        kombu.Consumer(self.channel, [queue], on_message=self.replies.append, no_ack=True).consume()

    def send(
        self,
        body: dict[str, Any] | str | bytes,
        task: str = names.MINT,
        headers: dict[str, Any] | None = None,
        exchange: str = names.REQUEST_EXCHANGE,
        key: str = names.REQUEST_QUEUE,
        **properties: Any,
    ) -> str:
        if isinstance(body, dict):
            body = json.dumps([[body], {}, {}])
        correlation = uuid.uuid4().hex
        user = {"user_id": self.name} if self.running.on_rabbitmq else {}
        properties = {"reply_to": self.reply_to, "correlation_id": correlation, **user, **properties}
        message = self.channel.prepare_message(
            body, content_type="application/json", content_encoding="utf-8",
            headers={"task": task, "id": correlation} if headers is None else headers,
            properties={k: v for k, v in properties.items() if v is not None},
        )  # fmt: skip
        self.channel.basic_publish(message, exchange=exchange, routing_key=key)
        return correlation

    def receive(self, correlation: str, seconds: float = 20) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for reply in self.replies:
                if reply.properties.get("correlation_id") == correlation:
                    body = reply.body if isinstance(reply.body, bytes) else reply.body.encode()
                    return json.loads(body)["result"]
            try:
                self.connection.drain_events(timeout=0.5)
            except TimeoutError:
                continue
        raise AssertionError("no answer")

    def ask(self, body: dict[str, Any] | str | bytes, **options: Any) -> Any:
        return self.receive(self.send(body, **options))


@pytest.fixture
def raw(running: Running) -> Iterator[Raw]:
    made = Raw(running)
    yield made
    made.connection.release()


@pytest.fixture(scope="module")
def served(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The HTTP service, two processes, with a client `rucio`."""
    made = Served(tmp_path_factory.mktemp("served"), postgres_dsn)
    made.add_client("rucio")
    yield made
    made.close()


def environment(folder: Path, *packages: str | Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", *packages], check=True)
    return folder / "bin/python"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT], check=True
    )
    (path,) = folder.glob("gridminter-*.whl")
    return path
