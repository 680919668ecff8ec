"""I5: even with debug logging, task events and broken messages, no secret is stored or shown."""

import json
import subprocess

import kombu
import pytest

from minter.cli.demo import read_jobs
from minter.client import FileRequest, FilledJob
from minter.contract import names
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.local.servers import _postgres_programs
from tests.acceptance.conftest import Raw, Running
from tests.acceptance.test_workers import BROKEN, OTHER, SE, request
from tests.conftest import EXAMPLES, MASTER_KEY

WINDOW = 20


def windows(secret: str) -> set[str]:
    """Return every 20-character part of a secret; none of them may be found anywhere."""
    return {secret[i : i + WINDOW] for i in range(len(secret) - WINDOW + 1)}


def leaks(haystack: str, secrets: list[str]) -> set[str]:
    """Return the parts of secrets that appear, in one pass over the text for any number of secrets."""
    wanted = set().union(*map(windows, secrets))
    return {
        haystack[i : i + WINDOW]
        for i in range(len(haystack) - WINDOW + 1)
        if haystack[i : i + WINDOW] in wanted
    }


def test_the_search_finds_what_it_looks_for() -> None:
    assert leaks("xxx" + "abcdefghijklmnopqrstuvwxyz" + "yyy", ["abcdefghijklmnopqrstuvwxyz"])
    assert not leaks("abcdefghijklmnopqrs", ["abcdefghijklmnopqrstuvwxyz"])


@pytest.fixture
def exercised(running: Running) -> tuple[list[str], list[str]]:
    """Do everything that a client can do, right and wrong; return the tokens that came back."""
    tokens = []
    with running.client() as client:
        result = client.mint(
            [FileRequest(sources=(SE + f"s{n}",), destinations=(OTHER + f"s{n}",)) for n in range(50)]
        )
        tokens += [t.reveal() for t in result.tokens]
        for _, job in list(read_jobs(EXAMPLES / "rucio-41.5/jobs"))[:30]:
            filled = client.fill_job(job)
            assert isinstance(filled, FilledJob)
            if filled.job:
                tokens += [
                    t for f in filled.job["files"] for t in f["source_tokens"] + f["destination_tokens"]
                ]
                assert filled.bearer is not None
                tokens.append(filled.bearer.reveal())
    raw = Raw(running)
    # A message that cannot be served, with a job that holds tokens already.
    kept = json.loads((EXAMPLES / "rucio-41.5/jobs/with-tokens-1.json").read_text())
    strangers = [t for f in kept["files"] for t in f["source_tokens"] + f["destination_tokens"] if t]
    for body in (*BROKEN.values(), json.dumps([[{"request_id": "x", "job": kept}], {}, {}]).encode()):
        text = body if running.on_rabbitmq else body.decode("latin1")
        raw.send(text)
        raw.send(text, task="minter.unknown")
        raw.send(text, headers={})
        raw.send(text, reply_to="nobody")
    raw.ask(request())
    raw.connection.release()
    return tokens, strangers


def test_nothing_secret_is_at_rest_or_in_sight(
    running: Running, exercised: tuple[list[str], list[str]]
) -> None:
    tokens, strangers = exercised
    assert len(tokens) > 100
    signatures = [t.split(".")[2] for t in tokens + strangers]
    with transaction(running.service.pool) as connection:
        ring = read_keys(connection)
    pems = [running.service.keystore.unlock(key).private_pem().decode() for key in ring]
    lines = [line for pem in pems for line in pem.splitlines() if "PRIVATE" not in line]
    assert lines
    secrets = [*signatures, *lines, MASTER_KEY, *running.passwords.values()]

    running.stop()
    places = {"logs": running.logs(), "dump": dump(running), "queues": queue_contents(running)}
    running.start_worker("-E")
    running.start_worker("-E")
    for place, text in places.items():
        assert len(text) > 1000, place
        assert not leaks(text, secrets), place
    # No part of a token is left on the broker, plain or compressed.
    assert "eyJhbGciOi" not in places["queues"]
    assert all(t.split(".")[1][:60] not in places["logs"] for t in tokens)


def dump(running: Running) -> str:
    """Return the whole database as text; bytea in hex cannot hold a base64 secret by accident."""
    done = subprocess.run(
        [_postgres_programs() / "pg_dump", "--data-only", "--inserts", running.environ["MINTER_DSN"]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def queue_contents(running: Running) -> str:
    """Return all messages in queues and dead letters, with headers, and the embedded broker's files."""
    seen = []
    with kombu.Connection(running.broker.url) as connection:
        channel = connection.channel()
        for queue in (names.DEAD_LETTER_QUEUE, names.REQUEST_QUEUE, names.INTERNAL_QUEUE):
            while message := channel.basic_get(queue, no_ack=True):
                body = message.body if isinstance(message.body, bytes) else str(message.body).encode()
                seen.append(f"{queue} {message.headers} {message.properties} {body!r}")
    assert any("minter-reason" in s for s in seen)
    return "\n".join(seen)
