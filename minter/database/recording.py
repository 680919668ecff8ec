"""SQL of the recording transaction (`records.Recording`): one statement for any number of rows.

The module knows nothing about the contents of tokens.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from typing import Any
from uuid import UUID

import msgspec
import psycopg
from psycopg import sql
from sqlalchemy.engine import Engine as Pool

from minter.database import families, managed
from minter.database.connection import (
    CONTROL_LOCK,
    QUICK_SECONDS,
    BoundedConnection,
    floor,
    instant,
    json_text,
    one,
    plain_text,
    transaction,
)
from minter.database.control import read_control
from minter.database.requests import REQUEST_COLUMNS, TOKEN_COLUMNS, USE_COLUMNS, request_row, tokens_of
from minter.policy.limits import HARD_MAX_SECONDS
from minter.policy.plans import Plan
from minter.policy.token_requests import Family, Subject
from minter.tokens.managed import ManagedToken, Wanted
from minter.tokens.records import OWN_KINDS, Control, RequestRow, TokenRow, UseRow, path_hash
from minter.tokens.shared import SharedKey

FEW_ROWS = 24
"""Up to so many tokens go to Postgres with the commit, in one round trip; COPY needs two more, but less time
for each row."""
COPY_ROWS = 64
"""Rows sent to Postgres at once. Postgres stores them while the next tokens are signed; the number is
small, so that few rows remain to be stored after the last signature."""

_BEGIN = sql.SQL(
    "BEGIN; SET LOCAL synchronous_commit TO on; SET LOCAL lock_timeout TO '4s';"
    " SET LOCAL idle_in_transaction_session_timeout TO '60s'; "
)
_READ = sql.SQL("SELECT version, clock_timestamp() FROM control")
# Each statement of the string takes its own snapshot, so `version` is read under the lock.
_LOCK_AND_READ = sql.SQL("SELECT pg_advisory_xact_lock_shared({}); ").format(CONTROL_LOCK) + _READ


class PostgresStore:
    """Postgres as the store of tokens; `clock` is this process's clock, compared with Postgres's.

    `seal` encrypts one secret of a managed token for a VO.
    """

    def __init__(
        self,
        pool: Pool,
        clock: Callable[[], datetime],
        seal: Callable[[str, UUID, str, str], bytes] | None = None,
    ) -> None:
        self.pool = pool
        self.clock = clock
        self._seal = seal
        self._version = -1
        self._control: Control | None = None
        self._storage_ids: dict[tuple[str, str], int] = {}
        self._vo_of: dict[int, str] = {}
        self._rules: dict[bytes, int] = {}

    @contextmanager
    def recording(self) -> Iterator["PostgresRecording"]:
        """Open the recording transaction; leaving it without an error commits it durably."""
        with transaction(self.pool, QUICK_SECONDS) as connection:
            recording = PostgresRecording(self, connection)
            yield recording
        self._rules |= recording.new_rules  # after the commit, when later transactions find them

    @contextmanager
    def controlled(self) -> Iterator[tuple["psycopg.Connection[Any]", Control]]:
        """Open a transaction that changes no control table; yield its connection and the control tables."""
        with transaction(self.pool, QUICK_SECONDS) as connection:
            control, _skew = self.control(connection)
            yield connection, control

    def control(self, connection: "psycopg.Connection[Any]", *, locked: bool = True) -> tuple[Control, float]:
        """Return the control tables, by default under the shared control lock, and the skew of the clocks.

        The tables are read only if their version changed. The skew is this process's clock minus Postgres's,
        in seconds.
        """
        # One round trip: psycopg would send its own BEGIN first, hence autocommit for this moment.
        connection.autocommit = True
        version, database_now = _last(connection, _BEGIN + _LOCK_AND_READ if locked else _BEGIN + _READ)
        skew = (self.clock() - database_now).total_seconds()
        if version != self._version or self._control is None:
            self._control = read_control(connection)
            rows = connection.execute("SELECT vo, name, storage_id FROM storages").fetchall()
            self._storage_ids = {(vo, name): number for vo, name, number in rows}
            self._vo_of = {c.client_id: c.vo for c in self._control.clients.values()}
            self._version = version
        return self._control, skew

    def unchanged(self, connection: "psycopg.Connection[Any]") -> bool:
        """Take the shared control lock; say whether the control tables are as `control` read them."""
        version, _ = _last(connection, _LOCK_AND_READ)
        return bool(version == self._version)

    def seal(self, client_id: int, jti: UUID, what: str, secret: str) -> bytes:
        """Encrypt one secret of a client's managed token."""
        assert self._seal is not None, "this process keeps no tokens of providers"
        return self._seal(self._vo_of[client_id], jti, what, secret)

    def rule_id(self, plan: Plan) -> int | None:
        """Return the rule_id of a plan, None if this process does not know that its row is committed."""
        return self._rules.get(plan.digest)

    def storage_id(self, client_id: int, name: str) -> int:
        """Return the storage_id of a client's storage or FTS."""
        return self._storage_ids[self._vo_of[client_id], name]


def _last(connection: "psycopg.Connection[Any]", statements: sql.Composed) -> tuple[Any, ...]:
    """Run several statements in one round trip; return the row of the last one."""
    cursor = connection.execute(statements)
    while cursor.nextset():
        pass
    row: tuple[Any, ...] = one(cursor)
    return row


class PostgresRecording:
    """The open recording transaction (`records.Recording`)."""

    def __init__(self, store: PostgresStore, connection: BoundedConnection) -> None:
        self._store = store
        self._connection = connection
        self.new_rules: dict[bytes, int] = {}

    def control(self, *, locked: bool = True) -> tuple[Control, float]:
        """Read the control tables, and the skew of this process's clock to Postgres's, in seconds."""
        return self._store.control(self._connection, locked=locked)

    def unchanged(self) -> bool:
        """Take the shared control lock; say whether the control tables are as `control` read them."""
        return self._store.unchanged(self._connection)

    def rules(self, plans: Iterable[Plan]) -> dict[Plan, int]:
        """Return the rule_id of each plan; new plans are recorded, in a fixed order to avoid deadlocks."""
        known = {plan: self._store.rule_id(plan) for plan in plans}
        new = sorted({p.digest: p for p, number in known.items() if number is None}.items())
        if new:
            self._connection.cursor().executemany(
                "INSERT INTO rules (digest, route, storage, operations, steps)"
                " VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                [(d, p.rule, p.area.storage, list(p.operations), json_text(p.steps)) for d, p in new],
            )
            found = self._connection.execute(
                "SELECT digest, rule_id FROM rules WHERE digest = ANY(%s)", ([d for d, _ in new],)
            ).fetchall()
            self.new_rules = {bytes(digest): number for digest, number in found}
        return {p: self.new_rules[p.digest] if n is None else n for p, n in known.items()}

    def insert_requests(self, rows: Sequence[RequestRow]) -> set[tuple[UUID, int]]:
        """Insert the requests that are not recorded yet; return their (request_id, client_id)."""
        own = [r for r in rows if r.kind in OWN_KINDS]
        self._at_commit("requests", _REQUEST, map(_request, own))
        new = {(r.request_id, r.client_id) for r in own}
        if asked := [_request(r) for r in rows if r.kind not in OWN_KINDS]:
            statement = (
                f"{_insert('requests', _REQUEST)} ON CONFLICT DO NOTHING RETURNING request_id, client_id"
            )
            new.update(self._connection.execute(statement, (_json(_REQUEST, asked),)))
        return new

    def _at_commit(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Insert rows with the commit, if there are any."""
        if values := list(rows):
            last = (_insert(table, columns), (_json(columns, values),))
            self._connection.last = (*self._connection.last, last)

    def copy_tokens(self, rows: Iterable[TokenRow]) -> None:
        """Insert a few minted tokens with the commit; COPY many as the iterator yields them, as text lines.

        An error of the iterator, such as a failed check, fails the COPY and so the transaction.
        """
        coming = iter(rows)
        few = list(islice(coming, FEW_ROWS + 1))
        if len(few) <= FEW_ROWS:
            self._at_commit("tokens", _TOKEN, map(self._token, few))
            return
        storage_ids: dict[tuple[int, str], int] = {}
        with self._connection.cursor().copy(
            "COPY tokens (jti, request_id, expires_at, path_hash, fts_token_id, client_id,"
            " storage_id, key_id, state, mode, side, file, position, external_id, payload,"
            " rule_id) FROM STDIN"
        ) as copy:
            lines = []
            instants: dict[int, datetime] = {}
            for t in chain(few, coming):
                where = (t.client_id, t.storage)
                storage_id = storage_ids.get(where)
                if storage_id is None:
                    storage_id = storage_ids[where] = self._store.storage_id(*where)
                # JSON escapes control characters: of those special to COPY, only the backslash occurs.
                payload = t.payload.replace("\\", "\\\\") if "\\" in t.payload else t.payload
                if t.expires_at not in instants:
                    instants[t.expires_at] = datetime.fromtimestamp(t.expires_at, UTC)
                lines.append(
                    f"{t.jti}\t{t.request_id.int:032x}\t{instants[t.expires_at]}"
                    f"\t{path_hash(t.path)}\t{t.fts_token_id}\t{t.client_id}\t{storage_id}\t{t.key_id}"
                    f"\tissued\tmint\t{t.side}\t{t.file}\t{t.index}\t{_copy(t.external_id)}"
                    f"\t{payload}\t{t.rule_id}\n"
                )
                if len(lines) >= COPY_ROWS:
                    copy.write("".join(lines).encode())
                    lines.clear()
            copy.write("".join(lines).encode())

    def add_uses(self, rows: Sequence[UseRow]) -> None:
        """Insert the uses of shared and managed tokens with the commit."""
        self._at_commit("uses", _USE, map(_use, rows))

    def _token(self, t: TokenRow) -> tuple[object, ...]:
        signed = (t.fts_token_id, t.key_id) if t.mode == "mint" else (None, None)  # else the provider signs
        return (
            t.jti, t.request_id, instant(t.expires_at), path_hash(t.path), *signed, t.client_id,
            self._store.storage_id(t.client_id, t.storage), t.state, t.mode, t.side, t.file, t.index,
            plain_text(t.external_id), plain_text(t.payload), t.rule_id,
        )  # fmt: skip

    def join_managed(self, wanted: Sequence[Wanted]) -> dict[bytes, ManagedToken]:
        """Add managed tokens, or add uses to existing ones with the same digest; return them by digest."""
        return managed.join(self._connection, wanted, self._store.seal)

    def managed(self, jtis: Collection[UUID]) -> dict[UUID, ManagedToken]:
        """Read managed tokens by jti."""
        return managed.read(self._connection, jtis)

    def add_managed(self, rows: Sequence[TokenRow]) -> None:
        """Insert the token rows of new managed tokens with the commit."""
        self._at_commit("tokens", _TOKEN, map(self._token, rows))

    def used(self, handles: Sequence[UUID]) -> list[tuple[str, str, TokenRow]]:
        """Read uses by their ids: name of the client, name of the consumer (may be empty), and token."""
        rows = self._connection.execute(
            f"SELECT c.name, u.consumer, {USE_COLUMNS} FROM uses u JOIN tokens t USING (jti)"
            " JOIN clients c ON c.client_id = u.client_id LEFT JOIN storages s USING (storage_id)"
            " WHERE u.use_id = ANY(%s)",
            (list(handles),),
        ).fetchall()
        return [(name, consumer, TokenRow(*row)) for name, consumer, *row in rows]

    def shared_tokens(self, shared_keys: Sequence[SharedKey], now: datetime) -> dict[SharedKey, TokenRow]:
        """Read for each key the live shared token that expires last; keys without one are missing."""
        rows = self._connection.execute(
            f"""
            SELECT DISTINCT ON (w.n) w.n, {TOKEN_COLUMNS}
            FROM unnest(%s::int[], %s::int[], %s::bigint[]) WITH ORDINALITY AS w (client, rule, hash, n)
            JOIN tokens t ON t.path_hash = w.hash AND t.rule_id = w.rule AND t.client_id = w.client
            LEFT JOIN storages s USING (storage_id)
            WHERE t.file < 0 AND t.mode = 'mint' AND t.expires_at > %s AND t.jti >= %s
            ORDER BY w.n, t.expires_at DESC
            """,
            (
                [p.client_id for p in shared_keys],
                [p.rule_id for p in shared_keys],
                [path_hash(p.path) for p in shared_keys],
                now,
                floor(now - timedelta(seconds=HARD_MAX_SECONDS)),
            ),
        ).fetchall()
        return {shared_keys[n - 1]: TokenRow(*row) for n, *row in rows}

    def subjects(self, jtis: Sequence[UUID]) -> dict[UUID, Subject]:
        """Read the subject tokens of token requests by jti."""
        rows = self._connection.execute(
            "SELECT t.jti, t.payload, c.name, coalesce(r.on_behalf_of, ''), coalesce(r.activity, ''),"
            " coalesce(r.kind, ''),"
            " coalesce((SELECT l.state FROM token_states l WHERE l.jti = t.jti), t.state)::text,"
            " k.state::text, t.expires_at, t.file < 0 AND t.side <> 'service'"
            " FROM unnest(%s::uuid[]) AS w (jti)"
            " JOIN tokens t USING (jti) JOIN clients c ON c.client_id = t.client_id"
            " JOIN signing_keys k USING (key_id)"
            " LEFT JOIN requests r ON (r.request_id, r.client_id) = (t.request_id, t.client_id)",
            (sorted(set(jtis)),),
        ).fetchall()
        names = Subject.__struct_fields__
        return {row[0]: Subject(**dict(zip(names, row, strict=True))) for row in rows}

    def families(self, ids: Sequence[UUID]) -> dict[UUID, Family]:
        """Read refresh families and lock their rows, in a fixed order to avoid deadlocks."""
        return families.read(self._connection, ids)

    def families_on(
        self, subjects: Sequence[UUID], since: datetime, ids: Sequence[UUID]
    ) -> dict[UUID, Family]:
        """Read refresh families by id, and the unused ones of these subject tokens started after `since`."""
        return families.read_on(self._connection, subjects, since, ids)

    def save_families(
        self, changed: Sequence[Family], tokens: Sequence[tuple[UUID, UUID]], now: datetime
    ) -> None:
        """Add or update refresh families; `tokens` are (family_id, jti) of access tokens."""
        if any(family.revoked_at for family in changed):
            self._flush()  # the tokens of a revoked family end, also those of this batch
        if changed:
            families.save(self._connection, changed, tokens, now)

    def _flush(self) -> None:
        """Insert now what would go with the commit."""
        for statement, values in self._connection.last:
            self._connection.execute(statement, values)
        self._connection.last = ()

    def recorded(
        self, ids: Sequence[tuple[UUID, int]]
    ) -> dict[tuple[UUID, int], tuple[RequestRow, list[TokenRow]]]:
        """Read requests by (request_id, client_id), with their tokens in order of jti.

        The first commit may have waited for the standby in vain, so this one writes a mark, and waits again.
        """
        self._connection.execute("SELECT pg_logical_emit_message(true, 'minter', '')")
        found = self._connection.execute(
            f"""
            SELECT {REQUEST_COLUMNS} FROM unnest(%s::uuid[], %s::int[]) AS w (id, client)
            JOIN requests r ON (r.request_id, r.client_id) = (w.id, w.client)
            """,
            ([i for i, _ in ids], [c for _, c in ids]),
        ).fetchall()
        return {
            (row.request_id, row.client_id): (row, tokens_of(self._connection, row))
            for row in map(request_row, found)
        }


# ── a few rows in one statement, as JSON with the types of their table ──────────────────────────


def _insert(table: str, columns: Sequence[str]) -> str:
    names = ", ".join(columns)
    return f"INSERT INTO {table} ({names}) SELECT {names} FROM json_populate_recordset(NULL::{table}, %s)"


def _json(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return msgspec.json.encode([dict(zip(columns, row, strict=True)) for row in rows]).decode()


_REQUEST = (
    "request_id", "client_id", "first_jti", "received_at", "tokens", "digest", "kind", "activity",
    "on_behalf_of", "error", "refusals", "renews", "all_or_nothing",
)  # fmt: skip
_TOKEN = (
    "jti", "request_id", "expires_at", "path_hash", "fts_token_id", "key_id", "client_id", "storage_id",
    "state", "mode", "side", "file", "position", "external_id", "payload", "rule_id",
)  # fmt: skip
_USE = (
    "use_id", "jti", "request_id", "path_hash", "client_id", "side", "file", "position", "path",
    "external_id", "consumer", "queue",
)  # fmt: skip


def _request(r: RequestRow) -> tuple[object, ...]:
    error = msgspec.Raw(json_text(r.error)) if r.error else None
    refusals = msgspec.Raw(json_text(r.refusals)) if r.refusals else None
    return (
        r.request_id, r.client_id, r.first_jti, r.received_at, r.tokens, f"\\x{r.digest.hex()}", r.kind,
        plain_text(r.activity), plain_text(r.on_behalf_of), error, refusals, r.renews, r.all_or_nothing,
    )  # fmt: skip


def _use(u: UseRow) -> tuple[object, ...]:
    return (
        u.use_id, u.jti, u.request_id, path_hash(u.path), u.client_id, u.side, u.file, u.index,
        plain_text(u.path), plain_text(u.external_id), plain_text(u.consumer), plain_text(u.queue),
    )  # fmt: skip


# ── many rows, by COPY ───────────────────────────────────────────────────────────────────────

_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\x00": ""})
_copy_special = re.compile(r"[\\\t\n\r\x00]").search


def _copy(text: str) -> str:
    return text.translate(_COPY_ESCAPES) if _copy_special(text) else text
