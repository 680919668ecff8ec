"""Run and operate the token engine Minter; `--json` prints JSON for scripts.

Exit codes: 0 success · 1 refused, or a check failed · 2 wrong usage or settings · 3 try again later.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from minter import checks
from minter.broker import rabbitmq
from minter.broker.publisher import connect, declare
from minter.cli import clients as cli_clients
from minter.cli import control as cli_control
from minter.cli import demo, processes, publish, storages, tokens, trace
from minter.cli.tables import AsJson, SettingsPath, console, guarded, open_service, show
from minter.database import migrations, partitions
from minter.database.connection import synchronous_standbys, transaction
from minter.database.control import read_control, read_keys
from minter.errors import Unavailable
from minter.issuer import well_known
from minter.local import drill, stack
from minter.policy.token_endpoint import ANY
from minter.service import Service, load_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback with local variables would show secrets
    help=__doc__,
)
db_app = typer.Typer(no_args_is_help=True, help="Manage the database.")
broker_app = typer.Typer(no_args_is_help=True, help="Manage the message broker.")
for name, group in (("db", db_app), ("broker", broker_app)):
    app.add_typer(group, name=name)
cli_clients.register(app)
cli_control.register(app)
publish.register(app)
storages.register(app)
tokens.register(app)
trace.register(app)
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
    """Run Minter with an embedded Postgres and broker until Ctrl-C."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with stack.Stack(settings, state, workers) as running:
        names = ("MINTER_SETTINGS", "MINTER_DSN", "MINTER_BROKER_URL")
        environ = {name: running.environ[name] for name in names}
        show(
            as_json,
            environ,
            lambda: (
                "\n".join(f"export {k}='{v}'" for k, v in environ.items())
                + f"\n{workers} workers and beat are running; Ctrl-C stops them all."
            ),
        )
        sys.stdout.flush()
        stopped.wait()


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
        str, typer.Option(help="How the provider fails: down, slow, error_500, busy_429, garbage, …")
    ] = "down",
    share: Annotated[float, typer.Option(help="Share of requests that fail in the outage, 0 to 1.")] = 1.0,
    transfers: Annotated[int, typer.Option(help="Number of transfers, one file each.")] = 2_000,
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
    """Simulate an outage of a provider with the real engine; report and plot the transfers that fail."""
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


@app.command()
@guarded
def check(settings: SettingsPath, as_json: AsJson = False) -> None:
    """Check the settings; if a DSN is set, also the database's schema, keys, clients and partitions."""
    os.environ["MINTER_SETTINGS"] = str(settings)
    loaded = load_settings()
    warnings = [*loaded.warnings, *checks.doubts(loaded)]
    warnings += [
        f"publish leaves out {file}, which would be the folder of another issuer; minter serve has it"
        for file in well_known.left_out(loaded.issuers.values())
    ]
    failed = list(checks.failures(loaded))
    warnings += [
        f"{vo}: no master key in the environment or a file"
        for vo in loaded.settings.issuers
        if not any(loaded.master_key_source(vo))
    ]
    if loaded.dsn:
        warnings += _check_database(Service(loaded))
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


def _check_database(service: Service) -> list[str]:
    warnings = []
    with transaction(service.pool) as connection:
        ring = read_keys(connection)
        standbys = synchronous_standbys(connection)
        clients = read_control(connection).clients.values()
    if not standbys:
        warnings.append("Postgres has no synchronous standby: a lost disk loses the rows of issued tokens")
    for vo in service.loaded.settings.issuers:
        for algorithm in service.loaded.settings.issuers[vo].algorithms:
            states = {k.state for k in ring if (k.vo, k.algorithm) == (vo, algorithm)}
            if "active" not in states:
                what = (
                    "no active signing key" if "prepared" not in states else "signing key not public for long"
                )
                warnings.append(f"{vo}: {what} for {algorithm}; run: minter keys create --vo {vo}")
            elif "prepared" not in states:
                warnings.append(f"{vo}: no {algorithm} standby key; run: minter keys create --vo {vo}")
    warnings += [
        f"client {c.name} may get tokens for the audience any, which every storage of the VO accepts"
        for c in clients
        if set(ANY) & {*c.audiences}
    ]
    ahead = partitions.partitions_ahead(service.pool, service.clock().date())
    if ahead < partitions.DAYS_AHEAD // 2:
        warnings.append(f"partitions exist for only {ahead} days ahead; is beat running?")
    return warnings


# ── database, broker ─────────────────────────────────────────────────────────────────────────


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


@broker_app.command("setup")
@guarded
def broker_setup(
    clients: Annotated[
        bool, typer.Option(help="Also create RabbitMQ users and permissions for every client.")
    ] = True,
    rabbitmqctl: Annotated[str, typer.Option(help="Path of the program rabbitmqctl.")] = "rabbitmqctl",
    passwords: Annotated[Path | None, typer.Option(help="File for new users' passwords (mode 600).")] = None,
    as_json: AsJson = False,
) -> None:
    """Declare exchanges and quorum queues; on RabbitMQ, also create users and permissions."""
    loaded = load_settings()
    try:
        with connect(loaded.broker_url, loaded.broker_ca) as connection:
            declare(connection)
    except OSError as error:
        raise Unavailable(f"the broker cannot be reached ({type(error).__name__})") from error
    made: list[str] = []
    if clients and loaded.broker_url.startswith(("amqp", "pyamqp")):
        with transaction(Service(loaded).pool) as connection:
            control = read_control(connection)
        queues = {c.name: c.reply_queues for c in control.clients.values() if not c.disabled}
        with connect(loaded.broker_url, loaded.broker_ca) as connection:
            declare(connection, [q for listed in queues.values() for q in listed])
        made = rabbitmq.setup_users(queues, loaded.broker_url, rabbitmqctl, passwords)
    show(as_json, {"users": made}, lambda: f"exchanges and queues declared; {len(made)} users made")


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
