"""A real HTTP service on a free port, with TLS and a CA of its own."""

import os
import signal
import ssl
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

from minter import service, settings
from minter.client import MinterClient
from minter.database import migrations
from minter.database.connection import transaction
from minter.local import stack
from minter.policy.clients import Client
from tests.conftest import EXAMPLES, MASTER_KEY, ROOT, _admin, _dsn
from tests.servers import certificates, free_ports

VO = "alpen"


class Served:
    """`minter serve` on a fresh database; `iss` is what clients are configured with.

    `iam` is the issuer of an IAM under which Minter signs; `more` has the table of that, then.
    """

    def __init__(
        self,
        folder: Path,
        postgres_dsn: str,
        more: str = "",
        processes: int = 2,
        http: str = "",
        iam: str = "",
    ) -> None:
        self.folder = folder
        self.database = f"minter_http_{uuid.uuid4().hex[:8]}"
        self.admin = postgres_dsn
        (self.port,) = free_ports(1)
        self.host = f"https://localhost:{self.port}"
        self.iss = f"{self.host}/{VO}/"
        self.ca = certificates(folder)
        self.secrets: dict[str, str] = {}
        text = (EXAMPLES / "settings.toml").read_text()
        text = text.replace("https://tokens.vo-alpen.example.org/alpen/", iam or self.iss)
        text = text.replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
        text += f'\n[http]\nport = {self.port}\nprocesses = {processes}\ncertificate = "host.pem"\nkey = "host.key"\n{http}\n{more}'
        path = folder / "settings.toml"
        path.write_text(text)
        dsn = _dsn(postgres_dsn, self.database)
        self.environ = {
            **os.environ,
            "MINTER_SETTINGS": str(path),
            "MINTER_DSN": dsn,
            "MINTER_MASTER_KEY_ALPEN": MASTER_KEY,
            "PYTHONPATH": str(ROOT),
        }
        _admin(postgres_dsn, f"CREATE DATABASE {self.database}")
        self.service = service.Service(settings.load(path, self.environ))
        migrations.upgrade(self.service.pool)
        self.service.prepare()
        self.service.create_keys(VO, ("ES256", "RS256"), "tests")
        if iam:  # keys sign once they have been public for two days
            with transaction(self.service.pool) as connection:
                connection.execute("UPDATE signing_keys SET published_at = now() - interval '3 days'")
            self.minter("keys", "rotate", "--vo", VO, "--algorithm", "ES256")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with (self.folder / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "minter.cli", "serve"],
                env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
            )  # fmt: skip
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                with self.http() as http:
                    if http.get("/ready").status_code == 200:
                        return
            except httpx.TransportError:
                time.sleep(0.1)
        self.close()
        raise AssertionError(self.log())

    def http(self, name: str | None = None, **options: Any) -> httpx.Client:
        """Return an HTTP client, which authenticates if a registered client is named."""
        auth = (name, self.secrets[name]) if name else None
        context = ssl.create_default_context(cafile=str(self.ca))
        return httpx.Client(base_url=self.host, verify=context, auth=auth, timeout=30, **options)

    def client(self, name: str = "rucio", **options: Any) -> MinterClient:
        return MinterClient(self.iss, name, self.secrets[name], ca=str(self.ca), **options)

    def add_client(self, name: str, **columns: Any) -> Client:
        """Register a client with a secret; `columns` are further columns of its row."""
        from minter.database import control_changes
        from minter.tokens import keystore

        made = stack.add_client(self.service, name, VO, "tests")
        if columns:
            control_changes.change_client(self.service.pool, name, columns, "tests")
        self.secrets[name] = keystore.new_secret()
        self.service.set_secret(made, self.secrets[name], "tests")
        return made

    def token(self, name: str | None, **form: Any) -> httpx.Response:
        """POST to the token endpoint; return the response."""
        with self.http(name) as http:
            return http.post(f"/{VO}/token", data=form)

    def minter(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "minter.cli", *map(str, arguments)],
            env=self.environ, capture_output=True, text=True, check=check, cwd=ROOT,
        )  # fmt: skip

    def log(self) -> str:
        return (self.folder / "serve.log").read_text(errors="replace")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def close(self) -> None:
        self.stop()
        self.service.pool.dispose()
        _admin(self.admin, f"DROP DATABASE {self.database} WITH (FORCE)")
