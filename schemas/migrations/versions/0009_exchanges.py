"""Refresh families are found by the subject token of their exchange; see 0009_exchanges.sql."""

from pathlib import Path

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the index; `families` has one row for each exchange, so it is built at once."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
