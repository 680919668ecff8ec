"""Measure tokens per second: `python -m benchmarks.bench_engine [--broker rabbitmq|embedded] [--json FILE]`.

One run measures openssl on one core, `mint_many` in one process, 100-file and single-file requests through
two workers, single requests one after the other, and the workers' memory. Durability, constraints and indexes
are the same as in production.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.engine import bench, openssl_per_second, report, versions
from minter import service
from minter.policy.routes import Route
from minter.policy.transfers import Policy
from minter.tokens import clock

ALGORITHMS = ("ES256", "RS256", "mix")


def core(running, requests: int, tokens: int = 40_000, algorithm: str = "ES256") -> int:
    """Return tokens per second of `mint_many` in this process, recorded; a call has `requests`×100 files."""
    named = "" if algorithm == "mix" else algorithm
    submissions = [running.submission(100, n, named) for n in range(tokens // 200 + 5)]
    mint_many = running.service.engine.mint_many
    mint_many(submissions[:5], clock.now())
    started, made = time.perf_counter(), 0
    for n in range(5, len(submissions), requests):
        made += sum(len(o.issued) for o in mint_many(submissions[n : n + requests], clock.now()))
    return round(made / (time.perf_counter() - started))


def core_shared(running) -> int:
    """Return uses per second of tokens shared by a storage's files; a call has 10 requests of 100 files."""
    engine = running.service.engine
    policy = engine.policy
    route = Route(
        name="shared", operations=("read", "write", "overwrite"), granularity="storage", wait_seconds=600
    )
    engine.policy = Policy(policy.directories, [route])
    try:
        return core(running, 10)
    finally:
        engine.policy = policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", choices=["rabbitmq", "embedded"], default="rabbitmq")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="also measure memory over a million tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = {"versions": versions(), "broker": options.broker}
    with (
        tempfile.TemporaryDirectory(prefix="minter-bench-") as folder,
        bench(Path(folder), options.broker) as running,
    ):
        rounds = []
        service.tune_gc()  # as in a worker
        for _ in range(options.rounds):
            raw = openssl_per_second()
            rounds.append(
                {
                    "openssl_per_s": raw,
                    "mint_many_per_s_of_10_requests": {a: core(running, 10, algorithm=a) for a in ALGORITHMS},
                    "mint_many_per_s_of_1_request": {a: core(running, 1, algorithm=a) for a in ALGORITHMS},
                    "shared_uses_per_s": core_shared(running),
                }
            )
        running.workers(2)
        running.load(1, 200, 16)
        for entry in rounds:
            big = running.load(100, 600, 32)
            small = running.load(1, 6000, 256)
            lone = running.load(1, 200, 1)
            entry |= {
                "tokens_per_s_100_files": round(big["tokens"] / big["seconds"]),
                "requests_per_s_1_file": round(small["requests"] / small["seconds"]),
                "lone_p50_ms": lone["p50_ms"], "lone_p99_ms": lone["p99_ms"],
                "verified": big["verified"] + small["verified"],
            }  # fmt: skip
            print(json.dumps(entry), flush=True)
        if options.memory:
            result["memory"] = memory(running)
        result["rounds"] = rounds
        plain = [k for k in rounds[0] if not isinstance(rounds[0][k], dict)]
        result["median"] = {k: median(r[k] for r in rounds) for k in plain}
        for name in ("10_requests", "1_request"):
            result["median"][f"mint_many_ratio_to_openssl_of_{name}"] = {
                a: round(
                    median(r[f"mint_many_per_s_of_{name}"][a] / r["openssl_per_s"][a] for r in rounds), 3
                )
                for a in ALGORITHMS
            }
    report(result, options.json)


def memory(running) -> dict[str, float]:
    """Return the workers' RSS after 1e5 and 1e6 tokens; half of the requests are refused or repeated."""
    tokens = 0
    seen = {}
    for mark in (100_000, 1_000_000):
        while tokens < mark:
            tokens += running.load(20, 5_000, 128, "mixed")["tokens"]
        seen[f"rss_kb_after_{mark}"] = running.rss()
    seen["ratio"] = round(seen["rss_kb_after_1000000"] / seen["rss_kb_after_100000"], 3)
    return seen


if __name__ == "__main__":
    main()
