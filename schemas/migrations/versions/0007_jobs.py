"""FTS jobs are keyed by client and know the ids of replicas; see 0007_jobs.sql."""

from pathlib import Path

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Rekey the jobs; an earlier release cannot report jobs from here on, so upgrade its workers."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
