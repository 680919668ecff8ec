"""Bring a database to the schema that this release needs."""

from pathlib import Path

from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

import schemas
from minter.database.connection import PASSING, SCHEMA, one, transaction, why
from minter.errors import Unavailable


def revision(pool: Engine) -> str | None:
    """Return the revision of the database's schema, None if it has none; raises Unavailable."""
    with transaction(pool) as connection:
        (known,) = one(connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL"))
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if known else None
    return str(row[0]) if row else None


def check(pool: Engine) -> str:
    """Return the schema's revision; raises Unavailable if it is older than this release needs.

    A release works with the schema of the next one, too.
    """
    found = revision(pool)
    if found is None or found < SCHEMA:
        has = f"schema {found}" if found else "no schema"
        raise Unavailable(f"the database has {has}, this release needs {SCHEMA}; run: minter db upgrade")
    return found


def upgrade(pool: Engine) -> None:
    """Run every migration that the database has not seen, in one transaction; raises Unavailable."""
    from alembic import command  # noqa: PLC0415 - every process checks the schema, few upgrade it
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(schemas.__file__).parent / "migrations"))
    try:
        with pool.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except DBAPIError as error:
        if isinstance(error.orig, PASSING):
            raise Unavailable(f"the schema could not be upgraded: {why(error.orig)}") from error
        raise
