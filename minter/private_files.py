"""Files that hold a secret: readable by their owner only, and never written over another file."""

import os
from pathlib import Path
from typing import TextIO

from minter.errors import InvalidRequest, SettingsError


def new_private_file(path: Path) -> TextIO:
    """Open a new file of mode 600 for writing; raises InvalidRequest if the name exists, even as a link."""
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")
    except FileExistsError:
        raise InvalidRequest(f"{path} exists already; name a new file") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from error


def write_private_file(path: Path, text: str) -> None:
    """Write a text to a new file of mode 600, and wait for the disk; raises InvalidRequest."""
    with new_private_file(path) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_private_file(what: str, path: Path) -> str:
    """Return the text of a file; raises SettingsError if others than its owner have access, or on errors."""
    try:
        if path.stat().st_mode & 0o077:
            raise SettingsError(f"{what} {path} is open to others; chmod 600 it")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{what} {path} cannot be read: {error.strerror}") from error
