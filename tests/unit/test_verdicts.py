"""Every claim of the dialect table against what real storages answered (tests/vectors/verifiers).

A verdict is one request with a valid token of one scope. Where the verdict says that the request was allowed or
refused, the scopes that the table gives to the request's operation, its way of matching, its spelling of paths
and its refused names must say the same.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from minter.contract.operations import Operation
from minter.errors import InvalidPath
from minter.scopes import IMPLIED, parent
from minter.storages.dialects import DIALECTS, STAGE_READS, Dialect
from minter.storages.matching import opens, write_path

FOLDER = Path(__file__).parents[1] / "vectors" / "verifiers"
FILES = {
    "storm": "storm-webdav-1.9.0-rc3-rs256.jsonl",
    "dcache": "dcache-9.2.47-rs256.jsonl",
    "dcache-11.2": "dcache-11.2.3.jsonl",
    "dcache-11.2.4": "dcache-HEAD.jsonl",
}
VERDICTS = [
    pytest.param(name, json.loads(line), id=f"{name}:{number}")
    for name, file in FILES.items()
    for number, line in enumerate((FOLDER / file).read_text().splitlines(), 1)
]
OPERATION: dict[str, Operation] = {
    "GET": "read", "HEAD": "stat", "PROPFIND": "stat", "PUT": "write", "DELETE": "delete", "MKCOL": "make_parents",
    "COPY": "overwrite", "STAGE": "stage", "ARCHIVEINFO": "poll",
}  # fmt: skip


def _scopes(claim: str) -> Iterator[tuple[str, str]]:
    for word in claim.split(" "):
        name, _, path = word.partition(":")
        yield name, path


def _held(claim: str) -> Iterator[tuple[str, str]]:
    """The scopes of a verdict's token with what they imply, paths as they are spelt."""
    for name, path in _scopes(claim):
        yield name, path
        yield from ((implied, path) for implied in IMPLIED.get(name, ()))


def _predicted(dialect: Dialect, verdict: dict[str, Any]) -> bool:
    """What the table says of a request: is there a scope that covers each thing that its operation needs?"""
    path = verdict["path"].removeprefix("/grid")
    operation = OPERATION[verdict["method"]]
    if "over" in verdict["case"].split():
        operation = "overwrite"
    held = [
        (name, raw if dialect.encoding == "raw" else unquote(raw)) for name, raw in _held(verdict["scope"])
    ]
    if STAGE_READS in dialect.quirks:
        held += [("storage.read", p) for name, p in held if name == "storage.stage"]
    return all(
        any(
            name == needed.scope
            and opens(dialect.matching, scope_path, path if needed.where == "file" else parent(path))
            for name, scope_path in held
        )
        for needed in dialect.scopes[operation]
    )


@pytest.mark.parametrize(("name", "verdict"), VERDICTS)
def test_what_the_table_gives_an_operation_is_what_the_storage_wants(
    name: str, verdict: dict[str, Any]
) -> None:
    """A token with exactly the table's scopes is allowed, and one that the table holds for too little is refused."""
    dialect = DIALECTS[name]
    operation = OPERATION[verdict["method"]]
    if "another storage" in verdict["case"]:
        assert not verdict["allowed"]
        return
    if verdict["case"].startswith(("name ", "regex")):
        _check_name(dialect, verdict)
        return
    if operation in dialect.unable:
        return  # the table grants nothing for it; test_unable_operations looks at these
    if _predicted(dialect, verdict):
        assert verdict["allowed"], "the table calls this enough, the storage does not"


def _check_name(dialect: Dialect, verdict: dict[str, Any]) -> None:
    """Names: the spelling that the table writes is one that was allowed, or the table refuses the name."""
    path, (scope,) = verdict["path"].removeprefix("/grid"), _scopes(verdict["scope"])
    asked = scope[1] if verdict["case"].startswith("regex") else path
    try:
        written = write_path(dialect, asked)
    except InvalidPath:
        # Refused: no token was wrong, and where it is a pattern a token could have been too wide.
        assert dialect.refused is not None or " " in path
        return
    if written == scope[1] and not verdict["case"].startswith("regex"):
        assert verdict["allowed"]
    if verdict["case"].startswith("regex"):
        opened = opens(dialect.matching, asked, path)
        assert opened == verdict["allowed"], "what the storage opens, the table must know to be open"


@pytest.mark.parametrize("name", FILES)
def test_unable_operations_were_refused_with_the_profile_scope(name: str) -> None:
    lines = [json.loads(line) for line in (FOLDER / FILES[name]).read_text().splitlines()]
    profile = {"poll": "storage.poll", "stage": "storage.stage", "make_parents": "storage.create"}
    methods = {"poll": ("ARCHIVEINFO", "PROPFIND"), "stage": ("STAGE",), "make_parents": ("MKCOL",)}
    for operation in DIALECTS[name].unable:
        tried = [
            v for v in lines
            if v["method"] in methods[operation] and v["scope"].startswith(profile[operation] + ":")
        ]  # fmt: skip
        assert tried
        assert not any(v["allowed"] for v in tried)


@pytest.mark.parametrize("name", FILES)
def test_a_verdict_stands_behind_each_row_that_counts_as_tried(name: str) -> None:
    assert DIALECTS[name].tried
    assert all(q.tried or q.name == "storm-stat-needs-read" for q in DIALECTS[name].quirks)


def test_rows_without_a_verdict_say_so() -> None:
    told = {name for name, dialect in DIALECTS.items() if not dialect.tried}
    assert told == {"profile"} | {
        f"{software}{v}" for software in ("eos", "cta") for v in ("", "-5.2.19", "-5.4.11")
    }
