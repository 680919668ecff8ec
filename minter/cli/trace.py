"""The commands `trace` (show what is recorded of tokens) and `archive` (move old records to files)."""

import uuid
from pathlib import Path
from typing import Annotated

import typer

from minter import search
from minter.cli.tables import AsJson, Listing, guarded, open_service, show, trace_table
from minter.database import archive as archives
from minter.database import traces
from minter.errors import InvalidRequest, SettingsError

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
    fts_id = None if fts_token_id is None else search.fts_token_id(fts_token_id)
    questions = {
        "jti": jti, "path": path, "external_id": external_id, "request": request,
        "fts_token_id": fts_id, "client": client, "storage": storage, "key": key,
    }  # fmt: skip
    asked = [(by, value) for by, value in questions.items() if value is not None]
    if len(asked) != 1:
        names = ", ".join("--" + by.replace("_", "-") for by in questions)
        raise InvalidRequest(f"expected exactly one of {names}")
    ((by, value),) = asked
    folder = folder or service.loaded.archive_folder
    refusals: list[traces.Refusals] = []
    if request is not None:
        found, refusals = search.of_request(service, request, folder)
    else:
        found = search.find(service, by, value, service.since(days, jti), limit, folder)
    show(as_json, {"tokens": found, "refusals": refusals}, lambda: trace_table(found))
    if refusals and not as_json:
        show(False, None, lambda: _refusals_table(refusals))
    if not found and not refusals:
        raise typer.Exit(1)


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
    return Listing("Refused", ("when", "client", "what", "reason", "why"), rows)


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
        lambda: Listing("Archived", ("file", "lines"), list(done)),
    )
