"""SQL of refresh families: what a refresh token leads to, and the access tokens that came of it."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from msgspec import structs
from psycopg.types.json import Jsonb

from minter.database.states import end_family_tokens
from minter.policy.token_requests import Family

_COLUMNS = Family.__struct_fields__


def read(connection: "psycopg.Connection[Any]", ids: Sequence[UUID]) -> dict[UUID, Family]:
    """Read refresh families and lock their rows, in a fixed order to avoid deadlocks."""
    return _read(connection, "family_id = ANY(%s)", list(ids))


def read_on(
    connection: "psycopg.Connection[Any]", subjects: Sequence[UUID], since: datetime, ids: Sequence[UUID]
) -> dict[UUID, Family]:
    """Read refresh families by id, and the unused ones of these subject tokens started after `since`.

    Subject tokens are locked before any family is, and all families at once, in a fixed order: batches
    cannot deadlock.
    """
    connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended(jti::text, 0))"
        " FROM (SELECT DISTINCT unnest(%s::uuid[]) AS jti ORDER BY jti) AS w",
        (list(subjects),),
    )
    return _read(
        connection,
        "family_id = ANY(%s) OR (subject_jti = ANY(%s) AND generation = 1 AND revoked_at IS NULL"
        " AND rotated_at > %s)",
        list(ids), list(subjects), since,
    )  # fmt: skip


def _read(connection: "psycopg.Connection[Any]", which: str, *values: object) -> dict[UUID, Family]:
    rows = connection.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM families WHERE {which} ORDER BY family_id FOR UPDATE", values
    ).fetchall()
    found = [Family(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]
    return {f.family_id: structs.replace(f, audience=tuple(f.audience)) for f in found}


def save(
    connection: "psycopg.Connection[Any]",
    families: Sequence[Family],
    tokens: Sequence[tuple[UUID, UUID]],
    now: datetime,
) -> None:
    """Add refresh families, or update their generation; `tokens` are (family_id, jti) of access tokens.

    The revocation of a family is audited, and ends its access tokens.
    """
    with connection.cursor() as cursor:
        cursor.executemany(
            f"INSERT INTO families ({', '.join(_COLUMNS)}) VALUES ({', '.join(['%s'] * len(_COLUMNS))})"
            " ON CONFLICT (family_id) DO UPDATE SET generation = excluded.generation,"
            " rotated_at = excluded.rotated_at, revoked_at = excluded.revoked_at",
            [
                structs.astuple(structs.replace(f, act=f.act and Jsonb(f.act), audience=list(f.audience)))
                for f in families
            ],
        )
        cursor.executemany(
            "INSERT INTO audit (actor, action, subject, details) SELECT name, 'refresh.reused', %s,"
            " jsonb_build_object('subject_jti', %s::text) FROM clients WHERE client_id = %s",
            [(str(f.family_id), str(f.subject_jti), f.client_id) for f in families if f.revoked_at],
        )
        cursor.executemany("INSERT INTO family_tokens (family_id, jti) VALUES (%s, %s)", tokens)
    end_family_tokens(connection, [f.family_id for f in families if f.revoked_at], now)
