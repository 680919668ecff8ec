"""Lists for a terminal: tables where they fit, else blocks, with every value whole."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from minter.cli import tables
from minter.cli.tables import Listing

JTI = "01a223e9-b5ad-7274-98f3-0123456789ab"
ROWS = [(JTI, "storage.read:/vo/data/a file with [brackets]", None), (JTI, "short", "here")]


@pytest.mark.parametrize(("width", "block"), [(200, False), (80, True), (20, True)])
def test_a_list_that_is_too_wide_becomes_blocks(width: int, block: bool) -> None:
    out = StringIO()
    Console(file=out, width=width).print(Listing("2 tokens", ("jti", "scope", "where"), ROWS))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert ("┃" not in text) is block
    squeezed = "".join(text.split())
    assert squeezed.count(JTI) == 2 or width == 20
    if width >= 80:
        assert "storage.read:/vo/data/a file with [brackets]" in text
    if block:
        assert text.count("where") == 1  # an empty value has no line


def test_progress_is_told_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(tables, "time", SimpleNamespace(monotonic=lambda: now))
    progress = tables.Progress()
    for number in range(1, 80):
        now = number / 10
        progress.tell(f"{number} done")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "30 done\n60 done\n")
