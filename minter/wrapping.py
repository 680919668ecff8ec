"""Functions of other software that Minter wraps: they are compared with the ones that were tested."""

import inspect
from collections.abc import Sequence
from typing import Any


def difference(owner: Any, path: str, expected: Sequence[str]) -> str:
    """Return how the function at a dotted path differs from the tested one, empty if it does not.

    `expected` are the names of its parameters.
    """
    found = owner
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        return f"has no {path}"
    signature = inspect.signature(found)
    if tuple(signature.parameters) != tuple(expected):
        return f"{path}{signature} has other parameters, expected {', '.join(expected)}"
    return ""
