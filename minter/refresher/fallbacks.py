"""Fallback tokens: tokens of the routes named in a fallback, for tokens that a provider does not give.

They are decided and recorded as a renewal of the request's tokens, by these routes only. The handles stay
the same, and give the fallback tokens from then on.
"""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec import structs
from sqlalchemy.engine import Engine as Pool

from minter import logs
from minter.contract.followups import RenewRequest
from minter.contract.messages import Slot, TokenAnswer
from minter.database import leases
from minter.database.fallbacks import fall_back, live_uses
from minter.database.leases import Leased, Result
from minter.errors import MinterError, RefreshTokenLost, RequestError, Unavailable
from minter.policy.limits import BACKDATE_SECONDS
from minter.policy.requests import Request
from minter.refresher.notifications import Pushes
from minter.tasks.lifecycle import Lifecycle
from minter.tokens.outcomes import Issued, Outcome, Submission

logger = logging.getLogger("minter.stand_ins")

Use = tuple[UUID, UUID, str, int, Any, int]
"""One use as `live_uses` returns it: use_id, request_id, queue, file, side and position."""
Needs = Mapping[Slot, UUID]
"""Ids of uses by slot (file, side, position)."""


class Fallbacks:
    """Replaces leased tokens of one provider by fallback tokens; without a broker `pushes` is None."""

    def __init__(self, pool: Pool, lifecycle: Lifecycle, pushes: Pushes | None) -> None:
        self._pool = pool
        self._lifecycle = lifecycle
        self._pushes = pushes
        self.refused: dict[UUID, None] = {}
        """Tokens whose fallback was refused; they are not tried again before the provider's pause changes."""
        self._paused_until: datetime | None = None

    def note_pause(self, until: datetime | None) -> None:
        """Forget refusals when the provider's pause, which any refresher may end or renew, has changed."""
        if until != self._paused_until:
            self.refused.clear()
            self._paused_until = until

    def give(self, token: Leased, lease: UUID, why: MinterError, now: datetime) -> None:
        """Move the uses of a token to fallback tokens, one request at a time; if refused, the token fails.

        While the broker of the queues to notify is unavailable, uses are not moved: the lease expires, and
        the fallback is tried again. A token does not fail for a refused fallback if `why` is Unavailable,
        because its provider may come back.
        """
        uses = live_uses(self._pool, token.jti)
        refused: RequestError | None = None
        for request_id in dict.fromkeys(use[1] for use in uses):
            own = [use for use in uses if use[1] == request_id]
            try:
                instead = self._given(token, request_id, own, now)
            except RequestError as error:
                refused = error
                logger.warning("no fallback for request %s, token %s: %s", request_id, token.jti, error)
                continue
            except Unavailable as error:
                logger.warning("no fallback for token %s yet: %s", token.jti, error)
                return
            served = fall_back(self._pool, token.jti, lease, instead)
            logs.event(logger, "fallback issued", jti=str(token.jti), reason=why.reason, uses=served)
        if refused is not None and not isinstance(why, Unavailable):
            fail(self._pool, token, lease, refused)
            return
        if refused is not None:  # the provider may come back
            self.refused[token.jti] = None
        leases.release(self._pool, [token], lease)  # uses may have been added meanwhile

    def _given(self, token: Leased, request_id: UUID, uses: Sequence[Use], now: datetime) -> dict[UUID, UUID]:
        """Record fallback tokens for the uses of one request, and push them to the queues of these uses.

        Returns the jti or handle of the fallback token for each use.
        """
        needs: Needs = {Slot(*use[3:]): use[0] for use in uses}
        queues = {use[0]: use[2] for use in uses if use[2]}
        outcome = self._minted(token, request_id, needs, now)
        if self._pushes is not None:
            self._pushes.send(
                (token.client, queues[needs[i.slot]], request_id, _answered(i, needs[i.slot]))
                for i in outcome.issued
                if needs.get(i.slot) in queues
            )
        given = {i.slot: UUID(i.jti) for i in outcome.issued}
        given |= {a.slot: UUID(a.handle) for a in outcome.pending}
        return {use: given[need] for need, use in needs.items()}

    def _minted(self, token: Leased, request_id: UUID, needs: Needs, now: datetime) -> Outcome:
        """Decide and record fallback tokens for one request; raises the error that refuses them."""
        engine = self._lifecycle.engine
        files = tuple(sorted({file for file, _, _ in needs}))
        wire = RenewRequest(request_id=engine.new_jti(), renews=request_id, files=files)
        life = int((token.deadline - now).total_seconds()) + BACKDATE_SECONDS
        routes = self._routes(token, now)
        request = _only(self._lifecycle.renewal(token.client, wire), needs, life, routes)
        (outcome,) = engine.mint_many([Submission(request, token.client)], now)
        if outcome.error is not None:
            raise outcome.error
        given = {issued.slot for issued in outcome.issued} | {pending.slot for pending in outcome.pending}
        if missing := [need for need in needs if need not in given]:
            first = outcome.refusals[0]["error"]["error_description"] if outcome.refusals else "no reason"
            raise RefreshTokenLost(
                f"the fallback refuses {len(missing)} of {len(needs)} tokens: {first}"[:400]
            )
        return outcome

    def _routes(self, token: Leased, now: datetime) -> tuple[str, ...]:
        """Return the fallback's routes that may be used: only those that mint, while the token is valid.

        Raises RefreshTokenLost if there is none.
        """
        valid = token.expires_at is not None and token.expires_at > now
        found = tuple(
            route.name
            for route in self._lifecycle.engine.policy.routes
            if route.name in token.fallback and (route.mode == "mint" or not valid)
        )
        if not found:
            raise RefreshTokenLost("no route of the fallback gives a token at once")
        return found


def fail(pool: Pool, token: Leased, lease: UUID, error: MinterError) -> None:
    """Save a token as failed, with its reason; its current access token works until it expires."""
    leases.save(pool, [failure(token, lease, error)])


def failure(token: Leased, lease: UUID, error: MinterError) -> Result:
    """Log that a token failed, and return the result to save."""
    logs.event(
        logger, "managed token failed", jti=str(token.jti), client=token.client, vo=token.vo,
        reason=error.reason, error=error.message,
    )  # fmt: skip
    return Result(
        jti=token.jti, lease=lease, state="failed", refresh=b"", subject=b"", tries=token.tries,
        fts_token_id=0, error=error.as_dict(),
    )  # fmt: skip


def _only(request: Request, needs: Needs, life_seconds: int, routes: tuple[str, ...]) -> Request:
    """Return a renewal restricted to some slots, to a lifetime in seconds, and to the fallback's routes."""
    files = []
    for file in request.files:
        kept = [n for n in file.needs if (n.file, n.side, n.index) in needs]
        if kept:
            life = [structs.replace(n, life_seconds=life_seconds, one_token=False) for n in kept]
            files.append(structs.replace(file, needs=tuple(life)))
    return structs.replace(request, files=tuple(files), service=None, routes=routes, all_or_nothing=False)


def _answered(issued: Issued, use_id: UUID) -> TokenAnswer:
    file, side, index = issued.slot
    return TokenAnswer(
        file, side, index, issued.storage, issued.scope, issued.jti, issued.exp, issued.token.decode(),
        str(use_id),
    )  # fmt: skip
