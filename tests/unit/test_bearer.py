"""Bearer tokens are found in the order of the WLCG discovery, and never taken from somebody else."""

import os
from pathlib import Path

import pytest

from minter.client import bearer, find_bearer_token
from minter.errors import InvalidRequest

NAME = f"bt_u{os.geteuid()}"


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """All four places filled, /tmp's in a folder of the test's own."""
    for folder in ("named", "run", "tmp"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / NAME).write_text(f" of-{folder}\n")
    original = bearer._usual_places
    monkeypatch.setattr(bearer, "_usual_places", lambda e: [*list(original(e))[:-1], tmp_path / "tmp" / NAME])
    return {
        "BEARER_TOKEN": " of-environment ",
        "BEARER_TOKEN_FILE": str(tmp_path / "named" / NAME),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
    }


def test_the_first_place_that_holds_a_token_counts(environ: dict[str, str]) -> None:
    found = [find_bearer_token(environ)]
    for name in list(environ):
        del environ[name]
        found.append(find_bearer_token(environ))
    assert found == ["of-environment", "of-named", "of-run", "of-tmp"]
    environ |= {"BEARER_TOKEN": "  ", "BEARER_TOKEN_FILE": "", "XDG_RUNTIME_DIR": "/nowhere"}
    assert find_bearer_token(environ) == "of-tmp"


def test_without_any_the_token_is_empty(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tmp" / NAME).unlink()
    assert find_bearer_token({}) == ""


def test_a_file_that_is_named_must_exist(environ: dict[str, str], tmp_path: Path) -> None:
    environ["BEARER_TOKEN"] = ""
    (tmp_path / "named" / NAME).unlink()
    with pytest.raises(InvalidRequest, match="does not exist"):
        find_bearer_token(environ)
    (tmp_path / "named" / NAME).write_bytes(b"\xff")
    with pytest.raises(InvalidRequest, match="no text"):
        find_bearer_token(environ)
    (tmp_path / "named" / NAME).write_bytes(b"a" * 20_000)
    with pytest.raises(InvalidRequest, match="holds no token"):
        find_bearer_token(environ)


def test_a_token_of_somebody_else_is_not_used(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mine = NAME, os.geteuid()
    monkeypatch.setattr(bearer, "_usual_places", lambda e: [Path(e["XDG_RUNTIME_DIR"]) / name])
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(InvalidRequest, match="not your own"):
        find_bearer_token({"XDG_RUNTIME_DIR": environ["XDG_RUNTIME_DIR"]})
