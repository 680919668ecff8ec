"""All of Minter on one machine: embedded Postgres and broker, workers, beat and refreshers.

Processes and settings file are the same as in production; only the URLs differ.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import kombu

from minter import settings
from minter.broker.publisher import declare
from minter.database import control_changes, migrations
from minter.database.connection import transaction
from minter.database.control import read_control
from minter.local.servers import PRIVATE_UMASK, Postgres, Valkey, make_private_folder
from minter.policy.clients import Client
from minter.private_files import write_private_file
from minter.service import Service
from minter.tokens.keystore import new_master_key, new_secret

STOP_SECONDS = 30.0
QUICK_DEATH_SECONDS = 10.0
MINTER = "minter.cli"


class Stack:
    """A running embedded engine; `environ` is the environment of the processes that use it."""

    def __init__(self, settings_path: Path, folder: Path, workers: int, refreshers: int = 1) -> None:
        self.folder = folder
        self.workers = workers
        self.refreshers = refreshers
        self.environ = {
            **os.environ,
            "MINTER_SETTINGS": str(settings_path.resolve()),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        self._commands: dict[int, tuple[str, tuple[str, ...], float]] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        """Start all servers and processes; if one fails, stop those that were started."""
        try:
            self._start()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the processes, so that workers finish their messages, and then the servers."""
        self._exit.close()

    def _start(self) -> None:
        make_private_folder(self.folder)
        postgres, broker = Postgres(self.folder / "postgres"), Valkey(self.folder / "valkey")
        for server in (postgres, broker):
            self._exit.callback(server.stop)
            server.start()
        self.environ |= {"MINTER_DSN": postgres.dsn, "MINTER_BROKER_URL": broker.url}
        path = Path(self.environ["MINTER_SETTINGS"])
        for vo in settings.load(path, self.environ).settings.issuers:
            self._master_key(vo)
        self.service = Service(settings.load(path, self.environ))
        self._exit.callback(self.service.pool.dispose)
        migrations.upgrade(self.service.pool)
        self.service.prepare()
        self._first_key_and_client()
        with kombu.Connection(broker.url) as connection:
            declare(connection)
        self._exit.callback(self.stop_processes)
        for number in range(self.workers):
            self.spawn_worker(number)
        self.spawn("beat", MINTER, "beat", "--schedule", str(self.folder / "beat-schedule"))
        for number in range(self.refreshers if self.service.loaded.settings.providers else 0):
            self.spawn(f"refresher-{number}", MINTER, "refresher")

    def _master_key(self, vo: str) -> None:
        """Create the VO's master key in the state folder, unless it exists."""
        path = self.folder / f"master-{vo}.key"
        if not path.exists():
            write_private_file(path, new_master_key())
        variable = settings.master_key_variable(vo)
        self.environ.setdefault(variable, path.read_text())

    def _first_key_and_client(self) -> None:
        loaded = self.service.loaded
        with transaction(self.service.pool) as connection:
            control = read_control(connection)
        for vo, issuer in loaded.settings.issuers.items():
            if not any(k.vo == vo for k in control.ring):
                self.service.create_keys(vo, issuer.algorithms, "up")
        local = loaded.settings.broker.local_client
        if local and local not in control.clients:
            vo = next(iter(loaded.settings.issuers))
            add_client(self.service, local, vo, "up")

    def spawn_worker(self, number: int) -> "subprocess.Popen[bytes]":
        """Start one worker process."""
        return self.spawn(f"worker-{number}", MINTER, "worker", "--name", f"minter-{number}@localhost")

    def spawn(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start a module as a process whose output goes to the file `{name}.log`."""
        path = self.folder / f"{name}.log"
        path.touch(mode=0o600)
        with path.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", *arguments],
                env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, umask=PRIVATE_UMASK,
            )  # fmt: skip
        self.processes.append(process)
        self._commands[process.pid] = name, arguments, time.monotonic()
        return process

    def restart_dead(self) -> list[str]:
        """Start processes that died again; return what happened, a line for each.

        A process that lived less than QUICK_DEATH_SECONDS would die again: it stays dead.
        """
        told = []
        for process in [p for p in self.processes if p.poll() is not None]:
            self.processes.remove(process)
            name, arguments, started = self._commands.pop(process.pid)
            log = self.folder / f"{name}.log"
            if time.monotonic() - started < QUICK_DEATH_SECONDS:
                told.append(f"{name} ended with code {process.returncode} at its start; see {log}")
                continue
            what = f"see {log}"
            if name == "console":
                what = f"the console, once: {self.console()}"
            else:
                self.spawn(name, *arguments)
            told.append(f"{name} ended with code {process.returncode}, and was started again; {what}")
        return told

    def serve(self) -> str:
        """Start the HTTP service; return a shell command that gets a token from it."""
        serving = self.spawn("serve", MINTER, "serve")
        loaded, local = self.service.loaded, self.service.loaded.settings.broker.local_client
        with transaction(self.service.pool) as connection:
            client = read_control(connection).clients[local]
        path = self.folder / "client-secret"
        secret = path.read_text() if path.exists() else new_secret()
        if not path.exists():
            write_private_file(path, secret)
        self.service.set_secret(client, secret, "up")
        area = loaded.policy.directories[client.vo].areas()[0]
        http = loaded.settings.http
        deadline = time.monotonic() + STOP_SECONDS
        while not _listens(http.listen, http.port) and serving.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return (
            f'curl -u "{local}:$(cat {path.resolve()})" -d grant_type=client_credentials'
            f" -d audience={area.audience[0]} -d scope=storage.read:{area.root}"
            f" http{'s' if http.certificate else ''}://{http.listen}:{http.port}/{client.vo}/token"
        )

    def console(self) -> str:
        """Start the web console; return the link that signs in once, empty if it did not start."""
        path = self.folder / "console-link"
        path.unlink(missing_ok=True)
        self.environ["MINTER_CONSOLE_LINK"] = str(path)
        started = self.spawn("console", MINTER, "console")
        deadline = time.monotonic() + STOP_SECONDS
        while not path.exists() and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return path.read_text() if path.exists() else ""

    def stop_processes(self) -> None:
        """Stop the processes with SIGTERM; kill those that do not stop in time."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def add_client(service: Service, name: str, vo: str, actor: str) -> Client:
    """Register a client with a fresh `sub` and no limits of its own."""
    client = service.new_client(name, vo)
    control_changes.add_client(service.pool, client, actor)
    return client


@contextmanager
def temporary(settings_path: Path, workers: int = 2) -> Iterator[Stack]:
    """Run a stack in a temporary folder, which is removed afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="minter-state-") as folder,
        Stack(settings_path, Path(folder), workers) as stack,
    ):
        yield stack
