"""Paths: the scopes of a planned token, on its file's path or on a path that several files share."""

from collections.abc import Sequence

from minter.errors import (
    OperationNotAllowed,
    PathNotAllowed,
    ScopeTooLarge,
)
from minter.policy.clients import Bans, Client
from minter.policy.limits import (
    MAX_CLAIM_CHARACTERS,
)
from minter.policy.plans import Plan
from minter.policy.requests import Request
from minter.scopes import (
    check_path,
    parent,
    path_contains,
)
from minter.storages.directory import Area
from minter.storages.matching import write_path


def area_path(plan: Plan, client: Client, path: str) -> str:
    """Return the root of the area for a poll token, if the client may have the whole area, else `path`.

    A token that polls by another scope than storage.poll keeps to its file: the scope grants more.
    """
    area = plan.area
    only_poll = {needed.scope for needed in plan.needed} == {"storage.poll"}
    return check_path(area.root) if only_poll and _may_have(area, area.root, client) else path


def check_reach(area: Area, path: str, client: Client, bans: Bans) -> None:
    """Raise Banned or PathNotAllowed if a scope on `path` would open what this client may not have."""
    bans.check_path(client.vo, path, area.matching)
    if not client.may_reach(path, area.matching):
        raise PathNotAllowed(
            f"path {path!r} is outside the prefixes of client {client.name!r}: {', '.join(client.paths)}"
            + ("" if area.matching == "exact" else "; only what lies strictly below one is inside here"),
            path=path,
        )
    if neighbour := area.opened_neighbour(path):
        raise PathNotAllowed(
            f"a token for path {path!r} would also open {neighbour!r}, another storage, since storage "
            f"{area.storage!r} matches paths as strings",
            path=path,
        )


def _may_have(area: Area, wide: str, client: Client) -> bool:
    """Say whether the client's prefixes contain a path, and no other storage lies below this path."""
    return client.may_reach(wide, area.matching) and area.opened_neighbour(wide) is None


def shared_path(plan: Plan, path: str, request: Request, client: Client, bans: Bans) -> str:
    """Return the path of a shared token for this file; empty if the file must have its own token.

    A request for a certain lifetime gets no shared token, which would exceed this lifetime.
    """
    if plan.granularity == "file" or request.lifetime_seconds is not None:
        return ""
    area = plan.area
    if plan.granularity == "directory":
        wide = parent(path)
        inside = area.holds_directory(wide)
    else:
        wide = area.root
        inside = path_contains(wide, path)
    allowed = inside and _may_have(area, wide, client) and not bans.touches(client.vo, wide, area.matching)
    return check_path(wide) if allowed else ""


def scope_on(plan: Plan, path: str, shared: str, client: Client, bans: Bans) -> str:
    """Return the scope claim of a plan on one file's path, or on the path `shared` of several files.

    Raises OperationNotAllowed if no scope is left, ScopeTooLarge if FTS could not store the claim.
    """
    area = plan.area
    on_path = write_path(area.dialect, shared or path)
    if shared:
        return _check_scope(list(dict.fromkeys(f"{n.scope}:{on_path}" for n in plan.needed)), plan, shared)
    words = []
    for needed in plan.needed:
        if needed.where == "file":
            words.append(f"{needed.scope}:{on_path}")
            continue
        directory = parent(path)
        if (
            area.holds_directory(directory)
            and not bans.touches(client.vo, directory, area.matching)
            and _may_have(area, directory, client)
        ):
            words.append(f"{needed.scope}:{write_path(area.dialect, directory)}")
    return _check_scope(words, plan, path)


def _check_scope(words: Sequence[str], plan: Plan, path: str) -> str:
    if not words:
        raise OperationNotAllowed(
            f"no scope of the operation is left on {path!r}: route {plan.rule} forbids it, or it would be "
            "on a directory that the client may not reach"
        )
    scope = " ".join(words)
    if len(scope) > MAX_CLAIM_CHARACTERS:
        raise ScopeTooLarge(
            f"scope for a path of {len(path)} characters is {len(scope)} characters long, "
            f"expected at most {MAX_CLAIM_CHARACTERS}; shorten the name",
            path=path[:200],
        )
    return scope
