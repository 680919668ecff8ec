"""SQL of managed tokens: recorded, leased, saved, ended; one statement for any number of rows.

A lease lets one worker at a time ask for a token, with no transaction open meanwhile. Its result is saved
only under the same lease: a refresh token that rotated is in its row before anything of it is used.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from msgspec import Struct, structs
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import json_text, plain_text, transaction
from minter.database.providers import known, locked
from minter.providers.budgets import HORIZON, Slots, reserve
from minter.providers.dialects import LEADS, Provider
from minter.tokens.managed import ManagedToken, Wanted

Seal = Callable[[int, UUID, str, str], bytes]
"""Encrypts one secret of a managed token: its client_id, its id, which secret it is, and the secret."""

# ── recorded with the request ────────────────────────────────────────────────────────────────

_SHOWN = "m.jti, m.state::text, c.vo, m.granted_scope, m.access, m.expires_at, m.error, m.deadline"


_TOO_SHORT = (
    "m.expires_at < excluded.needed_at"
    " - make_interval(secs => excluded.lead_seconds - excluded.least_seconds)"
)


def join(
    connection: "psycopg.Connection[Any]", wanted: Sequence[Wanted], seal: Seal
) -> dict[bytes, ManagedToken]:
    """Add managed tokens, or one more use to those that are there already; return them by digest."""
    wanted = sorted(wanted, key=lambda w: w.digest)  # an order that cannot deadlock
    rows = connection.execute(
        f"""
        WITH new AS (
            INSERT INTO managed AS m (jti, client_id, digest, provider, mode, state, scope, audience, storage,
                on_behalf_of, activity, fallback, uses, cap_seconds, least_seconds, deadline,
                lead_seconds, needed_at, subject, pushes)
            SELECT j, c, d, p, o::token_mode, 'queued', s,
                ARRAY(SELECT jsonb_array_elements_text(a::jsonb)), g, b, v,
                ARRAY(SELECT jsonb_array_elements_text(f::jsonb)), u, x, l, e, t, w, z, q
            FROM unnest(%s::uuid[], %s::int[], %s::bytea[], %s::text[], %s::text[], %s::text[], %s::text[],
                %s::text[], %s::text[], %s::text[], %s::text[], %s::int[], %s::int[], %s::int[],
                %s::timestamptz[], %s::int[], %s::timestamptz[], %s::bytea[],
                %s::bool[])
                AS w (j, c, d, p, o, s, a, g, b, v, f, u, x, l, e, t, w, z, q)
            ON CONFLICT (digest) WHERE state IN ('queued', 'issued') DO UPDATE SET
                uses = m.uses + excluded.uses,
                pushes = m.pushes OR excluded.pushes,
                deadline = greatest(m.deadline, excluded.deadline),
                least_seconds = greatest(m.least_seconds, excluded.least_seconds),
                -- Due at once if what is left of its life is too short for this use.
                lead_seconds = CASE WHEN {_TOO_SHORT} THEN excluded.lead_seconds
                    WHEN excluded.deadline > m.expires_at THEN coalesce(m.lead_seconds, 60)
                    ELSE m.lead_seconds END,
                needed_at = CASE WHEN {_TOO_SHORT} THEN excluded.needed_at
                    WHEN excluded.deadline > m.expires_at THEN coalesce(m.needed_at, m.expires_at)
                    ELSE m.needed_at END
            RETURNING m.*)
        SELECT m.digest, {_SHOWN} FROM new m JOIN clients c USING (client_id)
        """,
        (
            [w.jti for w in wanted],
            [w.client_id for w in wanted],
            [w.digest for w in wanted],
            [w.provider for w in wanted],
            [w.mode for w in wanted],
            [w.scope for w in wanted],
            [json_text(w.audience) for w in wanted],
            [w.storage for w in wanted],
            [plain_text(w.on_behalf_of) for w in wanted],
            [plain_text(w.activity) for w in wanted],
            [json_text(w.fallback) for w in wanted],
            [w.uses for w in wanted],
            [w.cap_seconds for w in wanted],
            [w.least_seconds for w in wanted],
            [w.deadline for w in wanted],
            [w.lead_seconds for w in wanted],
            [w.needed_at for w in wanted],
            [seal(w.client_id, w.jti, "subject", w.subject) if w.subject else None for w in wanted],
            [w.pushes for w in wanted],
        ),
    ).fetchall()
    return {bytes(digest): _token(*row) for digest, *row in rows}


def read(connection: "psycopg.Connection[Any]", jtis: Collection[UUID]) -> dict[UUID, ManagedToken]:
    """Read managed tokens; one that was kept no longer is missing."""
    rows = connection.execute(
        f"SELECT {_SHOWN} FROM managed m JOIN clients c USING (client_id) WHERE m.jti = ANY(%s)",
        (list(jtis),),
    ).fetchall()
    return {row[0]: _token(*row) for row in rows}


def _token(
    jti: UUID, state: str, vo: str, scope: str, access: Any, expires_at: Any, error: Any, deadline: Any
) -> ManagedToken:
    sealed = None if access is None else bytes(access)
    return ManagedToken(
        jti=jti, state=state, vo=vo, scope=scope, access=sealed, expires_at=expires_at, error=error,
        deadline=deadline,
    )  # fmt: skip


def end_uses(connection: "psycopg.Connection[Any]", uses: Sequence[UUID]) -> None:
    """Note that uses ended; a managed token that serves no more is finished, and its secrets are gone."""
    if not uses:
        return
    ended = (
        "(SELECT u.jti, count(*) AS uses FROM uses u JOIN tokens t USING (jti)"
        " WHERE u.use_id = ANY(%(uses)s) AND t.mode <> 'mint' GROUP BY u.jti) e"
    )
    values = {"uses": list(uses)}
    connection.execute(
        f"SELECT FROM managed m JOIN {ended} USING (jti)"
        " ORDER BY m.digest FOR UPDATE OF m",  # the order of `join`
        values,
    )
    connection.execute(
        f"UPDATE managed m SET uses = m.uses - e.uses FROM {ended} WHERE m.jti = e.jti", values
    )
    connection.execute(
        f"UPDATE managed m SET {_FINISHED} FROM {ended} WHERE m.jti = e.jti AND m.uses <= 0", values
    )


_UNFINISHED = "(access IS NOT NULL OR lead_seconds IS NOT NULL)"
_FINISHED = (
    "state = CASE WHEN state = 'failed' THEN state ELSE 'finished' END, access = NULL, refresh = NULL,"
    " subject = NULL, lead_seconds = NULL, needed_at = NULL, leased_until = NULL, lease = NULL"
)


# ── leased, asked for, saved ─────────────────────────────────────────────────────────────────


class Leased(Struct, frozen=True):
    """A managed token that this worker shall ask for now; what is encrypted in it stays so.

    `spent`: a refresh token of it was sent before, and the answer is not known.
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


_LEASED = ", ".join(
    {"vo": "c.vo", "client": "c.name", "mode": "m.mode::text",
     "client_subject": "CASE WHEN c.subject_provider = m.provider AND c.subject_expires_at > %(now)s"
     " THEN c.subject_token END",
     "spent": "d.was_spent"}.get(name, f"m.{name}")
    for name in Leased.__struct_fields__
)  # fmt: skip
_DUE = """
    SELECT d.* FROM unnest(%(leads)s::int[]) AS l (lead) CROSS JOIN LATERAL (
        SELECT m.jti, m.needed_at, m.spent AS was_spent FROM managed m
        WHERE m.provider = %(provider)s AND m.lead_seconds = l.lead
            AND m.needed_at <= %(now)s + make_interval(secs => l.lead) AND m.deadline > %(now)s
            AND (m.retry_at IS NULL OR m.retry_at <= %(now)s)
            AND (m.leased_until IS NULL OR m.leased_until <= %(now)s)
        ORDER BY m.needed_at LIMIT %(count)s {lock}
    ) d ORDER BY d.needed_at LIMIT %(count)s
"""
DUE = _DUE.format(lock="")
"""The tokens that are due, soonest end first: one index probe for each lead, however many are alive."""


class Taken(Struct, frozen=True):
    """What one worker may ask a provider for now: tokens, each with its slot, under one lease."""

    provider: str
    lease: UUID
    tokens: Sequence[Leased]
    slots: Slots


def take(
    pool: Pool,
    provider: Provider,
    lease: UUID,
    most: int,
    now: datetime,
    lease_seconds: float,
    horizon: timedelta = HORIZON,
) -> Taken | None:
    """Lease tokens that are due, and reserve a slot for each within the budget; None if there is nothing.

    While the provider is paused nothing is leased; then one is, to see whether it is back.
    """
    values = {"leads": list(LEADS), "provider": provider.name, "now": now, "count": 1}
    with transaction(pool) as connection:
        # Looked at before anything is locked, the cheaper first: most looks end here.
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
            f"""
            WITH due AS MATERIALIZED ({_DUE.format(lock="FOR UPDATE SKIP LOCKED")})
            UPDATE managed m SET leased_until = %(until)s, lease = %(lease)s,
                spent = m.refresh IS NOT NULL AND NOT %(replays)s
            FROM due d, clients c
            WHERE m.jti = d.jti AND c.client_id = m.client_id RETURNING {_LEASED}
            """,
            values | {"count": slots.count, "until": until, "lease": lease, "replays": provider.replays},
        ).fetchall()
        if not tokens:
            return None
        slots = structs.replace(slots, count=len(tokens))
        probe = breaker.probing(until).probed_until if state == "half_open" else breaker.probed_until
        connection.execute(
            "UPDATE providers SET due_at = %s, probed_until = %s WHERE name = %s",
            (slots.due_at, probe, provider.name),
        )
    found = [Leased(*row) for row in tokens]
    found.sort(key=lambda t: t.needed_at)
    return Taken(provider.name, lease, found, slots)


class Result(Struct, frozen=True, kw_only=True):
    """What became of one leased token, as it is saved; None keeps what there is, b"" forgets it.

    `state` is the new one; without `needed_at` nothing more is to be done for it.
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
    """Save results and give their leases back; return those that were still ours to save."""
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
                -- A use that joined meanwhile may need it for longer than the worker knew.
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
    """Give leases back of which nothing was sent."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE managed m SET leased_until = NULL, lease = NULL, spent = r.spent"
            " FROM unnest(%s::uuid[], %s::bool[]) AS r (jti, spent) WHERE m.jti = r.jti AND m.lease = %s",
            ([t.jti for t in tokens], [t.spent for t in tokens], lease),
        )


# ── stood in for ─────────────────────────────────────────────────────────────────────────────

FALLBACK_WITHIN_SECONDS = 900
"""While a provider is paused, a token with less life than this is stood in for, if its route says how."""


def lease_for_fallback(
    pool: Pool,
    provider: Provider,
    lease: UUID,
    most: int,
    now: datetime,
    lease_seconds: float,
    but: Collection[UUID] = (),
) -> list[Leased]:
    """Lease the tokens that something must stand in for because the provider is paused; not these."""
    with transaction(pool) as connection:
        paused = connection.execute(
            "SELECT FROM providers WHERE name = %s AND open_until IS NOT NULL", (provider.name,)
        ).fetchone()
        if paused is None:
            return []
        rows = connection.execute(
            f"""
            WITH due AS MATERIALIZED (
                SELECT m.jti, m.spent AS was_spent FROM managed m
                WHERE m.provider = %(provider)s AND m.lead_seconds IS NOT NULL AND m.fallback <> '{{}}'
                    AND m.needed_at <= %(soon)s AND m.deadline > %(now)s
                    AND (m.leased_until IS NULL OR m.leased_until <= %(now)s)
                    AND m.lead_seconds = ANY(%(leads)s) AND m.jti <> ALL(%(but)s)
                ORDER BY m.needed_at LIMIT %(most)s FOR UPDATE SKIP LOCKED
            )
            UPDATE managed m SET leased_until = %(until)s, lease = %(lease)s FROM due d, clients c
            WHERE m.jti = d.jti AND c.client_id = m.client_id RETURNING {_LEASED}
            """,
            {
                "provider": provider.name, "now": now, "soon": now + timedelta(seconds=FALLBACK_WITHIN_SECONDS),
                "until": now + timedelta(seconds=lease_seconds), "lease": lease, "most": most,
                "leads": list(LEADS), "but": list(but),
            },
        ).fetchall()  # fmt: skip
    return [Leased(*row) for row in rows]


def living_uses(pool: Pool, jti: UUID) -> list[tuple[UUID, UUID, str, int, str, int]]:
    """Return what a managed token serves still: (use_id, request_id, queue, file, side, position)."""
    with transaction(pool) as connection:
        return connection.execute(
            "SELECT u.use_id, u.request_id, u.queue, u.file, u.side::text, u.position FROM uses u"
            " WHERE u.jti = %s AND NOT EXISTS (SELECT FROM token_states l WHERE l.jti = u.use_id"
            " AND l.ended_at IS NOT NULL) ORDER BY u.use_id",
            (jti,),
        ).fetchall()


def fall_back(pool: Pool, jti: UUID, lease: UUID, instead: Mapping[UUID, UUID]) -> int:
    """Let uses be served by other tokens (by use_id), or by what serves other uses; return how many were.

    Those that ended meanwhile stay as they are. A token that serves no more is finished; 0 if its lease
    was lost.
    """
    with transaction(pool) as connection:
        mine = connection.execute(
            "SELECT FROM managed WHERE jti = %s AND lease = %s FOR UPDATE", (jti, lease)
        ).fetchone()
        if mine is None:
            return 0
        moved = [
            use_id
            for (use_id,) in connection.execute(
                "UPDATE uses u SET instead_of = coalesce(u.instead_of, u.jti),"
                " jti = coalesce((SELECT o.jti FROM uses o WHERE o.use_id = r.other), r.other)"
                " FROM unnest(%s::uuid[], %s::uuid[]) AS r (use_id, other)"
                " WHERE u.use_id = r.use_id AND u.jti = %s AND NOT EXISTS ("
                " SELECT FROM token_states l WHERE l.jti = u.use_id AND l.ended_at IS NOT NULL)"
                " RETURNING u.use_id",
                (list(instead), list(instead.values()), jti),
            )
        ]
        connection.execute(
            "UPDATE managed m SET uses = m.uses + n.uses, pushes = m.pushes OR n.pushes FROM ("
            " SELECT jti, count(*) AS uses, bool_or(queue <> '') AS pushes FROM uses"
            " WHERE use_id = ANY(%s) GROUP BY jti) n WHERE m.jti = n.jti",
            (moved,),
        )
        connection.execute("UPDATE managed SET uses = uses - %s WHERE jti = %s", (len(moved), jti))
        connection.execute(f"UPDATE managed SET {_FINISHED} WHERE jti = %s AND uses <= 0", (jti,))
    return len(moved)


# ── pushed to durable queues ─────────────────────────────────────────────────────────────────


class Unpushed(Struct, frozen=True):
    """A managed token that changed since it was pushed, and one use that wants to know."""

    jti: UUID
    client: str
    vo: str
    state: str
    storage: str
    granted_scope: str
    on_behalf_of: str
    activity: str
    scope: str
    access: bytes | None
    expires_at: datetime | None
    fts_token_id: int
    error: dict[str, Any] | None
    use_id: UUID | None
    request_id: UUID | None
    file: int
    side: str
    position: int
    queue: str


_UNPUSHED = ", ".join(
    {"client": "c.name", "vo": "c.vo", "state": "m.state::text", "side": "coalesce(u.side::text, '')",
     "use_id": "u.use_id", "request_id": "u.request_id", "file": "coalesce(u.file, 0)",
     "position": "coalesce(u.position, 0)", "queue": "coalesce(u.queue, '')"}.get(name, f"m.{name}")
    for name in Unpushed.__struct_fields__
)  # fmt: skip
PUSH_SECONDS = 30


def unpushed(pool: Pool, now: datetime, most: int) -> list[Unpushed]:
    """Take tokens that are to be pushed, for a while; one row for each use that wants to know."""
    with transaction(pool) as connection:
        rows = connection.execute(
            f"""
            WITH m AS (
                UPDATE managed SET pushing_until = %(now)s + make_interval(secs => {PUSH_SECONDS})
                WHERE jti IN (
                    SELECT jti FROM managed WHERE pushes AND fts_token_id IS DISTINCT FROM pushed_id
                        AND (pushing_until IS NULL OR pushing_until <= %(now)s)
                    LIMIT %(most)s FOR UPDATE SKIP LOCKED)
                RETURNING *)
            SELECT {_UNPUSHED} FROM m JOIN clients c USING (client_id)
            LEFT JOIN uses u ON u.jti = m.jti AND u.queue <> '' AND NOT EXISTS (
                SELECT FROM token_states l WHERE l.jti = u.use_id AND l.ended_at IS NOT NULL)
            """,
            {"now": now, "most": most},
        ).fetchall()
    return [Unpushed(*row) for row in rows]


def pushed(pool: Pool, done: Mapping[UUID, int]) -> None:
    """Note which tokens were pushed, by the FTS id of each; one that changed meanwhile is pushed again."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE managed m SET pushed_id = r.id, pushing_until = NULL"
            " FROM unnest(%s::uuid[], %s::bigint[]) AS r (jti, id) WHERE m.jti = r.jti",
            (list(done), list(done.values())),
        )


# ── in bulk ──────────────────────────────────────────────────────────────────────────────────

BULK_ROWS = 5_000


def end_overdue(pool: Pool, now: datetime) -> int:
    """Finish the managed tokens whose deadline is over: no secret is kept longer. Return how many."""
    with transaction(pool) as connection:
        return connection.execute(
            f"UPDATE managed SET {_FINISHED} WHERE jti IN (SELECT jti FROM managed WHERE deadline <= %s"
            f" AND {_UNFINISHED} LIMIT %s FOR UPDATE SKIP LOCKED)",
            (now, BULK_ROWS),
        ).rowcount


def forget(pool: Pool, before: datetime) -> int:
    """Delete managed tokens whose deadline was over `before`; their record stays in `tokens` and `uses`."""
    with transaction(pool) as connection:
        return connection.execute(
            "DELETE FROM managed WHERE jti IN (SELECT jti FROM managed WHERE deadline <= %s LIMIT %s"
            " FOR UPDATE SKIP LOCKED)",
            (before, BULK_ROWS),
        ).rowcount
