"""The engine for benchmarks: settings with 200 storages and 50 routes, servers, workers, versions."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import kombu
import msgspec

from benchmarks.load import body
from minter import service, settings
from minter.broker.publisher import declare
from minter.database import migrations
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.local import stack
from minter.local.servers import Postgres, Valkey
from minter.policy.requests import decode_mint
from minter.tokens import clock, keys
from minter.tokens.keystore import new_master_key
from minter.tokens.outcomes import Submission
from tests.servers import RabbitMQ

ROOT = Path(__file__).parents[1]
STORAGES = 200
ROUTES = 50


def settings_text() -> str:
    """Return settings with 200 storages and 50 routes, of which the last one matches."""
    text = ['[issuers.vo]\niss = "https://tokens.example.org/vo/"\n[broker]\nlocal_client = "load"\n']
    dialects = ("dcache", "xrootd", "storm", "xrootd")
    for n in range(STORAGES):
        text.append(
            f'[[storages]]\nvo = "vo"\nname = "SE{n:03d}"\ndialect = "{dialects[n % 4]}"\nbase_path = "/data"\n'
            f'endpoints = [{{ host = "se{n}.example.org", prefix = "/data/vo" }}]\n'
        )
    for n in range(ROUTES - 1):
        text.append(
            f'[[routes]]\nname = "other{n}"\nclients = ["client{n}*"]\nactivities = ["T{n}*"]\noperations = ["read", "overwrite"]\n'
        )
    text.append(
        '[[routes]]\nname = "all"\noperations = ["read", "write", "overwrite", "delete", "stage", "poll"]\n'
    )
    return "".join(text)


def openssl_per_second() -> dict[str, float]:
    """Return the signatures per second of one core by algorithm, measured by openssl.

    `mix` is the rate of one ES256 signature and one RS256 signature in turn.
    """
    done = subprocess.run(
        ["openssl", "speed", "-seconds", "3", "ecdsap256", "rsa2048"],
        capture_output=True,
        text=True,
        check=True,
    )
    rates = {
        "ES256": float(re.search(r"nistp256\)\s+\S+\s+\S+\s+([\d.]+)", done.stdout).group(1)),
        "RS256": float(re.search(r"rsa\s+2048 bits\s+\S+\s+\S+\s+([\d.]+)", done.stdout).group(1)),
    }
    return rates | {"mix": round(2 / (1 / rates["ES256"] + 1 / rates["RS256"]), 1)}


def report(result: dict[str, object], path: Path | None) -> None:
    """Print the result, and write it to a file if one is named."""
    text = json.dumps(result, indent=1)
    print(text)
    if path:
        path.write_text(text + "\n")


def versions() -> dict[str, str]:
    names = ("celery", "kombu", "amqp", "pyjwt", "cryptography", "psycopg", "sqlalchemy", "msgspec")
    return {
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        **{n: version(n) for n in names},
    }


class Bench:
    """Servers and a prepared database; each measurement starts its own workers."""

    def __init__(self, folder: Path, broker: str) -> None:
        self.folder = folder
        self.postgres = Postgres(folder / "postgres")
        self.broker = RabbitMQ(folder / "node") if broker == "rabbitmq" else Valkey(folder / "valkey")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.postgres.start()
        self.broker.start()
        path = self.folder / "settings.toml"
        path.write_text(settings_text())
        self.environ = {
            **os.environ, "MINTER_SETTINGS": str(path), "MINTER_DSN": self.postgres.dsn,
            "MINTER_BROKER_URL": self.broker.url, "MINTER_MASTER_KEY_VO": new_master_key(),
        }  # fmt: skip
        self.service = service.Service(settings.load(path, self.environ))
        migrations.upgrade(self.service.pool)
        self.service.prepare()
        self.service.create_keys("vo", ("ES256", "RS256"), "bench")
        stack.add_client(
            self.service, "guest" if isinstance(self.broker, RabbitMQ) else "load", "vo", "bench"
        )
        with kombu.Connection(self.broker.url) as connection:
            declare(connection)
        with transaction(self.service.pool) as connection:
            ring = read_keys(connection)
        (self.folder / "jwks.json").write_text(json.dumps(keys.jwks(ring, clock.now())))

    @property
    def client(self) -> str:
        return "guest" if isinstance(self.broker, RabbitMQ) else "load"

    def submission(self, files: int, number: int, algorithm: str = "") -> Submission:
        """Return a new request as the engine takes it; see `benchmarks.load.body`."""
        ((request,), _, _) = msgspec.json.decode(body(files, number, STORAGES, algorithm)[1])
        return Submission(decode_mint(msgspec.json.encode(request)), self.client)

    def workers(self, count: int) -> None:
        for n in range(count):
            with (self.folder / f"worker{n}.log").open("ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "--pool", "solo", "--concurrency", "1",
                         "--without-gossip", "--without-mingle", "--without-heartbeat", "--hostname", f"b{n}@localhost"],
                        env=self.environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT,
                    )
                )  # fmt: skip
        time.sleep(3)

    def load(self, files: int, requests: int, in_flight: int, kind: str = "plain") -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.load", self.broker.url, self.client, str(files), str(requests), str(in_flight),
             str(self.folder / "jwks.json"), kind],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return json.loads(done.stdout)

    def rss(self) -> int:
        """Return the resident memory of all workers, in kB."""
        total = 0
        for process in self.processes:
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += int(re.search(r"VmRSS:\s+(\d+)", status).group(1))
        return total

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)
        if hasattr(self, "service"):
            self.service.pool.dispose()
        self.broker.stop()
        self.postgres.stop()


@contextmanager
def bench(folder: Path, broker: str, postgres: Sequence[str] = ()) -> Iterator[Bench]:
    """Run servers and a prepared database; `postgres` has settings of Postgres."""
    made = Bench(folder, broker)
    made.postgres.settings = postgres
    try:
        made.start()
        yield made
    finally:
        made.stop()
