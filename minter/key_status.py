"""What `minter status` says of keys: those that sign, that are revoked, and that the public sees."""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

import msgspec
import urllib3
from sqlalchemy.engine import Engine as Pool

from minter.database import co_issuers, live_tokens, overview
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.database.recovery import revocations
from minter.errors import NoUsableKey
from minter.lines import SECONDS, Line, failed, ok, warning
from minter.sections import CoIssuerSettings
from minter.service import Service
from minter.settings import Loaded
from minter.tokens import keys
from minter.tokens.co_issuer import IamKeys

MERGED_OLD = timedelta(minutes=10)
"""A merged key set that was not checked for longer has failed."""


def key_lines(pool: Pool, service: Service) -> Iterator[Line]:
    """Yield a line for the active key of each issuer and algorithm: standby, end, and whether it opens."""
    with transaction(pool, SECONDS) as connection:
        ring = read_keys(connection)
    now = service.clock()
    for vo, issuer in service.loaded.settings.issuers.items():
        for algorithm in issuer.algorithms:
            own = [k for k in ring if (k.vo, k.algorithm) == (vo, algorithm)]
            yield from _of_key(vo, algorithm, own, service, now)
    yield from _revoked(pool, now)


def _revoked(pool: Pool, now: datetime) -> Iterator[Line]:
    """Yield a warning for each key that was revoked lately: who still trusts it, and for how long."""
    for one in revocations(pool, now - max(live_tokens.CACHES.values()), SECONDS):
        left = {name: one.revoked_at + length - now for name, length in live_tokens.CACHES.items()}
        trust = ", ".join(f"{name} {str(t).partition('.')[0]}" for name, t in left.items() if t > timedelta())
        yield warning(
            f"{one.vo} keys",
            f"{one.kid} is revoked, and still trusted for ({trust}); make its live tokens anew: minter keys "
            f"recover {one.kid}",
        )


def _of_key(
    vo: str, algorithm: str, own: Sequence[keys.Key], service: Service, now: datetime
) -> Iterator[Line]:
    part = f"{vo} {algorithm}"
    active = next((k for k in own if k.state == "active"), None)
    standby = [k for k in own if k.state == "prepared"]
    if active is None:
        what = "signing key not public for long" if standby else "no active signing key"
        text = f"{what}; run: minter keys create --vo {vo}"
        yield warning(part, text) if standby else Line("failed", part, text, "no_key")
        return
    try:
        service.keystore.unlock(active)
    except NoUsableKey as error:
        yield Line("failed", part, f"key {active.kid} does not open: {error.message}", "locked")
        return
    until = keys.signs_until(active, service.engine.rotation)
    left = f", signs until {until:%F %H:%M}" if until else ""
    if until and until < now:
        yield warning(part, f"key {active.kid} was due at {until:%F %H:%M}; is beat running?")
    elif not standby:
        yield warning(part, f"key {active.kid}{left}, no standby; run: minter keys create --vo {vo}")
    else:
        ready = keys.may_sign_from(standby[0], service.engine.rotation)
        yield ok(part, f"key {active.kid}{left}; the standby may sign from {ready:%F %H:%M}")


def issuer_lines(pool: Pool, loaded: Loaded) -> Iterator[Line]:
    """Yield a failed line for each VO that has issued under another `iss` before."""
    recorded = overview.issuers(pool, SECONDS)
    for vo, iss in loaded.issuers.items():
        if recorded.get(vo, iss) != iss:
            yield failed(vo, f"has issued as {recorded[vo]!r}, not {iss!r}; correct issuers.{vo}.iss")


def published_lines(pool: Pool, loaded: Loaded, now: datetime) -> Iterator[Line]:
    """Yield a line for the JWKS of each VO as the public sees it, and for key sets merged with an IAM's."""
    with transaction(pool, SECONDS) as connection:
        ring = read_keys(connection)
    http = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(total=SECONDS))
    for vo, co_issuer in loaded.co_issuers.items():
        yield from _merged(co_issuers.known(pool, vo, SECONDS), co_issuer, now)
    for vo, iss in loaded.own_issuers.items():
        wanted = {k.kid for k in ring if k.vo == vo and keys.is_public(k, now)}
        try:
            answer = http.request("GET", f"{iss}jwks.json", redirect=False)
            told = msgspec.json.decode(answer.data, type=dict[str, list[dict[str, object]]])
            seen = {str(key.get("kid")) for key in told.get("keys", [])}
        except (urllib3.exceptions.HTTPError, msgspec.DecodeError) as error:
            yield warning(f"{vo} JWKS", f"{iss}jwks.json cannot be read from here: {error}"[:300])
            continue
        if missing := wanted - seen:
            yield failed(f"{vo} JWKS", f"{iss}jwks.json lacks {', '.join(sorted(missing))}; publish again")
        else:
            yield ok(f"{vo} JWKS", f"{len(seen)} keys at {iss}jwks.json")


def _merged(known: IamKeys, wanted: CoIssuerSettings, now: datetime) -> Iterator[Line]:
    """Yield the lines of a key set that has the IAM's keys, too: how old it is, and what is wrong with it."""
    part = f"{known.vo} IAM's keys"
    ages = {"fetched from the IAM": known.fetched_at, "written by minter publish": known.written_at}
    for what, at in ages.items():
        if at is None or now - at > MERGED_OLD:
            since = "never" if at is None else f"last at {at:%F %H:%M}"
            yield failed(part, f"{what}: {since}; is minter publish --watch running? {known.problem}")
            return
    if known.problem:
        yield warning(part, known.problem)
    else:
        yield ok(part, f"{len(known.keys)} keys of the IAM in {wanted.path}, fresh")
