"""The commands `audit` (who changed what) and `dead` (messages that no worker could serve)."""

from collections.abc import Callable
from hashlib import sha256
from typing import Annotated, Any

import msgspec
import typer
from msgspec import Raw, Struct

from minter.broker.publisher import connect
from minter.cli.tables import AsJson, as_table, guarded, open_service, show, whoami
from minter.contract import names
from minter.database import audit as audits
from minter.errors import InvalidRequest, MinterError, Unavailable
from minter.jws import without_tokens
from minter.service import Service
from minter.tasks import dispatch
from minter.tasks.lifecycle import Lifecycle

dead_app = typer.Typer(no_args_is_help=True, help="Look at messages that no worker could serve.")
MOST_DEAD = 1_000
"""Dead letters that one command looks at."""
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
        lambda: as_table(
            f"{len(found)} changes",
            ("when", "who", "what", "of", "details"),
            [
                (f"{c.at:%F %T}", c.actor, c.action, c.subject, msgspec.json.encode(c.details).decode())
                for c in found
            ],
        ),
    )


# ── dead letters ─────────────────────────────────────────────────────────────────────────────


class DeadLetter(Struct, frozen=True, kw_only=True):
    """One dead letter; its id is a digest of sender, task and body."""

    id: str
    client: str
    task: str
    reason: str
    why: str
    bytes: int
    body: Raw


def _described(message: Any) -> DeadLetter:
    headers = message.headers if isinstance(message.headers, dict) else {}
    body = message.body if isinstance(message.body, bytes) else str(message.body).encode()
    client, reason = str(headers.get("minter-client", "")), str(headers.get("minter-reason", ""))
    why, task = str(headers.get("minter-description", "")), str(headers.get("task", ""))
    if {"x-death", "x-first-death-reason"} & headers.keys():
        # The broker put it here by itself: its headers are the sender's, and only user_id was checked.
        client, reason = str(message.properties.get("user_id") or ""), "rejected"
        why = f"by the broker: {headers.get('x-first-death-reason', 'see its x-death header')}"
    safe = without_tokens(body)
    return DeadLetter(
        id=sha256(f"{client} {task}".encode() + body).hexdigest()[:12], client=client, task=task[:255],
        reason=reason, why=why, bytes=len(body),
        body=Raw(safe if _is_json(safe) else msgspec.json.encode(repr(safe[:200]))),
    )  # fmt: skip


def _is_json(body: bytes) -> bool:
    try:
        msgspec.json.decode(body, type=Raw)
    except msgspec.DecodeError:
        return False
    return True


def _each(service: Service, handle: Any) -> list[DeadLetter]:
    """Give each dead letter to `handle`, which returns True to take it off the queue; return those taken.

    All others stay, in their order. A letter is acknowledged after it was handled, so a lost connection
    loses none.
    """
    loaded, taken = service.loaded, []
    connection = connect(loaded.broker_url, loaded.broker_ca)
    try:
        channel = connection.channel()
        for _ in range(MOST_DEAD):
            message = channel.basic_get(names.DEAD_LETTER_QUEUE)
            if message is None:
                break
            letter = _described(message)
            if handle(letter):
                channel.basic_ack(message.delivery_tag)
                taken.append(letter)
    except (*connection.connection_errors, *connection.channel_errors) as error:
        raise Unavailable(f"the broker cannot be asked: {error or type(error).__name__}"[:300]) from error
    finally:
        connection.release()  # the broker puts back what was not acknowledged
    return taken


@dead_app.command("list")
@guarded
def dead_list(as_json: AsJson = False) -> None:
    """List dead letters: who sent each, and why no worker could serve it."""
    found: list[DeadLetter] = []
    _each(open_service(), found.append)
    show(
        as_json,
        [{**msgspec.structs.asdict(d), "body": None} for d in found],
        lambda: as_table(
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
