"""Every log line is redacted: everything that looks like a secret is cut out."""

import asyncio
import io
import json
import logging
import select
from typing import Any

import pytest

from minter import logs

TOKEN = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4IiwiZXhwIjoxfQ.c2lnbmF0dXJlLXNpZ25hdHVyZQ"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"sent {TOKEN} away", "sent [token] away"),
        (f"sent {TOKEN[:40]}", "sent [token]"),
        (f'{{"source_tokens":["{TOKEN}","{TOKEN}"]}}', '{"source_tokens":["[token]","[token]"]}'),
        ("amqps://rucio:s3cret@broker/v", "amqps://rucio:[password]@broker/v"),
        ("-----BEGIN PRIVATE KEY-----\nMIGH\n-----END PRIVATE KEY-----\nend", "[key]\nend"),
        ("-----BEGIN EC PRIVATE KEY-----\nMIGH", "[key]"),
        ("Authorization: Basic cnVjaW86c2VjcmV0", "Authorization: Basic [secret]"),
        ("{'client_secret': 'abc'}", "{'client_secret': [secret]}"),
        ("password='two words' x", "password=[secret] x"),
        ("MINTER_MASTER_KEY_A=abc", "MINTER_MASTER_KEY_A=[secret]"),
        ("amqps://u:p@ss@h/v", "amqps://u:[password]@h/v"),
        ("amqps://u:p/ss@h/v", "amqps://u:[password]@h/v"),
        ('{"kty":"EC","d":"abcdefghijklmnopqrst"}', '{"kty":"EC","d":"[secret]"}'),
        ("davs://se01.example.org:443/atlas/eyes", "davs://se01.example.org:443/atlas/eyes"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_secrets_are_cut_out(text: str, shown: str) -> None:
    assert logs.redact(text) == shown


def line(message: str, *arguments: object, error: Any = None, **event: object) -> Any:
    record = logging.LogRecord("minter", logging.INFO, "f", 1, message, arguments, error)
    record.event = event
    return json.loads(logs.JsonFormatter().format(record))


def test_a_line_is_one_json_object_with_its_event() -> None:
    made = line("request %s", "x", client="rucio", tokens=2, reason="eyJhbGciOiJIUzI1NiJ9.x.y")
    assert (made["message"], made["client"], made["tokens"], made["reason"]) == (
        "request x",
        "rucio",
        2,
        "[token]",
    )
    assert made["level"] == "info"
    assert made["time"].endswith("+00:00")


def test_tracebacks_and_arguments_are_redacted() -> None:
    try:
        int(f"bad {TOKEN}")
    except ValueError as error:
        made = line("failed: %r", [TOKEN], error=(type(error), error, error.__traceback__))
    assert TOKEN[:20] not in json.dumps(made)
    assert "bad [token]" in made["traceback"]


def test_what_json_has_no_form_for_is_still_logged() -> None:
    assert line("x", what=object())["what"].startswith("<object")


class Stream(io.StringIO):
    """A stream that keeps each write apart."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


@pytest.fixture
def written() -> tuple[list[str], logging.Logger]:
    stream, logger = Stream(), logging.Logger("minter.requests", logging.INFO)  # noqa: LOG001 - one of its own
    logger.addHandler(logs.TurnHandler(stream))
    return stream.writes, logger


def test_the_lines_of_one_turn_are_written_together(written: tuple[list[str], logging.Logger]) -> None:
    writes, logger = written

    async def run_once() -> None:
        for number in range(3):
            logs.event(logger, f"event {number}")
        assert not writes
        await asyncio.sleep(0)
        assert writes == ["event 0\nevent 1\nevent 2\n"]
        logs.event(logger, "late")
        logger.warning("soon")
        assert writes[1:] == ["late\nsoon\n"]
        logs.event(logger, "last")

    asyncio.run(run_once())
    logger.handlers[0].flush()  # as at exit
    assert writes[2:] == ["last\n"]


def test_a_pipe_takes_each_write_as_one(written: tuple[list[str], logging.Logger]) -> None:
    writes, logger = written

    async def run_once() -> None:
        for number in range(50):
            logs.event(logger, f"{number} " + "ä" * 300)
        logs.event(logger, "x" * 5000)

    asyncio.run(run_once())
    logger.handlers[0].flush()
    assert all(text.endswith("\n") for text in writes)
    assert [len(text.encode()) <= select.PIPE_BUF for text in writes] == [True] * 9 + [False]
    assert "".join(writes).count("\n") == 51


def test_without_a_loop_each_line_is_written_at_once(written: tuple[list[str], logging.Logger]) -> None:
    writes, logger = written
    logs.event(logger, "one")
    logs.event(logger, "two")
    assert writes == ["one\n", "two\n"]
