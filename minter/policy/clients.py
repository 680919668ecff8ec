"""Clients with their own limits, and the bans of operators."""

from collections.abc import Iterable
from datetime import datetime
from fnmatch import fnmatchcase
from typing import NamedTuple

from msgspec import Struct, structs

from minter.errors import Banned
from minter.scopes import path_contains
from minter.storages.dialects import Matching
from minter.storages.matching import touches


def fits(value: str, patterns: Iterable[str]) -> bool:
    """Say whether a name matches one of the patterns, which are case-sensitive shell globs."""
    return any(fnmatchcase(value, pattern) for pattern in patterns)


class Client(Struct, frozen=True, eq=False, kw_only=True):
    """A registered client and its own limits; empty limits mean the VO's."""

    client_id: int
    name: str
    vo: str
    sub: str
    operations: frozenset[str] = frozenset()
    paths: tuple[str, ...] = ()
    max_lifetime_seconds: int | None = None
    reply_queues: tuple[str, ...] = ()
    jwe_key: dict[str, str] | None = None
    disabled: bool = False
    default_audience: tuple[str, ...] = ()
    """Audience at the token endpoint when the client requests none."""
    audiences: tuple[str, ...] = ()
    """Patterns of audiences that the client may have besides those of storages and of FTS."""
    scopes: tuple[str, ...] = ()
    """Patterns of scopes that the client may have besides those of storages."""
    groups: tuple[str, ...] = ()
    """Groups that the client may have in `wlcg.groups`."""
    subject_provider: str = ""
    """Provider of the subject token that is stored for the client, empty if none is stored."""
    subject_scope: str = ""
    subject_until: datetime | None = None

    def at(self, now: datetime) -> "Client":
        """Return the client as of `now`: without its stored subject token if that token has expired."""
        if self.subject_until is None or self.subject_until > now:
            return self
        return structs.replace(self, subject_provider="", subject_until=None)

    def may_reach(self, path: str, matching: Matching) -> bool:
        """Say whether a scope on `path` stays within the client's own prefixes, or it has none.

        Where paths match as strings, a scope on a prefix itself would open its neighbours: only what lies
        strictly below a prefix is within it.
        """
        if not self.paths or "/" in self.paths:
            return True
        if matching == "exact":
            return any(path_contains(prefix, path) for prefix in self.paths)
        return any(path.startswith(f"{prefix}/") for prefix in self.paths)


class Ban(NamedTuple):
    """One ban of an operator; `vo` is None for all VOs."""

    kind: str
    value: str
    vo: str | None = None


class Bans:
    """The bans in force, indexed by kind."""

    def __init__(self, bans: Iterable[Ban] = ()) -> None:
        self._values: dict[str, set[tuple[str | None, str]]] = {}
        for ban in bans:
            self._values.setdefault(ban.kind, set()).add((ban.vo, ban.value))

    def check(self, vo: str, /, **names: str) -> None:
        """Raise Banned if any of the named things (client, storage, …) is banned in this VO."""
        if not self._values:
            return
        for kind, value in names.items():
            banned = self._values.get(kind)
            if banned and ((vo, value) in banned or (None, value) in banned):
                raise Banned(f"{kind} {value!r} is banned by an operator", kind=kind)

    def has(self, kind: str, vo: str) -> bool:
        """Say whether anything of this kind is banned in this VO."""
        return any(ban_vo in (None, vo) for ban_vo, _ in self._values.get(kind, ()))

    def touches(self, vo: str, path: str, matching: Matching) -> bool:
        """Say whether a scope on `path` opens anything of a banned prefix, matched as its storage does."""
        return any(
            ban_vo in (None, vo) and touches(matching, path, prefix)
            for ban_vo, prefix in self._values.get("path", ())
        )

    def check_path(self, vo: str, path: str, matching: Matching) -> None:
        """Raise Banned if a scope on `path` opens anything of a banned prefix."""
        if self.touches(vo, path, matching):
            raise Banned(f"path {path!r} is banned by an operator", kind="path")
