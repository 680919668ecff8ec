"""Measure follow-ups of one request of 1 000 files: `python -m benchmarks.bench_lifecycle`."""

import json
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.engine import bench, versions
from minter.contract.followups import CancelRequest, FetchRequest, FileReport, RenewRequest, ReportRequest
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock
from minter.tokens.outcomes import Submission

FILES, ROUNDS = 1_000, 7


def main() -> None:
    took: dict[str, list[float]] = {}

    def timed(name, call):  # noqa: ANN202 - what the call returns
        started = time.perf_counter()
        result = call()
        took.setdefault(name, []).append((time.perf_counter() - started) * 1000)
        return result

    with (
        tempfile.TemporaryDirectory(prefix="minter-bench-") as folder,
        bench(Path(folder), "embedded") as running,
    ):
        engine, client = running.service.engine, running.client
        lifecycle = Lifecycle(engine, running.service.store)
        for number in range(ROUNDS):
            asked = running.submission(FILES, number)
            request = asked.request
            engine.mint_many([asked], clock.now())
            ids = [file.external_id for file in request.files]
            for state in ("active", "finished"):
                wire = ReportRequest(files=tuple(FileReport(state=state, external_id=i) for i in ids))
                assert (
                    timed(f"report_{state}", lambda w=wire: lifecycle.report(client, w, clock.now())).changed
                    == 2 * FILES
                )
            wire = ReportRequest(
                files=tuple(
                    FileReport(state="finished", request_id=request.request_id, file=n) for n in range(FILES)
                )
            )
            assert (
                timed("report_by_file_again", lambda w=wire: lifecycle.report(client, w, clock.now())).changed
                == 0
            )
            again = RenewRequest(request_id=clock.new_uuid7(), renews=request.request_id)
            renewal = timed("renewal_decoded", lambda w=again: lifecycle.renewal(client, w))
            engine.mint_many([Submission(renewal, client)], clock.now())
            timed("fetch", lambda r=again: lifecycle.fetch(client, FetchRequest(r.request_id), clock.now()))
            cancelled = timed(
                "cancel", lambda r=again: lifecycle.cancel(client, CancelRequest(r.request_id), clock.now())
            )
            assert cancelled.changed == len(cancelled.alive) == 2 * FILES
    print(
        json.dumps(
            {
                "versions": versions(),
                "files": FILES,
                "median_ms": {n: round(median(t), 1) for n, t in took.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
