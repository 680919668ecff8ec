"""The life of a token: rules, states, FTS jobs, renewals, rotated secrets; see 0002_life.sql."""

from pathlib import Path

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add to release 0.1 what release 0.2 needs; 0.1's code works on with it."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
