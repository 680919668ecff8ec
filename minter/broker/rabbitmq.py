"""RabbitMQ users and permissions: one user for each client, who can only send requests and read replies."""

import json
import re
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from minter.broker import connections
from minter.contract.names import DEAD_LETTER_QUEUE, REQUEST_EXCHANGE, client_requests, reply_prefix
from minter.errors import SettingsError, Unavailable
from minter.private_files import write_private_file

COMMAND_SECONDS = 60


def permissions(client: str, queues: Sequence[str] = ()) -> tuple[str, str, str]:
    """Return the configure, write and read patterns of a client.

    The client may declare and read its own reply queues, read the durable `queues` listed for it, and
    write to the request exchange and to its own. It may use no queue of others, and not the default
    exchange, which reaches every queue.
    """
    own = f"^{re.escape(reply_prefix(client))}.*$"
    read = "|".join([own, *(f"^{re.escape(q)}$" for q in queues)])
    write = f"^({re.escape(REQUEST_EXCHANGE)}|{re.escape(client_requests(client))})$"
    return own, write, read


# RabbitMQ 4 would drop a dead letter after it was looked at 20 times.
_DEAD_LETTER_LIMIT = '{"max-length-bytes":1073741824,"overflow":"drop-head","delivery-limit":1000000000}'


def setup_users(
    clients: Mapping[str, Sequence[str]], broker_url: str, rabbitmqctl: str, passwords: Path | None
) -> list[str]:
    """Create missing users with new passwords, set every client's permissions, return the new users' names.

    `clients` gives the durable queues listed for each client.

    New passwords are written to the new file `passwords` (mode 600, a JSON object), never to the terminal.
    Dead letters are bounded: the oldest give way, so that nobody's broken messages can fill the disk.
    Raises InvalidRequest if that file exists, SettingsError if it is needed but not named, Unavailable with
    the error of rabbitmqctl.
    """
    vhost = connections.vhost(broker_url)
    listed = json.loads(_call(rabbitmqctl, "list_users", "--formatter", "json"))
    known = {row["user"] for row in listed}
    new = {name: secrets.token_urlsafe(32) for name in clients if name not in known}
    if new and passwords is None:
        raise SettingsError(
            f"{len(new)} users must be created ({', '.join(new)}); name a file with --passwords"
        )
    if new and passwords is not None:  # before add_user: a lost password would lock the user out
        write_private_file(passwords, json.dumps(new, indent=1))
    _call(
        rabbitmqctl, "set_policy", "-p", vhost, DEAD_LETTER_QUEUE,
        f"^{re.escape(DEAD_LETTER_QUEUE)}$", _DEAD_LETTER_LIMIT, "--apply-to", "queues",
    )  # fmt: skip
    for name, password in new.items():
        _call(rabbitmqctl, "add_user", name, stdin=password)
    for name, queues in clients.items():
        _call(rabbitmqctl, "set_permissions", "-p", vhost, name, *permissions(name, queues))
    return list(new)


def new_password(client: str, rabbitmqctl: str, passwords: Path) -> None:
    """Give a client's user a new password, which is written to the new file `passwords` first.

    Connections that are open stay so. Raises InvalidRequest if the file exists, Unavailable with the error of
    rabbitmqctl, such as for a user that does not exist.
    """
    password = secrets.token_urlsafe(32)
    write_private_file(passwords, json.dumps({client: password}, indent=1))
    _call(rabbitmqctl, "change_password", client, stdin=password)


def _call(rabbitmqctl: str, *arguments: str, stdin: str | None = None) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the operator names the program
            [rabbitmqctl, "--quiet", *arguments],
            input=stdin, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{rabbitmqctl} cannot be run: {type(error).__name__}") from error
    if done.returncode != 0:
        raise Unavailable(f"{rabbitmqctl} {arguments[0]} failed: {done.stderr.strip()[:300]}")
    return done.stdout
