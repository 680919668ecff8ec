"""Dead letters as operators see them, and the environment file that commands read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minter.cli.__main__ import read_environment
from minter.cli.tables import Listing, console
from minter.errors import SettingsError
from minter.tasks.dead_letters import _described


def letter(body: bytes = b"{}", **headers: object) -> SimpleNamespace:
    return SimpleNamespace(headers=headers, body=body, properties={"user_id": "attacker"})


@pytest.mark.parametrize("by_broker", [{"x-death": [{}]}, {"x-first-death-reason": "expired"}])
def test_a_letter_of_the_broker_is_its_senders_whatever_its_headers_say(by_broker: dict[str, Any]) -> None:
    """A sender may set any header; the broker keeps them when a message expires."""
    forged: dict[str, Any] = {
        "minter-client": "victim",
        "minter-reason": "undeliverable",
        "task": "minter.mint",
    }
    assert _described(letter(**forged)).client == "victim"  # written by a worker
    found = _described(letter(**forged, **by_broker))
    assert (found.client, found.reason) == ("attacker", "rejected")


def test_no_token_of_a_letter_is_shown() -> None:
    body = json.dumps(
        [[{"job": {"files": [{"source_tokens": ["eyJhbGciOi.eyJzdWIi.c2ln"]}]}}], {}, {}]
    ).encode()
    assert b"eyJ" not in bytes(_described(letter(body)).body)


def test_text_in_tables_is_no_markup() -> None:
    with console.capture() as told:
        console.print(Listing("dead", ("why",), [("[/x] and [args, kwargs]",)]))
    assert "[/x] and [args, kwargs]" in told.get()


def test_the_environment_file_of_the_units_is_read(tmp_path: Path) -> None:
    path = tmp_path / "environment"
    path.write_text(
        "# comment\n;x=1\nMINTER_DSN=\"host=db password='my pass'\"\nPLAIN = value \nSINGLE='a b'\nHERE=file\n\nODD\n"
    )
    environ = {"HERE": "set"}
    read_environment(path, environ)
    assert environ == {
        "MINTER_DSN": "host=db password='my pass'", "PLAIN": "value", "SINGLE": "a b", "HERE": "set",
    }  # fmt: skip
    read_environment(tmp_path / "missing", environ)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_environment(tmp_path, environ)
