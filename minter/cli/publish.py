"""The commands `publish` (write the issuers' documents as files) and `serve` (run the HTTP service)."""

import threading
from pathlib import Path
from typing import Annotated

import typer

from minter import alive
from minter.cli.tables import AsJson, guarded, open_service, show
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.errors import NoUsableKey, SettingsError, Unavailable
from minter.issuer import co_issuer
from minter.issuer import jwks_cache as cache
from minter.issuer import well_known as files
from minter.service import Service, load_settings

WATCH_SECONDS = 2.0


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command("publish")(publish)
    app.command("serve")(serve)
    app.command("console")(console)


@guarded
def serve() -> None:
    """Serve tokens and transfers over HTTP until SIGTERM, as configured by [http] of the settings."""
    from minter.issuer.server import run  # noqa: PLC0415 - only this command needs the server's libraries

    run(load_settings())


@guarded
def console() -> None:
    """Serve the web console until SIGTERM, as configured by [console] of the settings."""
    from minter.console.server import run  # noqa: PLC0415 - needs the extra `console`

    run(load_settings())


@guarded
def publish(
    folder: Annotated[
        Path, typer.Argument(help="Folder that a web server serves as the root of the issuers' host.")
    ],
    watch: Annotated[
        bool,
        typer.Option(help="Keep running, and update the files within seconds of each change of the keys."),
    ] = False,
    jwks_cache: Annotated[
        Path | None,
        typer.Option(help="Folder for a WLCG JWKS cache, such as /var/cache/jwks; --watch keeps it fresh."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write every issuer's discovery document and JWKS as files (deploy/nginx.conf serves them)."""
    service = open_service()
    try:
        _write(service, folder, jwks_cache, as_json)
    except NoUsableKey as error:  # of an issuer that has no key yet; it may get one
        if not watch:
            raise
        typer.echo(f"minter: {error.reason}: {error}", err=True)
    alive.ready()
    while watch:
        threading.Event().wait(WATCH_SECONDS)
        try:
            _write(service, folder, jwks_cache, as_json, quiet=True)
        except (Unavailable, SettingsError) as error:  # what cannot be written stays as it is
            typer.echo(f"minter: {error.reason}: {error}", err=True)


def _write(
    service: Service, folder: Path, jwks_cache: Path | None, as_json: bool, *, quiet: bool = False
) -> None:
    with transaction(service.pool) as connection:
        ring = read_keys(connection)
    now, issuers = service.clock(), service.loaded.own_issuers
    merged = co_issuer.files(service, ring)
    written = files.write(folder, dict(merged.values()))
    co_issuer.note_written(service, merged)
    made = files.documents(ring, issuers, now) if issuers else {}
    if clash := made.keys() & {path for path, _ in merged.values()}:
        raise SettingsError(f"{min(clash)} is both an issuer's document and a co_issuer.path")
    written += files.write(folder, made)
    if jwks_cache is not None:
        written += files.write(jwks_cache, cache.entries(ring, issuers, now, jwks_cache))
    changed = [str(path) for path in written]
    if changed or not quiet:
        show(as_json, {"changed": changed}, lambda: "\n".join(changed) or "nothing has changed")
