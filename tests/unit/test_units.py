"""The systemd units: hardened by one drop-in, and started together by minter.target."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "deploy/systemd"
UNITS = sorted(FOLDER.glob("*.service"))
COMMANDS = {"worker", "beat", "serve", "publish", "refresher", "fts", "events", "archive", "console"}


def test_there_is_a_unit_for_each_long_running_command() -> None:
    started = {
        re.findall(r"^ExecStart=/opt/minter/bin/minter (\w+)", u.read_text(), re.MULTILINE)[0] for u in UNITS
    }
    assert started == COMMANDS
    for unit in UNITS:
        if unit.name != "minter-archive.service":  # its timer starts it
            assert "WantedBy=minter.target" in unit.read_text()


def test_compose_starts_commands_that_exist_and_mounts_files_that_exist() -> None:
    folder = ROOT / "deploy/container"
    text = (folder / "compose.yaml").read_text()
    commands = re.findall(r"<<: \*minter(?:,|\n) *command: \[(\w+)", text)
    assert {"db", "worker", "beat", "publish", "serve"} == set(commands) <= {*COMMANDS, "db"}
    mounted = re.findall(r"[- \[](\.\./[\w./-]+):", text)
    assert len(mounted) == 4
    assert all((folder / name).exists() for name in mounted)
    set_there = set(re.findall(r"^    (MINTER_\w+):", text, re.MULTILINE))
    example = (ROOT / "deploy/environment.example").read_text()
    assert set_there == set(re.findall(r"^(MINTER_\w+)=", example, re.MULTILINE)) - {"MINTER_SETTINGS"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_hardened(unit: Path, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "systemd")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", f"./{unit.name}"],
        cwd=tmp_path / "systemd", capture_output=True, text=True, check=False,
    )  # fmt: skip
    exposure = re.search(r"Overall exposure level for \S+ ([\d.]+)", done.stdout)
    assert exposure, done.stderr
    assert float(exposure[1]) <= 3
