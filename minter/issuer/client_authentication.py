"""Client authentication: `client_secret_basic`, `client_secret_post` (RFC 6749 §2.3.1), `private_key_jwt`.

Each process keeps the clients' secret hashes and keys, and reads them again when the control tables changed.
It checks for changes once a second, and when a client is unknown, so that a new client need not wait. The
recording transaction decides whether a client is disabled or banned, as everywhere.
"""

import base64
import hmac
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from urllib.parse import unquote_plus

import jwt
from msgspec import Struct
from sqlalchemy.engine import Engine as Pool

from minter.database.client_secrets import SecretRow, read_secrets, use_assertion
from minter.database.connection import QUICK_SECONDS, transaction
from minter.database.control import read_version
from minter.errors import InvalidClient, InvalidRequest, NoUsableKey
from minter.jws import UNREADABLE, is_compact
from minter.tokens.keystore import Keystore

logger = logging.getLogger(__name__)

ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_MAX_SECONDS = 3600
"""Longest remaining life of an assertion; its id is remembered until it expires."""
LEEWAY_SECONDS = 30
FRESH_SECONDS = 0.2
"""Shortest time between two reads of the control tables' version."""
_ID = re.compile(r"[!-~]{1,255}").fullmatch
_AFTER_SIGNATURE = (
    jwt.ExpiredSignatureError,
    jwt.ImmatureSignatureError,
    jwt.InvalidAudienceError,
    jwt.InvalidIssuedAtError,
    jwt.InvalidIssuerError,
    jwt.exceptions.InvalidJTIError,
    jwt.exceptions.InvalidSubjectError,
    jwt.MissingRequiredClaimError,
)
"""Errors that PyJWT raises for the claims of a token whose signature is right."""
WRONG = "client authentication failed; the client's name and secret, or a fresh signed assertion, are needed"


class Account(Struct, frozen=True):
    """A client's authentication data; `hashes` are (hash of a secret, its expiry or None)."""

    client_id: int
    name: str
    vo: str
    hashes: tuple[tuple[bytes, datetime | None], ...]
    auth_key: dict[str, str] | None

    def __repr__(self) -> str:
        """Name the client only."""
        return f"Account({self.name})"


class Presented(Struct, frozen=True):
    """A request's credentials: a client's name with a secret or an assertion. `repr` shows neither."""

    name: str
    secret: str = ""
    assertion: str = ""

    def __repr__(self) -> str:
        """Name the client only."""
        return f"Presented({self.name})"


def presented(authorization: str | None, form: Mapping[str, str]) -> Presented:
    """Return a request's credentials; raises InvalidClient, or InvalidRequest for two methods at once."""
    ways = [authorization is not None, "client_secret" in form, "client_assertion" in form]
    if sum(ways) > 1:
        raise InvalidRequest("more than one way of client authentication, expected one (RFC 6749 §2.3)")
    if authorization is not None:
        return _basic(authorization)
    if "client_assertion" in form:
        if form.get("client_assertion_type") != ASSERTION:
            raise InvalidRequest(f"client_assertion_type is not {ASSERTION}")
        return Presented(_issuer(form["client_assertion"]), assertion=form["client_assertion"])
    if "client_secret" in form and "client_id" in form:
        return Presented(form["client_id"], form["client_secret"])
    raise InvalidClient(WRONG)


def _basic(header: str) -> Presented:
    scheme, _, encoded = header.partition(" ")
    try:
        pair = base64.b64decode(encoded.strip(), validate=True).decode()
    except ValueError:  # not base64, not ASCII or not UTF-8
        raise InvalidClient(WRONG) from None
    name, colon, secret = pair.partition(":")
    if scheme.lower() != "basic" or not colon:
        raise InvalidClient(WRONG)
    return Presented(unquote_plus(name), unquote_plus(secret))


def _issuer(assertion: str) -> str:
    try:
        if not is_compact(assertion):
            raise ValueError
        claims = jwt.decode(assertion, options={"verify_signature": False})
    except UNREADABLE:
        raise InvalidClient(WRONG) from None
    return str(claims.get("iss", ""))


class Credentials:
    """The clients' secret hashes and keys, as of the version of the control tables that was read last."""

    def __init__(
        self, pool: Pool, keystore: Keystore, vos: Collection[str], clock: Callable[[], datetime]
    ) -> None:
        self._pool = pool
        self._vos = vos
        self._keystore = keystore
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._peppers: dict[str, bytes] = {}
        self.version = -1
        self._asked = float("-inf")

    def fresh_for(self) -> float:
        """Return for how many seconds the accounts count as fresh: guessed secrets cost few queries."""
        return max(0.0, self._asked + FRESH_SECONDS - time.monotonic())

    def refresh(self, since: float) -> None:
        """Read the accounts again if the control tables changed, unless a read began after `since`.

        Only the begin of a read counts: a client registered later may be missing from its result.
        """
        if self._asked >= since:
            return
        self._asked = time.monotonic()
        with transaction(self._pool, QUICK_SECONDS) as connection:
            version, _ = read_version(connection)
            if version != self.version:
                sealed, rows = read_secrets(connection, self._vos)
                self._peppers = dict(self._opened(sealed))
                self._accounts = {row.name: _account(row) for row in rows}
                self.version = version

    def _opened(self, sealed: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        """Yield the peppers that can be decrypted; one VO's missing master key does not affect other VOs."""
        for vo, pepper in sealed:
            try:
                yield vo, self._keystore.open_pepper(vo, bytes(pepper))
            except NoUsableKey as error:
                logger.warning("clients of VO %s cannot authenticate: %s", vo, error)

    def by_secret(self, who: Presented, vo: str) -> Account | None:
        """Return the account of the VO with this name and secret, or None."""
        account = self._accounts.get(who.name)
        pepper = self._peppers.get(vo, b"")
        hashed = hmac.digest(pepper, who.secret.encode(), "sha256")
        known = account.hashes if account is not None and account.vo == vo else ()
        now = self._clock()
        # All hashes are compared, and always at least one, so that the time reveals nothing.
        matches = [
            hmac.compare_digest(hashed, expected) and (until is None or now < until)
            for expected, until in known or ((bytes(32), now),)
        ]
        return account if pepper and who.secret and any(matches) else None

    def by_assertion(self, who: Presented, vo: str, audience: list[str]) -> Account | None:
        """Return the account whose key signed an assertion (RFC 7523 §3), or None.

        Raises InvalidClient, with what is wrong, once the signature was verified.
        """
        account = self._accounts.get(who.name)
        if account is None or account.vo != vo or account.auth_key is None:
            return None
        try:
            claims = jwt.decode(
                who.assertion,
                jwt.PyJWK(account.auth_key).key,
                algorithms=[account.auth_key["alg"]],
                audience=audience,
                issuer=account.name,
                subject=account.name,
                leeway=LEEWAY_SECONDS,
                options={"require": ["iss", "sub", "aud", "exp", "jti"]},
            )
            exp, jti = float(claims["exp"]), claims["jti"]
        except _AFTER_SIGNATURE as error:
            raise InvalidClient(f"the client's assertion cannot be taken: {error}") from None
        except UNREADABLE:
            return None
        if exp > self._clock().timestamp() + ASSERTION_MAX_SECONDS:
            raise InvalidClient(
                f"the client's assertion lives too long, expected at most {ASSERTION_MAX_SECONDS} s"
            )
        if not _ID(jti):
            raise InvalidClient("the client's assertion has a bad jti, expected 1 to 255 visible characters")
        if not use_assertion(self._pool, account.client_id, jti, exp + LEEWAY_SECONDS):
            raise InvalidClient("the client's assertion was used before: sign one for each request")
        return account


def _account(row: SecretRow) -> Account:
    known = ((row.secret_hash, None), (row.old_secret_hash, row.old_secret_until))
    hashes = tuple((bytes(hashed), until) for hashed, until in known if hashed is not None)
    return Account(row.client_id, row.name, row.vo, hashes, row.auth_key)
