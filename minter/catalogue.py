"""What settings and operators change: issuers, storages, clients, keys; alone, and audited (I8, I9)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy.engine import Engine as Pool

from minter.database import CONTROL_LOCK, one, transaction
from minter.errors import Unavailable, UnknownClient
from minter.policy import Client


@contextmanager
def controlling(
    engine: Pool, actor: str, action: str, subject: str, details: Mapping[str, object]
) -> Iterator["psycopg.Connection[Any]"]:
    """Change a control table: alone, and audited in the same transaction (I8, I9)."""
    with transaction(engine) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (CONTROL_LOCK,))
        yield connection
        connection.execute(
            "INSERT INTO audit (actor, action, subject, details) VALUES (%s, %s, %s, %s)",
            (actor, action, subject, Jsonb(dict(details))),
        )


def sync_catalogue(engine: Pool, issuers: Mapping[str, str], wanted: Mapping[tuple[str, str], object]) -> int:
    """Bring issuers and storages of the settings into rows that outlive them; return the changes.

    `wanted` has what the settings say of each storage and FTS, as JSON values, by (VO, name).

    A VO never changes its `iss` (§2.1: sub is unique in it); a storage no longer in the settings
    is kept, marked retired, for what was issued on it.
    """
    with transaction(engine) as connection:
        known_issuers = dict(connection.execute("SELECT vo, iss FROM issuers").fetchall())
        rows = connection.execute(
            "SELECT vo, name, definition, retired_at IS NOT NULL FROM storages"
        ).fetchall()
    known = {(vo, name): None if retired else definition for vo, name, definition, retired in rows}
    new = {vo: iss for vo, iss in issuers.items() if known_issuers.get(vo) != iss}
    changed = [key for key, definition in wanted.items() if known.get(key) != definition]
    gone = [k for k, d in known.items() if d is not None and k not in wanted and k[0] in issuers]
    if not (new or changed or gone):
        return 0
    details = {"issuers": sorted(new), "changed": len(changed), "retired": len(gone)}
    with controlling(engine, "settings", "catalogue", "settings", details) as connection:
        for vo, iss in new.items():
            connection.execute(
                "INSERT INTO issuers (vo, iss) VALUES (%s, %s) ON CONFLICT DO NOTHING", (vo, iss)
            )
            (recorded,) = one(connection.execute("SELECT iss FROM issuers WHERE vo = %s", (vo,)))
            if recorded != iss:
                raise Unavailable(f"VO {vo!r} has issued as {recorded!r} before and cannot become {iss!r}")
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO storages (vo, name, definition) VALUES (%s, %s, %s)"
                " ON CONFLICT (vo, name) DO UPDATE"
                " SET definition = excluded.definition, retired_at = NULL",
                [(*key, Jsonb(wanted[key])) for key in changed],
            )
            cursor.executemany("UPDATE storages SET retired_at = now() WHERE vo = %s AND name = %s", gone)
    return len(new) + len(changed) + len(gone)


def add_client(engine: Pool, client: Client, actor: str) -> int:
    """Register a client; return its client_id. Raises psycopg's UniqueViolation as UnknownClient."""
    details = {
        "vo": client.vo, "operations": sorted(client.operations), "paths": client.paths,
        "reply_queues": client.reply_queues, "jwe": bool(client.jwe_key),
    }  # fmt: skip
    try:
        with controlling(engine, actor, "client.add", client.name, details) as connection:
            row = connection.execute(
                "INSERT INTO clients (name, vo, sub, operations, paths, max_lifetime_seconds,"
                " reply_queues, jwe_key) VALUES (%s, %s, %s, %s, %s, %s, %s, %s) RETURNING client_id",
                (
                    client.name, client.vo, client.sub, sorted(client.operations),
                    list(client.paths), client.max_lifetime_seconds, list(client.reply_queues),
                    Jsonb(client.jwe_key) if client.jwe_key else None,
                ),
            ).fetchone()  # fmt: skip
    except psycopg.errors.UniqueViolation as error:
        raise UnknownClient(f"client {client.name!r} exists already; choose another name") from error
    except psycopg.errors.ForeignKeyViolation as error:
        raise UnknownClient(f"VO {client.vo!r} has no issuer in the database") from error
    except psycopg.errors.CheckViolation as error:
        raise UnknownClient(
            f"client {client.name!r} cannot be registered: {error.diag.constraint_name}; a name has "
            "letters, digits, _ and -, at most 64"
        ) from error
    return int(row[0]) if row else 0


def add_key(
    engine: Pool,
    vo: str,
    kid: str,
    algorithm: str,
    jwk: Mapping[str, str],
    encrypted: bytes,
    actor: str,
) -> str:
    """Store a new key and return its state: an issuer's first key is active at once (I6)."""
    with controlling(engine, actor, "key.create", kid, {"vo": vo, "algorithm": algorithm}) as tx:
        row = tx.execute(
            """
            INSERT INTO signing_keys (vo, kid, algorithm, state, public_jwk, private_key, activated_at)
            SELECT %(vo)s, %(kid)s, %(algorithm)s, first.state, %(jwk)s, %(encrypted)s,
                   CASE first.state WHEN 'active' THEN now() END
            FROM (SELECT (CASE WHEN EXISTS (SELECT FROM signing_keys WHERE vo = %(vo)s)
                          THEN 'prepared' ELSE 'active' END)::key_state AS state) AS first
            RETURNING state::text
            """,
            {
                "vo": vo, "kid": kid, "algorithm": algorithm, "jwk": Jsonb(dict(jwk)),
                "encrypted": encrypted,
            },
        ).fetchone()  # fmt: skip
    return str(row[0]) if row else ""
