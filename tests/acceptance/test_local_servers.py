"""Embedded servers: one a folder, private, also as root and after their parent was killed."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from minter.errors import SettingsError
from minter.local.servers import Postgres, Valkey


@pytest.mark.parametrize("kind", [Postgres, Valkey])
def test_a_second_server_on_the_folder_is_refused_and_the_first_lives_on(
    kind: type[Postgres | Valkey], tmp_path: Path
) -> None:
    first = kind(tmp_path / "state" / "server")
    first.start()
    try:
        assert first.process is not None
        with pytest.raises(SettingsError, match=rf"runs on .* already \(process {first.process.pid}\)"):
            kind(tmp_path / "state" / "server").start()
        assert first.ready()
    finally:
        first.stop()
    again = kind(tmp_path / "state" / "server")
    again.start()
    again.stop()


def test_an_orphan_keeps_its_lock(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from minter.local.servers import Valkey;"
        "v = Valkey(pathlib.Path(sys.argv[1])); v.start(); print(v.process.pid, flush=True); sys.stdin.read()"
    )
    command: list[str | Path] = [sys.executable, "-c", code, tmp_path / "server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        parent.kill()
    try:
        with pytest.raises(SettingsError, match=f"process {orphan}"):
            Valkey(tmp_path / "server").start()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_nothing_of_the_state_is_open_to_others(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        servers: list[Postgres | Valkey] = [
            Postgres(tmp_path / "state" / "postgres"),
            Valkey(tmp_path / "state" / "valkey"),
        ]
        for server in servers:
            server.start()
            server.stop()
    finally:
        os.umask(old)
    found = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert len(found) > 100
    assert not [p for p in found if stat.S_IMODE(p.lstat().st_mode) & 0o077 and not p.is_symlink()]
