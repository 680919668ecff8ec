"""The VO's own policy package: its submodules are found below `minter.rucio`."""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from configparser import NoOptionError, NoSectionError
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

VARIABLE = "MINTER_RUCIO_POLICY_PACKAGE"
"""Environment variable that names the VO's package, as RUCIO_POLICY_PACKAGE names the one of Rucio."""


def package() -> ModuleType | None:
    """Import the VO's policy package; None if `[minter] policy_package` names none, or without Rucio.

    Raises ImportError with the setting's name: Rucio then refuses to start, as for any broken package.
    """
    try:
        from rucio.common.config import config_get  # noqa: PLC0415 - only Rucio has Rucio
    except ModuleNotFoundError:
        return None
    name = os.environ.get(VARIABLE, "")
    if not name:
        try:
            name = str(config_get("minter", "policy_package", check_config_table=False))
        except (NoOptionError, NoSectionError):
            return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"[minter] policy_package = {name!r} cannot be imported: {error}") from error


class Submodules(MetaPathFinder):
    """Finds `ours.x` where `theirs.x` exists: the same module under a second name."""

    def __init__(self, ours: str, theirs: str) -> None:
        self._ours, self._theirs = ours + ".", theirs + "."

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a submodule of the VO's package, None if it has no such module."""
        if not fullname.startswith(self._ours):
            return None
        theirs = self._theirs + fullname.removeprefix(self._ours)
        if importlib.util.find_spec(theirs) is None:
            return None
        return ModuleSpec(fullname, _Alias(theirs))


class _Alias(Loader):
    def __init__(self, theirs: str) -> None:
        self._theirs = theirs

    def create_module(self, _spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._theirs)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system replaced it by the second name's
