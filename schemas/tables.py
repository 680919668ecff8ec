"""The database tables as SQLAlchemy metadata, which the migrations must build (a test compares them)."""

from schemas import control_tables, token_tables
from schemas.columns import metadata

__all__ = ["control_tables", "metadata", "token_tables"]
