"""Measure external IAMs: the budget as the provider sees it, finding due tokens, and the cost of one refresh.

    python -m benchmarks.bench_providers [--budgets 50 700] [--seconds 60] [--refreshers 4] [--alive 1000000] [--json FILE]

The provider is npm oidc-provider, started here. For each budget, the requests of all refreshers together are
counted in the provider's log: their mean rate, and the most in any second and in any ten seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from statistics import median

from msgspec import structs

from benchmarks.engine import ROOT, settings_text, versions
from minter import settings
from minter.database import connection, control_changes, leases, migrations
from minter.local import stack
from minter.local.servers import Postgres
from minter.providers.dialects import LEADS, lead_of
from minter.refresher.refresher import Refresher
from minter.service import Service
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock
from minter.tokens.keystore import new_master_key
from tests.iam_servers import OidcProvider

LEAD = lead_of(6 * 3600, 2 * 3600)
AUDIENCE = "https://se0.example.org"
WAITING = 100_000
_ROWS = """
    INSERT INTO managed (jti, client_id, digest, provider, mode, state, scope, audience, storage, on_behalf_of,
        activity, fallback, uses, cap_seconds, least_seconds, deadline, lead_seconds, needed_at, access, expires_at,
        granted_scope)
    SELECT gen_random_uuid(), %(client)s, sha256(('%(salt)s' || n)::bytea), 'iam', 'client_credentials',
        %(state)s::token_state, 'storage.read:/vo/' || n, ARRAY['https://se0.example.org'], 'SE000', '', '', '{}', 1,
        21600, 120, now() + interval '8 days', %(lead)s, now() + make_interval(secs => %(first)s + n * %(step)s),
        CASE WHEN %(state)s = 'issued' THEN decode(repeat('ab', 900), 'hex') END,
        now() + make_interval(secs => %(first)s + n * %(step)s), ''
    FROM generate_series(1, %(count)s) AS s (n)
"""


class Refreshers:
    """A database, a provider, and refresher processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.postgres = Postgres(folder / "postgres", settings=["max_wal_size=4GB"])
        self.iam = OidcProvider(folder / "iam", AT_TTL="21600")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.postgres.start()
        self.iam.start()
        secret = self.folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text("minter-secret")
        self.environ = {
            **os.environ, "MINTER_DSN": self.postgres.dsn, "MINTER_MASTER_KEY_VO": new_master_key(),
            "PYTHONPATH": str(ROOT), "MINTER_SETTINGS": str(self.folder / "settings.toml"),
        }  # fmt: skip
        self.configure(700)
        migrations.upgrade(self.service.pool)
        self.service.prepare()
        stack.add_client(self.service, "load", "vo", "bench")
        with connection.transaction(self.service.pool) as tx:
            (self.client_id,) = tx.execute("SELECT client_id FROM clients").fetchone()

    def configure(self, budget: float) -> None:
        path = self.folder / "settings.toml"
        path.write_text(
            settings_text()
            + f'[[providers]]\nname = "iam"\nissuer = "{self.iam.issuer}"\nclient_id = "minter"\n'
            f'dialect = "resource"\nsecret_file = "secret"\nrequests_per_second = {budget}\nin_flight = 100\n'
        )
        self.service = Service(settings.load(path, self.environ))

    def rows(self, count: int, state: str, first: float, step: float) -> None:
        values = {
            "client": self.client_id, "state": state, "count": count, "first": first, "step": step, "lead": LEAD,
        }  # fmt: skip
        with connection.transaction(self.service.pool) as tx:
            tx.execute(_ROWS.replace("%(salt)s", uuid.uuid4().hex), values)

    def empty(self) -> None:
        with connection.transaction(self.service.pool) as tx:
            tx.execute("TRUNCATE managed")
        with connection.transaction(self.service.pool) as tx:
            tx.execute("UPDATE providers SET due_at = now(), failures = 0, pauses = 0, open_until = NULL")

    def spawn(self, count: int) -> None:
        for number in range(count):
            with (self.folder / f"refresher{number}.log").open("ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "minter.cli", "refresher"],
                        env=self.environ,
                        stdout=log,
                        stderr=log,
                        cwd=ROOT,
                    )
                )

    def stop_refreshers(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(60)
        self.processes.clear()

    def stop(self) -> None:
        self.stop_refreshers()
        self.iam.stop()
        self.service.pool.dispose()
        self.postgres.stop()

    def requests(self, since: float) -> list[float]:
        """Return the times of the token requests in the provider's log, in seconds."""
        lines = map(json.loads, self.iam.requests.read_text().splitlines())
        return sorted(e["t"] / 1000 for e in lines if e.get("path") == "/token" and e["t"] / 1000 >= since)


def most(times: list[float], window: float) -> int:
    """Return the most requests in any window of `window` seconds."""
    start, found = 0, 0
    for end, at in enumerate(times):
        while at - times[start] >= window:
            start += 1
        found = max(found, end - start + 1)
    return found


def budget(refreshers: Refreshers, per_second: float, seconds: float, count: int) -> dict[str, float]:
    refreshers.configure(per_second)
    refreshers.empty()
    refreshers.rows(int(per_second * (seconds + 20)), "queued", 600, 0.00001)
    refreshers.spawn(count)
    time.sleep(5)
    since = time.time()
    time.sleep(seconds)
    until = time.time()
    refreshers.stop_refreshers()
    times = refreshers.requests(0)
    steady = [t for t in times if since <= t < until]
    return {
        "budget": per_second,
        "mean": len(steady) / seconds,
        "share": len(steady) / seconds / per_second,
        "most_in_1s": most(times, 1.0),
        "allowed_in_1s": per_second * 1.02 + 1,
        "most_in_10s": most(times, 10.0),
        "allowed_in_10s": per_second * 10,
    }


def due(refreshers: Refreshers, alive: int) -> dict[str, object]:
    """Time how long finding and leasing 500 due tokens takes, with growing numbers of live tokens.

    At last 100 000 tokens that are needed before all others wait for a retry.
    """
    refreshers.configure(10_000)
    refreshers.empty()
    found: dict[str, object] = {}
    held, provider = 0, refreshers.service.loaded.settings.providers[0]
    provider = structs.replace(provider, in_flight=1000)
    refreshers.rows(3000, "issued", 600, 0.01)
    for size in (10_000, 100_000, alive, alive + WAITING):
        if size > alive:
            refreshers.rows(WAITING, "queued", -500, 0.001)
            with connection.transaction(refreshers.service.pool) as tx:
                tx.execute("UPDATE managed SET retry_at = now() + interval '1 hour' WHERE state = 'queued'")
        else:
            refreshers.rows(size - held, "issued", LEAD + 100, 3600 * 4 / size)
        held = size
        with connection.transaction(refreshers.service.pool) as tx:
            tx.execute("ANALYZE managed")
        times, taking = [], []
        for _ in range(9):
            now = clock.now()
            started = time.perf_counter()
            with connection.transaction(refreshers.service.pool) as tx:
                values = {"leads": list(LEADS), "provider": "iam", "now": now, "count": 500}
                rows = tx.execute(leases.DUE, values).fetchall()
            times.append(time.perf_counter() - started)
            started = time.perf_counter()
            taken = leases.take(refreshers.service.pool, provider, uuid.uuid4(), 500, now, 0.0)
            taking.append((time.perf_counter() - started, len(taken.tokens) if taken else 0))
        found[str(size)] = {
            "found": len(rows), "find_ms": 1000 * median(times), "take_ms": 1000 * median(t for t, _ in taking),
            "taken": median(n for _, n in taking),
        }  # fmt: skip
    return found


def one(refreshers: Refreshers, rounds: int = 50) -> dict[str, float]:
    """Time one refresh from its lease to the saved row, without the provider's own time."""
    refreshers.configure(1000)
    refreshers.empty()
    service = refreshers.service
    iams = service.iams()
    spent: list[float] = []
    refresher = Refresher(
        service.pool, service.keystore, Lifecycle(service.engine, service.store), iams, service.clock,
        lambda *asked: spent.append(asked[3]),
    )  # fmt: skip
    above = []
    for _ in range(rounds):
        refreshers.rows(1, "queued", 600, 0)
        before, started = len(spent), time.perf_counter()
        while len(spent) == before:
            refresher.run_once()
            time.sleep(0.0005)
        above.append(1000 * (time.perf_counter() - started - spent[-1]))
    refresher.stopped = True
    refresher.run()
    return {
        "above_provider_ms": median(above),
        "provider_ms": 1000 * median(spent),
        "p90_ms": sorted(above)[int(0.9 * rounds)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=float, nargs="*", default=[50, 700])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--refreshers", type=int, default=4)
    parser.add_argument("--alive", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minter-bench-") as folder:
        refreshers = Refreshers(Path(folder))
        try:
            refreshers.start()
            control_changes.sync_providers(refreshers.service.pool, ["iam"])
            result: dict[str, object] = {"versions": versions(), "refreshers": wanted.refreshers}
            result["one_refresh"] = one(refreshers)
            print(result["one_refresh"], flush=True)
            result["budgets"] = []
            for per_second in wanted.budgets:
                result["budgets"].append(budget(refreshers, per_second, wanted.seconds, wanted.refreshers))
                print(result["budgets"][-1], flush=True)
            if wanted.alive:
                result["due"] = due(refreshers, wanted.alive)
                print(result["due"], flush=True)
        finally:
            refreshers.stop()
    if wanted.json:
        wanted.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
