"""Measure `minter keys recover`: `python -m benchmarks.bench_recovery [TOKENS]`.

The rate of the command, with a process for each core, and in the same run the rate at which one process
minted the same requests, of 100 files and of single files.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.engine import bench, versions
from minter.database import keyring
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.tokens import clock, keys

BATCH_TOKENS = 1_000


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    results = {}
    with (
        tempfile.TemporaryDirectory(prefix="minter-bench-") as folder,
        bench(Path(folder), "embedded") as running,
    ):
        service = running.service
        number = 0
        for files in (100, 1):
            per_batch = BATCH_TOKENS // (2 * files)
            started = time.perf_counter()
            for _ in range(tokens // BATCH_TOKENS):
                batch = [running.submission(files, number + n) for n in range(per_batch)]
                number += per_batch
                service.engine.mint_many(batch, clock.now())
            minted = time.perf_counter() - started
            with transaction(service.pool) as connection:
                ring = read_keys(connection)
            took, made = 0.0, 0
            for key in [k for k in ring if k.state == "active"]:
                service.ensure_standby(key.kid, "bench")
                keyring.revoke(service.pool, key.kid, clock.now(), keys.RotationPolicy(0), "bench", "leak")
                started = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-m", "minter.cli", "keys", "recover", key.kid, "--yes", "--json"],
                    env=running.environ, capture_output=True, check=True,
                )  # fmt: skip
                took += time.perf_counter() - started
                report = json.loads(done.stdout)
                made += report["made"]
                assert report["made"] == report["tokens"]
            results[f"{files} files"] = {
                "tokens": made,
                "minted_per_second": round(tokens / minted),
                "recovered_per_second": round(made / took),
            }
            service.maintain_keys("bench")
    print(json.dumps({"results": results, "versions": versions()}, indent=2))


if __name__ == "__main__":
    main()
