"""Print pip constraints with the lowest versions that users may install: `python -m tests.lowest`.

A package that several extras name gets the highest of their lower bounds.
"""

import re
import tomllib
from collections.abc import Sequence

from tests.conftest import ROOT

GROUPS = ("amqp", "server", "console", "embedded")
_BOUND = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?>=([\d.]+)").match


def lowest(groups: Sequence[str] = GROUPS) -> dict[str, str]:
    """Return the lowest version of each package that pyproject.toml bounds, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found: dict[str, str] = {}
    for requirement in (*project["dependencies"], *(r for group in groups for r in extras[group])):
        if bound := _BOUND(requirement):
            name, version = bound.groups()
            found[name] = max(found.get(name, "0"), version, key=_numbers)
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in lowest().items()))
