"""The command `rucio check`: what Rucio's configuration and RSEs mean for tokens, before it is switched on."""

import configparser
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from minter.cli.tables import AsJson, Listing, guarded, read_object, show
from minter.errors import SettingsError
from minter.private_files import read_private_file
from minter.rucio.hooks import AWAY, switched
from minter.service import load_settings
from minter.settings import Loaded
from minter.storages.from_rucio import rses_of

rucio_app = typer.Typer(no_args_is_help=True, help="Look at Rucio's side.")
PACKAGE = "minter.rucio"


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.add_typer(rucio_app, name="rucio")


@rucio_app.callback()
def rucio() -> None:
    """Look at Rucio's side."""


@rucio_app.command("check")
@guarded
def check(
    cfg: Annotated[Path, typer.Argument(help="rucio.cfg of the daemons.")],
    export: Annotated[Path, typer.Argument(help="Rucio's RSE export (JSON).")],
    vo: Annotated[str, typer.Option(help="VO of these RSEs in Minter's settings.")],
    rucio_vo: Annotated[str, typer.Option(help="The VO's name in a multi-VO Rucio.")] = "",
    as_json: AsJson = False,
) -> None:
    """Say what would happen to the files of each RSE, and what rucio.cfg lacks; exit code 1 if anything."""
    loaded = load_settings()
    if vo not in loaded.issuers:
        raise SettingsError(f"no [issuers.{vo}] in the settings")
    wrong = list(config_problems(_read(cfg), cfg.parent, loaded.endpoints[vo], rucio_vo))
    rows = [(name, *_fate(loaded, vo, name, rse)) for name, rse in rses_of(read_object(export, "export"))]
    bad = [name for name, fate, _ in rows if fate == "refused"]
    show(
        as_json,
        {"problems": wrong, "rses": [dict(zip(("rse", "files", "why"), row, strict=True)) for row in rows]},
        lambda: Listing(f"{len(rows)} RSEs", ("RSE", "files", "why"), rows),
    )
    for problem in wrong:
        typer.echo(f"rucio.cfg: {problem}", err=True)
    if wrong or bad:
        raise typer.Exit(1)


def config_problems(
    cfg: configparser.ConfigParser, folder: Path, url: str, rucio_vo: str = ""
) -> Iterator[str]:
    """Yield what is missing or wrong in rucio.cfg; `url` is where Minter's endpoints of this VO are."""

    def option(name: str) -> str:
        found = cfg.get("minter", f"{name}-{rucio_vo}", fallback="") if rucio_vo else ""
        return found or cfg.get("minter", name, fallback="")

    yield from _policy_problems(cfg.get("policy", "package", fallback=""), option("policy_package"))
    for name in ("url", "client", "secret_file"):
        if not option(name):
            yield f"[minter] {name} is not set"
    if option("url") and option("url") != url:
        yield f"[minter] url is {option('url')}, expected {url}"
    if secret := option("secret_file"):
        try:
            read_private_file("secret file", folder / secret)
        except SettingsError as error:
            yield f"[minter] secret_file: {error.message}"
    if (away := option("away") or "wait") not in AWAY:
        yield f"[minter] away is {away}, expected one of {', '.join(AWAY)}"


def _policy_problems(package: str, own: str) -> Iterator[str]:
    if package != PACKAGE:
        yield f"[policy] package is {package or 'not set'}, expected {PACKAGE}: Minter is off"
        if package and not own:
            yield f"set [minter] policy_package = {package}, so that the VO's own package goes on working"
    if own and not _importable(own):
        yield f"[minter] policy_package {own} cannot be imported here; check where the daemons run"


def _fate(loaded: Loaded, vo: str, name: str, rse: object) -> tuple[str, str]:
    """Return what happens to the files of an RSE, and why."""
    given = rse.get("attributes") if isinstance(rse, dict) else None
    attributes = given if isinstance(given, dict) else {}
    if not switched(attributes):
        return "as before", "attribute minter is not True"
    storage = next((s for s in loaded.storages if (s.vo, s.name) == (vo, name)), None)
    if storage is None:
        return "refused", f"Minter's settings have no storage {name}: import the RSEs"
    if not storage.tokens:
        return "refused", "Minter has it as an RSE without tokens: no oidc_support, or signed URLs"
    why = f"dialect {storage.dialect}" + (", tape" if storage.tape else "")
    return "tokens of Minter", why + ("; name its software" if storage.dialect == "profile" else "")


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _read(path: Path) -> configparser.ConfigParser:
    cfg = configparser.ConfigParser(inline_comment_prefixes=(";",), interpolation=None)
    try:
        cfg.read_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, configparser.Error) as error:
        raise SettingsError(f"{path} cannot be read: {type(error).__name__}") from None
    return cfg
