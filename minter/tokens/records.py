"""Records: what of a request, its tokens and their uses is kept, and where it is kept, as `mint` needs it.

The adapters fit `Store` and `Recording`; rows are plain values.
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
"""The bits, five hex digits, of a jti that count a request's tokens: no request has 2^20."""
OWN_KINDS = ("token", "exchange", "refresh")
"""Requests of the token endpoint: their ids are made there, so nobody can have sent them before."""


class Control(Struct, frozen=True, eq=False):
    """What operators may change at any time, as of the recording transaction."""

    clients: Mapping[str, Client]
    bans: Bans
    ring: Sequence[Key]
    issuers: Mapping[str, str]
    """Issuer URL by VO."""
    away: frozenset[str] = frozenset()
    """Providers that are not asked now."""


def known_client(control: Control, name: str) -> Client:
    """Return a client that may ask; raises UnknownClient."""
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
        """Return the range for planned tokens that begins near a fresh jti: its last 20 bits are counted."""
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

    `tokens` is how many ids it may have used: one for each grant, and one for each path that a
    shared token could be needed for.
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

    A shared token is written with `file` -1, and read once for each use, as the token of its file.
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
        """The id under which its state is kept: the use's, if the token is shared."""
        return UUID(self.use_id or self.jti)

    @property
    def slot(self) -> Slot:
        """Where it belongs in its request."""
        return Slot(self.file, self.side, self.index)


class UseRow(Struct, frozen=True, gc=False):
    """One use of a shared token as recorded: the file and side that the token `jti` serves."""

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
    """Another client that may fetch it, if it is one of a managed token."""
    queue: str = ""
    """The client's durable queue that it is pushed to, if it is one of a managed token."""


class Recording(Protocol):
    """The recording transaction; leaving it without an error commits it durably."""

    def control(self) -> tuple[Control, float]:
        """Read the control tables under a shared lock; also the clock's skew to the database's."""
        ...

    def rules(self, plans: Iterable[Plan]) -> dict[Plan, int]:
        """Return the numbers of plans, which are recorded if they are new (I8)."""
        ...

    def insert_requests(self, rows: Sequence[RequestRow]) -> set[tuple[UUID, int]]:
        """Insert what is not there yet; return the (request_id, client_id) that were new."""
        ...

    def copy_tokens(self, rows: Iterable[TokenRow]) -> None:
        """Add token rows as they come; an error of their iterator undoes all."""
        ...

    def join_managed(self, wanted: Sequence[Wanted]) -> dict[bytes, ManagedToken]:
        """Add managed tokens, or uses to those that are there; return them by digest."""
        ...

    def copy_managed(self, rows: Sequence[TokenRow]) -> None:
        """Add the token rows of new managed tokens, if there are any."""
        ...

    def managed(self, jtis: Collection[UUID]) -> dict[UUID, ManagedToken]:
        """Read what is kept of managed tokens."""
        ...

    def copy_uses(self, rows: Sequence[UseRow]) -> None:
        """Add use rows, if there are any."""
        ...

    def shared_tokens(self, shared_keys: Sequence[SharedKey], now: datetime) -> dict[SharedKey, TokenRow]:
        """Read for each place the shared token that lives longest."""
        ...

    def subjects(self, jtis: Sequence[UUID]) -> dict[UUID, Subject]:
        """Read tokens that somebody wants to act with."""
        ...

    def families(self, ids: Sequence[UUID]) -> dict[UUID, Family]:
        """Read refresh families, which nobody else can change until the end."""
        ...

    def save_families(self, families: Sequence[Family]) -> None:
        """Add families, or bring them to their new generation; one that ends is audited."""
        ...

    def used(self, handles: Sequence[UUID]) -> list[tuple[str, str, TokenRow]]:
        """Read uses by their ids: the client's name, the consumer's, and the token."""
        ...

    def recorded(
        self, ids: Sequence[tuple[UUID, int]]
    ) -> dict[tuple[UUID, int], tuple[RequestRow, list[TokenRow]]]:
        """Read requests with their tokens, in order of jti."""
        ...


class Store(Protocol):
    """Where tokens are recorded."""

    def recording(self) -> AbstractContextManager[Recording]:
        """Open the recording transaction."""
        ...


def fts_token_id(token: bytes) -> int:
    """Return FTS's id of a token, the first 16 hex digits of its SHA-1, as a signed 64-bit number."""
    return int.from_bytes(hashlib.sha1(token, usedforsecurity=False).digest()[:8], signed=True)


def path_hash(path: str) -> int:
    """Return the indexed hash of a VO-relative path: 64 bits, signed."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], signed=True)
