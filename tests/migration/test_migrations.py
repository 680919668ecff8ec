"""All migrations in order give exactly the schema that the code declares."""

import subprocess
import uuid

from sqlalchemy import create_engine

from minter.database import connection, migrations
from minter.local.servers import _postgres_programs
from schemas.tables import metadata
from tests.conftest import _admin, _dsn


def _dump(dsn: str) -> list[str]:
    done = subprocess.run(
        [_postgres_programs() / "pg_dump", "--schema-only", "--no-owner", "--exclude-table=alembic_version", dsn],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [
        line
        for line in done.stdout.splitlines()
        if line and not line.startswith(("--", "\\restrict", "\\unrestrict"))
    ]


def test_migrations_give_the_declared_schema(postgres_dsn: str) -> None:
    names = [f"minter_{kind}_{uuid.uuid4().hex[:8]}" for kind in ("migrated", "declared")]
    for name in names:
        _admin(postgres_dsn, f"CREATE DATABASE {name}")
    migrated, declared = (_dsn(postgres_dsn, name) for name in names)
    pool = connection.open_pool(migrated)
    migrations.upgrade(pool)
    migrations.upgrade(pool)  # a second run changes nothing
    assert migrations.revision(pool) == connection.SCHEMA
    pool.dispose()
    import psycopg

    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(declared))
    metadata.create_all(engine)
    engine.dispose()
    assert _dump(migrated) == _dump(declared)
    for name in names:
        _admin(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")
