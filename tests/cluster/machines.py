"""Machines of a cluster on one machine: each has a network namespace, a host name and folders of its own.

Two switches are joined by a cable, so that the cluster can be cut into halves. The cable can also be a bad
line: a relay that delays and drops frames, since not every kernel has netem. Everything needs root.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from tests.servers import lacking

FOLDERS = (
    "/etc/patroni", "/etc/pgbouncer", "/etc/haproxy", "/etc/rabbitmq", "/var/lib/etcd", "/var/lib/postgresql",
    "/var/lib/rabbitmq", "/var/log/rabbitmq", "/var/log/postgresql", "/var/run/postgresql",
)  # fmt: skip
"""Folders that each machine has for itself; Debian's packages make them."""
STOP_SECONDS = 20.0
POSTGRES = Path("/usr/lib/postgresql/15/bin/postgres")
PROGRAMS = ("curl", "patroni", "etcd", "pgbouncer", "haproxy", "rabbitmq-server", "ip", "unshare", "setpriv")


def missing() -> list[str]:
    """Return the programs that a cluster needs and this machine lacks."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    postgres = [] if POSTGRES.exists() else [str(POSTGRES)]
    return postgres + [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; raises RuntimeError with its output."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done


class Machine:
    """One machine; `start` runs a program there, and its output goes to a file."""

    def __init__(self, network: "Network", name: str, address: str, half: str) -> None:
        self.name, self.address, self.half = name, address, half
        self.folder = network.folder / name
        self.namespace = f"{network.prefix}{name}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[Sequence[str | Path], str, Mapping[str, str]]] = {}
        self._hosts = network.folder / "hosts"
        self._lock = threading.Lock()
        for folder in FOLDERS:
            (self.folder / folder[1:]).mkdir(parents=True)
        run("ip", "netns", "add", self.namespace)
        run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        self.plug = network.connect(self.namespace, f"{address}/24", half)

    @property
    def host(self) -> str:
        """Its name in the deploy files."""
        return f"{self.name}.example.org"

    def path(self, path: str) -> Path:
        """Return where a path of the machine is on the real one."""
        return self.folder / path[1:]

    def command(self, command: Sequence[str | Path], user: str = "root") -> list[str]:
        """Return the command line that runs a command there as a user."""
        mounts = "".join(f'mount --bind "{self.folder}{f}" {f} && ' for f in FOLDERS)
        drop = "" if user == "root" else f"setpriv --reuid {user} --regid {user} --init-groups "
        script = (
            f'mkdir -p /var/run/postgresql && {mounts}mount --bind "{self._hosts}" /etc/hosts && '
            f'hostname {self.host} && exec {drop}"$@"'
        )
        inner = ["unshare", "--mount", "--uts", "sh", "-c", script, "sh"]
        return ["ip", "netns", "exec", self.namespace, *inner, *map(str, command)]

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        user: str = "root",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Start a program there under a name of ours."""
        self._commands[name] = command, user, environ or {}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(command, user), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **(environ or {})}, start_new_session=True, cwd=self.folder,
            )  # fmt: skip

    def restart_dead(self) -> list[str]:
        """Start programs again that died, as systemd would; return their names."""
        with self._lock:
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            for name in dead:
                self.start(name, *self._commands[name])
        return dead

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a program and to all that it started."""
        process = self.processes[name]
        if process.poll() is None:
            os.killpg(process.pid, number)
        if number is signal.SIGKILL:
            process.wait()

    def stop(self, name: str) -> None:
        """Stop a program in order; kill it after STOP_SECONDS."""
        process = self.processes[name]
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill(name)

    def replace(self, name: str, command: Sequence[str | Path], environ: Mapping[str, str]) -> None:
        """Stop a program in order, and start another in its place."""
        with self._lock:
            self.stop(name)
            self.start(name, command, self._commands[name][1], environ)

    def pids(self) -> list[int]:
        """Return all processes of the machine."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.namespace, check=False).stdout.split()]

    def power_off(self) -> None:
        """Kill every process of the machine at once."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes.values():
            process.wait()


class Network:
    """Two switches `a` and `b`, the cable between them, and the machines; this machine is .1 on `b`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"m{os.getpid() % 10000}"
        self.net = f"10.77.{os.getpid() % 250}"
        self.machines: dict[str, Machine] = {}
        self._switch = f"{self.prefix}net"
        self._plugs = 0
        self._relay: subprocess.Popen[bytes] | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        """Make the switches and the cable."""
        run("ip", "netns", "add", self._switch)
        self._exit.callback(run, "ip", "netns", "del", self._switch)
        for half in "ab":
            self._in_switch("link", "add", "name", f"switch-{half}", "type", "bridge")
            self._in_switch("link", "set", f"switch-{half}", "up")
        self._in_switch("link", "add", "cable-a", "type", "veth", "peer", "name", "cable-b")
        for half in "ab":
            self._in_switch("link", "set", f"cable-{half}", "master", f"switch-{half}")
            self._in_switch("link", "set", f"cable-{half}", "up")
        self.connect("", f"{self.net}.1/24", "b")
        return self

    def __exit__(self, *_: object) -> None:
        """Kill every process of the machines, and remove them."""
        self.good_line()
        for machine in self.machines.values():
            machine.power_off()
            run("ip", "netns", "del", machine.namespace)
        self._exit.close()

    def add(self, name: str, number: int, half: str) -> Machine:
        """Add a machine with an address on one of the switches."""
        self.machines[name] = made = Machine(self, name, f"{self.net}.{number}", half)
        return made

    def name_hosts(self, extra: Mapping[str, Sequence[str]]) -> None:
        """Write the hosts file of all machines; `extra` has more names with machines' addresses."""
        lines = ["127.0.0.1 localhost"] + [f"{m.address} {m.host}" for m in self.machines.values()]
        lines += [f"{address} {name}" for name, addresses in extra.items() for address in addresses]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    def connect(self, namespace: str, address: str, half: str) -> str:
        """Connect a namespace, or this machine, to a switch; return the name of its port there."""
        self._plugs += 1
        ours, theirs = f"{self.prefix}p{self._plugs}", f"{self.prefix}e{self._plugs}"
        run("ip", "link", "add", theirs, "type", "veth", "peer", "name", ours)
        run("ip", "link", "set", ours, "netns", self._switch)
        self._in_switch("link", "set", ours, "master", f"switch-{half}")
        self._in_switch("link", "set", ours, "up")
        here: tuple[str, ...] = ("ip",)
        if namespace:
            run("ip", "link", "set", theirs, "netns", namespace)
            here = ("ip", "-n", namespace)
        run(*here, "addr", "add", address, "dev", theirs)
        run(*here, "link", "set", theirs, "up")
        return ours

    def unplug(self, machine: Machine) -> None:
        """Take a machine off the network."""
        self._in_switch("link", "set", machine.plug, "down")

    def plug_in(self, machine: Machine) -> None:
        """Connect it again."""
        self._in_switch("link", "set", machine.plug, "up")

    def cut(self) -> None:
        """Cut the cable: nothing passes between the halves."""
        self._in_switch("link", "set", "cable-a", "down")

    def bad_line(self, seconds: float, loss: float) -> None:
        """Replace the cable by a line with a delay each way and a share of lost frames."""
        taps = []
        for half in "ab":
            tap = f"tap-{half}"
            self._in_switch("tuntap", "add", "dev", tap, "mode", "tap")
            self._in_switch("link", "set", tap, "master", f"switch-{half}")
            self._in_switch("link", "set", tap, "up")
            taps.append(tap)
        script = Path(__file__).with_name("bad_line.py")
        self._relay = subprocess.Popen(
            ["ip", "netns", "exec", self._switch, sys.executable, script, *taps, str(seconds), str(loss)],
            stdin=subprocess.DEVNULL,
        )
        time.sleep(0.5)  # the relay opens the taps
        assert self._relay.poll() is None
        self.cut()

    def good_line(self) -> None:
        """Put the cable in its place again."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
            self._relay = None
            for half in "ab":
                self._in_switch("link", "del", f"tap-{half}")
        self._in_switch("link", "set", "cable-a", "up")

    def _in_switch(self, *arguments: str) -> None:
        run("ip", "-n", self._switch, *arguments)


def namespaces_allowed() -> bool:
    """Say whether this machine lets us make a network namespace."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"m{os.getpid()}try"
    made = run("ip", "netns", "add", name, check=False).returncode == 0
    run("ip", "netns", "del", name, check=False)
    return made


def need_machines(gone: Sequence[str]) -> None:
    """Skip the test where no machines can be made; `gone` are programs that they need and this one lacks."""
    if not namespaces_allowed():
        pytest.skip("machines need root and a kernel that allows network namespaces")
    if gone:
        lacking(f"not installed: {', '.join(gone)} (see .ci/run)")
