"""Dead letters: messages that no worker could serve, as operators look at them."""

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import kombu
import msgspec
from msgspec import Raw, Struct

from minter.broker.connections import opened
from minter.contract import names
from minter.jws import without_tokens

MOST = 1_000
"""Dead letters that are looked at, at once."""


class DeadLetter(Struct, frozen=True, kw_only=True):
    """One dead letter, its body without tokens; its id is a digest of sender, task and body."""

    id: str
    client: str
    task: str
    reason: str
    why: str
    bytes: int
    body: Raw


def each(connection: kombu.Connection, handle: Callable[[DeadLetter], object]) -> list[DeadLetter]:
    """Give each dead letter to `handle`, which returns True to take it off the queue; return those taken.

    All others stay, in their order. A letter is acknowledged after it was handled, so a lost connection
    loses none. Closes the connection. Raises Unavailable if the broker cannot be asked.
    """
    taken = []
    with opened(connection):  # at the end, the broker puts back what was not acknowledged
        channel = connection.channel()
        for _ in range(MOST):
            message = channel.basic_get(names.DEAD_LETTER_QUEUE)
            if message is None:
                break
            letter = _described(message)
            if handle(letter) is True:
                channel.basic_ack(message.delivery_tag)
                taken.append(letter)
    return taken


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
