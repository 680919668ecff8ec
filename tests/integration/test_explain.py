"""Each question is one indexed query of bounded time (EXPLAIN on a million rows); disk space of a token."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from minter.database import connection, traces
from minter.database.requests import TOKEN_COLUMNS, tokens_of
from minter.service import Service
from minter.tokens import clock
from minter.tokens.records import RequestRow

pytestmark = pytest.mark.slow

ROWS = 1_000_000
PAYLOAD = (
    '{"wlcg.ver":"1.0","iss":"https://tokens.vo-alpen.example.org/alpen/","sub":"01a20118-96d0-71ce-b20a-cb171bc2efc8",'
    '"aud":"webdav.alpen-t1.example.org","scope":"storage.read:/atlasdatadisk/rucio/mc20_13TeV/e6/0a/DAOD_PHYS.38191575._000030.pool.root.1",'
    '"client_id":"rucio-alpen","iat":1795314660,"nbf":1795314660,"exp":1795920918,"jti":"01a20118-9ddb-7538-9909-d9caefa00001"}'
)


@pytest.fixture(scope="module")
def million(postgres_dsn: str, template: str) -> Iterator[Service]:
    """Write a million tokens in four daily partitions, in the order of their jti, as the engine does."""
    from tests.conftest import _admin, _dsn, load_settings

    _admin(postgres_dsn, f"CREATE DATABASE minter_million TEMPLATE {template}")
    service = Service(load_settings(_dsn(postgres_dsn, "minter_million")))
    start = (clock.now() - timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    with connection.transaction(service.pool) as tx:
        tx.execute("SELECT setseed(0.5)")
        tx.execute(
            """
            INSERT INTO tokens
            SELECT (lpad(to_hex(%(start)s + n * 345 %% 345600000), 12, '0') || '7' || lpad(to_hex(n %% 4096), 3, '0')
                    || '8' || lpad(to_hex(n), 15, '0'))::uuid,
                   gen_random_uuid(), now() + interval '1 day', (random() * 9e18)::bigint, (random() * 9e18)::bigint,
                   1, 1, 1, 'issued', 'mint', 'source', 0, 0, md5((n / 2)::text), %(payload)s
            FROM generate_series(1, %(rows)s) AS n
            """,
            {"start": int(start.timestamp() * 1000), "payload": PAYLOAD, "rows": ROWS},
        )
    with connection.transaction(service.pool) as tx:
        tx.execute("ANALYZE tokens")
    yield service
    service.pool.dispose()
    _admin(postgres_dsn, "DROP DATABASE minter_million WITH (FORCE)")


def plan(service: Service, query: str, values: Any) -> Any:
    with connection.transaction(service.pool) as tx:
        return tx.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", values).fetchall()[0][0][0]["Plan"]


def scans(node: dict[str, Any]) -> Counter[tuple[str, str]]:
    """Return every scan of a tokens partition as (partition, kind), with the number of its runs."""
    found: Counter[tuple[str, str]] = Counter()
    if re.match(r"(tokens|requests)_\d{8}$", node.get("Relation Name", "")) and node["Actual Loops"]:
        found[node["Relation Name"], node["Node Type"]] += node["Actual Loops"]
    for child in node.get("Plans", []):
        found += scans(child)
    return found


@pytest.mark.parametrize("by", sorted(traces.INDEXED))
def test_one_indexed_probe_for_each_partition_in_the_time_asked_for(million: Service, by: str) -> None:
    columns = {
        "jti": "jti",
        "path": "path_hash",
        "fts_token_id": "fts_token_id",
        "external_id": "external_id",
    }
    with connection.transaction(million.pool) as tx:
        ((value,),) = tx.execute(f"SELECT {columns[by]} FROM tokens OFFSET 500000 LIMIT 1").fetchall()
    since = (clock.now() - timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    until = since + timedelta(days=4)  # days with rows: an empty partition is scanned
    bounds = {**traces.bounds(since, until), "limit": 100, "asker": None}
    found = scans(plan(million, traces.queries(by)[0], {"value": value, **bounds}))
    assert found
    assert not [kind for _, kind in found if "Seq" in kind]
    assert max(Counter(partition for partition, _ in found).values()) == 1
    if by == "jti":
        assert len(found) == 1
    narrow = {**bounds, **traces.bounds(clock.now(), clock.now() + timedelta(hours=1))}
    assert len(scans(plan(million, traces.queries(by)[0], {"value": value, **narrow}))) <= 2


def test_a_requests_tokens_are_one_range_of_the_primary_key(million: Service) -> None:
    with connection.transaction(million.pool) as tx:
        ((first,),) = tx.execute("SELECT jti FROM tokens ORDER BY jti OFFSET 1000 LIMIT 1").fetchall()
    last = UUID(int=first.int + 200)
    query = f"SELECT {TOKEN_COLUMNS} FROM tokens t LEFT JOIN storages s USING (storage_id) WHERE t.jti BETWEEN %s AND %s ORDER BY t.jti"
    found = scans(plan(million, query, (first, last)))
    assert len(found) == 1
    assert not [kind for _, kind in found if "Seq" in kind]
    row = RequestRow(first, 1, b"", "mint", "", "", first, 1, [], None, clock.now())
    with connection.transaction(million.pool) as tx:
        assert [t.jti for t in tokens_of(tx, row)] == [str(first)]


def test_what_a_token_costs_on_disk(million: Service, record_property: Callable[[str, object], None]) -> None:
    with connection.transaction(million.pool) as tx:
        ((heap, total),) = tx.execute(
            "SELECT sum(pg_relation_size(relid)), sum(pg_total_relation_size(relid)) FROM pg_partition_tree('tokens')"
        ).fetchall()
    print(json.dumps({"bytes_per_token": {"heap": int(heap) / ROWS, "with_indexes": int(total) / ROWS}}))
    record_property("bytes_per_token", int(total) / ROWS)
    assert int(total) / ROWS < 720
