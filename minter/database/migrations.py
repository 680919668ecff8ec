"""Bring a database to the schema that this release needs."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Engine

import schemas


def upgrade(pool: Engine) -> None:
    """Run every migration that the database has not seen, in one transaction."""
    config = Config()
    config.set_main_option("script_location", str(Path(schemas.__file__).parent / "migrations"))
    with pool.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
