"""The commands `trace` (show what is recorded of tokens) and `archive` (move old records to files)."""

import uuid
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from minter.cli.tables import AsJson, as_table, guarded, open_service, show, trace_table
from minter.database import archive as archives
from minter.database import traces
from minter.errors import InvalidRequest, RequestError, SettingsError
from minter.policy.plans import SEVERAL_STORAGES
from minter.service import Service
from minter.storages.urls import readings

_FTS_ID_BYTES = 8
Folder = Annotated[
    Path | None, typer.Option("--archive", help="Archive folder; the folder of the settings if not given.")
]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command("trace")(trace)
    app.command("archive")(archive)


@guarded
def trace(
    jti: Annotated[uuid.UUID | None, typer.Option(help="jti of a token.")] = None,
    path: Annotated[
        str | None,
        typer.Option(help="Path of a file below the VO's area, or its URL as FTS or a storage logs it."),
    ] = None,
    external_id: Annotated[str | None, typer.Option(help="Submitter's id of a file (external_id).")] = None,
    request: Annotated[uuid.UUID | None, typer.Option(help="request_id of a request.")] = None,
    fts_token_id: Annotated[str | None, typer.Option(help="Token id in FTS, 16 hex digits.")] = None,
    client: Annotated[str | None, typer.Option(help="Name of a client, for its newest tokens.")] = None,
    storage: Annotated[str | None, typer.Option(help="Name of a storage, for its newest tokens.")] = None,
    key: Annotated[str | None, typer.Option(help="kid of a signing key, for its newest tokens.")] = None,
    days: Annotated[int, typer.Option(help="Days to search back.", min=1, max=4000)] = 30,
    limit: Annotated[int, typer.Option(help="Largest number of tokens to show.", min=1, max=100_000)] = 100,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Show who asked for tokens, the rule that allowed them, their scopes and their states.

    The command searches the database and the archive; times are UTC.
    """
    service = open_service()
    fts_id = None if fts_token_id is None else _fts_token_id(fts_token_id)
    questions = {
        "jti": jti, "path": path, "external_id": external_id, "request": request,
        "fts_token_id": fts_id, "client": client, "storage": storage, "key": key,
    }  # fmt: skip
    asked = [(by, value) for by, value in questions.items() if value is not None]
    if len(asked) != 1:
        names = ", ".join("--" + by.replace("_", "-") for by in questions)
        raise InvalidRequest(f"expected exactly one of {names}")
    ((by, value),) = asked
    since, until = service.since(days, jti), service.clock() + timedelta(days=1)
    folder = folder or service.loaded.archive_folder
    found, refusals = _of_request(service, request, folder, until) if request else ([], [])
    if not request:
        values, at = _files_of(service, path) if path is not None and "://" in path else ({value}, None)
        found = [t for v in values for t in traces.find(service.pool, by, v, since, until, limit)]
        if folder is not None and len(found) < limit:
            found += [t for v in values for t in archives.find(folder, by, v, since, until, limit)]
        found = traces.newest([t for t in found if at is None or t.storage in at], limit)
    show(as_json, {"tokens": found, "refusals": refusals}, lambda: trace_table(found))
    if refusals and not as_json:
        show(False, None, lambda: _refusals_table(refusals))
    if not found and not refusals:
        raise typer.Exit(1)


def _of_request(
    service: Service, request: uuid.UUID, folder: Path | None, until: datetime
) -> tuple[list[traces.TraceRecord], list[traces.Refusals]]:
    """Return the tokens and refusals of a request, from the archive where the database has no token of it."""
    found, refusals = traces.find_request(service.pool, request)
    if folder is not None and not found:
        found, archived = archives.find_request(folder, request, until)
        refusals = refusals or archived
    return found, refusals


def _files_of(service: Service, url: str) -> tuple[set[object], set[str]]:
    """Return the VO-relative paths and the storages that a URL names, as it is or percent-encoded.

    Raises the error of `Directory.locate` if it names a file of no VO.
    """
    paths, storages = set[object](), set[str]()
    for directory, spelling in product(service.loaded.policy.directories.values(), readings(url)):
        try:
            area, found = directory.locate(spelling)
        except RequestError as error:
            wrong = error
            continue
        paths.add(found)
        storages |= {area.storage, SEVERAL_STORAGES}
    if not paths:
        raise wrong
    return paths, storages


def _refusals_table(refusals: list[traces.Refusals]) -> object:
    rows = []
    for one in refusals:
        for refused in [{"error": one.error}] if one.error else one.refusals:
            where = (
                f"{refused['side']}[{refused['index']}] of file {refused['file']}"
                if "side" in refused
                else "all"
            )
            error = refused["error"]
            rows.append((one.received_at, one.client, where, error["reason"], error["error_description"]))
    return as_table("Refused", ("when", "client", "what", "reason", "why"), rows)


def _fts_token_id(text: str) -> int:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != _FTS_ID_BYTES:
        raise InvalidRequest(f"{text!r} is not an FTS token id, expected 16 hex digits")
    return int.from_bytes(raw, signed=True)


@guarded
def archive(folder: Folder = None, as_json: AsJson = False) -> None:
    """Write days past the retention time to compressed files, and remove them from the database.

    A timer runs this command daily (deploy/systemd/minter-archive.timer). It may be stopped at any point.
    """
    service = open_service()
    folder = folder or service.loaded.archive_folder
    if folder is None:
        raise SettingsError("no archive folder: set database.archive_folder, or name one with --archive")
    days = archives.due(service.pool, service.clock(), service.loaded.settings.database.retention_days)
    done = [archives.archive_day(service.pool, folder, kind, day) for kind, day in days]
    show(
        as_json,
        [{"file": str(path), "lines": count} for path, count in done],
        lambda: as_table("Archived", ("file", "lines"), list(done)),
    )
