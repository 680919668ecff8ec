"""The HTTP issuer: what clients may ask there, refresh families; see 0004_issuer.sql."""

from pathlib import Path

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add what the issuer needs; code that knows nothing of it works on."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
