"""`minter drill`: an outage with the real engine on a fast clock, with a report and a plot."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SCALE = 150
"""A token lives half a simulated hour after the outage of two hours, and gets a fallback a quarter before its
end: at this speed in 12 and 6 s, which a busy machine keeps."""
DRILLS = {
    "two_hours": "--transfers 400 --hours 8.5 --outage-from 3.5",
    "five_hours": "--transfers 400 --hours 7 --outage-hours 5 --fault error_500 --refreshers 1",
    "with_fallback": "--transfers 400 --hours 8.5 --outage-hours 5 --mode mixed",
    "minted": "--transfers 100 --hours 4 --outage-from 0 --outage-hours 4 --mode mint --refreshers 1",
}
Drill = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """All drills at once, as they wait most of their time; the function returns the report of one."""
    folder = tmp_path_factory.mktemp("drills")
    started = {name: _started(options, folder / f"{name}.svg") for name, options in DRILLS.items()}

    def report(name: str) -> dict[str, Any]:
        told, _ = started[name].communicate(timeout=280)
        found: dict[str, Any] = json.loads(told)
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")
        assert started[name].returncode == (1 if found["failed"] else 0)
        return found

    yield report
    for process in started.values():
        process.terminate()
        process.wait(60)


def _started(options: str, plot: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "minter.cli",
        "drill",
        "--scale",
        str(SCALE),
        "--budget",
        "0.5",
        "--json",
    ]
    return subprocess.Popen(
        [*command, "--output", str(plot), *options.split()], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_two_hours_cost_no_transfer(drill: Drill) -> None:
    report = drill("two_hours")
    assert (report["submitted"], report["failed"], report["refused"]) == (400, 0, 0)
    assert 0.2 < report["most_per_second"] < 0.7  # coarse: a simulated minute takes 400 ms
    assert report["after_outage_per_second"] > 0


def test_five_hours_do_and_the_drill_says_so(drill: Drill) -> None:
    report = drill("five_hours")
    assert report["failed"] > 0
    assert report["most_at_risk"] > 0


def test_a_fallback_costs_nothing_however_long_it_is(drill: Drill) -> None:
    assert drill("with_fallback")["failed"] == 0


def test_what_we_sign_does_not_notice(drill: Drill) -> None:
    report = drill("minted")
    assert (report["failed"], report["requests"]) == (0, 0)
