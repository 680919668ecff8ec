"""Waits for Postgres end: a standby that is away, and a server that does not answer."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from minter.database import connection
from minter.errors import Unavailable
from minter.heartbeats import Heartbeat
from minter.local.servers import Postgres
from minter.service import Service
from tests.conftest import load_settings, prepare, rows
from tests.integration.test_mint import mint, submission, tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    made = Postgres(tmp_path_factory.mktemp("deadlines") / "postgres")
    made.start()
    prepare(made.dsn)
    yield made
    made.stop()


@pytest.fixture
def service(postgres: Postgres) -> Iterator[Service]:
    made = Service(load_settings(postgres.dsn))
    yield made
    made.pool.dispose()


def set_standby(postgres: Postgres, name: str) -> None:
    with psycopg.connect(postgres.dsn, autocommit=True) as admin:
        admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
        admin.execute("SELECT pg_reload_conf()")
    time.sleep(0.3)


def test_a_standby_that_is_away_gives_a_typed_error_and_no_token(
    postgres: Postgres, service: Service
) -> None:
    """Also a repeat, whose record Postgres has by now, gets nothing before the standby has it."""
    asked = submission("standby")
    mint(service, submission("warm"))
    set_standby(postgres, "nobody")
    try:
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(Unavailable, match="synchronous standby"):
                mint(service, asked)
            assert time.monotonic() - started < connection.QUICK_SECONDS
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        assert rows(service, waiting) == [(0,)]  # no server process is left waiting, and no lock held
    finally:
        set_standby(postgres, "")
    (first,), (second,) = mint(service, asked), mint(service, asked)
    assert len(first.issued) == 2
    assert tokens(first) == tokens(second)
    recorded = "SELECT count(*) FROM tokens WHERE request_id = %s"
    assert rows(service, recorded, asked.request.request_id) == [(2,)]


def test_a_server_that_does_not_answer_gives_a_typed_error(postgres: Postgres, service: Service) -> None:
    mint(service, submission("warm"))
    assert postgres.process is not None
    family = [postgres.process.pid, *children(postgres.process.pid)]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(Unavailable, match="no answer within 6 s"):
            mint(service, submission("frozen"))
        assert time.monotonic() - started < connection.QUICK_SECONDS + 1
    finally:
        for pid in family:
            os.kill(pid, signal.SIGCONT)
    (outcome,) = mint(service, submission("thawed"))
    assert outcome.issued


def children(pid: int) -> list[int]:
    """Return the process ids below a process."""
    own = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*own, *(found for child in own for found in children(child))]


@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        ("host=127.0.0.1 port=1 user=minter", "refused"),
        ("host=no-such-host.invalid user=minter", "resolve|translate|not known"),
        ("{socket} user=minter dbname=nothing", 'database "nothing" does not exist'),
        ("{socket} user=nobody dbname=postgres", 'role "nobody" does not exist'),
    ],
)
def test_what_is_wrong_with_a_connection_is_told_apart(postgres: Postgres, dsn: str, said: str) -> None:
    pool = connection.open_pool(dsn.format(socket=f"host={postgres.sockets}"))
    with pytest.raises(Unavailable, match=said), connection.transaction(pool):
        pass


def test_a_missing_standby_leaves_no_connection_behind(postgres: Postgres, service: Service) -> None:
    """`/ready` and heartbeats ask with less patience than a commit has, again and again."""
    heartbeat = Heartbeat("serve", service)
    heartbeat.beat()
    set_standby(postgres, "nobody")
    try:
        for _ in range(4):
            with pytest.raises(Unavailable, match="standby"):
                heartbeat.beat(1.5)
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' OR wait_event_type = 'Lock'"
        )
        assert rows(service, waiting) == [(0,)]
    finally:
        set_standby(postgres, "")
        heartbeat.stop()
