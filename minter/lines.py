"""Lines of `minter status`: the state of one part, and what to do."""

from typing import Literal

from msgspec import Struct

Level = Literal["ok", "warning", "failed"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "failed")
"""From well to worst."""
SECONDS = 3.0
"""Longest wait for one part."""


class Line(Struct, frozen=True, omit_defaults=True):
    """The state of one part, and what to do if it is not well; `code` names a cause that commands act on."""

    level: Level
    part: str
    text: str
    code: Literal["", "no_key", "locked"] = ""


def ok(part: str, text: str) -> Line:
    """Return the line of a part that is well."""
    return Line("ok", part, text)


def warning(part: str, text: str) -> Line:
    """Return the line of a part to look at today."""
    return Line("warning", part, text)


def failed(part: str, text: str) -> Line:
    """Return the line of a part without which requests wait, or soon will."""
    return Line("failed", part, text)
