"""What all tables share: the metadata, enumerations and columns."""

from sqlalchemy import (
    Column,
    MetaData,
    func,
)
from sqlalchemy.dialects.postgresql import ENUM, TIMESTAMP

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    }
)

TOKEN_STATES = ("queued", "issued", "active", "finished", "cancelled", "failed")
KEY_STATES = ("prepared", "active", "old", "revoked")
MODES = ("mint", "exchange", "client_credentials")
REQUEST_KINDS = ("mint", "fill_job", "renew", "token", "exchange", "refresh")
SIDES = ("source", "destination", "operation", "service")
BAN_KINDS = ("client", "on_behalf_of", "vo", "activity", "storage", "path")

Instant = TIMESTAMP(timezone=True)
token_state = ENUM(*TOKEN_STATES, name="token_state", metadata=metadata)
token_mode = ENUM(*MODES, name="token_mode", metadata=metadata)
token_side = ENUM(*SIDES, name="token_side", metadata=metadata)
key_state = ENUM(*KEY_STATES, name="key_state", metadata=metadata)


def now(name: str) -> "Column[object]":
    """Return a column that holds the time of the insertion."""
    return Column(name, Instant, nullable=False, server_default=func.now())
