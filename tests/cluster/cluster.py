"""The cluster of docs/cluster.md, with the files of deploy/cluster: three machines with servers, two with Minter."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psycopg

from minter.tokens.keystore import new_master_key
from tests.cluster.machines import Machine, Network, run
from tests.conftest import EXAMPLES, ROOT
from tests.servers import PROGRAMS, certificates

DEPLOY = ROOT / "deploy"
SERVERS, APPS = ("db1", "db2", "db3"), ("app1", "app2")
ISSUER = "tokens.vo-alpen.example.org"
WORKERS = {"app1": 2, "app2": 1}
CLIENTS = ("rucio-amqp", "rucio-http")
START_SECONDS = 120.0
PATRONI = "4.1.5"
"""Debian 12's 3.0.2 may give a primary that was cut off its place again, and lose rows (patroni#2689)."""


class Cluster:
    """A running cluster; machine `client` is for the load, and has no server."""

    def __init__(
        self, folder: Path, code: Path = ROOT, on_machines: Callable[["Cluster"], None] = lambda _: None
    ) -> None:
        folder.chmod(0o755)  # the servers' users pass it
        self.folder = folder
        self.network = Network(folder)
        self.passwords: dict[str, str] = {}
        self._password = secrets.token_hex(16)
        self._certificates = certificates(
            folder,
            [
                "localhost",
                "db.example.org",
                ISSUER,
                *(f"{n}.example.org" for n in (*SERVERS, *APPS)),
            ],
        )
        self.code = code
        self._on_machines = on_machines

    def __enter__(self) -> Self:
        """Start everything; stop it all if a part does not start."""
        self.network.__enter__()
        try:
            self._make_machines()
            self._on_machines(self)
            self._start_servers()
            self._prepare()
            for name in APPS:
                self.start_minter(name)
            self.wait("issuing", self.well)
        except BaseException:
            self.network.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop everything."""
        self.network.__exit__()

    @property
    def machines(self) -> dict[str, Machine]:
        return self.network.machines

    @property
    def environ(self) -> dict[str, str]:
        """Environment of Minter's processes."""
        return {
            **os.environ,
            "MINTER_SETTINGS": str(self.folder / "settings.toml"),
            "MINTER_DSN": f"host=db.example.org hostaddr=127.0.0.1 dbname=minter user=minter"
            f" password={self._password} sslmode=verify-full sslrootcert={self._certificates}"
            " keepalives_idle=5 keepalives_interval=2 keepalives_count=3 tcp_user_timeout=10000",
            "MINTER_BROKER_URL": self.broker("minter", self._password).split(";")[0]
            if self.code != ROOT  # the release before knows one node only
            else self.broker("minter", self._password),
            "MINTER_MASTER_KEY_ALPEN": self._master_key,
            "PYTHONPATH": str(self.code),
        }

    def broker(self, user: str, password: str) -> str:
        """Return the broker's URL for a user: all three nodes."""
        return ";".join(f"amqps://{user}:{password}@{name}.example.org:5671/minter" for name in SERVERS)

    def _make_machines(self) -> None:
        for number, (name, half) in enumerate(
            (("db1", "a"), ("db2", "b"), ("db3", "b"), ("app1", "a"), ("app2", "b"), ("client", "b")), 11
        ):
            self.network.add(name, number, half)
        apps = [self.machines[name].address for name in APPS]
        self.network.name_hosts({ISSUER: apps[::-1], "db.example.org": ["127.0.0.1"]})
        self._master_key = new_master_key()
        text = (EXAMPLES / "settings.toml").read_text().replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
        text = text.replace("[broker]", f'[broker]\nca = "{self._certificates}"')
        text += "\n[http]\nport = 8443\nprocesses = 1\n"
        (self.folder / "settings.toml").write_text(text)

    # ── servers ──────────────────────────────────────────────────────────────────────────────

    def _install(self, machine: Machine, source: str, target: str, owner: str, **changes: str) -> None:
        """Install a file of deploy/ on a machine; `changes` are for the small size of this one."""
        text = (DEPLOY / source).read_text().replace("@HOST@", machine.host)
        for old, new in {"change-me": self._password, **changes}.items():
            text = text.replace(old, new)
        path = machine.path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        shutil.chown(path, owner, owner)
        path.chmod(0o600)

    @property
    def _of_patroni(self) -> dict[str, str]:
        """Environment of Patroni: a release of the package index, on Debian's Python packages."""
        path = str(self.folder / "patroni")
        return {
            "HOME": "/var/lib/postgresql",
            "PATH": "/usr/bin:/bin:/usr/sbin",
            "LANG": "C.UTF-8",
            "PYTHONPATH": path,
        }

    def _start_servers(self) -> None:
        target = ["--target", str(self.folder / "patroni"), f"patroni=={PATRONI}"]
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *target)
        for name in SERVERS:
            machine = self.machines[name]
            small = {
                "shared_buffers: 8GB": "shared_buffers: 128MB",
                "max_wal_size: 16GB": "max_wal_size: 1GB",
            }
            self._install(machine, "cluster/etcd.yml", "/var/lib/etcd/etcd.yml", "etcd")
            self._install(machine, "cluster/patroni.yml", "/etc/patroni/config.yml", "postgres", **small)
            self._install(machine, "cluster/pgbouncer.ini", "/etc/pgbouncer/pgbouncer.ini", "postgres")
            self._install(machine, "rabbitmq.conf", "/etc/rabbitmq/rabbitmq.conf", "rabbitmq")
            self._install(machine, "cluster/rabbitmq.conf", "/etc/rabbitmq/conf.d/cluster.conf", "rabbitmq")
            users = machine.path("/etc/pgbouncer/userlist.txt")
            users.write_text(f'"minter" "{self._password}"\n')
            machine.path("/etc/rabbitmq/rabbitmq-env.conf").write_text("USE_LONGNAME=true\n")
            cookie = machine.path("/var/lib/rabbitmq/.erlang.cookie")
            cookie.write_text("MINTER")
            cookie.chmod(0o400)
            for folder, owner in (("/etc/pgbouncer", "postgres"), ("/etc/rabbitmq", "rabbitmq")):
                for file in ("ca.pem", "host.pem", "host.key"):
                    shutil.copy(self.folder / file, machine.path(f"{folder}/{file}"))
                run("chown", "-R", f"{owner}:", machine.path(folder))
            for folder, owner in (
                ("/var/lib/etcd", "etcd"), ("/var/lib/postgresql", "postgres"), ("/var/log/postgresql", "postgres"),
                ("/var/run/postgresql", "postgres"), ("/var/lib/rabbitmq", "rabbitmq"), ("/var/log/rabbitmq", "rabbitmq"),
            ):  # fmt: skip
                run("chown", "-R", f"{owner}:", machine.path(folder))
            for line in (DEPLOY / "cluster/sysctl.conf").read_text().splitlines():
                if line and not line.startswith("#"):
                    key, _, value = line.partition(" = ")
                    set_to = f"echo {value} > /proc/sys/{key.replace('.', '/')}"
                    run("ip", "netns", "exec", machine.namespace, "sh", "-c", set_to)
            self.start_servers(name)
        self.wait("a primary and its standby", lambda: self.primary() is not None)
        for name in APPS:
            machine = self.machines[name]
            self._install(machine, "cluster/haproxy.cfg", "/etc/haproxy/haproxy.cfg", "haproxy")
            shutil.copy(self._certificates, machine.path("/etc/haproxy/ca.pem"))
            both = (self.folder / "host.pem").read_text() + (self.folder / "host.key").read_text()
            machine.path("/etc/haproxy/host.pem").write_text(both)
            machine.start("haproxy", ["haproxy", "-db", "-f", "/etc/haproxy/haproxy.cfg"])

    def start_servers(self, name: str) -> None:
        """Start the servers of a machine."""
        machine = self.machines[name]
        machine.start(
            "etcd", ["etcd", "--config-file", "/var/lib/etcd/etcd.yml"], "etcd", {"PATH": "/usr/bin"}
        )
        patroni = ["/usr/bin/python3", "-m", "patroni", "/etc/patroni/config.yml"]
        machine.start("patroni", patroni, "postgres", self._of_patroni)
        machine.start("pgbouncer", ["pgbouncer", "/etc/pgbouncer/pgbouncer.ini"], "postgres")
        small = {"HOME": "/var/lib/rabbitmq", "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none"}
        machine.start("rabbitmq", [PROGRAMS / "rabbitmq-server"], "rabbitmq", small)

    def rabbitmqctl(self, name: str, *arguments: str, check: bool = True) -> str:
        """Run rabbitmqctl on a machine; return what it prints."""
        command = [str(PROGRAMS / "rabbitmqctl"), "--longnames", "--quiet", *arguments]
        environ = {**os.environ, "HOME": "/var/lib/rabbitmq"}
        done = subprocess.run(
            self.machines[name].command(command, "rabbitmq"), env=environ, capture_output=True, text=True, check=False
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"rabbitmqctl {arguments[0]} on {name}: {done.stdout}{done.stderr}")
        return str(done.stdout)

    # ── Postgres ─────────────────────────────────────────────────────────────────────────────

    def connect(self, name: str, database: str = "minter") -> psycopg.Connection[Any]:
        """Connect to the Postgres of a machine as its superuser, past PgBouncer and HAProxy."""
        return psycopg.connect(
            host=self.machines[name].address, dbname=database, user="postgres", password=self._password,
            connect_timeout=2, autocommit=True,
        )  # fmt: skip

    def primary(self) -> str | None:
        """Return the machine of a primary that a standby confirms commits to, None if there is none."""
        for name in SERVERS:
            with suppress(psycopg.OperationalError), self.connect(name, "postgres") as connection:
                in_step = connection.execute(
                    "SELECT 1 FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')"
                ).fetchone()
                standby = connection.execute("SELECT pg_is_in_recovery()").fetchone()
                if in_step and standby == (False,):
                    return name
        return None

    def patronictl(self, *arguments: str) -> str:
        """Run patronictl on a database machine whose Patroni lives."""
        for name in SERVERS:
            machine = self.machines[name]
            if machine.processes["patroni"].poll() is None:
                script = "from patroni.ctl import ctl; ctl()"
                command = ["/usr/bin/python3", "-c", script, "-c", "/etc/patroni/config.yml", *arguments]
                done = subprocess.run(
                    machine.command(command, "postgres"), env=self._of_patroni, capture_output=True, text=True, check=False
                )  # fmt: skip
                if done.returncode == 0:
                    return str(done.stdout)
        raise RuntimeError(f"patronictl {arguments[0]}: no machine answers")

    # ── Minter ───────────────────────────────────────────────────────────────────────────────

    def minter(
        self, *arguments: str, machine: str = "app1", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Minter on a machine of its own."""
        command = [sys.executable, "-m", "minter.cli", *arguments]
        return subprocess.run(
            self.machines[machine].command(command), env=self.environ, capture_output=True, text=True,
            check=check, cwd=self.folder,
        )  # fmt: skip

    def dead_letters(self) -> list[Any]:
        """Return the messages that were set aside."""
        found: list[Any] = json.loads(self.minter("dead", "list", "--json").stdout)
        return found

    def _prepare(self) -> None:
        self._wait_for_brokers()
        self.rabbitmqctl("db1", "add_vhost", "minter")
        self.rabbitmqctl("db1", "add_user", "minter", self._password)
        self.rabbitmqctl("db1", "set_permissions", "-p", "minter", "minter", ".*", ".*", ".*")
        name = self.primary()
        assert name is not None
        with self.connect(name, "postgres") as connection:
            connection.execute(f"CREATE ROLE minter LOGIN PASSWORD '{self._password}'")
            connection.execute("GRANT pg_monitor TO minter")
            connection.execute("CREATE DATABASE minter OWNER minter")
        self.wait(
            "HAProxy's way to Postgres", lambda: self.minter("db", "upgrade", check=False).returncode == 0
        )
        self.minter("keys", "create", "--vo", "alpen")
        for client in CLIENTS:
            self.minter("clients", "add", client, "--vo", "alpen")
        ctl = self.folder / "rabbitmqctl"
        inner = self.machines["db1"].command([PROGRAMS / "rabbitmqctl", "--longnames"], "rabbitmq")
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in inner)
        ctl.write_text(f'#!/bin/sh\nexport HOME=/var/lib/rabbitmq\nexec {quoted} "$@"\n')
        ctl.chmod(0o755)
        file = self.folder / "passwords.json"
        self.minter("broker", "setup", "--rabbitmqctl", str(ctl), "--passwords", str(file))
        self.passwords = json.loads(file.read_text())
        self.minter("clients", "rotate", "rucio-http", "--secret-file", str(self.folder / "secret"))

    def _wait_for_brokers(self) -> None:
        self.wait("three RabbitMQ nodes", lambda: len(self._brokers("db1")["running_nodes"]) == len(SERVERS))

    def _brokers(self, name: str) -> dict[str, Any]:
        """Return what the RabbitMQ node of a machine knows of the cluster; nothing runs if it does not answer."""
        told = self.rabbitmqctl(name, "cluster_status", "--formatter", "json", check=False)
        found: dict[str, Any] = (
            json.loads(told) if told.startswith("{") else {"running_nodes": [], "partitions": {}}
        )
        return found

    def start_minter(self, name: str) -> None:
        """Start the processes of a machine that runs Minter."""
        for role, command in self.commands(name).items():
            self.machines[name].start(role, command, environ=self.environ)

    def commands(self, name: str) -> Mapping[str, Sequence[str]]:
        """Return the commands of a machine's processes by role."""
        base = [sys.executable, "-m", "minter.cli"]
        workers = {
            f"worker-{n}": [*base, "worker", "--name", f"worker-{n}@{name}"] for n in range(WORKERS[name])
        }
        schedule = str(self.machines[name].folder / "schedule")
        return workers | {"beat": [*base, "beat", "--schedule", schedule], "serve": [*base, "serve"]}

    def restart_dead(self) -> list[str]:
        """Start again what died on any machine that has power, as systemd would."""
        return [f"{m.name}: {dead}" for m in self.machines.values() for dead in m.restart_dead()]

    def whole(self) -> bool:
        """Say whether every server runs: three RabbitMQ nodes, a primary, and two standbys that stream."""
        name = self.primary()
        if name is None:
            return False
        with suppress(psycopg.OperationalError), self.connect(name, "postgres") as connection:
            streaming = connection.execute(
                "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
            ).fetchone()
            if streaming == (len(SERVERS) - 1,):
                return len(self._brokers(name)["running_nodes"]) == len(SERVERS)
        return False

    def join_brokers(self) -> list[str]:
        """Restart RabbitMQ nodes that stayed apart from two others after a cut; return their names."""
        apart = []
        for name in SERVERS:
            of_me = dict(self._brokers(name)["partitions"]).get(f"rabbit@{self.machines[name].host}", [])
            if len(of_me) == len(SERVERS) - 1:
                self.machines[name].kill("rabbitmq")
                self.machines[name].restart_dead()
                apart.append(name)
        return apart

    def well(self) -> bool:
        """Say whether both machines' Minter serves, by itself and through its HAProxy."""
        return all(self._ready(name, port) for name in APPS for port in (8444, 443))

    def _ready(self, name: str, port: int) -> bool:
        to = f"{ISSUER}:{port}:{self.machines[name].address}"
        curl: list[str | Path] = [
            "curl",
            "-sf",
            "--max-time",
            "2",
            "--cacert",
            self._certificates,
            "--resolve",
            to,
        ]
        command = self.machines["client"].command([*curl, f"https://{ISSUER}:{port}/ready"])
        return run(*command, check=False).returncode == 0

    def wait(self, what: str, ready: Callable[[], bool], seconds: float = START_SECONDS) -> float:
        """Wait until something is so; return the seconds. Raises TimeoutError that names it."""
        started = time.monotonic()
        while not ready():
            if time.monotonic() - started > seconds:
                raise TimeoutError(f"{what}: not within {seconds:g} s; logs are in {self.folder}")
            time.sleep(0.2)
        return time.monotonic() - started
