"""Pushes: access tokens and failures of managed tokens, sent to the durable queues that requests named.

The row of a managed token says what was pushed last, so each change is sent at least once, even if a
process dies meanwhile.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec import Struct
from sqlalchemy.engine import Engine as Pool

from minter import logs
from minter.contract.messages import Answer, RefusedNeed, TokenAnswer
from minter.database.notifications import Unpushed, pushed, unpushed
from minter.errors import NoUsableKey, Unavailable
from minter.policy.clients import Client
from minter.storages.dialects import Matching
from minter.tokens.keystore import Keystore
from minter.tokens.managed import SHOWN_SECONDS, forbidden
from minter.tokens.records import Control

logger = logging.getLogger("minter.pushes")

MOST = 200
"""Managed tokens pushed at once, at most."""
AWAY_SECONDS = 10.0
"""How long, in seconds, nothing is pushed after the broker was unavailable."""
REFUSED_SECONDS = 60.0
"""How long, in seconds, nothing is pushed to a queue that refused a push, because it is full."""


class Push(Struct, frozen=True):
    """An answer for one of a client's durable queues."""

    client: Client
    queue: str
    answer: Answer


Send = Callable[[Sequence[Push]], set[str]]
"""Sends pushes and returns the queues that refused theirs; raises Unavailable if the broker is away."""
Told = tuple[str, str, UUID, TokenAnswer | RefusedNeed]
"""The message for one use: client, queue and request_id, and the token or the refusal."""


class Pushes:
    """Pushes changed managed tokens; a queue that refuses a push gets none for REFUSED_SECONDS."""

    def __init__(
        self,
        pool: Pool,
        keystore: Keystore,
        control: Callable[[], Control],
        send: Send,
        matching_of: Callable[[str, str], Matching],
    ) -> None:
        self._matching_of = matching_of
        self._pool = pool
        self._keystore = keystore
        self._control = control
        self._send = send
        self._away_until = float("-inf")
        self._refused_until: dict[str, float] = {}

    def run_once(self, now: datetime) -> None:
        """Push the tokens that changed; pushes that were not confirmed are repeated later."""
        if time.monotonic() < self._away_until:
            return
        changed = unpushed(self._pool, now, MOST, self._refusing())
        if not changed:
            return
        control = self._control()
        told = [told for one in changed if (told := self._told(one, control, now)) is not None]
        try:
            refusing = self.send(told)
        except Unavailable as error:
            self._away_until = time.monotonic() + AWAY_SECONDS
            logger.warning("not pushed: %s", error)
            return
        pushed(self._pool, {one.jti: one.fts_token_id for one in changed if one.queue not in refusing})

    def _refusing(self) -> list[str]:
        now = time.monotonic()
        self._refused_until = {queue: until for queue, until in self._refused_until.items() if until > now}
        return list(self._refused_until)

    def send(self, told: Iterable[Told]) -> set[str]:
        """Send an answer for each request and queue, return the queues that refused; raises Unavailable."""
        answers: dict[tuple[str, str, UUID], list[TokenAnswer | RefusedNeed]] = {}
        for client, queue, request_id, one in told:
            answers.setdefault((client, queue, request_id), []).append(one)
        if not answers:
            return set()
        clients = self._control().clients
        pushes = [
            Push(
                clients[client],
                queue,
                Answer(
                    request_id=str(request_id),
                    tokens=[a for a in given if isinstance(a, TokenAnswer)],
                    refusals=[a for a in given if isinstance(a, RefusedNeed)],
                ),
            )
            for (client, queue, request_id), given in answers.items()
            if queue in clients[client].reply_queues
        ]
        refusing = self._send(pushes)
        for queue in refusing:
            self._refused_until[queue] = time.monotonic() + REFUSED_SECONDS
            logger.warning("queue %s refuses pushes: is it full?", queue)
        logs.event(logger, "pushed", answers=sum(push.queue not in refusing for push in pushes))
        return refusing

    def _told(self, one: Unpushed, control: Control, now: datetime) -> Told | None:
        """Return the message for a use: a token, a refusal, or None if there is nothing to send."""
        if one.request_id is None or one.state not in ("issued", "failed"):
            return None
        side: Any = one.side
        if (why := forbidden(one, control.clients, control.bans, self._matching_of)) is not None:
            logs.event(logger, "not pushed", jti=str(one.jti), reason=why.reason)
            return None
        if one.state == "failed" or one.access is None or one.expires_at is None:
            refused = RefusedNeed(one.file, side, one.position, one.error or {})
            return one.client, one.queue, one.request_id, refused
        if one.expires_at - now < timedelta(seconds=SHOWN_SECONDS):
            return None
        try:
            token = self._keystore.open_token(one.vo, one.jti, "access", one.access)
        except NoUsableKey as error:
            logger.error("token %s cannot be pushed: %s", one.jti, error)  # noqa: TRY400 - told in full
            return None
        exp, handle = int(one.expires_at.timestamp()), str(one.use_id)
        answer = TokenAnswer(
            one.file, side, one.position, one.storage, one.granted_scope, handle, exp, token, handle
        )
        return one.client, one.queue, one.request_id, answer
