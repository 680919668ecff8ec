"""Bans as operators name them."""

from difflib import get_close_matches

from sqlalchemy.engine import Engine as Pool

from minter.database import control_changes
from minter.errors import InvalidRequest
from minter.policy.clients import Ban
from minter.scopes import check_path
from minter.storages.urls import squash
from schemas.columns import BAN_KINDS as KINDS

__all__ = ["KINDS", "check_known", "named"]


def named(kind: str, value: str, vo: str | None) -> Ban:
    """Return the ban of what an operator wrote; raises InvalidRequest for a path that is none."""
    return Ban(kind, check_path(squash(value)) if kind == "path" else value, vo)


def check_known(pool: Pool, ban: Ban) -> None:
    """Raise InvalidRequest if nothing has the banned name: a ban with a typing error would ban nobody."""
    known = control_changes.names(pool, ban.kind)
    if known is not None and ban.value not in known:
        near = ", ".join(get_close_matches(ban.value, known, 3)) or "none"
        raise InvalidRequest(f"no {ban.kind} is named {ban.value!r}; similar names: {near}")
