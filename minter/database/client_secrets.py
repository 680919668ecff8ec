"""Client authentication data of the HTTP service: hashes of secrets, public keys, used assertions."""

from collections.abc import Collection
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import transaction


class SecretRow(NamedTuple):
    """One enabled client: keyed hashes of its current and its previous secret, and its public key."""

    client_id: int
    name: str
    vo: str
    secret_hash: bytes | None
    old_secret_hash: bytes | None
    old_secret_until: datetime | None
    auth_key: dict[str, str] | None


def read_secrets(
    connection: "psycopg.Connection[Any]", vos: Collection[str]
) -> tuple[list[tuple[str, bytes]], list[SecretRow]]:
    """Return the encrypted key that hashes client secrets, for each of these VOs, and all enabled clients."""
    sealed = connection.execute(
        "SELECT vo, secrets_key FROM issuers WHERE secrets_key IS NOT NULL AND vo = ANY(%s)", (list(vos),)
    ).fetchall()
    rows = connection.execute(
        f"SELECT {', '.join(SecretRow._fields)} FROM clients WHERE disabled_at IS NULL"
    ).fetchall()
    return sealed, [SecretRow(*row) for row in rows]


def use_assertion(pool: Pool, client_id: int, jti: str, until: float) -> bool:
    """Record that an assertion was used; return False if it was used before (RFC 7523 §3).

    `until` is the assertion's expiry in seconds since the epoch; the record is kept until then.
    """
    with transaction(pool) as connection:
        noted = connection.execute(
            "INSERT INTO assertions (client_id, assertion_id, expires_at)"
            " VALUES (%s, %s, to_timestamp(%s)) ON CONFLICT DO NOTHING",
            (client_id, jti, until),
        ).rowcount
    return noted > 0
