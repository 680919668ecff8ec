"""The refresher: gets managed tokens from their providers and keeps them fresh, within the providers' limits.

Each loop iteration saves the answers that arrived, and takes the tokens that are due: it leases their rows,
each with a slot of the shared budget. A request is sent at its slot or not at all. The steps, and the effect
of a crash after each of them:

1. Lease, in one transaction with the budget. After a crash the lease expires, and another refresher goes on.
2. Ask, with no transaction open. After a crash a refresh token that works only once may be spent. Its row
   says so, and a new exchange, the route's fallback, or `refresh_token_lost` follows.
3. Save, under the lease: the new refresh token is in its row before anybody can have the access token.
"""

import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from queue import Empty, SimpleQueue

from msgspec import structs
from sqlalchemy.engine import Engine as Pool

from minter import alive, logs
from minter.backoff import Backoff
from minter.database import leases, managed, providers
from minter.database.connection import transaction
from minter.database.control import read_control, read_version
from minter.database.fallbacks import lease_for_fallback
from minter.database.leases import Leased, Result, Taken
from minter.errors import (
    Banned,
    Lost,
    MinterError,
    Misconfigured,
    NoUsableKey,
    ProviderAway,
    ProviderRefused,
    RefreshTokenLost,
    Unavailable,
    UnknownClient,
)
from minter.providers.answers import Asked, Obtained
from minter.providers.budgets import HORIZON, backoff_seconds
from minter.providers.iam import IAM
from minter.refresher import discovery
from minter.refresher.answers import Observe, ProviderAnswer, health_of, kept, threads_of
from minter.refresher.fallbacks import Fallbacks, failure
from minter.refresher.notifications import Pushes, Send
from minter.tasks.lifecycle import Lifecycle
from minter.tokens.clock import check_clock
from minter.tokens.keystore import Keystore
from minter.tokens.managed import LEAST_SECONDS, forbidden, next_need
from minter.tokens.records import Control, fts_token_id

logger = logging.getLogger("minter.refresher")

TOLERANCE_SECONDS = 0.012
"""A request later than this, in seconds, is not sent: sent late, it would share its second with requests on
time and exceed the budget."""
IDLE_SECONDS = 0.05
"""How long, in seconds, a refresher sleeps when nothing is due: a due token is noticed no later than this."""
TOGETHER, TOGETHER_SECONDS = 4, 0.02
"""While more than TOGETHER requests are unanswered, answers of TOGETHER_SECONDS are saved together."""
MAINTENANCE_SECONDS = 5.0
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.1, 10.0
KEYLESS = timedelta(minutes=5)
"""Delay until the next request for a token whose secrets could not be encrypted."""
FALLBACKS_AT_ONCE = 100
"""Tokens of one provider that get a fallback in one run of the maintenance, at most."""


class Refresher:
    """Keeps managed tokens fresh, as one of several processes; `run` returns after `stopped` was set.

    `time_scale` is how many times faster than real time `clock` runs: 1 except in drills. With `checks_clock`
    the refresher takes no tokens while its clock differs from Postgres's, because it would end live tokens
    early and delay the other refreshers.
    """

    def __init__(
        self,
        pool: Pool,
        keystore: Keystore,
        lifecycle: Lifecycle,
        iams: Mapping[str, IAM],
        clock: Callable[[], datetime],
        observe: Observe = lambda *_: None,
        send: Send | None = None,
        time_scale: float = 1.0,
        *,
        checks_clock: bool = True,
        jitter: Callable[[float], float] = lambda bound: random.uniform(0, bound),  # noqa: S311 - jitter
    ) -> None:
        self._pool = pool
        self._keystore = keystore
        self._iams = iams
        self._clock = clock
        self._observe = observe
        self._matching_of = lifecycle.engine.policy.matching_of
        pushes = Pushes(pool, keystore, self._current, send, self._matching_of) if send is not None else None
        self._pushes = pushes
        self._fallbacks = {name: Fallbacks(pool, lifecycle, self._pushes) for name in iams}
        self._scale = time_scale
        self._checks_clock = checks_clock
        self._jitter = jitter
        self._out: Counter[str] = Counter()
        self._came: SimpleQueue[tuple[IAM, Taken, Leased, ProviderAnswer]] = SimpleQueue()
        self._unsaved: list[tuple[IAM, Taken, Leased, ProviderAnswer]] = []
        self._threads = {name: ThreadPoolExecutor(threads_of(iam), name) for name, iam in iams.items()}
        self._version = -1
        self._control: Control
        self._maintained_at = float("-inf")
        self.stopped = False

    def run(self) -> None:
        """Keep tokens fresh until `stopped`, then wait for unanswered requests and save their answers."""
        backoff = Backoff(FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS)
        while not self.stopped or self._out.total() or self._unsaved:
            alive.turn()
            try:
                busy = self.run_once()
                backoff.reset()
            except Unavailable as error:
                pause = backoff.pause()
                logger.warning("cannot go on, trying again in %.1f s: %s", pause, error)
                time.sleep(pause)
                continue
            if self._out.total() > TOGETHER:
                time.sleep(TOGETHER_SECONDS)
            elif self._out.total():
                self._wait()
            elif not busy:
                time.sleep(IDLE_SECONDS)
        alive.rest()
        for threads in self._threads.values():
            threads.shutdown()

    def run_once(self) -> bool:
        """Save the answers that arrived and take the tokens that are due; return whether there were any."""
        while not self._came.empty():
            self._note_came(self._came.get_nowait())
        done = len(self._unsaved)
        self._save()
        if self.stopped:
            return bool(done)
        taken = [self._take(iam) for iam in self._iams.values()]
        if self._pushes is not None:
            self._pushes.run_once(self._clock())
        if time.monotonic() - self._maintained_at > max(MAINTENANCE_SECONDS / self._scale, IDLE_SECONDS):
            self._maintained_at = time.monotonic()
            self._maintenance()
        return bool(done) or any(taken)

    def _wait(self) -> None:
        """Wait for the next answer, IDLE_SECONDS / 5 at most, because tokens may be due."""
        with suppress(Empty):
            self._note_came(self._came.get(timeout=IDLE_SECONDS / 5))

    def _note_came(self, came: tuple[IAM, Taken, Leased, ProviderAnswer]) -> None:
        self._out[came[0].provider.name] -= 1
        self._unsaved.append(came)

    # ── taking ───────────────────────────────────────────────────────────────────────────────

    def _take(self, iam: IAM) -> bool:
        provider, now, started = iam.provider, self._clock(), time.monotonic()
        free = threads_of(iam) - self._out[provider.name]
        if free <= 0:
            return False
        control = self._current()  # before the lease: after it nothing may fail before the requests
        taken = leases.take(
            self._pool, provider, uuid.uuid4(), free, now, self._lease_seconds(iam), HORIZON * self._scale
        )
        if taken is None:
            return False
        for number, token in enumerate(taken.tokens):
            slot = taken.slots.first + number * taken.slots.interval - now
            refused = forbidden(token, control.clients, control.bans, self._matching_of)
            self._out[provider.name] += 1
            if refused is None:
                at = started + slot.total_seconds() / self._scale
                self._threads[provider.name].submit(self._run, iam, taken, token, at)
            else:
                self._came.put((iam, taken, token, ProviderAnswer("", error=refused, sent=False)))
        return True

    def _lease_seconds(self, iam: IAM) -> float:
        """Return the duration of a lease, in seconds of `clock`: enough to get and save the answer."""
        return (5 * iam.provider.timeout_seconds + 20) * self._scale

    def _current(self) -> Control:
        with transaction(self._pool) as connection:
            version, at = read_version(connection)
            if self._checks_clock:
                check_clock((self._clock() - at).total_seconds())
            if version != self._version:
                self._control, self._version = read_control(connection), version
        return self._control

    # ── asking: in a thread of the provider's, without a transaction ─────────────────────────

    def _run(self, iam: IAM, taken: Taken, token: Leased, slot: float) -> None:
        self._came.put((iam, taken, token, self._ask(iam, token, slot)))

    def _ask(self, iam: IAM, token: Leased, slot: float) -> ProviderAnswer:
        time.sleep(max(0.0, slot - time.monotonic()))
        if time.monotonic() - slot > TOLERANCE_SECONDS:
            return ProviderAnswer("", sent=False)
        started = time.perf_counter()
        grant, error, obtained = "none", None, None
        try:
            grant, send = self._request(iam, token)
            obtained = send()
        except MinterError as caught:
            error = caught
            if isinstance(caught, Unavailable) and not isinstance(caught, ProviderAway):
                grant = "none"  # nothing was sent
        except Exception as caught:
            logger.exception("the refresher failed to ask provider %s", iam.provider.name)
            error = Lost(f"the refresher failed ({type(caught).__name__})")
        return ProviderAnswer(grant, obtained, error, seconds=time.perf_counter() - started)

    def _request(self, iam: IAM, token: Leased) -> tuple[str, Callable[[], Obtained]]:
        """Return the OAuth grant type and the call that uses it; raises RefreshTokenLost if there is none."""
        left = int((token.deadline - self._clock()).total_seconds())
        least = max(LEAST_SECONDS, min(token.least_seconds, left))
        asked = Asked(token.scope, tuple(token.audience), token.cap_seconds, min(least, token.cap_seconds))
        if token.mode == "client_credentials":
            return "client_credentials", lambda: iam.client_credentials(asked)
        if token.refresh is not None and (iam.provider.replays or not token.spent):
            refresh = self._keystore.open_token(token.vo, token.jti, "refresh", token.refresh)
            # Scopes that were left out once are not requested again: some IAMs would refuse the request.
            asked = structs.replace(asked, scope=token.granted_scope or token.scope)
            return "refresh_token", lambda: iam.refresh(asked, refresh)
        if token.subject is not None:
            subject = self._keystore.open_token(token.vo, token.jti, "subject", token.subject)
        elif token.client_subject is not None:
            subject = self._keystore.open_token(
                token.vo, token.client, "client_subject", token.client_subject
            )
        elif token.spent:
            raise RefreshTokenLost(
                f"a refresh token of provider {iam.provider.name} was sent and its answer never came; it "
                "works once only, and there is no subject token to exchange again: renew the request"
            )
        else:
            raise RefreshTokenLost(
                f"provider {iam.provider.name} gave no refresh token, and there is no subject token to "
                "exchange again: renew the request"
            )
        return "token_exchange", lambda: iam.exchange(asked, subject)

    # ── saving ───────────────────────────────────────────────────────────────────────────────

    def _save(self) -> None:
        """Save the answers that arrived, in one statement; if that fails, they are kept for the next time."""
        if not self._unsaved:
            return
        now, unsaved = self._clock(), self._unsaved
        results: list[Result] = []
        failed: list[tuple[Taken, Leased, MinterError]] = []
        for iam, taken, token, answer in unsaved:
            if not answer.sent and answer.error is None:
                continue
            try:
                made = self._result(iam, taken, token, answer, now)
            except NoUsableKey as closed:  # the tokens of other VOs are saved
                logger.error("token %s cannot be saved: %s", token.jti, closed)  # noqa: TRY400 - told in full
                made = structs.replace(kept(taken, token), retry_at=now + KEYLESS, spent=True)
            if isinstance(made, Result):
                results.append(made)
            elif token.fallback and not isinstance(made, Banned | UnknownClient):
                failed.append((taken, token, made))
            else:
                results.append(failure(token, taken.lease, made))
        for taken in {t.lease: t for _, t, _, _ in unsaved}.values():
            unsent = [k for _, t, k, a in unsaved if t is taken and not a.sent and a.error is None]
            if unsent:
                leases.release(self._pool, unsent, taken.lease)
        saved = leases.save(self._pool, results)
        self._unsaved = []
        self._note(unsaved, saved, now)
        for taken, token, error in failed:
            self._fallbacks[taken.provider].give(token, taken.lease, error, now)

    def _result(
        self, iam: IAM, taken: Taken, token: Leased, answer: ProviderAnswer, now: datetime
    ) -> Result | MinterError:
        """Return the result to save after one request, or the error that ends the token."""
        # A refresh token that may be spent is deleted once another grant type was used.
        forget = token.spent and answer.grant != "refresh_token"
        keep = structs.replace(kept(taken, token), refresh=b"" if forget else None)
        again = structs.replace(
            keep,
            tries=token.tries + 1,
            retry_at=now + timedelta(seconds=backoff_seconds(token.tries, self._jitter)),
        )
        error = answer.error
        if isinstance(error, Lost) and answer.grant == "refresh_token" and not iam.provider.replays:
            return structs.replace(again, spent=True, error=error.as_dict())
        if isinstance(error, Unavailable | Misconfigured):
            return structs.replace(again, error=error.as_dict())
        if isinstance(error, ProviderRefused) and answer.grant == "refresh_token":
            if token.subject is None and token.client_subject is None:
                return error
            return structs.replace(keep, refresh=b"")  # a new exchange, at the next slot
        if error is not None:
            return error
        assert answer.obtained is not None
        return self._given(iam, token, answer.obtained, keep, again, now)

    def _given(
        self, iam: IAM, token: Leased, obtained: Obtained, keep: Result, again: Result, now: datetime
    ) -> Result | MinterError:
        """Return the result to save for an answer; a refresh token is kept even beside a rejected token."""
        seal = self._keystore.seal_token
        refresh = keep.refresh
        if obtained.refresh:
            refresh = seal(token.vo, token.jti, "refresh", obtained.refresh)
        if obtained.error is not None:
            if now >= token.needed_at:  # the token is needed and cannot wait longer
                return obtained.error
            return structs.replace(again, refresh=refresh, error=obtained.error.as_dict())
        if not obtained.access:
            first = token.tries == 0
            return structs.replace(again, refresh=refresh, retry_at=None if first else again.retry_at)
        expires_at = datetime.fromtimestamp(obtained.expires_at, now.tzinfo)
        lead_seconds, needed_at = next_need(expires_at, token.deadline, now, iam.provider)
        return Result(
            jti=token.jti,
            lease=keep.lease,
            state="issued",
            access=seal(token.vo, token.jti, "access", obtained.access),
            refresh=refresh,
            expires_at=expires_at,
            scope=obtained.scope,
            fts_token_id=fts_token_id(obtained.access.encode()),
            lead_seconds=lead_seconds,
            needed_at=needed_at,
        )

    def _note(
        self,
        answers: Sequence[tuple[IAM, Taken, Leased, ProviderAnswer]],
        saved: set[uuid.UUID],
        now: datetime,
    ) -> None:
        """Report the outcomes of requests that were sent to the circuit breaker, the metrics and the log."""
        for _, taken, _, answer in answers:
            if taken.probe is not None and not answer.asked:
                providers.end_probe(self._pool, taken.provider, taken.probe)
        for name, iam in self._iams.items():
            sent = [(t, k, a) for i, t, k, a in answers if i is iam and a.asked]
            if not sent:
                continue
            told = [health_of(answer) for _, _, answer in sent]
            before, after = providers.note_answers(self._pool, name, told, now, self._jitter)
            if before.open_until != after.open_until:
                until = after.open_until.isoformat() if after.open_until else None
                logs.event(
                    logger, "provider paused" if until else "provider is back", provider=name, until=until
                )
            for _, token, answer in sent:
                obtained = answer.obtained or Obtained()
                error = answer.error or obtained.error
                outcome = error.reason if error else "ok" if token.jti in saved else "outrun"
                self._observe(name, answer.grant, outcome, answer.seconds)
                logs.event(
                    logger, "provider asked", provider=name, grant=answer.grant, outcome=outcome,
                    jti=str(token.jti), client=token.client, vo=token.vo,
                    token_jti=obtained.jti or None, dropped=" ".join(obtained.dropped) or None,
                    error=error.message if error else None,
                )  # fmt: skip

    # ── maintenance ───────────────────────────────────────────────────────────────────────────────

    def _maintenance(self) -> None:
        """Give fallback tokens for paused providers, probe these providers, finish overdue tokens."""
        now = self._clock()
        for iam in self._iams.values():
            lease, seconds = uuid.uuid4(), self._lease_seconds(iam)
            paused = ProviderAway(f"provider {iam.provider.name} is paused")
            fallbacks = self._fallbacks[iam.provider.name]
            fallbacks.note_pause(providers.paused_until(self._pool, iam.provider.name))
            for token in lease_for_fallback(
                self._pool, iam.provider, lease, FALLBACKS_AT_ONCE, now, seconds, fallbacks.refused
            ):
                fallbacks.give(token, lease, paused, now)
            if providers.probe(self._pool, iam.provider, now, seconds):
                is_back = discovery.probe(iam)
                told = [(not is_back, 0.0)]
                providers.note_answers(self._pool, iam.provider.name, told, now, self._jitter)
        managed.end_overdue(self._pool, now)
