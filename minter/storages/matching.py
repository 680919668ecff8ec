"""How a verifier reads the path of a scope: how it is written, and what else it opens."""

from minter.errors import InvalidPath
from minter.scopes import encode_path, path_contains, raw_path
from minter.storages.dialects import Dialect, Matching


def write_path(dialect: Dialect, path: str) -> str:
    """Return a checked path as a scope for this software writes it.

    Raises InvalidPath for a name that its verifier would read as more than itself, or cannot match.
    """
    if dialect.refused is not None and (found := dialect.refused.search(path)):
        raise InvalidPath(
            f"path {path!r} contains {found.group()!r}, which {dialect.software} does not read as part of a "
            "name; rename the file",
            path=path,
        )
    return encode_path(path) if dialect.encoding == "percent" else raw_path(path)


def opens(matching: Matching, granted: str, path: str) -> bool:
    """Say whether a scope on `granted` opens `path`, as a verifier that matches in this way sees it.

    Both are decoded and VO-relative. A scope on a directory opens all below it.
    """
    if matching == "exact":
        return path_contains(granted, path)
    return len(path) >= len(granted) and _agree(matching, granted, path)


def touches(matching: Matching, granted: str, area: str) -> bool:
    """Say whether a scope on `granted` opens anything at or below the path `area`."""
    if path_contains(area, granted) or opens(matching, granted, area):
        return True
    return matching == "pattern" and len(granted) > len(area) and _agree(matching, granted, area + "/")


def _agree(matching: Matching, granted: str, path: str) -> bool:
    """Compare two strings as far as both go; in a pattern a dot of `granted` is any character."""
    if matching == "prefix":
        return path.startswith(granted[: len(path)])
    return all(g in (c, ".") for g, c in zip(granted, path, strict=False))
