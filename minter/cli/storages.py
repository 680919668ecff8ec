"""Commands for storages: import them from Rucio or DIRAC, list them, print a site's configuration, probe them."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from minter.cli.tables import AsJson, Listing, client_of, guarded, open_service, read_object, show, whoami
from minter.database import audit
from minter.errors import InvalidRequest, RequestError, SettingsError
from minter.probe import probe
from minter.service import load_settings
from minter.settings import Loaded
from minter.storages.dialects import DIALECTS, AudienceForm
from minter.storages.directory import Directory, Storage
from minter.storages.from_dirac import storages_from_cfg
from minter.storages.from_rucio import RSERule, storages_from_export
from minter.storages.site_config import site_config

storages_app = typer.Typer(
    no_args_is_help=True, help="Import storages, list them, print sites' configuration, probe them."
)

VO = Annotated[str, typer.Option(help="VO that the storages belong to.")]
Dialects = Annotated[
    list[str] | None,
    typer.Option(
        "--dialect", help="PATTERN=DIALECT for storages whose names match PATTERN; the first match counts."
    ),
]
Form = Annotated[
    AudienceForm | None, typer.Option(help="How to build a storage's audience from its endpoints.")
]
Output = Annotated[Path | None, typer.Option(help="File for the [[storages]] of the settings.")]
VOIfSeveral = Annotated[
    str | None, typer.Option("--vo", help="VO of the storage, if its name is in several VOs.")
]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.add_typer(storages_app, name="storages")


@storages_app.command("import-rucio")
@guarded
def import_rucio(
    export: Path,
    vo: VO,
    dialect: Dialects = None,
    audience_form: Form = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Import storages from Rucio's RSE export, keyed by RSE name or id; - reads standard input."""
    found, warnings = storages_from_export(
        read_object(export, "export"), vo, _rules(dialect), audience_form or "host"
    )
    _imported(found, warnings, output, as_json)


@storages_app.command("import-dirac")
@guarded
def import_dirac(
    cfg: Path,
    vo: VO,
    dialect: Dialects = None,
    audience_form: Form = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Import the storage elements of a DIRAC configuration (CFG)."""
    try:
        text = cfg.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"configuration {cfg} cannot be read: {error}") from error
    found, warnings = storages_from_cfg(text, vo, _rules(dialect), audience_form or "url_with_port")
    _imported(found, warnings, output, as_json)


def _rules(dialects: list[str] | None) -> tuple[RSERule, ...]:
    rules = []
    for entry in dialects or ():
        pattern, equals, dialect = entry.partition("=")
        if not equals or dialect not in DIALECTS:
            raise InvalidRequest(f"{entry!r} is not PATTERN=DIALECT with one of {', '.join(DIALECTS)}")
        rules.append(RSERule(pattern, dialect))
    return tuple(rules)


def _imported(found: list[Storage], warnings: list[str], output: Path | None, as_json: bool) -> None:
    Directory(found)  # raises SettingsError for storages that conflict
    if output is not None:
        try:
            output.write_text(settings_text(found), encoding="utf-8")
        except OSError as error:
            raise InvalidRequest(f"{output} cannot be written: {error.strerror}") from error
    show(
        as_json,
        {"storages": found, "warnings": warnings},
        lambda: f"{len(found)} storages" + "".join(f"\nwarning: {w}" for w in warnings),
    )


def settings_text(found: list[Storage]) -> str:
    """Return storages as [[storages]] tables for the settings file, without default values."""
    plain = Storage(vo="", name="", endpoints=())
    lines = []
    for storage in found:
        lines.append("[[storages]]")
        for field in storage.__struct_fields__:
            value = getattr(storage, field)
            if field == "endpoints":
                endpoints = ", ".join(
                    f"{{ host = {_toml(e.host)}, port = {e.port}, prefix = {_toml(e.prefix)}"
                    + (f", base_path = {_toml(e.base_path)}" if e.base_path else "")
                    + " }"
                    for e in value
                )
                lines.append(f"endpoints = [{endpoints}]")
            elif value != getattr(plain, field):
                lines.append(f"{field} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """Return a string, a boolean or a list of strings as TOML, which writes these as JSON does."""
    return msgspec.json.encode(value).decode()


@storages_app.command("list")
@guarded
def storages_list(as_json: AsJson = False) -> None:
    """List the storages of the settings, with the audiences and paths that their tokens get."""
    loaded = load_settings()
    areas = [a for directory in loaded.policy.directories.values() for a in directory.areas()]
    headings = ("vo", "storage", "dialect", "prefix", "base path", "audience", "tokens")
    rows = sorted(
        (
            a.vo,
            a.storage,
            a.dialect.name,
            a.prefix,
            a.base_path,
            ", ".join(a.audience),
            "yes" if a.tokens else "no",
        )
        for a in areas
    )
    show(
        as_json,
        [dict(zip(headings, row, strict=True)) for row in rows],
        lambda: Listing("Storages", headings, rows),
    )


@storages_app.command("site-config")
@guarded
def storages_site_config(
    storage: Annotated[str, typer.Option(help="Name of the storage.")],
    vo: VOIfSeveral = None,
    as_json: AsJson = False,
) -> None:
    """Print the configuration that makes a site's storage trust this engine's tokens."""
    loaded = load_settings()
    named = _named(loaded, storage, vo)
    areas = [a for a in loaded.policy.directories[named.vo].areas() if a.storage == storage]
    if not areas:
        raise SettingsError(f"storage {storage!r} shares all its endpoints with another one; name that one")
    text = site_config(named, areas, loaded.issuers[named.vo])
    show(as_json, {"storage": storage, "config": text}, lambda: text)


@storages_app.command("probe")
@guarded
def storages_probe(
    storage: Annotated[str, typer.Argument(help="Name of the storage.")],
    path: Annotated[
        str, typer.Argument(help="Path, as scopes have it, of a folder to write in, or of a file to read.")
    ],
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Write nothing; PATH is a file that exists.")
    ] = False,
    client: Annotated[str | None, typer.Option(help="Registered client that the tokens are for.")] = None,
    ca: Annotated[str | None, typer.Option(help="File or folder of the CAs that sign storages.")] = None,
    vo: VOIfSeveral = None,
    as_json: AsJson = False,
) -> None:
    """Try on a real storage what its dialect promises, with tokens of one minute.

    Each endpoint is asked what must be allowed and what must be refused, and a refusal is taken apart: audience,
    base path, issuer, header, algorithm, rights. The files of the probe are removed at its end.
    """
    service = open_service()
    named = _named(service.loaded, storage, vo)
    name, _ = client_of(service, client)
    askers = probe.askers(service, named, path, name, ca)

    def note(failed: list[str]) -> None:
        details = {"path": path, "read_only": read_only, "failed": failed}
        audit.note(service.pool, whoami(), probe.PROBED, f"{named.vo}/{named.name}", details)

    try:
        found = {
            place: list(probe.read_only(asker, path) if read_only else probe.write_and_read(asker, path))
            for place, asker in askers.items()
        }
    except RequestError as error:
        note([error.reason])
        raise
    lines = [
        f"{place} {'ok     ' if verdict.passes else 'failed '} {verdict.check}: {verdict.text}"
        for place, verdicts in found.items()
        for verdict in verdicts
    ]
    wrong = [verdict.check for verdicts in found.values() for verdict in verdicts if not verdict.passes]
    show(as_json, {"passes": not wrong, "endpoints": found}, lambda: "\n".join(lines))
    note(wrong)
    if wrong:
        raise typer.Exit(1)


def _named(loaded: Loaded, name: str, vo: str | None) -> Storage:
    """Return the one storage of a name that takes tokens; raises InvalidRequest or SettingsError."""
    named = [s for s in loaded.storages if s.name == name and vo in (None, s.vo)]
    if len(named) != 1:
        raise InvalidRequest(
            f"{len(named)} storages are named {name!r}, expected one" + ("; name its --vo" if named else "")
        )
    if not named[0].tokens:
        raise SettingsError(f"storage {name!r} takes no tokens (tokens = false)")
    return named[0]
