"""Records of requests, tokens and uses, and the interface of their store, as `mint` needs it.

Adapters for databases implement `Store` and `Recording`; rows are plain values.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from msgspec import Struct

from minter.contract.messages import Side, Slot
from minter.errors import UnknownClient
from minter.policy.clients import Bans, Client
from minter.policy.plans import Plan, PlannedToken
from minter.policy.token_requests import Family, Subject
from minter.tokens.keys import Key
from minter.tokens.managed import ManagedToken, Wanted
from minter.tokens.shared import SharedKey

_JTI_NUMBERS = (1 << 20) - 1
"""The low 20 bits (five hex digits) of a jti number a request's tokens: no request has 2^20 tokens."""
OWN_KINDS = ("token", "exchange", "refresh")
"""Kinds of requests of the token endpoint, which makes their ids itself, so that none is ever repeated."""


class Control(Struct, frozen=True, eq=False):
    """Contents of the control tables, which may change at any time, as of the recording transaction."""

    clients: Mapping[str, Client]
    bans: Bans
    ring: Sequence[Key]
    issuers: Mapping[str, str]
    """Issuer URL by VO."""
    away: frozenset[str] = frozenset()
    """Names of the providers that are paused."""


def known_client(control: Control, name: str) -> Client:
    """Return the registered client of this name; raises UnknownClient if there is none or it is disabled."""
    client = control.clients.get(name)
    if client is None or client.disabled:
        raise UnknownClient(f"client {name!r} is not registered, or disabled; run: minter clients add")
    return client


class JtiRange(Struct, frozen=True, gc=False):
    """The consecutive jtis of one request, `count` of them from `first` on.

    The first ones belong to its planned tokens, in order: a planned token's own jti, or the id of its use
    of a shared or managed one. New shared tokens follow, and from number `managed` on, managed tokens.
    """

    first: UUID
    managed: int
    count: int
    prefix: str

    @classmethod
    def at(cls, jti: UUID, planned: Sequence[PlannedToken]) -> "JtiRange":
        """Return the range for planned tokens: a fresh jti, whose last 20 bits become the number of an id."""
        first = UUID(int=jti.int & ~_JTI_NUMBERS)
        shared = {(p.plan, p.shared) for p in planned if p.shared and not p.managed}
        managed = len(planned) + len(shared)
        return cls(first, managed, managed + sum(p.managed for p in planned), str(first)[:-5])

    def text(self, number: int) -> str:
        """Return a jti of the range as text."""
        return f"{self.prefix}{number:05x}"

    def uuid(self, number: int) -> UUID:
        """Return a jti of the range."""
        return UUID(int=self.first.int + number)


class RequestRow(Struct, frozen=True):
    """One request as recorded: its tokens and uses have the ids `first_jti`, `first_jti + 1`, ….

    `tokens` is the number of ids that the request may have used: one for each planned token, one for each
    path that may need a new shared token, and one for each planned token that may need a new managed token.
    """

    request_id: UUID
    client_id: int
    digest: bytes
    kind: str
    activity: str
    on_behalf_of: str
    first_jti: UUID
    tokens: int
    refusals: list[dict[str, Any]]
    error: dict[str, Any] | None
    received_at: datetime
    renews: UUID | None = None
    all_or_nothing: bool = False


class TokenRow(Struct, frozen=True, gc=False):
    """One token as recorded: everything but its signature.

    A shared token is written with `file` -1, and is read once for each use, with the file of the use.
    """

    jti: str
    request_id: UUID
    client_id: int
    storage: str
    key_id: int
    expires_at: int
    path: str
    fts_token_id: int
    file: int
    side: Side
    index: int
    external_id: str
    payload: str
    rule_id: int
    state: str = "issued"
    path_hash: int = 0
    use_id: str = ""
    mode: str = "mint"

    @property
    def id(self) -> UUID:
        """Id under which the state is recorded: that of the use if there is one, else the jti."""
        return UUID(self.use_id or self.jti)

    @property
    def slot(self) -> Slot:
        """Slot (file, side, position) of the token in its request."""
        return Slot(self.file, self.side, self.index)


class UseRow(Struct, frozen=True, gc=False):
    """One use of a shared or managed token as recorded: the file and side that the token `jti` serves."""

    use_id: str
    jti: str
    request_id: UUID
    client_id: int
    path: str
    file: int
    side: Side
    index: int
    external_id: str
    consumer: str = ""
    """Another client that may fetch the managed token, empty if there is none."""
    queue: str = ""
    """The client's durable queue to which the managed token is pushed, empty if there is none."""


class Recording(Protocol):
    """The recording transaction; leaving it without an error commits it durably."""

    def control(self, *, locked: bool = True) -> tuple[Control, float]:
        """Read the control tables, and the clock's skew to the database's, in seconds.

        By default under a shared lock, for which operators' changes wait until the transaction ends.
        """
        ...

    def unchanged(self) -> bool:
        """Take the shared lock; say whether the control tables are as `control` read them."""
        ...

    def rules(self, plans: Iterable[Plan]) -> dict[Plan, int]:
        """Return the rule_id of each plan; new plans are recorded (I8)."""
        ...

    def insert_requests(self, rows: Sequence[RequestRow]) -> set[tuple[UUID, int]]:
        """Insert the requests that are not recorded yet; return their (request_id, client_id)."""
        ...

    def copy_tokens(self, rows: Iterable[TokenRow]) -> None:
        """Add token rows as the iterator yields them; an error of the iterator fails the transaction."""
        ...

    def join_managed(self, wanted: Sequence[Wanted]) -> dict[bytes, ManagedToken]:
        """Add managed tokens, or add uses to existing ones with the same digest; return them by digest."""
        ...

    def add_managed(self, rows: Sequence[TokenRow]) -> None:
        """Add the token rows of new managed tokens, if there are any."""
        ...

    def managed(self, jtis: Collection[UUID]) -> dict[UUID, ManagedToken]:
        """Read managed tokens by jti."""
        ...

    def add_uses(self, rows: Sequence[UseRow]) -> None:
        """Add use rows, if there are any."""
        ...

    def shared_tokens(self, shared_keys: Sequence[SharedKey], now: datetime) -> dict[SharedKey, TokenRow]:
        """Read for each key the live shared token that expires last; keys without one are missing."""
        ...

    def subjects(self, jtis: Sequence[UUID]) -> dict[UUID, Subject]:
        """Read the subject tokens of token requests by jti."""
        ...

    def families(self, ids: Sequence[UUID]) -> dict[UUID, Family]:
        """Read refresh families, and lock them until the transaction ends."""
        ...

    def families_on(
        self, subjects: Sequence[UUID], since: datetime, ids: Sequence[UUID]
    ) -> dict[UUID, Family]:
        """Read refresh families, and the unused ones that exchanges of these subject tokens started lately.

        Lately is after `since`. No other transaction starts a family on the subject tokens, or changes one of
        the families, until this one ends.
        """
        ...

    def save_families(
        self, families: Sequence[Family], tokens: Sequence[tuple[UUID, UUID]], now: datetime
    ) -> None:
        """Add refresh families, or update their generation; `tokens` are (family_id, jti) of access tokens.

        The revocation of a family is audited, and ends its access tokens.
        """
        ...

    def used(self, handles: Sequence[UUID]) -> list[tuple[str, str, TokenRow]]:
        """Read uses by their ids: name of the client, name of the consumer (may be empty), and token."""
        ...

    def recorded(
        self, ids: Sequence[tuple[UUID, int]]
    ) -> dict[tuple[UUID, int], tuple[RequestRow, list[TokenRow]]]:
        """Read requests by (request_id, client_id), with their tokens in order of jti."""
        ...


class Store(Protocol):
    """The store in which tokens are recorded."""

    def recording(self) -> AbstractContextManager[Recording]:
        """Open the recording transaction."""
        ...


def fts_token_id(token: bytes) -> int:
    """Return FTS's id of a token, the first 16 hex digits of its SHA-1, as a signed 64-bit number."""
    return int.from_bytes(hashlib.sha1(token, usedforsecurity=False).digest()[:8], signed=True)


def path_hash(path: str) -> int:
    """Return the indexed hash of a VO-relative path: 64 bits, signed."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], signed=True)
