"""A release that runs before `minter db upgrade`: it does not start, or its requests wait."""

import uuid

import psycopg
import pytest

from minter.database.connection import transaction
from minter.errors import Unavailable
from minter.service import Service
from tests.conftest import _admin, _dsn, load_settings, rows
from tests.integration.test_mint import mint, submission, tokens


def test_a_process_does_not_start_on_an_older_schema(service: Service) -> None:
    _alter(service, "UPDATE alembic_version SET version_num = '0011'")
    with pytest.raises(Unavailable, match="has schema 0011, "):
        service.prepare()


def test_a_process_starts_on_the_schema_of_the_next_release(service: Service) -> None:
    _alter(service, "UPDATE alembic_version SET version_num = '9999'")
    service.prepare()


def test_a_process_does_not_start_without_a_schema(postgres_dsn: str) -> None:
    name = f"minter_empty_{uuid.uuid4().hex[:8]}"
    _admin(postgres_dsn, f"CREATE DATABASE {name}")
    made = Service(load_settings(_dsn(postgres_dsn, name)))
    with pytest.raises(Unavailable, match="no schema"):
        made.prepare()
    made.pool.dispose()
    _admin(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("what", ["requests", "requests.activity"])
def test_requests_wait_for_an_upgrade(service: Service, what: str) -> None:
    table, _, column = what.partition(".")
    asked = submission("waits")
    _alter(service, "UPDATE alembic_version SET version_num = '0011'")
    part = f"COLUMN {column}" if column else ""
    _alter(service, f"ALTER TABLE {table} RENAME {part} TO away")
    with pytest.raises(Unavailable, match="minter db upgrade"):
        mint(service, asked)
    _alter(
        service,
        f"ALTER TABLE {table if column else 'away'} RENAME {part and 'COLUMN away'} TO {column or table}",
    )
    assert tokens(mint(service, asked)[0])
    assert rows(service, "SELECT count(*) FROM requests") == [(1,)]


def test_an_unknown_column_of_a_schema_in_order_is_a_fault(service: Service) -> None:
    with pytest.raises(psycopg.errors.UndefinedColumn), transaction(service.pool) as connection:
        connection.execute("SELECT nonsense FROM requests")


def _alter(service: Service, statement: str) -> None:
    with transaction(service.pool) as connection:
        connection.execute(statement)
