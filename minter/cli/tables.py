"""Helpers of all commands: exit codes, tables or JSON, the service, and the operator's name."""

import getpass
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from minter.client import find_bearer_token
from minter.database import connection, live_tokens
from minter.database.control import read_control
from minter.database.traces import TraceRecord
from minter.errors import InvalidRequest, MinterError, SettingsError, Unavailable, UnknownClient
from minter.policy.clients import Ban
from minter.service import Service, load_settings
from minter.tokens.records import Control

console = Console()
MOST_SHOWN, MOST_LISTED = 20, 10_000
"""How many live tokens are listed on a terminal, and in JSON; totals always count all of them."""
PROGRESS_SECONDS = 3.0
"""A long command says so often how far it is, at most."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
SettingsPath = Annotated[
    Path, typer.Option("--settings", envvar="MINTER_SETTINGS", help="The settings file (TOML).")
]


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a MinterError into one line on standard error and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except MinterError as error:
            if kwargs.get("as_json"):
                typer.echo(json.dumps(error.as_dict()), err=True)
            else:
                typer.echo(f"minter: {error.reason}: {error}", err=True)
            raise typer.Exit(_exit_code(error)) from None

    return run


def _exit_code(error: MinterError) -> int:
    if isinstance(error, SettingsError):
        return 2
    return 3 if isinstance(error, Unavailable) else 1


def token_on_input() -> str:
    """Return the text on standard input, or at a terminal the user's bearer token (WLCG discovery)."""
    if not sys.stdin.isatty():
        return sys.stdin.read()
    token = find_bearer_token()
    if not token:
        raise InvalidRequest(
            "no token on standard input, and none where WLCG tools leave one (BEARER_TOKEN …)"
        )
    return token


def show(as_json: bool, data: Any, text: Callable[[], Any]) -> None:
    """Print `data` as JSON, or else the text or table that `text` returns."""
    if as_json:
        typer.echo(msgspec.json.encode(data).decode())
    else:
        shown = text()
        if isinstance(shown, str):
            typer.echo(shown)
        else:
            console.print(shown)


_ANY_WIDTH = 100_000


class Listing:
    """Rows under headings: a table where the terminal is wide enough for it, else a block for each row.

    None is an empty cell.
    """

    def __init__(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._title = title
        self._headings = headings
        self._rows = [["" if value is None else str(value) for value in row] for row in rows]

    def __rich_console__(self, shown: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table or the blocks; values are text, never rich's markup."""
        table = Table(title=self._title)
        for heading in self._headings:
            table.add_column(heading, overflow="fold")
        for row in self._rows:
            table.add_row(*map(Text, row))
        if Measurement.get(shown, options.update(max_width=_ANY_WIDTH), table).maximum <= options.max_width:
            yield table
            return
        yield Text(self._title)
        wide = max(map(len, self._headings))
        for row in self._rows:
            block = Table.grid(padding=(0, 2))
            block.add_column(min_width=wide)
            block.add_column(overflow="fold")
            for heading, value in zip(self._headings, row, strict=True):
                if value:
                    block.add_row(Text(heading), Text(value))
            yield Text()
            yield block


def open_service() -> Service:
    """Return the engine that MINTER_SETTINGS describes."""
    return Service(load_settings())


def not_registered(name: str, known: Iterable[str]) -> UnknownClient:
    """Return the error for a name that no client has, with the nearest one that a client has."""
    near = get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "; run: minter clients list"
    return UnknownClient(f"client {name!r} is not registered{hint}")


def client_of(service: Service, client: str | None) -> tuple[str, Control]:
    """Return the registered client that a command acts as, the local one by default, and the control tables."""
    with connection.transaction(service.pool) as opened:
        control = read_control(opened)
    name = client or service.loaded.settings.broker.local_client
    if name not in control.clients:
        raise not_registered(name, control.clients)
    return name, control


class Progress:
    """Tells on standard error how far a long command is, every PROGRESS_SECONDS at most."""

    def __init__(self) -> None:
        self._told_at = time.monotonic()

    def tell(self, how_far: str) -> None:
        """Say how far the command is, unless it was said a moment ago."""
        if time.monotonic() - self._told_at >= PROGRESS_SECONDS:
            self._told_at = time.monotonic()
            typer.echo(how_far, err=True)


def whoami() -> str:
    """Return the operator's user name, for the audit."""
    return os.environ.get("SUDO_USER") or getpass.getuser()


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file, or from standard input for `-`; raises InvalidRequest."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        job = json.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{what} {path} cannot be read as JSON: {error}") from error
    if not isinstance(job, dict):
        raise InvalidRequest(f"{what} {path} is not a JSON object")
    return job


def trace_table(found: Sequence[TraceRecord]) -> Listing:
    """Return a table of traces: who asked for each token, which rule allowed it, and its state."""
    return Listing(
        f"{len(found)} tokens",
        (
            "issued", "jti, FTS id", "who asked", "storage", "side", "scope", "audience, issuer", "rule",
            "expires", "state",
        ),
        [
            (
                f"{one.issued_at:%F %T}",
                f"{one.jti}\n{one.fts_token_id}",
                "\n".join(filter(None, (one.client, one.on_behalf_of, one.activity, one.external_id))),
                one.storage,
                f"{one.side}[{one.position}] of file {one.file}" if one.file >= 0 else one.side,
                one.scope,
                "\n".join(one.addressed),
                f"{one.route}: {', '.join(one.operations)}" if one.operations else one.route,
                f"{one.expires_at:%F %T}",
                _fate(one),
            )
            for one in found
        ],
    )  # fmt: skip


def _fate(one: TraceRecord) -> str:
    said = [one.state]
    if one.active_at:
        said.append(f"active {one.active_at:%F %T}")
    if one.ended_at:
        said.append(f"{one.state} {one.ended_at:%F %T}")
    if one.job_id:
        said.append(f"FTS job {one.job_id}")
    if one.renews:
        said.append(f"renews {one.renews}")
    return "\n".join(said)


def show_live_tokens(service: Service, as_json: bool, done: str, what: Ban) -> None:
    """Print what was done, and the live tokens concerned: only revoking its key stops a token (I9)."""
    living = live_tokens.under(
        service.pool, what.kind, what.value, what.vo, service.clock(), service.loaded.policy.matching_of
    )
    most = MOST_LISTED if as_json else MOST_SHOWN
    storages: Counter[str] = Counter()
    found: list[live_tokens.LiveTokenRow] = []
    until = 0
    for token in living:
        storages[token.storage] += 1
        until = max(until, token.exp)
        if len(found) < most:
            found.append(token)
    total = storages.total()
    show(
        as_json,
        {"done": done, "total": total, "storages": storages, "until": until or None, "alive": found},
        lambda: Listing(
            f"{done}; {total} tokens are still valid"
            + (f", the last until {connection.instant(until):%F %T} UTC; tell the sites" if until else ""),
            ("storage", "jti", "scope", "until"),
            [(t.storage, t.jti, t.scope, connection.instant(t.exp)) for t in found]
            + [(s, f"{n} in all", "", "") for s, n in storages.most_common() if total > len(found)],
        ),
    )
