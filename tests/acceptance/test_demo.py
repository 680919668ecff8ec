"""The demo, run by the command in the README."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_demo_verifies_every_token_and_leaves_nothing() -> None:
    before = _servers()
    done = subprocess.run(
        [sys.executable, "-m", "minter.cli", "demo", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout)
    assert facts["jobs"] == 107
    assert facts["tokens"] == facts["verified"] > 3000
    assert facts["failures"] == []
    for shown in (
        "Tokens by storage",
        "Refused, with reasons",
        "One token, decoded",
        "minter explain",
        "minter trace",
        "tokens/s",
    ):
        assert shown in done.stderr
    assert _servers() == before


def _servers() -> str:
    return subprocess.run(
        ["pgrep", "-f", "minter-state-"], capture_output=True, text=True, check=False
    ).stdout
