"""Run and operate the token engine Minter; `--json` prints JSON for scripts.

Exit codes: 0 success · 1 refused, or a check failed · 2 wrong usage or settings · 3 try again later.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from minter import __version__, checks, status
from minter.cli import (
    broker,
    demo,
    lifetimes,
    operations,
    processes,
    publish,
    rucio,
    storages,
    tokens,
    trace,
)
from minter.cli import clients as cli_clients
from minter.cli import control as cli_control
from minter.cli.tables import AsJson, SettingsPath, console, guarded, open_service, show
from minter.database import migrations, partitions
from minter.database.connection import BoundedConnection, synchronous_standbys, transaction
from minter.database.control import read_control
from minter.errors import SettingsError, Unavailable
from minter.issuer import well_known
from minter.key_status import issuer_lines, key_lines
from minter.lines import Line
from minter.local import drill, key_leak, stack
from minter.policy.audiences import ANY
from minter.service import Service, load_settings

ENVIRONMENT = Path("/etc/minter/environment")
"""Variables of the units in deploy/systemd; commands read them where MINTER_SETTINGS is not set."""

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # brackets in help texts are TOML's, not markup
    pretty_exceptions_enable=False,  # a traceback with local variables would show secrets
    help=__doc__,
)
db_app = typer.Typer(no_args_is_help=True, help="Manage the database.")
app.add_typer(db_app, name="db")
broker.register(app)
cli_clients.register(app)
cli_control.register(app)
publish.register(app)
storages.register(app)
tokens.register(app)
operations.register(app)
trace.register(app)
lifetimes.register(app)
rucio.register(app)
processes.register(app)


# ── running ──────────────────────────────────────────────────────────────────────────────────


@app.command()
@guarded
def up(
    settings: SettingsPath,
    state: Annotated[Path, typer.Option(help="Folder for the data of the embedded servers.")] = Path(
        ".minter"
    ),
    workers: Annotated[int, typer.Option(min=1, max=64)] = 2,
    as_json: AsJson = False,
) -> None:
    """Run Minter with an embedded Postgres and broker until Ctrl-C; a process that dies is started again."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with stack.Stack(settings, state, workers) as running:
        names = ("MINTER_SETTINGS", "MINTER_DSN", "MINTER_BROKER_URL")
        environ = {name: running.environ[name] for name in names}
        curl = running.serve() if running.service.loaded.settings.broker.local_client else ""
        link = running.console()
        show(
            as_json,
            environ | ({"curl": curl} if curl else {}) | {"console": link},
            lambda: (
                "\n".join(f"export {k}='{v}'" for k, v in environ.items())
                + (f"\nA token: {curl}" if curl else "")
                + (f"\nThe console, once: {link}" if link else "")
                + f"\n{workers} workers, beat and the HTTP service are running; Ctrl-C stops them all."
            ),
        )
        sys.stdout.flush()
        while not stopped.wait(1.0):
            for told in running.restart_dead():
                typer.echo(told, err=True)


@app.command("demo")
@guarded
def demo_command(
    examples: Annotated[Path, typer.Option(help="The folder with settings and jobs.")] = Path("examples"),
    as_json: AsJson = False,
) -> None:
    """Fill the example FTS jobs of Rucio with tokens, verify every token, and print a summary."""
    shown = Console(stderr=as_json, width=None if console.is_terminal else 160)
    with stack.temporary(examples / "settings.toml") as running:
        run = demo.Demo(running, shown, examples / "rucio-41.5" / "jobs")
        code = run.run()
        if as_json:
            typer.echo(
                json.dumps(
                    {
                        "jobs": len(run.jobs),
                        "tokens": len(run.tokens),
                        "verified": run.verified,
                        "failures": run.failures,
                    }
                )
            )
    raise typer.Exit(code)


@app.command("drill")
@guarded
def drill_command(
    mode: Annotated[
        str, typer.Option(help="mint, exchange, or mixed (exchange, and mint while the provider is down).")
    ] = "exchange",
    fault: Annotated[
        str,
        typer.Option(
            help="How the provider fails: down, slow, error_500, busy_429, garbage, …; or key-leak, where a key "
            "of Minter leaks: then only --transfers and --json count."
        ),
    ] = "down",
    share: Annotated[float, typer.Option(help="Share of requests that fail in the outage, 0 to 1.")] = 1.0,
    transfers: Annotated[int, typer.Option(min=1, help="Number of transfers, one file each.")] = 2_000,
    hours: Annotated[float, typer.Option(help="Length of the drill, in simulated hours.")] = 11.0,
    outage_from: Annotated[float, typer.Option(help="Start of the outage, in simulated hours.")] = 3.75,
    outage_hours: Annotated[float, typer.Option(help="Length of the outage, in simulated hours.")] = 2.0,
    budget: Annotated[float, typer.Option(help="Requests per simulated second to the provider.")] = 1.0,
    skew_seconds: Annotated[int, typer.Option(help="Error of the provider's clock during the outage.")] = 0,
    scale: Annotated[float, typer.Option(help="Speed of simulated time (1 is real time).")] = 240.0,
    refreshers: Annotated[int, typer.Option(help="Number of refresher processes.")] = 2,
    output: Annotated[Path, typer.Option(help="File for the plot (SVG).")] = Path("drill.svg"),
    as_json: AsJson = False,
) -> None:
    """Simulate an outage of a provider with the real engine; report and plot the transfers that fail.

    With `--fault key-leak`, a signing key leaks: every live token is made anew, and the drill says what was lost.
    """
    if fault == "key-leak":
        leak = key_leak.rehearse(transfers)
        show(as_json, leak, lambda: key_leak.told(leak))
        raise typer.Exit(1 if leak.failed else 0)
    plan = msgspec.convert(
        {
            "mode": mode, "fault": fault, "share": share, "transfers": transfers, "hours": hours,
            "outage_from_hours": outage_from, "outage_hours": outage_hours, "budget": budget,
            "skew_seconds": skew_seconds, "scale": scale, "refreshers": refreshers,
        },
        drill.DrillPlan,
    )  # fmt: skip
    report = drill.rehearse(plan)
    drill.plot(report, output)
    show(
        as_json,
        report,
        lambda: (
            f"{report.failed} of {report.transfers} transfers would have failed, {report.refused} were refused\n"
            f"at most {report.most_at_risk} tokens had less than 30 min left\n"
            f"the provider saw {report.requests} requests, at most {report.most_per_second:.2f}/s over a minute "
            f"({plan.budget:g}/s allowed), {report.after_outage_per_second:.2f}/s in the hour after the outage\n"
            f"plot: {output}"
        ),
    )
    raise typer.Exit(1 if report.failed else 0)


@app.command("status")
@guarded
def status_command(as_json: AsJson = False) -> None:
    """Show in one screen whether everything is well; exit code 0 (ok), 3 (warning) or 1 (failed)."""
    found = status.lines(load_settings())
    show(as_json, {"status": status.worst(found), "lines": found}, lambda: _status_text(found))
    if code := {"ok": 0, "warning": 3, "failed": 1}[status.worst(found)]:
        raise typer.Exit(code)


def _status_text(found: Sequence[Line]) -> str:
    """Return a line for each part, wrapped to the terminal."""
    wide = max(len(line.part) for line in found)
    lines = []
    for line in found:
        head = f"{line.level:8}{line.part:{wide}}  "
        lines.append(
            fill(line.text, max(60, console.width), initial_indent=head, subsequent_indent=" " * len(head))
        )
    return "\n".join(lines)


@app.command()
@guarded
def check(
    settings: SettingsPath,
    deep: Annotated[
        bool, typer.Option(help="Also ask every part of the running system, as `status` does.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the settings; if a DSN is set, also the database's schema, keys, clients and partitions."""
    os.environ["MINTER_SETTINGS"] = str(settings)
    loaded = load_settings()
    warnings = [*loaded.warnings, *checks.doubts(loaded)]
    warnings += [
        f"publish leaves out {file}, which would be the folder of another issuer; minter serve has it"
        for file in well_known.left_out(loaded.own_issuers.values())
    ]
    failed = list(checks.failures(loaded))
    warnings += [
        f"{vo}: no master key in the environment or a file"
        for vo in loaded.settings.issuers
        if not any(loaded.master_key_source(vo))
    ]
    if loaded.dsn:
        try:
            _check_database(Service(loaded), warnings, failed)
        except Unavailable as error:
            failed.append(error.message)
        if deep:
            found = status.lines(loaded)
            failed += [f"{line.part}: {line.text}" for line in found if line.level == "failed"]
            warnings += [f"{line.part}: {line.text}" for line in found if line.level == "warning"]
    else:
        warnings.append("no DSN is set: the database was not checked")
    facts = {
        "issuers": loaded.issuers,
        "storages": len(loaded.storages),
        "routes": len(loaded.settings.routes),
        "warnings": warnings,
        "failures": failed,
    }
    show(
        as_json,
        facts,
        lambda: (
            f"settings are {'valid' if not failed else 'WRONG'}: {len(loaded.storages)} storages, "
            f"{len(loaded.settings.routes)} routes\n"
            + "\n".join([f"failed: {f}" for f in failed] + [f"warning: {w}" for w in warnings])
        ),
    )
    if failed:
        raise typer.Exit(1)


def _check_database(service: Service, warnings: list[str], failed: list[str]) -> None:
    migrations.check(service.pool)
    with transaction(service.pool) as connection:
        standbys = synchronous_standbys(connection)
        clients = read_control(connection).clients.values()
    if not standbys:
        warnings.append("Postgres has no synchronous standby: a lost disk loses the rows of issued tokens")
    of_keys = [*key_lines(service.pool, service), *issuer_lines(service.pool, service.loaded)]
    opened = {vo for vo in service.loaded.settings.issuers if any(service.loaded.master_key_source(vo))}
    for line in of_keys:
        without_master = line.code == "locked" and line.part.partition(" ")[0] not in opened
        if line.level != "ok" and not without_master:
            wrong = line.level == "failed" and line.code != "no_key"  # before the first key is made
            (failed if wrong else warnings).append(f"{line.part}: {line.text}")
    warnings += [
        f"client {c.name} may get tokens for the audience any, which every storage of the VO accepts"
        for c in clients
        if set(ANY) & {*c.audiences}
    ]
    ahead = partitions.partitions_ahead(service.pool, service.clock().date())
    if ahead < partitions.DAYS_AHEAD // 2:
        warnings.append(f"partitions exist for only {ahead} days ahead; is beat running?")


# ── database ─────────────────────────────────────────────────────────────────────────────────


@db_app.command("upgrade")
@guarded
def db_upgrade(as_json: AsJson = False) -> None:
    """Upgrade the database to this release's schema and create partitions."""
    service = open_service()
    migrations.upgrade(service.pool)
    service.prepare()
    ahead = partitions.partitions_ahead(service.pool, service.clock().date())
    show(
        as_json,
        {"partitions_ahead": ahead},
        lambda: f"database is up to date, {ahead} days of partitions ahead",
    )


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Run and operate the token engine Minter."""
    if version:
        typer.echo(f"minter {__version__}")
        raise typer.Exit


def read_environment(path: Path, environ: MutableMapping[str, str]) -> None:
    """Add the variables of a systemd environment file that are not set; raises SettingsError.

    Units have the file by EnvironmentFile=; with this, an operator's commands find the same settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}; or set MINTER_SETTINGS") from None
    for line in text.splitlines():
        name, separator, value = line.strip().partition("=")
        if separator and not name.startswith(("#", ";")):
            value = value.strip()
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            environ.setdefault(name.strip(), value[1:-1] if quoted else value)


def main() -> None:
    """Run the command."""
    if "MINTER_SETTINGS" not in os.environ:
        try:
            read_environment(ENVIRONMENT, os.environ)
        except SettingsError as error:
            typer.echo(f"minter: {error}", err=True)
    BoundedConnection.on_slow = staticmethod(lambda what: typer.echo(f"waiting for {what} …", err=True))
    app()


if __name__ == "__main__":
    main()
