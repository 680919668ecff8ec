"""The campaign of `make cluster`: seeded faults under load, then the audit and a report.

python -m tests.cluster --each 20 --seed 1 --report benchmarks/results-cluster.json
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.cluster import audit
from tests.cluster.cluster import APPS, Cluster
from tests.cluster.faults import Faults, small_volumes, start_load, stop_load, unmount
from tests.cluster.machines import run
from tests.conftest import ROOT

RESTART_SECONDS = 2.0
CALM_SECONDS = 4.0
"""Time before each fault and after its cure."""


class Campaign:
    """Runs faults one after the other, and keeps what happened."""

    def __init__(self, cluster: Cluster, faults: Faults, book: Path) -> None:
        self.cluster, self.faults, self.book = cluster, faults, book
        self.events: list[dict[str, Any]] = []
        self.restarted: list[str] = []
        """RabbitMQ nodes that stayed apart after a cut and were restarted, as docs/cluster.md says."""

    def strike(self, kind: str) -> None:
        """Do one fault, wait until all is well, and note the pauses of issuing."""
        time.sleep(CALM_SECONDS)
        started = time.time()
        with self.supervised():
            what = self.faults.kinds[kind]()
        mended = time.time()
        self.cluster.wait("all well", self.well, 180)
        well = time.time()
        time.sleep(CALM_SECONDS)
        event = {"kind": kind, "what": what, "at": started, "broken": mended - started, "well": well - mended}
        event |= {
            f"pause, {k}": v for k, v in audit.pauses(audit.read(self.book), started, time.time()).items()
        }
        event = {k: round(v, 2) if isinstance(v, float) else v for k, v in event.items()}
        self.events.append(event)
        print(json.dumps(event), flush=True)

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Start Minter's processes again when they die, as systemd does."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(RESTART_SECONDS):
                for name in APPS:
                    self.cluster.machines[name].restart_dead()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def audit(self) -> dict[str, int]:
        """Stop the clients, and hold their book against the primary; raises AssertionError."""
        stop_load(self.cluster)
        with self.cluster.connect(self.faults.primary()) as connection:
            counted = audit.check(audit.read(self.book), connection)
        dead = self.cluster.dead_letters()
        assert dead == [], dead
        return counted

    def well(self) -> bool:
        """Start what died; say whether the cluster is whole again."""
        self.cluster.restart_dead()
        self.restarted += self.cluster.join_brokers()
        return self.cluster.whole() and self.cluster.well()


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return number, median and worst pauses of each kind of fault, in seconds."""
    found: dict[str, Any] = {}
    for kind in sorted({e["kind"] for e in events}):
        of_kind = [e for e in events if e["kind"] == kind]
        found[kind] = {"times": len(of_kind)} | {
            name: {
                "median": round(statistics.median(e[name] for e in of_kind), 2),
                "worst": round(max(e[name] for e in of_kind), 2),
            }
            for name in of_kind[0]
            if name.startswith("pause")
        }
    return found


def table(report: dict[str, Any]) -> str:
    """Return the report as the table of docs/cluster.md: median and worst pause in seconds."""
    rows = [
        "| fault | times | of all clients | AMQP | HTTP | of the unluckiest client |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in summary(report["events"]).items():
        pauses = [found[f"pause, {who}"] for who in ("all", "amqp", "http", "one client")]
        cells = " | ".join(f"{p['median']:.1f}, {p['worst']:.1f}" for p in pauses)
        rows.append(f"| {kind} | {found['times']} | {cells} |")
    return "\n".join(rows)


def options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", nargs="*", help="words in the names of faults")
    parser.add_argument("--old", help="commit of the release before, for rolling upgrades")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--add", action="store_true", help="add to the report")
    parser.add_argument("--keep", action="store_true", help="keep the folder with all logs")
    found = parser.parse_args()
    if found.add and not found.report:
        parser.error("--add adds to the file of --report, which is missing")
    return found


def main() -> None:
    arguments = options()
    print(f"seed {arguments.seed}", flush=True)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="minter-cluster-", dir="/var/tmp"))
        if not arguments.keep:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        old = None
        if arguments.old:
            old = folder / "old"
            run("git", "-C", ROOT, "worktree", "add", "--detach", old, arguments.old)
            stack.callback(run, "git", "-C", ROOT, "worktree", "remove", "--force", old)
        cluster = Cluster(folder, old or ROOT, small_volumes)
        stack.callback(unmount, cluster)
        stack.enter_context(cluster)
        faults, book = Faults(cluster, arguments.seed, old), folder / "book"
        faults.prepare()
        start_load(cluster, book, arguments.seed)
        campaign = Campaign(cluster, faults, book)
        kinds = [k for k in faults.kinds if not arguments.only or any(w in k for w in arguments.only)]
        schedule = kinds * arguments.each
        random.Random(arguments.seed).shuffle(schedule)
        if old is not None and "rolling upgrade" in schedule:  # the other faults meet this release only
            schedule.remove("rolling upgrade")
            schedule.insert(0, "rolling upgrade")
        started, failure = time.time(), ""
        try:
            for kind in schedule:
                campaign.strike(kind)
        except (TimeoutError, AssertionError, RuntimeError) as error:
            failure = f"{type(error).__name__}: {error}"
            print(failure, flush=True)
        counted = {}
        try:
            counted = campaign.audit()
        except (TimeoutError, AssertionError, subprocess.TimeoutExpired) as error:
            failure = f"{failure} {type(error).__name__}: {error}"
        told = {
            "seed": arguments.seed, "minutes": round((time.time() - started) / 60, 1), "failure": failure,
            "audit": counted, "brokers restarted": campaign.restarted,
        }  # fmt: skip
        report: dict[str, Any] = {"campaigns": [], "events": []}
        if arguments.add and arguments.report.exists():
            report = json.loads(arguments.report.read_text())
        report["campaigns"].append(told)
        report["events"] += campaign.events
        print(json.dumps(told, indent=1), table(report), sep="\n")
        if arguments.report:
            arguments.report.write_text(json.dumps(report, indent=1) + "\n")
    if failure:
        sys.exit(f"the campaign failed: {failure}")


if __name__ == "__main__":
    main()
