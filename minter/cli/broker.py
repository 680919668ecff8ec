"""The commands `broker setup` and `broker password`: queues, users and permissions on RabbitMQ."""

from pathlib import Path
from typing import Annotated

import typer

from minter.broker import rabbitmq
from minter.broker.connections import connect, opened
from minter.broker.publisher import declare
from minter.cli.tables import AsJson, guarded, not_registered, open_service, show, whoami
from minter.database import audit, control_changes
from minter.database.connection import LONG_SECONDS, transaction
from minter.database.control import read_control
from minter.service import Service, load_settings

broker_app = typer.Typer(no_args_is_help=True, help="Manage the message broker.")


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.add_typer(broker_app, name="broker")


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
    with opened(connect(loaded.broker_url, loaded.broker_ca)) as connection:
        declare(connection)
    made: list[str] = []
    if clients and loaded.broker_url.startswith(("amqp", "pyamqp")):
        with transaction(Service(loaded).pool) as connection:
            control = read_control(connection)
        queues = {c.name: c.reply_queues for c in control.clients.values() if not c.disabled}
        with opened(connect(loaded.broker_url, loaded.broker_ca)) as connection:
            declare(connection, [q for listed in queues.values() for q in listed], queues)
        made = rabbitmq.setup_users(queues, loaded.broker_url, rabbitmqctl, passwords)
    show(as_json, {"users": made}, lambda: f"exchanges and queues declared; {len(made)} users made")


@broker_app.command("password")
@guarded
def broker_password(
    client: Annotated[str, typer.Argument(help="Name of the client.")],
    passwords: Annotated[Path, typer.Option(help="New file for the password (mode 600).")],
    rabbitmqctl: Annotated[str, typer.Option(help="Path of the program rabbitmqctl.")] = "rabbitmqctl",
    as_json: AsJson = False,
) -> None:
    """Give a client's RabbitMQ user a new password; the old one opens no new connection."""
    service = open_service()
    known = control_changes.client_names(service.pool, LONG_SECONDS)
    if client not in known:
        raise not_registered(client, known)
    rabbitmq.new_password(client, rabbitmqctl, passwords)
    audit.note(service.pool, whoami(), "client.amqp_password", client, {})
    show(as_json, {"client": client}, lambda: f"{client} has a new password, written to {passwords}")
