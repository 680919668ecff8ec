"""The commands `audit` (who changed what) and `dead` (messages that no worker could serve)."""

from collections.abc import Callable
from typing import Annotated

import msgspec
import typer

from minter.broker.connections import connect
from minter.cli.tables import AsJson, Listing, guarded, open_service, show, whoami
from minter.contract import names
from minter.database import audit as audits
from minter.errors import InvalidRequest, MinterError
from minter.service import Service
from minter.tasks import dead_letters, dispatch
from minter.tasks.dead_letters import DeadLetter
from minter.tasks.lifecycle import Lifecycle

dead_app = typer.Typer(no_args_is_help=True, help="Look at messages that no worker could serve.")
Name = Annotated[str, typer.Argument(help="Id of the dead letter, as `minter dead list` shows it.")]
Done = tuple[str, str]
Everything = Annotated[bool, typer.Option("--all", help="All dead letters.")]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command("audit")(audit)
    app.add_typer(dead_app, name="dead")


@guarded
def audit(
    days: Annotated[int, typer.Option(help="Days to search back.", min=1, max=4000)] = 7,
    actor: Annotated[str | None, typer.Option(help="Only changes by this user or client.")] = None,
    action: Annotated[
        str | None, typer.Option(help="Only actions that begin so, such as ban or key.")
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="Only changes of this client, key, ban or family.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Largest number of changes to show.", min=1, max=100_000)] = 100,
    as_json: AsJson = False,
) -> None:
    """Show who changed what, the newest change first; times are UTC."""
    service = open_service()
    found = audits.changes(service.pool, service.since(days), actor, action, subject, limit)
    show(
        as_json,
        found,
        lambda: Listing(
            f"{len(found)} changes",
            ("when", "who", "what", "of", "details"),
            [
                (f"{c.at:%F %T}", c.actor, c.action, c.subject, msgspec.json.encode(c.details).decode())
                for c in found
            ],
        ),
    )


# ── dead letters ─────────────────────────────────────────────────────────────────────────────


def _each(service: Service, handle: Callable[[DeadLetter], object]) -> list[DeadLetter]:
    return dead_letters.each(connect(service.loaded.broker_url, service.loaded.broker_ca), handle)


@dead_app.command("list")
@guarded
def dead_list(as_json: AsJson = False) -> None:
    """List dead letters: who sent each, and why no worker could serve it."""
    found: list[DeadLetter] = []
    _each(open_service(), found.append)
    show(
        as_json,
        [{**msgspec.structs.asdict(d), "body": None} for d in found],
        lambda: Listing(
            f"{len(found)} dead letters",
            ("id", "client", "task", "reason", "why", "bytes"),
            [(d.id, d.client, d.task, d.reason, d.why, d.bytes) for d in found],
        ),
    )


@dead_app.command("show")
@guarded
def dead_show(name: Name, as_json: AsJson = False) -> None:
    """Show one dead letter with its body."""
    found: list[DeadLetter] = []
    _each(open_service(), lambda d: found.append(d) if d.id == name else None)
    if not found:
        raise _not_there(name)
    show(as_json, found[0], lambda: msgspec.json.format(msgspec.json.encode(found[0]), indent=2).decode())


@dead_app.command("drop")
@guarded
def dead_drop(
    name: Annotated[str, typer.Argument(help="Id of the dead letter.")] = "",
    everything: Everything = False,
    as_json: AsJson = False,
) -> None:
    """Remove a dead letter for good; the audit keeps its sender, task and reason."""
    _take(open_service(), name, everything, ("dead.drop", "dropped"), lambda _: None, as_json)


@dead_app.command("requeue")
@guarded
def dead_requeue(
    name: Annotated[str, typer.Argument(help="Id of the dead letter.")] = "",
    everything: Everything = False,
    as_json: AsJson = False,
) -> None:
    """Serve a dead letter now, for its sender, who fetches the tokens by request_id.

    A letter that is refused again stays a dead letter.
    """
    service = open_service()
    lifecycle = Lifecycle(service.engine, service.store)
    done = ("dead.requeue", "served")
    _take(service, name, everything, done, lambda letter: _serve(service, lifecycle, letter), as_json)


def _serve(service: Service, lifecycle: Lifecycle, letter: DeadLetter) -> None:
    """Serve a letter as a worker would; raises the error with which it is refused."""
    if letter.task not in names.PUBLIC_TASKS or not letter.client:
        raise InvalidRequest("it was no request of a client")
    argument = dispatch.argument_of(letter.task, bytes(letter.body))
    made = dispatch.submission(lifecycle, letter.task, letter.client, argument)
    if made is None:
        dispatch.follow_up(lifecycle, letter.task, letter.client, argument, service.clock())
        return
    (outcome,) = service.engine.mint_many([made], service.clock())
    if outcome.error is not None:
        raise outcome.error


def _take(
    service: Service,
    name: str,
    everything: bool,
    done: Done,
    handle: Callable[[DeadLetter], None],
    as_json: bool,
) -> None:
    """Handle one letter or all, audit each, and take it off the queue; one that `handle` refuses stays.

    `done` is the action for the audit, and what is told of the letters taken.
    """
    if bool(name) == everything:
        raise InvalidRequest("expected either the id of a dead letter or --all")
    action, told = done
    refused: list[str] = []

    def take(letter: DeadLetter) -> bool:
        if not (everything or letter.id == name):
            return False
        try:
            handle(letter)
        except MinterError as error:
            refused.append(f"{letter.id}: {error.reason}: {error.message}")
            return False
        except Exception as error:  # noqa: BLE001 - it failed in a worker, too; the others go on
            refused.append(f"{letter.id}: failed again: {type(error).__name__}")
            return False
        details = {"client": letter.client, "task": letter.task, "reason": letter.reason}
        audits.note(service.pool, whoami(), action, letter.id, details)
        return True

    taken = _each(service, take)
    for line in refused:
        typer.echo(line, err=True)
    if refused and not taken:
        raise typer.Exit(1)
    if name and not taken:
        raise _not_there(name)
    show(as_json, {told: [d.id for d in taken]}, lambda: f"{len(taken)} dead letters {told}")


def _not_there(name: str) -> InvalidRequest:
    return InvalidRequest(f"no dead letter has the id {name!r}; run: minter dead list")
