"""Access tokens know the refresh family that gave them; see 0008_family_tokens.sql."""

from pathlib import Path

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the table; access tokens of before are not in it, and outlive the end of their family."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
