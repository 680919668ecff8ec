"""The scopes that operations need in one token at a storage."""

from collections.abc import Iterable, Mapping

from minter.contract.operations import OPERATIONS, Operation
from minter.storages.dialects import POLL_NEEDS_READ, STORM_POLL, Dialect, Needed, Where


def scopes_needed(
    dialect: Dialect, operations: Iterable[Operation], forbidden: frozenset[str] = frozenset()
) -> tuple[Needed, ...]:
    """Return the scopes that several operations need in one token, without scopes that others imply.

    A scope that only a quirk named in `forbidden` needs is left out. The order is that of OPERATIONS,
    so equal arguments give equal claims.
    """
    wanted: dict[tuple[str, Where], Needed] = {}
    for operation in OPERATIONS:
        if operation not in operations:
            continue
        for needed in dialect.scopes[operation]:
            if needed.quirk is not None and needed.quirk.name in forbidden:
                continue
            known = wanted.get((needed.scope, needed.where))
            if known is None or known.quirk is not None:
                wanted[needed.scope, needed.where] = needed
    return tuple(needed for needed in wanted.values() if not _implied(needed, wanted))


def _implied(needed: Needed, wanted: Mapping[tuple[str, Where], Needed]) -> bool:
    """Say whether another scope on the same path grants this one, too."""
    if needed.quirk in (POLL_NEEDS_READ, STORM_POLL):  # a stage token polls by itself
        return ("storage.stage", needed.where) in wanted
    wider = {"storage.create": "storage.modify", "storage.poll": "storage.stage"}.get(needed.scope)
    return (wider, needed.where) in wanted
