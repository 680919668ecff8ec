"""What must hold after all faults, by the clients' book and by SQL on the surviving primary; and the pauses."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg


def read(book: Path) -> list[dict[str, Any]]:
    """Return the lines of a book."""
    return [json.loads(line) for line in book.read_text().splitlines()]


def check(lines: Sequence[dict[str, Any]], connection: psycopg.Connection[Any]) -> dict[str, int]:
    """Check I2, I3 and I4; raises AssertionError with what was found. Return what was counted."""
    asked = [line for line in lines if line["event"] == "asked"]
    answered = [line for line in lines if line["event"] == "answered"]
    refused = [line for line in lines if line["event"] == "refused"]
    assert not refused, refused[:3]
    assert len(asked) == len(answered), f"{len(asked) - len(answered)} requests have no outcome"
    first: dict[str, dict[str, Any]] = {}
    for line in answered:
        assert not line["refusals"]
        assert len(line["tokens"]) == 2 * line["files"], line
        known = first.setdefault(line["request_id"], line["tokens"])
        assert known == line["tokens"], f"repeats of {line['request_id']} differ"
    given = {jti: request for request, tokens in first.items() for jti in tokens}
    assert len(given) == sum(len(tokens) for tokens in first.values()), "a jti was given twice"
    assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)
    ids = [UUID(request) for request in first]
    rows = connection.execute(
        "SELECT jti::text, request_id::text FROM tokens WHERE request_id = ANY(%s)", (ids,)
    ).fetchall()
    assert len(rows) == len({jti for jti, _ in rows})
    recorded = dict(rows)
    lost = given.keys() - recorded.keys()
    assert not lost, f"{len(lost)} tokens were handed out and have no row, such as {sorted(lost)[:3]}"
    assert recorded == given, "the requests have other rows than tokens"
    counted = connection.execute(
        "SELECT count(*), count(DISTINCT request_id) FROM requests WHERE request_id = ANY(%s)", (ids,)
    ).fetchone()
    assert counted == (len(ids), len(ids))
    return {
        "requests": len(ids), "repeats": len(answered) - len(ids), "tokens": len(given),
        "tries_that_failed": sum(line["event"] == "tried" for line in lines),
    }  # fmt: skip


def pauses(lines: Sequence[dict[str, Any]], start: float, end: float) -> dict[str, float]:
    """Return the longest times without an answer between two times: of all, of each protocol, of one client."""
    times: dict[str, list[float]] = {line["client"]: [] for line in lines}
    for line in lines:
        if line["event"] == "answered":
            times[line["client"]].append(line["at"])
    groups = {
        "all": [t for at in times.values() for t in at],
        "amqp": [t for client, at in times.items() if client.startswith("amqp") for t in at],
        "http": [t for client, at in times.items() if client.startswith("http") for t in at],
    }
    found = {name: _longest(at, start, end) for name, at in groups.items()}
    return {**found, "one client": max(_longest(at, start, end) for at in times.values())}


def _longest(at: Sequence[float], start: float, end: float) -> float:
    inside = sorted(t for t in at if start <= t <= end)
    edges = [start, *inside, end]
    return max(b - a for a, b in pairwise(edges))
