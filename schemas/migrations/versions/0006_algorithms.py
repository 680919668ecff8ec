"""One active signing key for each algorithm of an issuer; see 0006_algorithms.sql."""

from pathlib import Path

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Let an issuer have an active key of each algorithm; earlier releases sign with the first one."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
