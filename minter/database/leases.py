"""Leases of managed tokens: a refresher takes a lease, and saves its result only under that lease.

A lease lets one refresher at a time request a token from its provider, with no transaction open meanwhile.
A rotated refresh token is committed to its row before the access token that came with it is used.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec import Struct, structs
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import json_text, transaction
from minter.database.providers import known, locked
from minter.providers.budgets import HORIZON, Slots, reserve
from minter.providers.dialects import LEADS, Provider

# ── leased, asked for, saved ─────────────────────────────────────────────────────────────────


class Leased(Struct, frozen=True):
    """A managed token that this refresher is to request now; its secrets are still encrypted.

    `spent` is true if its refresh token was sent before and the answer is not known.
    """

    jti: UUID
    vo: str
    client: str
    mode: str
    scope: str
    granted_scope: str
    audience: list[str]
    storage: str
    on_behalf_of: str
    activity: str
    fallback: list[str]
    cap_seconds: int
    least_seconds: int
    deadline: datetime
    lead_seconds: int
    needed_at: datetime
    tries: int
    spent: bool
    subject: bytes | None
    refresh: bytes | None
    expires_at: datetime | None
    client_subject: bytes | None


LEASED = ", ".join(
    {"vo": "c.vo", "client": "c.name", "mode": "m.mode::text",
     "client_subject": "CASE WHEN c.subject_provider = m.provider AND c.subject_expires_at > %(now)s"
     " THEN c.subject_token END",
     "spent": "d.was_spent"}.get(name, f"m.{name}")
    for name in Leased.__struct_fields__
)  # fmt: skip
LOCK = "FOR UPDATE SKIP LOCKED"


def needed_soonest(which: str, retried: str, lock: str = LOCK) -> str:
    """Return the query of a provider's tokens that are not leased, those needed soonest first.

    `which` and `retried` are conditions, the latter for tokens that wait for a retry: these have an index of
    their own. Each index is probed once for each lead, however many tokens are live.
    """
    probes = " UNION ALL ".join(
        f"""
        SELECT * FROM (
            SELECT m.jti, m.needed_at, m.spent AS was_spent FROM managed m
            WHERE m.provider = %(provider)s AND m.lead_seconds = l.lead AND {retry} AND {which}
                AND m.deadline > %(now)s AND (m.leased_until IS NULL OR m.leased_until <= %(now)s)
            ORDER BY m.needed_at LIMIT %(count)s {lock}
        ) AS {name}"""
        for name, retry in (("first", "m.retry_at IS NULL"), ("again", retried))
    )
    return (
        f"SELECT d.* FROM unnest(%(leads)s::int[]) AS l (lead) CROSS JOIN LATERAL ({probes}) AS d"
        " ORDER BY d.needed_at LIMIT %(count)s"
    )


_DUE = ("m.needed_at <= %(now)s + make_interval(secs => l.lead)", "m.retry_at <= %(now)s")
DUE = needed_soonest(*_DUE, lock="")
"""Selects due tokens."""


class Taken(Struct, frozen=True):
    """Tokens that one refresher may request from a provider now, each with its slot, under one lease."""

    provider: str
    lease: UUID
    tokens: Sequence[Leased]
    slots: Slots
    probe: datetime | None
    """If the request is the probe of a half-open breaker: until when other requests wait for its answer."""


_LEASE = f"""
    WITH due AS MATERIALIZED ({needed_soonest(*_DUE)})
    UPDATE managed m SET leased_until = %(until)s, lease = %(lease)s,
        spent = m.refresh IS NOT NULL AND NOT %(replays)s
    FROM due d, clients c
    WHERE m.jti = d.jti AND c.client_id = m.client_id RETURNING {LEASED}
    """


def take(
    pool: Pool,
    provider: Provider,
    lease: UUID,
    most: int,
    now: datetime,
    lease_seconds: float,
    horizon: timedelta = HORIZON,
) -> Taken | None:
    """Lease at most `most` due tokens, and reserve a slot for each within the budget; None if there is none.

    While the provider's circuit breaker is open no token is leased; while it is half open, one token is
    leased, as a probe.
    """
    values = {"leads": list(LEADS), "provider": provider.name, "now": now, "count": 1}
    with transaction(pool) as connection:
        # Checks without locks come first, the cheaper one before the other: most calls end here.
        if known(connection, provider.name).state(now) == "open":
            return None
        if connection.execute(DUE, values).fetchone() is None:
            return None
        due_at, breaker, leased = locked(connection, provider.name, now)
        state = breaker.state(now)
        if state == "open":
            return None
        wanted = 1 if state == "half_open" else most
        free = provider.in_flight - leased
        slots = reserve(due_at, now, provider.requests_per_second, wanted, free, horizon)
        if not slots.count:
            return None
        until = now + timedelta(seconds=lease_seconds)
        tokens = connection.execute(
            _LEASE,
            values | {"count": slots.count, "until": until, "lease": lease, "replays": provider.replays},
        ).fetchall()
        if not tokens:
            return None
        slots = structs.replace(slots, count=len(tokens))
        probe = until if state == "half_open" else None
        connection.execute(
            "UPDATE providers SET due_at = %s, probed_until = coalesce(%s, probed_until) WHERE name = %s",
            (slots.due_at, probe, provider.name),
        )
    found = [Leased(*row) for row in tokens]
    found.sort(key=lambda t: t.needed_at)
    return Taken(provider.name, lease, found, slots, probe)


class Result(Struct, frozen=True, kw_only=True):
    """The result for one leased token, as `save` writes it.

    None keeps the stored state, secret, expiry, scope or FTS id; b"" deletes a secret. `lead_seconds` and
    `needed_at` are None if the token needs no further request.
    """

    jti: UUID
    lease: UUID
    state: str | None = None
    access: bytes | None = None
    refresh: bytes | None = None
    subject: bytes | None = None
    expires_at: datetime | None = None
    scope: str | None = None
    fts_token_id: int | None = None
    lead_seconds: int | None = None
    needed_at: datetime | None = None
    retry_at: datetime | None = None
    tries: int = 0
    spent: bool = False
    error: dict[str, Any] | None = None


def save(pool: Pool, results: Sequence[Result]) -> set[UUID]:
    """Save results whose lease is still held, and end these leases; return the jtis that were saved."""
    if not results:
        return set()
    ordered = sorted(results, key=lambda r: r.jti)
    with transaction(pool) as connection:
        rows = connection.execute(
            """
            UPDATE managed m SET
                state = coalesce(r.state::token_state, m.state),
                access = CASE WHEN r.access = '' THEN NULL ELSE coalesce(r.access, m.access) END,
                refresh = CASE WHEN r.refresh = '' THEN NULL ELSE coalesce(r.refresh, m.refresh) END,
                subject = CASE WHEN r.subject = '' THEN NULL ELSE coalesce(r.subject, m.subject) END,
                expires_at = coalesce(r.expires_at, m.expires_at),
                granted_scope = coalesce(r.scope, m.granted_scope),
                fts_token_id = coalesce(r.fts, m.fts_token_id),
                -- A use added meanwhile may need the token for longer than the refresher knew.
                lead_seconds = CASE WHEN r.lead IS NULL AND r.expires_at < m.deadline
                    AND coalesce(r.state, 'issued') = 'issued' THEN 60 ELSE r.lead END,
                needed_at = CASE WHEN r.lead IS NULL AND r.expires_at < m.deadline
                    AND coalesce(r.state, 'issued') = 'issued' THEN r.expires_at ELSE r.needed END,
                retry_at = r.retry, tries = r.tries, spent = r.spent, error = r.error::jsonb,
                leased_until = NULL, lease = NULL
            FROM unnest(%s::uuid[], %s::uuid[], %s::text[], %s::bytea[], %s::bytea[], %s::bytea[],
                %s::timestamptz[], %s::text[], %s::bigint[], %s::int[], %s::timestamptz[], %s::timestamptz[],
                %s::int[], %s::bool[], %s::text[])
                AS r (jti, lease, state, access, refresh, subject, expires_at, scope, fts, lead, needed,
                    retry, tries, spent, error)
            WHERE m.jti = r.jti AND m.lease = r.lease RETURNING m.jti
            """,
            (
                [r.jti for r in ordered],
                [r.lease for r in ordered],
                [r.state for r in ordered],
                [r.access for r in ordered],
                [r.refresh for r in ordered],
                [r.subject for r in ordered],
                [r.expires_at for r in ordered],
                [r.scope for r in ordered],
                [r.fts_token_id for r in ordered],
                [r.lead_seconds for r in ordered],
                [r.needed_at for r in ordered],
                [r.retry_at for r in ordered],
                [r.tries for r in ordered],
                [r.spent for r in ordered],
                [json_text(r.error) if r.error else None for r in ordered],
            ),
        ).fetchall()
    return {jti for (jti,) in rows}


def release(pool: Pool, tokens: Sequence[Leased], lease: UUID) -> None:
    """End the leases of tokens without saving a result; `spent` gets the value that it had before."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE managed m SET leased_until = NULL, lease = NULL, spent = r.spent"
            " FROM unnest(%s::uuid[], %s::bool[]) AS r (jti, spent) WHERE m.jti = r.jti AND m.lease = %s",
            ([t.jti for t in tokens], [t.spent for t in tokens], lease),
        )
