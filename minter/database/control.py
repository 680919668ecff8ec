"""Control tables, as the recording transaction reads them: clients, bans, keys, issuers, paused providers.

Operators may change clients, bans and keys at any time.
"""

from datetime import datetime
from typing import Any

import psycopg
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import one, transaction
from minter.policy.clients import Ban, Bans, Client
from minter.tokens.keys import Key
from minter.tokens.records import Control

_CLIENT = ", ".join(
    {"disabled": "disabled_at IS NOT NULL", "subject_until": "subject_expires_at"}.get(name, name)
    for name in Client.__struct_fields__
)


def _client(row: tuple[Any, ...]) -> Client:
    values = [tuple(value) if isinstance(value, list) else value for value in row]
    fields = dict(zip(Client.__struct_fields__, values, strict=True))
    return Client(**fields | {"operations": frozenset(fields["operations"])})


def read_control(connection: "psycopg.Connection[Any]") -> Control:
    """Read clients, bans, keys, issuers and paused providers in the transaction of `connection`."""
    clients = map(_client, connection.execute(f"SELECT {_CLIENT} FROM clients").fetchall())
    bans = connection.execute("SELECT kind, value, vo FROM bans WHERE lifted_at IS NULL").fetchall()
    issuers = connection.execute("SELECT vo, iss FROM issuers").fetchall()
    away = connection.execute("SELECT name FROM providers WHERE open_until IS NOT NULL").fetchall()
    return Control(
        {client.name: client for client in clients},
        Bans(Ban(*row) for row in bans),
        read_keys(connection),
        dict(issuers),
        frozenset(name for (name,) in away),
    )


def read_version(connection: "psycopg.Connection[Any]") -> tuple[int, datetime]:
    """Return the version of the control tables, which increases with each change, and Postgres's time."""
    version, at = one(connection.execute("SELECT version, clock_timestamp() FROM control"))
    return version, at


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
