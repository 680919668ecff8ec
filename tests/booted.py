"""Debian machines that boot under systemd: systemd-nspawn in the network namespaces of tests/cluster. Needs root."""

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.cluster.machines import Network, run

SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
BOOT_SECONDS = 120.0
PROGRAMS = ("debootstrap", "systemd-nspawn", "nsenter", "ip", "mount")


def missing() -> list[str]:
    """Return the programs that booted machines need and this one lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def make_base(folder: Path, packages: Sequence[str]) -> Path:
    """Return the files of a fresh Debian with these packages installed, so that `apt-get install` needs no network."""
    base = folder / "base"
    wanted = "systemd-sysv,dbus,iproute2,ca-certificates,openssl"
    run("debootstrap", "--variant=minbase", f"--include={wanted}", SUITE, base, MIRROR)
    shutil.copy("/etc/resolv.conf", base / "etc/resolv.conf")
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *packages]
    run("chroot", base, "env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", *install)
    return base


def why_not(base: Path) -> str:
    """Return why the kernel does not let this machine boot others, empty if it does."""
    command = [
        "systemd-nspawn",
        "--quiet",
        "--register=no",
        "--keep-unit",
        "--private-network",
        "--ephemeral",
    ]
    done = run(*command, f"--directory={base}", "/bin/true", check=False)
    return done.stderr.strip() if done.returncode else ""


class Booted:
    """A machine: an overlay of the base, with its own PID 1, host name and address."""

    def __init__(self, name: str, base: Path, network: Network, number: int) -> None:
        self.name = name
        self._machine = network.add(name, number, "a")
        self._network = network
        self.root = self._machine.folder / "root"
        self._exit = ExitStack()
        upper, work = self._machine.folder / "upper", self._machine.folder / "work"
        for folder in (self.root, upper, work):
            folder.mkdir()
        layers = f"lowerdir={base},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "overlay", "-o", layers, self.root)
        self._exit.callback(run, "umount", self.root)
        self.pid = 0

    def boot(self) -> None:
        """Start it, and wait until its systemd has started what it should."""
        (self.root / "etc/hostname").write_text(f"{self._machine.host}\n")
        hosts = self._network.folder / "hosts"
        with (self._machine.folder / "console.log").open("ab") as log:
            process = subprocess.Popen(
                ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--resolv-conf=off", f"--directory={self.root}",
                 f"--machine={self.name}", f"--hostname={self._machine.host}", f"--bind-ro={hosts}:/etc/hosts",
                 f"--network-namespace-path=/run/netns/{self._machine.namespace}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._exit.callback(process.wait)
        self._exit.callback(process.kill)
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            assert process.poll() is None, (self._machine.folder / "console.log").read_text(errors="replace")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            self.pid = int(children[0]) if children else 0
            if self.pid and self.shell("systemctl is-system-running")[1].strip() in ("running", "degraded"):
                return
            time.sleep(0.3)
        raise TimeoutError(f"{self.name} did not boot: {self.shell('systemctl list-jobs')[1]}")

    def shell(self, script: str, **environ: str) -> tuple[int, str]:
        """Run a script by bash as root; return its exit code and its output."""
        place = [
            "nsenter",
            f"--target={self.pid}",
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--root",
            "--wd",
        ]
        clean = {
            "HOME": "/root",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
        }
        done = subprocess.run(
            [*place, "bash", "-e", "-o", "pipefail", "-c", f"cd /root\n{script}"], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env={**clean, **environ}, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout

    def close(self) -> None:
        """Kill it, and take its files off the tree."""
        self._machine.power_off()
        self._exit.close()


class Machines:
    """Several machines on one switch; `aliases` are further names of some."""

    def __init__(self, folder: Path, base: Path, names: Sequence[str], aliases: Mapping[str, str]) -> None:
        self.network = Network(folder)
        self._base, self._names, self._aliases = base, names, aliases
        self._booted: dict[str, Booted] = {}

    def __enter__(self) -> Self:
        """Make and boot them; remove them all if one does not boot."""
        self.network.__enter__()
        try:
            for number, name in enumerate(self._names, 11):
                self._booted[name] = Booted(name, self._base, self.network, number)
            addresses = {alias: [self.network.machines[n].address] for alias, n in self._aliases.items()}
            self.network.name_hosts(addresses)
            for machine in self._booted.values():
                machine.boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kill them, and remove their network."""
        for machine in self._booted.values():
            machine.close()
        self.network.__exit__()

    def __getitem__(self, name: str) -> Booted:
        return self._booted[name]
