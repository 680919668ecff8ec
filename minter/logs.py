"""Logs of the services: one JSON object a line, one event for each request, and no secret.

No code of the engine logs a token. The redaction here is the last line of defence against secrets
in messages of libraries and in tracebacks: text that looks like a token, a private key or a
password in a URL is cut out of every line.
"""

import asyncio
import logging
import re
import select
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TextIO

import msgspec

requests_logger = logging.getLogger("minter.requests")

_SECRETS = (
    # A JWS or JWE, whole or cut off: its header is base64url of a JSON object.
    (re.compile(r"eyJ[\w-]{8,}(?:\.[\w-]*)*"), "[token]"),
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        "[key]",
    ),
    # Private members of a JWK (RFC 7518 §6.2.2, §6.3.2, §6.4.1).
    (re.compile(r"(\"(?:d|p|q|dp|dq|qi|k)\"\s*:\s*\")[\w-]{16,}"), r"\1[secret]"),
    # The name of a secret and its value, which is quoted or ends at the next blank.
    (
        re.compile(
            r"((?:authorization|password|client_secret|refresh_token|master_key\w*)"
            r"[\"']?\s?[=:]\s?(?:basic |bearer )?)"
            r"(?:\"[^\"]*\"|'[^']*'|[^\s\"',}]+)",
            re.IGNORECASE,
        ),
        r"\1[secret]",
    ),
    (re.compile(r"(\w://[^\s/:@]*):\S+@"), r"\1:[password]@"),
)  # fmt: skip


# Texts, in lower case, without which no pattern of _SECRETS matches a line of JSON: most lines have none.
_MARKS = (
    "eyj", "-----begin", "://", "authorization", "password", "client_secret", "refresh_token", "master_key",
    *(f'"{name}{end}' for name in ("d", "p", "q", "dp", "dq", "qi", "k") for end in ('"', '\\"')),
)  # fmt: skip


_encode = msgspec.json.Encoder(enc_hook=str).encode


def redact(text: str) -> str:
    """Return `text` with everything that looks like a secret replaced."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields of an event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line; no value of a field can make this fail."""
        second, fraction = divmod(record.created, 1)
        line: dict[str, Any] = {
            "time": f"{_second(second)}.{int(1000 * fraction):03d}+00:00",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        line |= getattr(record, "event", {})
        text = _encode(line).decode()
        if not any(map(text.lower().__contains__, _MARKS)):
            return text
        clean = {name: redact(v) if isinstance(v, str) else v for name, v in line.items()}
        return _encode(clean).decode()


class TurnHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of one event-loop turn together; without a loop, or for a warning, at once.

    A write releases the interpreter's lock: writing once for each request cost a seventh of the throughput.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Buffer a line; the caller, `handle`, holds the handler's lock."""
        try:
            self._lines.append(self.format(record))
            loop = _running_loop()
            if record.levelno >= logging.WARNING or loop is None:
                self.flush()
            elif len(self._lines) == 1:
                loop.call_soon(self.flush)
        except Exception:  # noqa: BLE001 - as every handler of `logging` does
            self.handleError(record)

    def flush(self) -> None:
        """Write the buffered lines."""
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            for piece in _pieces(lines):
                self.stream.write(piece)
                self.stream.flush()
        finally:
            self.release()


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """Yield whole lines in pieces that a pipe takes as one write: several processes may share the pipe."""
    piece, size = "", 0
    for line in lines:
        length = len(line.encode()) + 1
        if piece and size + length > select.PIPE_BUF:
            yield piece
            piece, size = "", 0
        piece, size = f"{piece}{line}\n", size + length
    if piece:
        yield piece


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@lru_cache(maxsize=4)
def _second(created: float) -> str:
    return datetime.fromtimestamp(created, UTC).isoformat()[:19]


_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


def request_event(*, request_id: str | None, traceparent: str | None, **fields: Any) -> None:
    """Log a request's one event, under the caller's trace id (W3C Trace Context §3.2) or its request_id."""
    given = _TRACEPARENT.fullmatch(traceparent or "")
    own = request_id.replace("-", "")[:32] if request_id else None
    event(requests_logger, "request", request_id=request_id, trace_id=given[1] if given else own, **fields)


def configure(level: int | str) -> None:
    """Send every logger's lines to standard error, as JSON."""
    # No line has these values, and collecting them costs time (Python's logging HOWTO, "Optimization").
    logging._srcfile = None  # noqa: SLF001
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = TurnHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def event(logger: logging.Logger, message: str, **fields: Any) -> None:
    """Log one event with its fields; fields that are None are left out."""
    if logger.isEnabledFor(logging.INFO):  # does the work of `info` in fewer steps
        record = logger.makeRecord(logger.name, logging.INFO, "", 0, message, (), None)
        record.event = {name: value for name, value in fields.items() if value is not None}
        logger.handle(record)
