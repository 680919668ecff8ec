"""Changes of control tables by settings and operators: issuers, storages, clients, bans (I8, I9).

`controlling` holds the control lock exclusively, and audits each change in the same transaction.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import CONTROL_LOCK, one, transaction
from minter.errors import InvalidRequest, SettingsError, UnknownClient, UnknownVO
from minter.policy.clients import Ban, Client


@contextmanager
def controlling(
    pool: Pool, actor: str, action: str, subject: str, details: Mapping[str, object]
) -> Iterator["psycopg.Connection[Any]"]:
    """Yield a connection that holds the control lock exclusively; audit the change with it (I8, I9)."""
    with transaction(pool) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (CONTROL_LOCK,))
        yield connection
        connection.execute(
            "INSERT INTO audit (actor, action, subject, details) VALUES (%s, %s, %s, %s)",
            (actor, action, subject, Jsonb(dict(details))),
        )


def sync_catalogue(pool: Pool, issuers: Mapping[str, str], wanted: Mapping[tuple[str, str], object]) -> int:
    """Write the issuers and storages of the settings to the database; return the number of changes.

    `wanted` maps (VO, name) to the definition of each storage and FTS in the settings, as a JSON value.

    The `iss` of a VO cannot change (§2.1: `sub` is unique within it); raises SettingsError if it differs. A
    storage that left the settings keeps its row, marked as retired, because issued tokens refer to it.
    """
    with transaction(pool) as connection:
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
    with controlling(pool, "settings", "catalogue", "settings", details) as connection:
        for vo, iss in new.items():
            connection.execute(
                "INSERT INTO issuers (vo, iss) VALUES (%s, %s) ON CONFLICT DO NOTHING", (vo, iss)
            )
            (recorded,) = one(connection.execute("SELECT iss FROM issuers WHERE vo = %s", (vo,)))
            if recorded != iss:
                raise SettingsError(
                    f"VO {vo!r} has issued as {recorded!r} before and cannot become {iss!r}; "
                    f"correct issuers.{vo}.iss"
                )
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO storages (vo, name, definition) VALUES (%s, %s, %s)"
                " ON CONFLICT (vo, name) DO UPDATE"
                " SET definition = excluded.definition, retired_at = NULL",
                [(*key, Jsonb(wanted[key])) for key in changed],
            )
            cursor.executemany("UPDATE storages SET retired_at = now() WHERE vo = %s AND name = %s", gone)
    return len(new) + len(changed) + len(gone)


def sync_providers(pool: Pool, names: Iterable[str]) -> None:
    """Add a row for each new provider of the settings; a provider that left the settings keeps its row."""
    with transaction(pool) as connection:
        for name in sorted(names):
            connection.execute(
                "INSERT INTO providers (name, due_at) SELECT %(name)s, now()"
                " WHERE NOT EXISTS (SELECT FROM providers WHERE name = %(name)s) ON CONFLICT DO NOTHING",
                {"name": name},
            )


def set_subject(pool: Pool, name: str, subject: Mapping[str, Any], actor: str) -> None:
    """Store a client's subject token for exchanges; `subject` maps columns of `clients` to values."""
    shown = {k: str(v) for k, v in subject.items() if k != "subject_token"}
    with controlling(pool, actor, "client.subject_token", name, shown) as tx:
        for column, value in subject.items():
            _update(tx, name, f"{column} = %s", value)


def add_client(pool: Pool, client: Client, actor: str) -> int:
    """Register a client and return its client_id.

    Raises UnknownClient if the name is taken, a value is not allowed, or the VO has no issuer.
    """
    details = {
        "vo": client.vo, "operations": sorted(client.operations), "paths": client.paths,
        "reply_queues": client.reply_queues, "jwe": bool(client.jwe_key),
        "audiences": client.audiences, "scopes": client.scopes, "groups": client.groups,
    }  # fmt: skip
    try:
        with controlling(pool, actor, "client.add", client.name, details) as connection:
            row = connection.execute(
                "INSERT INTO clients (name, vo, sub, operations, paths, max_lifetime_seconds,"
                " reply_queues, jwe_key, default_audience, audiences, scopes, groups)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING client_id",
                (
                    client.name, client.vo, client.sub, sorted(client.operations),
                    list(client.paths), client.max_lifetime_seconds, list(client.reply_queues),
                    Jsonb(client.jwe_key) if client.jwe_key else None,
                    list(client.default_audience), list(client.audiences), list(client.scopes),
                    list(client.groups),
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


_KEYS = ("jwe_key", "auth_key")


def change_client(pool: Pool, name: str, changes: Mapping[str, Any], actor: str) -> None:
    """Change a client's limits, queues or key; `changes` maps columns of `clients` to new values."""
    shown = {k: bool(v) if k in _KEYS else v for k, v in changes.items()}
    with controlling(pool, actor, "client.change", name, shown) as tx:
        for column, value in changes.items():
            _update(tx, name, f"{column} = %s", Jsonb(value) if column in _KEYS and value else value)


def disable_client(pool: Pool, name: str, actor: str, *, disabled: bool) -> None:
    """Disable or enable a client; requests of a disabled client are refused from the next transaction on."""
    with controlling(pool, actor, "client.disable" if disabled else "client.enable", name, {}) as tx:
        _update(tx, name, "disabled_at = CASE WHEN %s THEN now() END", disabled)


def set_secret(pool: Pool, name: str, hashed: bytes, keep_old: timedelta, actor: str) -> None:
    """Store the hash of a client's new secret; the previous secret stays valid for `keep_old`."""
    with controlling(
        pool, actor, "client.secret", name, {"keep_old_seconds": keep_old.total_seconds()}
    ) as tx:
        _update(
            tx,
            name,
            "old_secret_until = CASE WHEN secret_hash IS NOT NULL THEN now() + %s END,"
            " old_secret_hash = secret_hash, secret_hash = %s",
            keep_old,
            hashed,
        )


def secrets_key(pool: Pool, vo: str, fresh: bytes) -> bytes:
    """Return the encrypted key that hashes a VO's client secrets; if there is none, store `fresh` first."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE issuers SET secrets_key = %s WHERE vo = %s AND secrets_key IS NULL", (fresh, vo)
        )
        row = connection.execute("SELECT secrets_key FROM issuers WHERE vo = %s", (vo,)).fetchone()
    if row is None:
        raise UnknownClient(f"VO {vo!r} has no issuer in the database")
    return bytes(row[0])


def _update(tx: "psycopg.Connection[Any]", name: str, change: str, *values: object) -> None:
    try:
        changed = tx.execute(f"UPDATE clients SET {change} WHERE name = %s", (*values, name)).rowcount
    except psycopg.errors.CheckViolation as error:
        raise InvalidRequest(f"client {name!r} cannot be changed: {error.diag.constraint_name}") from error
    if not changed:
        raise UnknownClient(f"client {name!r} is not registered; run: minter clients list")


def add_ban(pool: Pool, ban: Ban, reason: str, actor: str) -> None:
    """Add a ban, in force from the next transaction on; raises InvalidRequest if it is in force already."""
    details = {"kind": ban.kind, "value": ban.value, "vo": ban.vo, "reason": reason}
    try:
        with controlling(pool, actor, "ban", ban.value, details) as tx:
            tx.execute("INSERT INTO bans (kind, value, vo, reason) VALUES (%s, %s, %s, %s)", (*ban, reason))
    except psycopg.errors.UniqueViolation as error:
        raise InvalidRequest(f"{ban.kind} {ban.value!r} is banned already") from error
    except psycopg.errors.ForeignKeyViolation as error:
        raise UnknownVO(f"VO {ban.vo!r} has no issuer in the database") from error


def lift_ban(pool: Pool, ban: Ban, actor: str) -> None:
    """Lift a ban; raises InvalidRequest if there is none."""
    with controlling(pool, actor, "unban", ban.value, {"kind": ban.kind, "vo": ban.vo}) as tx:
        lifted = tx.execute(
            "UPDATE bans SET lifted_at = now() WHERE (kind, value) = (%s, %s)"
            " AND vo IS NOT DISTINCT FROM %s AND lifted_at IS NULL",
            ban,
        ).rowcount
        if not lifted:
            raise InvalidRequest(f"{ban.kind} {ban.value!r} is not banned; run: minter bans")


_NAMES = {
    "client": "SELECT name FROM clients",
    "storage": "SELECT name FROM storages",
    "vo": "SELECT vo FROM issuers",
}


def names(pool: Pool, kind: str) -> set[str] | None:
    """Return the known names for a kind of ban, None for a kind that accepts any value."""
    if kind not in _NAMES:
        return None
    with transaction(pool) as connection:
        return {name for (name,) in connection.execute(_NAMES[kind]).fetchall()}


def client_names(pool: Pool, patience: float) -> list[str]:
    """Return the names of all clients in order; `patience` is the longest wait for Postgres, in seconds."""
    with transaction(pool, patience) as connection:
        rows = connection.execute("SELECT name FROM clients ORDER BY name").fetchall()
    return [name for (name,) in rows]


def list_bans(pool: Pool) -> list[dict[str, Any]]:
    """Return the bans in force, newest first."""
    with transaction(pool) as connection:
        rows = connection.execute(
            "SELECT kind, value, vo, reason, created_at FROM bans WHERE lifted_at IS NULL"
            " ORDER BY ban_id DESC"
        ).fetchall()
    return [dict(zip(("kind", "value", "vo", "reason", "since"), row, strict=True)) for row in rows]
