"""The faults of a campaign: each breaks something for real, and mends it after a while."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.cluster.cluster import APPS, SERVERS, Cluster
from tests.cluster.machines import run
from tests.conftest import ROOT

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
VOLUME_BYTES = 1_500_000_000
CUT_SECONDS = (25.0, 40.0)
"""How long the network is cut: longer than the lease of a primary (ttl in patroni.yml)."""
OUTAGE_SECONDS = (6.0, 14.0)
"""How long something stays broken that does not mend itself."""


class Faults:
    """Breaks a cluster by a seeded random; `old` is the code of the release before, for rolling upgrades."""

    def __init__(self, cluster: Cluster, seed: int, old: Path | None = None) -> None:
        self.cluster = cluster
        self.random = random.Random(seed)
        self.old = old
        self.kinds: Mapping[str, Callable[[], str]] = {
            "primary's Postgres killed": self.kill_primary,
            "primary's machine lost": self.lose_machine,
            "broker node killed": self.kill_broker,
            "etcd's leader killed": self.kill_etcd,
            "process of Minter killed": self.kill_minter,
            "machine of Minter off the network": self.unplug_minter,
            "switchover": self.switch_over,
            "halves parted": self.part,
            "primary's machine off the network": self.unplug_primary,
            "200 ms and 5 % loss": self.bad_line,
            "primary's disk full": self.fill_disk,
            "clock of a worker jumps": self.jump,
            "rolling upgrade": self.upgrade,
        }

    def _outage(self) -> None:
        time.sleep(self.random.uniform(*OUTAGE_SECONDS))

    def primary(self) -> str:
        """Return the machine of the primary, which is waited for."""
        found: list[str] = []

        def look() -> bool:
            name = self.cluster.primary()
            found[:] = [name] if name else []
            return name is not None

        self.cluster.wait("a primary", look)
        return found[0]

    def kill_primary(self) -> str:
        """kill -9 of the primary's postmaster."""
        name = self.primary()
        file = self.cluster.machines[name].path("/var/lib/postgresql/15/minter/postmaster.pid")
        os.kill(int(file.read_text().split()[0]), signal.SIGKILL)
        return name

    def lose_machine(self) -> str:
        """kill -9 of everything on the primary's machine, which stays away for a while."""
        name = self.primary()
        machine = self.cluster.machines[name]
        machine.power_off()
        machine.processes.clear()
        time.sleep(self.random.uniform(25, 35))
        machine.path("/var/lib/postgresql/15/minter/postmaster.pid").unlink(missing_ok=True)
        self.cluster.start_servers(name)
        return name

    def kill_broker(self) -> str:
        """kill -9 of a RabbitMQ node, which systemd starts again."""
        name = self.random.choice(SERVERS)
        self.cluster.machines[name].kill("rabbitmq")
        self._outage()
        return name

    def kill_etcd(self) -> str:
        """kill -9 of the etcd node that leads."""
        for name in SERVERS:
            url = f"http://{self.cluster.machines[name].address}:2379/v3/maintenance/status"
            try:
                with urllib.request.urlopen(url, b"{}", timeout=2) as answer:
                    status = json.load(answer)
            except urllib.error.URLError:
                continue
            if status["leader"] == status["header"]["member_id"]:
                self.cluster.machines[name].kill("etcd")
                self._outage()
                return name
        raise AssertionError("etcd has no leader")

    def kill_minter(self) -> str:
        """kill -9 of one process of ours, or of its HAProxy."""
        machine = self.cluster.machines[self.random.choice(APPS)]
        name = self.random.choice(sorted(machine.processes))
        machine.kill(name)
        time.sleep(self.random.uniform(1, 5))
        return f"{name} on {machine.name}"

    def unplug_minter(self) -> str:
        """Take a machine with Minter off the network: nobody is told that its connections ended."""
        machine = self.cluster.machines[self.random.choice(APPS)]
        self.cluster.network.unplug(machine)
        time.sleep(self.random.uniform(20, 30))
        self.cluster.network.plug_in(machine)
        return machine.name

    def switch_over(self) -> str:
        """A planned change of the primary."""
        before = self.primary()
        self.cluster.patronictl("switchover", "minter", "--leader", f"{before}.example.org", "--force")
        self.cluster.wait("another primary", lambda: self.cluster.primary() not in (None, before), 60)
        return before

    def part(self) -> str:
        """Cut the network between db1, app1 and db2, db3, app2."""
        before = self.primary()
        self.cluster.network.cut()
        time.sleep(self.random.uniform(*CUT_SECONDS))
        self.cluster.network.good_line()
        return f"primary {before}, then {self.primary()}"

    def unplug_primary(self) -> str:
        """Take the primary's machine off the network: it must not come back as primary."""
        before = self.primary()
        machine = self.cluster.machines[before]
        self.cluster.network.unplug(machine)
        time.sleep(self.random.uniform(*CUT_SECONDS))
        self.cluster.network.plug_in(machine)
        after = self.primary()
        assert after != before, "the primary that was cut off is primary again"
        return f"primary {before}, then {after}"

    def bad_line(self) -> str:
        """200 ms each way and 5 % of frames lost between the halves."""
        self.cluster.network.bad_line(0.2, 0.05)
        time.sleep(self.random.uniform(15, 25))
        self.cluster.network.good_line()
        return ""

    def fill_disk(self) -> str:
        """Fill the volume of the primary's Postgres."""
        name = self.primary()
        volume = self.cluster.machines[name].path("/var/lib/postgresql")
        ballast = volume / "ballast"
        free = os.statvfs(volume)
        size = free.f_bavail * free.f_frsize
        with ballast.open("wb") as file:
            while size >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
                except OSError:
                    size //= 2
        time.sleep(self.random.uniform(10, 20))
        ballast.unlink()
        return name

    def jump(self) -> str:
        """Set the clock of one worker minutes off, and right again."""
        seconds = self.random.choice((-600, -120, 120, 600))
        log = self.cluster.machines["app1"].folder / "worker-1.log"
        before = log.read_text().count("clock")
        (self.cluster.folder / "clock").write_text(f"{seconds:+d}")
        self.cluster.wait(
            "the worker's word about its clock", lambda: log.read_text().count("clock") > before, 30
        )
        self._outage()
        (self.cluster.folder / "clock").write_text("+0")
        return f"{seconds:+d} s"

    def upgrade(self) -> str:
        """Change every process of ours to this release, one by one; from the second time on, back before that."""
        if self.old and self.cluster.code != self.old:
            self._replace_all(self.old)
        self._replace_all(ROOT)
        return "with a new schema" if self.old else "the same release"

    def _replace_all(self, code: Path) -> None:
        cluster = self.cluster
        cluster.code = code
        if code != self.old:
            upgraded = cluster.minter("db", "upgrade", check=False)
            assert upgraded.returncode == 0, upgraded.stderr
        for name in APPS:
            for role, command in cluster.commands(name).items():
                cluster.machines[name].replace(role, command, self.environ(name, role))
                time.sleep(0.5)
            cluster.wait(f"the processes of {name}", cluster.well)

    def environ(self, machine: str, role: str) -> Mapping[str, str]:
        """Return the environment of a process; one worker has a clock that can jump."""
        if (machine, role) != ("app1", "worker-1"):
            return self.cluster.environ
        clock = self.cluster.folder / "clock"
        if not clock.exists():
            clock.write_text("+0")
        return self.cluster.environ | {
            "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip

    def prepare(self) -> None:
        """Give one worker the clock that can jump."""
        command = self.cluster.commands("app1")["worker-1"]
        assert FAKETIME.exists(), "a clock that jumps needs Debian's libfaketime"
        self.cluster.machines["app1"].replace("worker-1", command, self.environ("app1", "worker-1"))


def small_volumes(cluster: Cluster) -> None:
    """Put the data of each Postgres on a small volume of its own, which can be filled."""
    for name in SERVERS:
        image = cluster.folder / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(VOLUME_BYTES)
        run("mkfs.ext4", "-q", "-m", "0", image)
        run("mount", "-o", "loop", image, cluster.machines[name].path("/var/lib/postgresql"))


def unmount(cluster: Cluster) -> None:
    """Take the volumes away again."""
    for name in SERVERS:
        run("umount", "-l", cluster.machines[name].path("/var/lib/postgresql"), check=False)


def start_load(cluster: Cluster, book: Path, seed: int) -> None:
    """Start the clients on their machine."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LOAD_BROKER_URL": cluster.broker("rucio-amqp", cluster.passwords["rucio-amqp"]),
        "LOAD_HTTP_URL": "https://tokens.vo-alpen.example.org/alpen/",
        "LOAD_SECRET": (cluster.folder / "secret").read_text().strip(),
    }
    command = [
        sys.executable, "-m", "tests.cluster.load", "--book", str(book), "--seed", str(seed), "--ca",
        str(cluster.folder / "ca.pem"),
    ]  # fmt: skip
    cluster.machines["client"].start("load", command, environ=environ)


def stop_load(cluster: Cluster, seconds: float = 90) -> None:
    """Let the clients get their last answers; raises TimeoutExpired if one waits for ever."""
    process = cluster.machines["client"].processes.pop("load")
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        raise
