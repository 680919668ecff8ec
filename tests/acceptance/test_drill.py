"""`minter drill`: an outage with the real engine on a fast clock, with a report and a plot."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def drill(tmp_path: Path, *options: str) -> dict[str, Any]:
    plot = tmp_path / "drill.svg"
    done = subprocess.run(
        [sys.executable, "-m", "minter.cli", "drill", "--scale", "225", "--budget", "0.5", "--json", "--output", str(plot), *options],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    assert plot.read_text().startswith("<?xml")
    assert done.returncode == (1 if report["failed"] else 0)
    return report


def test_two_hours_cost_no_transfer(tmp_path: Path) -> None:
    report = drill(tmp_path, "--transfers", "400", "--hours", "9")
    assert (report["submitted"], report["failed"], report["refused"]) == (400, 0, 0)
    assert 0.2 < report["most_per_second"] < 0.7  # coarse: a simulated minute takes 67 ms
    assert report["after_outage_per_second"] > 0


def test_five_hours_do_and_the_drill_says_so(tmp_path: Path) -> None:
    report = drill(
        tmp_path, "--transfers", "400", "--hours", "9", "--outage-hours", "5", "--fault", "error_500"
    )
    assert report["failed"] > 0
    assert report["most_at_risk"] > 0


def test_a_fallback_costs_nothing_however_long_it_is(tmp_path: Path) -> None:
    report = drill(tmp_path, "--transfers", "400", "--hours", "9", "--outage-hours", "5", "--mode", "mixed")
    assert report["failed"] == 0


def test_what_we_sign_does_not_notice(tmp_path: Path) -> None:
    report = drill(
        tmp_path,
        "--transfers",
        "100",
        "--hours",
        "4",
        "--outage-from",
        "0",
        "--outage-hours",
        "4",
        "--mode",
        "mint",
    )
    assert (report["failed"], report["requests"]) == (0, 0)
