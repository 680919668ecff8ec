"""Paths: the scopes of a planned token, on its file's path or on a path that several files share."""

from collections.abc import Sequence

from minter.errors import (
    OperationNotAllowed,
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
    encode_path,
    parent,
    path_contains,
    raw_path,
)
from minter.storages.directory import Area


def area_path(area: Area, client: Client, path: str) -> str:
    """Return the root of the area if the client may have the whole area, else the file's own path."""
    return check_path(area.root) if _may_have(area, area.root, client) else path


def _may_have(area: Area, wide: str, client: Client) -> bool:
    """Say whether the client's prefixes contain a path, and no other storage lies below this path."""
    return client.may_reach(wide) and not any(path_contains(wide, inner) for inner in area.nested)


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
    allowed = inside and _may_have(area, wide, client) and not bans.touches(client.vo, wide)
    return check_path(wide) if allowed else ""


def scope_on(plan: Plan, path: str, shared: str, client: Client, bans: Bans) -> str:
    """Return the scope claim of a plan on one file's path, or on the path `shared` of several files.

    Raises OperationNotAllowed if no scope is left, ScopeTooLarge if FTS could not store the claim.
    """
    write = encode_path if plan.area.dialect.encoding == "percent" else raw_path
    if shared:
        on_shared = write(shared)
        return _check_scope(list(dict.fromkeys(f"{n.scope}:{on_shared}" for n in plan.needed)), plan, shared)
    on_file = write(path)
    words = []
    for needed in plan.needed:
        if needed.where == "file":
            words.append(f"{needed.scope}:{on_file}")
            continue
        directory = parent(path)
        if not plan.area.holds_directory(directory) or bans.touches(client.vo, directory):
            continue
        if not client.may_reach(directory):
            continue
        words.append(f"{needed.scope}:{write(directory)}")
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
