"""Bring a database to the schema that this release needs."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Engine

import schemas
from minter.database.connection import one, transaction


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(schemas.__file__).parent / "migrations"))
    return config


def head() -> str:
    """Return the revision of the schema that this release needs."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def revision(pool: Engine) -> str | None:
    """Return the revision of the database's schema, None if it has none; raises Unavailable."""
    with transaction(pool) as connection:
        (known,) = one(connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL"))
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if known else None
    return str(row[0]) if row else None


def upgrade(pool: Engine) -> None:
    """Run every migration that the database has not seen, in one transaction."""
    config = _config()
    with pool.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
