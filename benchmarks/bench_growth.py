"""Measure Minter on a day of many tokens: `python -m benchmarks.bench_growth [--tokens N] [--json FILE]`.

A scratch Postgres gets some real tokens, and then a day of N tokens that SQL makes from their shape, with new ids,
paths and external ids. Look-ups, a report, the console's pages and the mint rate are measured before and after.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from falcon.testing import TestClient

from benchmarks.engine import Bench, bench, openssl_per_second, report, versions
from minter import search
from minter.console.app import application
from minter.console.pages import Pages
from minter.console.signin import SignIn
from minter.contract.followups import FileReport, ReportRequest
from minter.database import partitions
from minter.database.connection import transaction
from minter.local import stack
from minter.sections import ConsoleSettings
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock

POSTGRES = (
    "shared_buffers=2GB", "max_wal_size=8GB", "checkpoint_timeout=15min", "wal_compression=on",
    "max_locks_per_transaction=256",
)  # fmt: skip
"""deploy/postgresql.conf, scaled down."""
FILES, REQUESTS = 20, 200
CHUNK = 2_000
PATH = r"/vo/mc23_13p6TeV/[0-9a-f]{2}/[0-9]{8}\.[0-9]+\.pool\.root\.1"
"""Paths of `benchmarks.load.body`."""
numbers = count()
"""Numbers of requests, each of which has paths of its own."""

TEMPLATES = """
    CREATE TABLE templates AS SELECT dense_rank() OVER (ORDER BY request_id) - 1 AS request, t.*,
        extract(epoch FROM expires_at - received_at) AS life,
        regexp_replace(replace(payload, t.jti::text, '@JTI@'), %(path)s, '@PATH@', 'g') AS body,
        r.tokens, r.received_at, r.first_jti
    FROM tokens t JOIN requests r USING (request_id, client_id);
    CREATE INDEX ON templates (request);
    ANALYZE templates
"""
FILL = """
    WITH r AS MATERIALIZED (
        SELECT n, n %% %(templates)s AS request, to_timestamp(%(start)s + n * %(pace)s) AS made,
            lpad(to_hex((1000 * (%(start)s + n * %(pace)s))::bigint), 12, '0') || '7' || left(md5(n::text), 3) || 'a'
                || substr(md5(n::text), 4, 10) AS head
        FROM generate_series(%(low)s::int, %(high)s::int) AS n
    ), t AS MATERIALIZED (
        SELECT t.*, r.made, r.head, (r.head || 'fffff')::uuid AS new_request, (r.head || lpad(
            to_hex(('x' || right(t.jti::text, 5))::bit(20)::int - ('x' || right(t.first_jti::text, 5))::bit(20)::int), 5, '0')
            )::uuid AS new_jti, '/vo/mc23_13p6TeV/' || lpad(to_hex(t.file & 255), 2, '0') || '/' || 20000000 + r.n || '.'
            || t.file || '.pool.root.1' AS path
        FROM r JOIN templates t USING (request)
    ), q AS (
        INSERT INTO requests SELECT DISTINCT ON (new_request) new_request, client_id, (head || '00000')::uuid, made, tokens,
            sha256(head::bytea), 'mint', 'Production Output', '', NULL::jsonb, NULL::jsonb, NULL::uuid, false FROM t
    ), s AS (
        INSERT INTO token_states SELECT new_jti, made + interval '5 min', made + interval '25 min', 'finished' FROM t
    )
    INSERT INTO tokens SELECT new_jti, new_request, made + life * interval '1 s',
        ('x' || encode(substr(sha256(path::bytea), 1, 8), 'hex'))::bit(64)::bigint,
        ('x' || left(md5(new_jti::text), 16))::bit(64)::bigint, client_id, storage_id, key_id, 'issued', mode, side, file,
        position, md5(path), replace(replace(body, '@PATH@', path), '@JTI@', new_jti::text), rule_id FROM t
"""


def fill(running: Bench, tokens: int) -> dict[str, float]:
    """Make a day of tokens until now; return the seconds that it took and the bytes per token by table or index."""
    now = datetime.now(UTC)
    start = now.replace(hour=0, minute=0, second=1, microsecond=0).timestamp()
    with psycopg.connect(running.postgres.dsn, autocommit=True) as connection:
        for statement in TEMPLATES.split(";"):
            connection.execute(statement, {"path": PATH} if "%(" in statement else None)
        (templates, per_request) = connection.execute(
            "SELECT max(request) + 1, count(*) / (max(request) + 1) FROM templates"
        ).fetchone()
        requests = int(tokens / per_request)
        pace = (now.timestamp() - start - 600) / requests
        began = time.perf_counter()
        for low in range(0, requests, CHUNK):
            high = min(low + CHUNK, requests) - 1
            connection.execute(
                FILL, {"templates": templates, "start": start, "pace": pace, "low": low, "high": high}
            )
        took = time.perf_counter() - began
        connection.execute("DROP TABLE templates")
        connection.execute("VACUUM (ANALYZE)")
        (rows,) = connection.execute(f"SELECT count(*) FROM tokens_{now:%Y%m%d}").fetchone()
        sizes = connection.execute(
            "SELECT relname, pg_relation_size(oid) FROM pg_class WHERE relkind IN ('r', 'i') AND relname ~ %s",
            (f"^({'|'.join(partitions.PARTITIONED)})_{now:%Y%m%d}",),
        ).fetchall()
    each = {name.replace(f"_{now:%Y%m%d}", ""): round(size / rows, 1) for name, size in sorted(sizes)}
    return {"rows": rows, "fill_seconds": round(took), **each, "bytes_per_token": round(sum(each.values()))}


def timed(calls: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Return the times of calls in ms."""
    took = []
    for call in calls:
        started = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - started))
    return {"p50_ms": round(median(took), 1), "p99_ms": round(sorted(took)[int(0.99 * len(took))], 1)}


def lookups(running: Bench, samples: int) -> dict[str, dict[str, float]]:
    """Measure searches as `minter trace` and the console make them, and reports of 100 files by external id."""
    s = running.service
    with transaction(s.pool, 600) as connection:
        rows = connection.execute(
            "SELECT jti, request_id, external_id, fts_token_id, substring(payload FROM %s) FROM tokens"
            " WHERE external_id <> '' ORDER BY path_hash LIMIT %s", (PATH, samples),
        ).fetchall()  # fmt: skip
    by = {"jti": 0, "external_id": 2, "fts_token_id": 3, "path": 4}
    found: dict[str, Sequence[Callable[[], object]]] = {
        name: [lambda n=name, v=row[at]: search.find(s, n, v, s.since(), 50) for row in rows]
        for name, at in by.items()
    }
    found["request"] = [lambda r=row[1]: search.of_request(s, r) for row in rows]
    lifecycle = Lifecycle(s.engine, s.store)
    files = tuple(FileReport(state="finished", external_id=row[2]) for row in rows[:100])
    found["report of 100 files"] = [
        lambda: lifecycle.report("load", ReportRequest(files=files), clock.now())
    ] * 5
    return {name: timed(calls) for name, calls in found.items()}


def pages(running: Bench) -> dict[str, dict[str, float]]:
    """Measure the console's pages, as a viewer gets them."""
    sign_in = SignIn(ConsoleSettings(), "")
    http = TestClient(application(Pages(running.service), sign_in, "http://127.0.0.1:8445"))
    cookies = {"minter-session": sign_in.open("a viewer", "viewer")}

    def get(path: str) -> None:
        assert http.simulate_get(path, cookies=cookies).status_code == 200, path

    asked = [f"/?period={period}" for period in ("hour", "day", "week")]
    asked += [f"/{page}" for page in ("storages", "clients", "keys", "audit", "chart/tokens/week.svg")]
    asked += [f"/search?{of}" for of in ("client=load", "client=idle", "storage=SE001", "storage=nowhere")]
    return {path: timed([lambda p=path: get(p)] * 7) for path in asked}


def mint_rate(running: Bench, files: int, at_once: int, seconds: float) -> dict[str, float]:
    """Return tokens per second of `mint_many`, with a checkpoint before and another in the middle."""
    raw, spent, tokens, middle = openssl_per_second()["ES256"], 0.0, 0, False
    with psycopg.connect(running.postgres.dsn, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        while spent < seconds:
            if not middle and spent > seconds / 2:
                middle = True
                connection.execute("CHECKPOINT")
            wanted = [running.submission(files, next(numbers)) for _ in range(at_once)]
            started = time.perf_counter()
            tokens += sum(len(o.issued) for o in running.service.engine.mint_many(wanted, clock.now()))
            spent += time.perf_counter() - started
    return {"tokens_per_s": round(tokens / spent), "of_openssl": round(tokens / spent / raw, 3)}


def measure(running: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything once."""
    return {
        "lookups": lookups(running, options.samples),
        "pages": pages(running),
        "mint": {
            "100 files": mint_rate(running, 100, 1, options.seconds),
            "single files, 16 at once": mint_rate(running, 1, 16, options.seconds),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=60, help="seconds of each mint rate")
    parser.add_argument("--samples", type=int, default=300, help="look-ups of each kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="minter-bench-") as folder,
        bench(Path(folder), "embedded", POSTGRES) as running,
    ):
        stack.add_client(running.service, "idle", "vo", "bench")
        running.service.engine.mint_many(
            [running.submission(FILES, next(numbers)) for _ in range(REQUESTS)], clock.now()
        )
        result: dict[str, Any] = {"versions": versions(), "postgres": POSTGRES}
        result["empty"] = measure(running, options)
        result["day"] = fill(running, options.tokens)
        result["full"] = measure(running, options)
    report(result, options.json)


if __name__ == "__main__":
    main()
