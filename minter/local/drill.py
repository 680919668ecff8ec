"""The drill: transfers at a chosen rate while the provider fails in a chosen way, with the real engine.

Database, broker, workers and refreshers are real ones, embedded; the provider is `minter.local.fake_iam`.
All their clocks run `scale` times as fast as real time. The drill takes a sample every TICK_SECONDS; a
transfer fails if its handle has no valid token in a sample that is taken while the transfer runs.
"""

import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import urllib3
from msgspec import Struct

from minter.client import FileOperation, FileRequest, MinterClient, new_request_id
from minter.contract.messages import Answer, MintRequest
from minter.contract.names import MINT
from minter.database import control_changes, drill_transfers
from minter.errors import ProviderAway, SettingsError
from minter.local.fake_iam import Behaviour, Fault
from minter.local.stack import Stack
from minter.private_files import write_private_file

Mode = Literal["mint", "exchange", "mixed"]
CLIENT, PROVIDER = "drill", "iam"
RISK_SECONDS = 1800
"""A token counts as at risk if it expires within this time and is not refreshed yet."""
FILES = 20
"""Files in one request."""
TICK_SECONDS = 1.0
"""Interval of submissions and samples, in real time."""
HOUR = 3600

_SETTINGS = """
[issuers.vo]
iss = "https://tokens.drill.example.org/vo/"
[broker]
local_client = "drill"
[drill]
time_scale = {scale}
origin = {origin}
[[storages]]
vo = "vo"
name = "SE"
dialect = "dcache"
base_path = "/data"
endpoints = [{{ host = "se.drill.example.org", prefix = "/data/vo" }}]
[[providers]]
name = "iam"
issuer = "{issuer}"
client_id = "minter"
secret_file = "iam.secret"
requests_per_second = {budget}
in_flight = 60
timeout_seconds = 2
outage_margin_seconds = {margin}
[[routes]]
name = "asked"
activities = ["exchange", "mixed"]
operations = ["read"]
mode = "exchange"
provider = "iam"
{fallback}
[[routes]]
name = "minted"
operations = ["read"]
max_lifetime_seconds = 86400
mitigations = ["no_modify", "one_storage"]
risk_assessment = "none: a drill"
"""


class DrillPlan(Struct, frozen=True, kw_only=True):
    """The parameters of a drill; its hours, and the seconds of `budget`, are simulated time."""

    mode: Mode = "exchange"
    fault: Fault = "down"
    share: float = 1.0
    transfers: int = 2_000
    arrive_hours: float = 2.0
    wait_hours: tuple[float, float] = (1.0, 7.0)
    run_hours: float = 1.0
    hours: float = 11.0
    outage_from_hours: float = 3.75
    outage_hours: float = 2.0
    life_hours: float = 6.0
    margin_hours: float = 2.0
    budget: float = 1.0
    skew_seconds: int = 0
    scale: float = 240.0
    refreshers: int = 2


class Sample(Struct, frozen=True):
    """One sample: simulated hours since the start, and counts of tokens and transfers."""

    hours: float
    at_risk: int
    overdue: int
    running: int
    failed: int


class Report(Struct, frozen=True, kw_only=True):
    """The result of a drill; requests are counted in the provider's log, by simulated minute."""

    plan: DrillPlan
    submitted: int
    transfers: int
    failed: int
    refused: int
    most_at_risk: int
    requests: int
    most_per_second: float
    after_outage_per_second: float
    samples: list[Sample]
    per_minute: list[tuple[float, float]]


class Drill:
    """One drill, in a folder of its own."""

    def __init__(self, plan: DrillPlan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self._port = _free_port()
        self.issuer = f"http://127.0.0.1:{self._port}/"
        self._log = folder / "provider.jsonl"
        self._http = urllib3.PoolManager()
        self._random = random.Random(1)  # noqa: S311 - the same transfers each time

    def run(self) -> Report:
        """Run the drill; raises SettingsError or ProviderAway if an embedded server does not start."""
        with (self.folder / "provider.log").open("ab") as log:
            provider = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "minter.local.fake_iam", str(self._port), str(self._log)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._until_up()
            self.origin = time.time()
            with Stack(self._settings(), self.folder, workers=1, refreshers=self.plan.refreshers) as stack:
                self.stack = stack
                self._behave()
                self._prepare()
                samples = self._play()
                return self._report(samples)
        finally:
            provider.terminate()
            provider.wait(30)

    # ── setting up ────────────────────────────────────────────────────────────────────────────

    def _settings(self) -> Path:
        secret = self.folder / "iam.secret"
        write_private_file(secret, "minter-secret")
        path = self.folder / "settings.toml"
        path.write_text(
            _SETTINGS.format(
                scale=self.plan.scale, origin=self.origin, issuer=self.issuer, budget=self.plan.budget,
                margin=int(self.plan.margin_hours * HOUR),
                fallback='fallback = ["minted"]' if self.plan.mode == "mixed" else "",
            )
        )  # fmt: skip
        return path

    def _until_up(self) -> None:
        for _ in range(200):
            try:
                self._http.request("GET", self.issuer + "jwks", retries=False)
            except urllib3.exceptions.HTTPError:
                time.sleep(0.05)
            else:
                return
        raise ProviderAway("the drill's provider did not start")

    def _behave(self, *, outage: bool = False) -> None:
        plan = self.plan
        behaviour = Behaviour(
            fault=plan.fault if outage else "", share=plan.share, slow_seconds=3.0,
            life_seconds=int(plan.life_hours * HOUR), time_scale=plan.scale, origin=self.origin,
            skew_seconds=plan.skew_seconds if outage else 0,
        )  # fmt: skip
        self._http.request("POST", self.issuer + "faults", body=msgspec.json.encode(behaviour))

    def _prepare(self) -> None:
        service = self.stack.service
        answer = self._http.request(
            "POST", self.issuer + "subject",
            body=json.dumps({"sub": "experiment", "aud": "minter", "scope": "storage.read:/", "exp": 2**33}),
        )  # fmt: skip
        token = json.loads(answer.data)["access_token"]
        subject = {
            "subject_token": service.keystore.seal_token("vo", CLIENT, "client_subject", token),
            "subject_provider": PROVIDER,
            "subject_scope": "storage.read:/",
            "subject_expires_at": datetime.fromtimestamp(2**32, UTC),
        }
        control_changes.set_subject(service.pool, CLIENT, subject, "drill")
        drill_transfers.create(service.pool)

    # ── running ──────────────────────────────────────────────────────────────────────────────

    def _play(self) -> list[Sample]:
        plan, clock = self.plan, self.stack.service.clock
        start = clock()
        samples: list[Sample] = []
        made, self.refused, was_out = 0, 0, False
        with MinterClient(self.stack.environ["MINTER_BROKER_URL"], CLIENT) as client:
            while (hours := (clock() - start) / timedelta(hours=1)) < plan.hours:
                due = min(plan.transfers, int(plan.transfers * hours / plan.arrive_hours)) // FILES * FILES
                self._submit(client, due - made, clock())
                made = due
                out = plan.outage_from_hours <= hours < plan.outage_from_hours + plan.outage_hours
                if out != was_out:
                    self._behave(outage=out)
                    was_out = out
                samples.append(self._look(hours, clock()))
                time.sleep(TICK_SECONDS)
        self._start, self.submitted = start, made
        return samples

    def _submit(self, client: MinterClient, count: int, now: datetime) -> None:
        requests, windows = [], []
        for _ in range(count // FILES):
            starts = [
                now + timedelta(hours=self._random.uniform(*self.plan.wait_hours)) for _ in range(FILES)
            ]
            requests.append(self._request(starts, now))
            windows.append(starts)
        for starts, answer in zip(windows, client.ask(MINT, requests) if requests else (), strict=True):
            self._note(starts, answer)

    def _request(self, starts: list[datetime], now: datetime) -> MintRequest:
        run = int(self.plan.run_hours * HOUR)
        files = tuple(
            FileRequest(
                operations=(
                    FileOperation("read", f"davs://se.drill.example.org/data/vo/{new_request_id()}"),
                ),
                wait_seconds=int((at - now).total_seconds()),
                transfer_seconds=run,
            )
            for at in starts
        )
        return MintRequest(request_id=new_request_id(), files=files, activity=self.plan.mode)

    def _note(self, starts: list[datetime], answer: Answer) -> None:
        self.refused += FILES if answer.error else len(answer.refusals)
        ends = timedelta(hours=self.plan.run_hours)
        rows: list[tuple[str | None, datetime | None, datetime]] = [
            (a.handle, None, starts[a.file]) for a in answer.pending
        ]
        rows += [(None, datetime.fromtimestamp(t.exp, UTC), starts[t.file]) for t in answer.tokens]
        drill_transfers.add(
            self.stack.service.pool, [(handle, expires_at, at, at + ends) for handle, expires_at, at in rows]
        )

    def _look(self, hours: float, now: datetime) -> Sample:
        counts = drill_transfers.sample(self.stack.service.pool, now, RISK_SECONDS)
        return Sample(round(hours, 3), *counts)

    # ── reporting ────────────────────────────────────────────────────────────────────────────

    def _report(self, samples: list[Sample]) -> Report:
        per_minute = Counter(self._requests())
        rates = [(minute / 60, count / 60) for minute, count in sorted(per_minute.items())]
        end = self.plan.outage_from_hours + self.plan.outage_hours
        after = [rate for hours, rate in rates if end <= hours < end + 1]
        total, failed = drill_transfers.totals(self.stack.service.pool)
        return Report(
            plan=self.plan, submitted=self.submitted, transfers=total, failed=failed, refused=self.refused,
            most_at_risk=max(s.at_risk for s in samples), requests=sum(per_minute.values()),
            most_per_second=max((rate for _, rate in rates), default=0.0),
            after_outage_per_second=max(after, default=0.0), samples=samples, per_minute=rates,
        )  # fmt: skip

    def _requests(self) -> Iterator[int]:
        """Yield the simulated minute of each token request in the provider's log."""
        start = self._start.timestamp()
        if not self._log.exists():
            return
        for line in self._log.read_text().splitlines():
            entry: dict[str, Any] = json.loads(line)
            if entry.get("path") == "/token":
                at = self.origin + self.plan.scale * (entry["at"] / 1000 - self.origin)
                yield int((at - start) // 60)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def plot(report: Report, path: Path) -> None:
    """Plot tokens at risk, running and failed transfers, and requests a second over time, as SVG."""
    try:
        import pygal  # noqa: PLC0415 - part of the extra that has the embedded servers
    except ImportError as error:
        raise SettingsError("the plot needs pygal; run: pip install 'gridminter[embedded]'") from error
    plan = report.plan
    chart = pygal.XY(
        title=f"{plan.mode}, {plan.fault} for {plan.outage_hours:g} h from {plan.outage_from_hours:g} h on: "
        f"{report.failed} of {report.transfers} transfers fail",
        x_title="hours", show_dots=False, legend_at_bottom=True, js=(), width=1000, height=500,
    )  # fmt: skip
    chart.add("tokens with less than 30 min", [(s.hours, s.at_risk) for s in report.samples])
    chart.add("transfers running", [(s.hours, s.running) for s in report.samples])
    chart.add("transfers failed", [(s.hours, s.failed) for s in report.samples])
    chart.add("requests/s at the provider", report.per_minute or [(0.0, 0.0)], secondary=True)
    path.write_bytes(chart.render())


def rehearse(plan: DrillPlan) -> Report:
    """Run a drill in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="minter-drill-") as folder:
        return Drill(plan, Path(folder)).run()
