"""SQL of finding, and the transactions that all SQL runs in; one function per question.

It knows nothing about what makes a token right. Failures of Postgres that pass by themselves
leave here as `Unavailable`, and nothing of the transaction stays.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import psycopg
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine as Pool

from minter.errors import Unavailable
from minter.policy.clients import Ban, Bans, Client
from minter.policy.limits import HARD_MAX_SECONDS
from minter.tokens.keys import Key
from minter.tokens.records import Control, RequestRow, TokenRow

CONTROL_LOCK = 0x6D696E74  # "mint": recording holds it shared, changes of the control tables alone

_PASSING = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)


def open_pool(dsn: str, size: int = 2) -> Pool:
    """Return a connection pool; no session state is kept, so PgBouncer may stand in between.

    synchronous_commit is asked for per transaction, not per session, in `Store.recording`.
    """
    return create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(dsn, prepare_threshold=None, connect_timeout=5),
        pool_size=size,
        max_overflow=size,
    )


@contextmanager
def transaction(pool: Pool) -> Iterator["psycopg.Connection[Any]"]:
    """Yield a driver connection in a transaction; raises Unavailable for what will pass."""
    try:
        pooled = pool.raw_connection()
    except _PASSING as error:
        raise Unavailable(f"Postgres cannot be reached ({type(error).__name__})") from error
    driver: psycopg.Connection[Any] = pooled.driver_connection  # type: ignore[assignment]
    try:
        yield driver
        driver.commit()
    except _PASSING as error:
        pooled.invalidate()
        raise Unavailable(
            f"Postgres failed during the transaction ({type(error).__name__}); nothing was handed out"
        ) from error
    except psycopg.errors.CheckViolation as error:
        driver.rollback()
        if "no partition of relation" in str(error):
            raise Unavailable(
                "no partition for this day; is beat running? (minter db upgrade makes them too)"
            ) from error
        raise
    except BaseException:
        if not driver.closed:
            driver.rollback()
        raise
    finally:
        if not driver.closed:
            driver.autocommit = False
        pooled.close()


def one(cursor: "psycopg.Cursor[Any]") -> Any:
    """Return the row that there must be; raises Unavailable on a database that was not upgraded."""
    row = cursor.fetchone()
    if row is None:
        raise Unavailable("the control row is missing; run: minter db upgrade")
    return row


# ── reading ──────────────────────────────────────────────────────────────────────────────────

REQUEST_COLUMNS = (
    "r.request_id, r.client_id, r.digest, r.kind, r.activity, r.on_behalf_of, r.first_jti,"
    " r.tokens, r.refusals, r.error, r.received_at, r.renews, r.all_or_nothing"
)


def _token_columns(path: str, use_id: str, of: str) -> str:
    """Return the columns of a TokenRow: the token is `t`, and the file that it is for is `of`'s."""
    return (
        f"t.jti::text, {of}.request_id, t.client_id, coalesce(s.name, ''), t.key_id,"
        f" extract(epoch FROM t.expires_at)::bigint, {path}, t.fts_token_id, {of}.file, {of}.side::text,"
        f" {of}.position, {of}.external_id, t.payload, coalesce(t.rule_id, 0), coalesce((SELECT l.state::text"
        f" FROM token_states l WHERE l.jti = {use_id or 't.jti'}), t.state::text), {of}.path_hash,"
        f" {use_id + '::text' if use_id else repr('')}, t.mode::text"
    )


TOKEN_COLUMNS = _token_columns("''", "", of="t")
USE_COLUMNS = _token_columns("u.path", "u.use_id", of="u")
OWN = "(t.file >= 0 OR t.side = 'service')"
"""That a token is no shared one: those serve the files of their uses."""


def request_row(row: Sequence[Any]) -> RequestRow:
    """Return the request of a row of REQUEST_COLUMNS."""
    fields = list(row)
    fields[8] = fields[8] or []
    return RequestRow(*fields)


def tokens_of(connection: "psycopg.Connection[Any]", request: RequestRow) -> list[TokenRow]:
    """Return the tokens of one request: a range of the primary key, in one or two partitions.

    Where its ids are not all those of tokens, the others are of uses.
    """
    if not request.tokens:
        return []
    ids = (request.first_jti, UUID(int=request.first_jti.int + request.tokens - 1))
    rows = connection.execute(
        f"SELECT t.jti, {TOKEN_COLUMNS} FROM tokens t LEFT JOIN storages s USING (storage_id)"
        f" WHERE t.jti BETWEEN %s AND %s AND {OWN} ORDER BY t.jti",
        ids,
    ).fetchall()
    if len(rows) < request.tokens:
        rows += connection.execute(
            f"SELECT u.use_id, {USE_COLUMNS} FROM uses u JOIN tokens t USING (jti)"
            " LEFT JOIN storages s USING (storage_id) WHERE u.use_id BETWEEN %s AND %s",
            ids,
        ).fetchall()
        rows.sort()
    return [TokenRow(*row) for _, *row in rows]


def read_control(connection: "psycopg.Connection[Any]") -> Control:
    """Read clients, bans, keys and issuers in the transaction of `connection`."""
    clients = connection.execute(
        "SELECT client_id, name, vo, sub, operations, paths, max_lifetime_seconds, reply_queues,"
        " jwe_key, disabled_at IS NOT NULL, default_audience, audiences, scopes, groups,"
        " subject_provider, subject_scope, subject_expires_at FROM clients"
    ).fetchall()
    bans = connection.execute("SELECT kind, value, vo FROM bans WHERE lifted_at IS NULL").fetchall()
    issuers = connection.execute("SELECT vo, iss FROM issuers").fetchall()
    away = connection.execute("SELECT name FROM providers WHERE open_until IS NOT NULL").fetchall()
    return Control(
        {
            name: Client(
                client_id=number,
                name=name,
                vo=vo,
                sub=sub,
                operations=frozenset(operations),
                paths=tuple(paths),
                max_lifetime_seconds=longest,
                reply_queues=tuple(queues),
                jwe_key=jwe_key,
                disabled=disabled,
                default_audience=tuple(default_audience),
                audiences=tuple(audiences),
                scopes=tuple(scopes),
                groups=tuple(groups),
                subject_provider=subject_provider,
                subject_scope=subject_scope,
                subject_until=subject_until,
            )
            for (
                number,
                name,
                vo,
                sub,
                operations,
                paths,
                longest,
                queues,
                jwe_key,
                disabled,
                default_audience,
                audiences,
                scopes,
                groups,
                subject_provider,
                subject_scope,
                subject_until,
            ) in clients
        },
        Bans(Ban(*row) for row in bans),
        read_keys(connection),
        dict(issuers),
        frozenset(name for (name,) in away),
    )


def find_operations(connection: "psycopg.Connection[Any]", rules: Iterable[int]) -> dict[int, list[Any]]:
    """Return what was asked for, by rule_id."""
    rows = connection.execute(
        "SELECT rule_id, operations FROM rules WHERE rule_id = ANY(%s)", (list(rules),)
    ).fetchall()
    return dict(rows)


def read_request(
    connection: "psycopg.Connection[Any]", request_id: UUID, client_id: int
) -> tuple[RequestRow, list[TokenRow]] | None:
    """Return one client's request with its tokens, None if there is none."""
    row = connection.execute(
        f"SELECT {REQUEST_COLUMNS} FROM requests r WHERE (r.request_id, r.client_id) = (%s, %s)",
        (request_id, client_id),
    ).fetchone()
    if row is None:
        return None
    request = request_row(row)
    return request, tokens_of(connection, request)


def read_keys(connection: "psycopg.Connection[Any]") -> list[Key]:
    """Return every key of every issuer, without private halves, oldest first."""
    rows = connection.execute(
        "SELECT key_id, vo, kid, algorithm, state::text, public_jwk, published_at, activated_at,"
        " retired_at, last_exp FROM signing_keys ORDER BY key_id"
    ).fetchall()
    return [Key(*row) for row in rows]


def read_private_key(pool: Pool, key_id: int) -> bytes | None:
    """Return the encrypted private half of a key, None once it was destroyed."""
    with transaction(pool) as connection:
        row = connection.execute(
            "SELECT private_key FROM signing_keys WHERE key_id = %s", (key_id,)
        ).fetchone()
    return None if row is None or row[0] is None else bytes(row[0])


_LARGE_ROWS = 1_000_000
"""Above this, living tokens are counted in a sample of 1 %."""


def count_living(pool: Pool, now: datetime, soon: timedelta) -> dict[str, tuple[int, int]]:
    """Count, by VO, the tokens that have not expired, and those that do so `soon`."""
    with transaction(pool) as connection:
        (size,) = one(
            connection.execute(
                "SELECT coalesce(sum(c.reltuples), 0) FROM pg_inherits i"
                " JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = 'tokens'::regclass AND c.reltuples > 0"
            )
        )
        sample, factor = ("TABLESAMPLE SYSTEM (1)", 100) if size > _LARGE_ROWS else ("", 1)
        rows = connection.execute(
            "SELECT c.vo, count(*), count(*) FILTER (WHERE t.expires_at <= %(soon)s)"
            f" FROM tokens t {sample} JOIN clients c USING (client_id)"
            " WHERE t.expires_at > %(now)s AND t.jti >= %(first)s GROUP BY c.vo",
            {"now": now, "soon": now + soon, "first": floor(now - timedelta(seconds=HARD_MAX_SECONDS))},
        ).fetchall()
    return {vo: (factor * alive, factor * expiring) for vo, alive, expiring in rows}


def floor(instant: datetime) -> UUID:
    """Return the smallest UUIDv7 of an instant (milliseconds, RFC 9562 §5.7)."""
    return UUID(int=int(instant.timestamp() * 1000) << 80)


def instant(numeric_date: int) -> datetime:
    """Return a NumericDate (RFC 7519 §2) as an aware datetime."""
    return datetime.fromtimestamp(numeric_date, UTC)


# ── writing ──────────────────────────────────────────────────────────────────────────────────


def plain_text(text: str) -> str:
    """Return a text as Postgres can hold it."""
    return text.replace("\x00", "")  # Postgres has no NUL in text


def json_text(value: object) -> str:
    """Return a value as JSON that Postgres can hold."""
    text = msgspec.json.encode(value).decode()
    return msgspec.json.encode(_without_nul(value)).decode() if "\\u0000" in text else text


def _without_nul(value: object) -> object:
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, dict):
        return {plain_text(str(k)): _without_nul(v) for k, v in value.items()}
    return [_without_nul(v) for v in value] if isinstance(value, list | tuple) else value
