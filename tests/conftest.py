"""Fixtures: a real Postgres, new databases from a template, and an engine on them."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from _pytest.fixtures import reorder_items
from msgspec import structs

from minter import settings
from minter.database import migrations
from minter.database.connection import transaction
from minter.local import stack
from minter.local.servers import Postgres
from minter.service import Service
from minter.tokens import keys
from minter.tokens.keystore import new_master_key
from tests.simulators import FakeFTS

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
MASTER_KEY = new_master_key()


@pytest.fixture(scope="session")
def postgres_dsn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The DSN of a Postgres: MINTER_TEST_DSN (with a superuser), or an embedded server."""
    if dsn := os.environ.get("MINTER_TEST_DSN"):
        yield dsn
        return
    server = Postgres(tmp_path_factory.mktemp("state") / "postgres", settings=["max_connections=200"])
    server.start()
    yield server.dsn
    server.stop()


@pytest.fixture(scope="session")
def template(postgres_dsn: str) -> Iterator[str]:
    """A database with the schema, the settings' catalogue and one key, which is copied for each test."""
    name = f"minter_template_{uuid.uuid4().hex[:8]}"
    _admin(postgres_dsn, f"CREATE DATABASE {name}")
    prepare(_dsn(postgres_dsn, name))
    yield name
    _admin(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def dsn(postgres_dsn: str, template: str) -> Iterator[str]:
    """A fresh database."""
    name = f"minter_test_{uuid.uuid4().hex[:8]}"
    _admin(postgres_dsn, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _dsn(postgres_dsn, name)
    _admin(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def service(dsn: str) -> Iterator[Service]:
    """The engine on a fresh database, with the examples' settings."""
    made = Service(load_settings(dsn))
    yield made
    made.pool.dispose()


@pytest.fixture
def fts() -> Iterator[FakeFTS]:
    made = FakeFTS()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def loaded() -> settings.Loaded:
    """The examples' settings, without a database."""
    return load_settings("")


@pytest.fixture(scope="session")
def es256() -> keys.Signer:
    return keys.load_signer((ROOT / "tests/keys/es256.pem").read_bytes(), "ES256")


@pytest.fixture(scope="session")
def rs256() -> keys.Signer:
    return keys.load_signer((ROOT / "tests/keys/rs256.pem").read_bytes(), "RS256")


def load_settings(dsn: str, **environ: str) -> settings.Loaded:
    return settings.load(
        EXAMPLES / "settings.toml",
        {"MINTER_DSN": dsn, "MINTER_MASTER_KEY_ALPEN": MASTER_KEY, **environ},
    )


def prepare(dsn: str) -> None:
    """Give a new database the schema, the settings' catalogue, one key and one client."""
    service = Service(load_settings(dsn))
    migrations.upgrade(service.pool)
    service.prepare()
    service.create_keys("alpen", ("ES256", "RS256"), "tests")
    stack.add_client(service, "rucio-alpen", "alpen", "tests")
    service.pool.dispose()


def _admin(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement)


def _dsn(dsn: str, name: str) -> str:
    return psycopg.conninfo.make_conninfo(dsn, dbname=name)


def rows(service: Service, statement: str, *values: object) -> list[tuple[Any, ...]]:
    with transaction(service.pool) as connection:
        return connection.execute(statement, values).fetchall()


def with_one_algorithm(service: Service) -> Service:
    """Leave an issuer its ES256 key only, in the database and in the settings."""
    issuers = service.loaded.settings.issuers
    for vo, issuer in issuers.items():
        issuers[vo] = structs.replace(issuer, algorithms=("ES256",))
    with transaction(service.pool) as connection:
        connection.execute("DELETE FROM signing_keys WHERE algorithm = 'RS256'")
    return service


# ── order ────────────────────────────────────────────────────────────────────────────────────


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the order inside each module of acceptance tests, which share running servers.

    pytest-randomly shuffled everything before.
    """
    places: dict[Path, list[int]] = {}
    for number, item in enumerate(items):
        if item.path.parent.name == "acceptance":
            places.setdefault(item.path, []).append(number)
    for numbers in places.values():
        ordered = sorted((items[n] for n in numbers), key=lambda item: item.location[1] or 0)
        for number, item in zip(numbers, ordered, strict=True):
            items[number] = item
    items[:] = reorder_items(items)  # as pytest did before: each parameter of a shared server once


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    seed = config.getoption("randomly_seed", default=None)
    terminalreporter.write_line(f"to repeat this order: --randomly-seed={seed}")
