"""Measure what a greedy client costs honest ones over HTTP: `python -m benchmarks.bench_hostile [--json FILE]`.

Ten honest clients mint one file after the other, first alone, then beside a client with 60 connections that
sends requests of 500 files without pause. Both phases are of the same run, on the same service. In both,
an operator bans and lifts a path once a second.
"""

import argparse
import base64
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Queue
from pathlib import Path
from statistics import median, quantiles

import urllib3

from benchmarks.bench_http import minter
from benchmarks.engine import versions
from minter.client import new_request_id
from minter.database import control_changes
from minter.local import stack
from minter.policy.clients import Ban
from minter.service import Service
from minter.tokens.keystore import new_secret

HONEST, GREEDY, GREEDY_FILES = 10, 60, 500
SOURCE = "davs://se3.example.org:443/data/vo/{name}"
Told = tuple[str, list[float], "Counter[int]"]


def ask(
    url: str, name: str, secret: str, files: int, connections: int, until: float, out: "Queue[Told]"
) -> None:
    """Mint `files` files a request on each connection until `until`; put seconds and statuses."""
    http = urllib3.PoolManager(maxsize=connections)
    basic = "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()
    parts = json.dumps(
        {
            "request_id": "ID",
            "files": [{"sources": [SOURCE.format(name=f"{name}/{i}")]} for i in range(files)],
        }
    ).partition("ID")
    took: list[float] = []
    statuses: Counter[int] = Counter()

    def one(_: int) -> None:
        while (started := time.monotonic()) < until:
            body = parts[0] + str(new_request_id()) + parts[2]
            headers = {"Authorization": basic, "Content-Type": "application/json"}
            answer = http.request("POST", url, body=body, headers=headers, retries=False)
            took.append(time.monotonic() - started)
            statuses[answer.status] += 1
            time.sleep(float(answer.headers.get("Retry-After", 0)))

    with ThreadPoolExecutor(connections) as threads:
        list(threads.map(one, range(connections)))
    out.put((name, took, statuses))


def bans(service: Service, until: float) -> list[float]:
    """Ban and lift again a path once a second until `until`; return how many seconds each took to commit.

    A change holds the control lock alone, so every batch after its commit follows it.
    """
    took = []
    while time.monotonic() < until - 1:
        for change in (control_changes.add_ban, control_changes.lift_ban):
            reason = ("bench",) if change is control_changes.add_ban else ()
            started = time.monotonic()
            change(service.pool, Ban("path", "/vo/banned", "vo"), *reason, "bench")
            took.append(time.monotonic() - started)
        time.sleep(0.5)
    return took


def phase(
    url: str, secrets: dict[str, str], seconds: float, service: Service, *, greedy: bool
) -> dict[str, object]:
    """Return the honest clients' latencies, the answers that the greedy one got, and how long bans took."""
    out: Queue[Told] = multiprocessing.Queue()
    until = time.monotonic() + seconds
    who = [(name, 1, 1) for name in secrets if name != "greedy"]
    who += [("greedy", GREEDY_FILES, GREEDY // 3)] * (3 if greedy else 0)
    processes = [
        multiprocessing.Process(target=ask, args=(url, name, secrets[name], files, connections, until, out))
        for name, files, connections in who
    ]
    for process in processes:
        process.start()
    changes = bans(service, until)
    told = [out.get() for _ in processes]
    for process in processes:
        process.join()
    honest = [t for name, took, _ in told if name != "greedy" for t in took]
    answers = sum((statuses for name, _, statuses in told if name == "greedy"), Counter())
    return {
        "honest_per_s": round(len(honest) / seconds),
        "honest_p50_ms": round(median(honest) * 1000, 1),
        "honest_p99_ms": round(quantiles(honest, n=100)[98] * 1000, 1),
        "ban_max_ms": round(max(changes) * 1000, 1),
        "ban_p50_ms": round(median(changes) * 1000, 1),
        "greedy_answers": {str(status): count for status, count in answers.items()},
    }


def main() -> None:
    """Run both phases and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, minter(Path(folder), 2) as (base, _, service):
        secrets = {name: new_secret() for name in [*(f"honest{n}" for n in range(HONEST)), "greedy"]}
        for name, secret in secrets.items():
            service.set_secret(stack.add_client(service, name, "vo", "bench"), secret, "bench")
        time.sleep(2)  # every process of the service reads the new clients once a second
        phases = {
            name: phase(f"{base}/vo/v1/mint", secrets, options.seconds, service, greedy=greedy)
            for name, greedy in (("alone", False), ("beside a greedy client", True))
        }
    found = {"versions": versions(), "phases": phases}
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
