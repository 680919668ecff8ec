"""SQL of the keys of IAMs under whose issuer Minter signs, too (ADR 16)."""

from datetime import datetime, timedelta

from psycopg.types.json import Jsonb
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import LONG_SECONDS, transaction
from minter.database.control_changes import controlling
from minter.errors import InvalidRequest
from minter.tokens.co_issuer import IamKeys, kid_of

_COLUMNS = ", ".join(IamKeys.__struct_fields__)


def known(pool: Pool, vo: str, patience: float = LONG_SECONDS) -> IamKeys:
    """Return what is known of the keys of a VO's IAM."""
    with transaction(pool, patience) as connection:
        row = connection.execute(f"SELECT {_COLUMNS} FROM co_issuers WHERE vo = %s", (vo,)).fetchone()
    return IamKeys(**dict(zip(IamKeys.__struct_fields__, row, strict=True))) if row else IamKeys(vo=vo)


def claim(pool: Pool, vo: str, now: datetime, every: timedelta) -> bool:
    """Say whether this process is to fetch the IAM's keys now: none has tried for `every`."""
    with transaction(pool) as connection:
        connection.execute("INSERT INTO co_issuers (vo) VALUES (%s) ON CONFLICT DO NOTHING", (vo,))
        claimed = connection.execute(
            "UPDATE co_issuers SET tried_at = %(now)s WHERE vo = %(vo)s"
            " AND (tried_at IS NULL OR tried_at <= %(before)s)",
            {"vo": vo, "now": now, "before": now - every},
        ).rowcount
    return bool(claimed)


def save(pool: Pool, found: IamKeys) -> None:
    """Keep what a good answer of the IAM says, unless a later one was kept."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE co_issuers SET keys = %s, missing = %s, problem = %s, fetched_at = %s"
            " WHERE vo = %s AND (fetched_at IS NULL OR fetched_at < %s)",
            (
                Jsonb(found.keys),
                Jsonb(found.missing),
                found.problem,
                found.fetched_at,
                found.vo,
                found.fetched_at,
            ),
        )


def note_problem(pool: Pool, vo: str, problem: str) -> None:
    """Note why the IAM's last answer could not be used; its known keys stay."""
    with transaction(pool) as connection:
        connection.execute("UPDATE co_issuers SET problem = %s WHERE vo = %s", (problem[:500], vo))


def note_written(pool: Pool, vo: str, now: datetime, every: timedelta) -> None:
    """Note that the merged file is as it should be, unless that was noted less than `every` ago."""
    with transaction(pool) as connection:
        connection.execute(
            "UPDATE co_issuers SET written_at = %(now)s WHERE vo = %(vo)s"
            " AND (written_at IS NULL OR written_at <= %(before)s)",
            {"vo": vo, "now": now, "before": now - every},
        )


def drop(pool: Pool, vo: str, kid: str, now: datetime, actor: str) -> None:
    """Remove a key of the IAM at once, audited; raises InvalidRequest if it is not known, or the only one."""
    with controlling(pool, actor, "co_issuer.drop", kid, {"vo": vo}) as connection:
        row = connection.execute("SELECT keys FROM co_issuers WHERE vo = %s FOR UPDATE", (vo,)).fetchone()
        keys = row[0] if row else []
        left = [key for key in keys if kid_of(key) != kid]
        if len(left) == len(keys):
            raise InvalidRequest(
                f"the IAM of VO {vo!r} has no key with the kid {kid!r}; run: minter keys iam --vo {vo}"
            )
        if not left:
            raise InvalidRequest(f"{kid!r} is the IAM's only known key: sites would refuse all of its tokens")
        # An answer that is on its way was asked for before this, and is not saved.
        connection.execute(
            "UPDATE co_issuers SET keys = %s, fetched_at = greatest(fetched_at, %s) WHERE vo = %s",
            (Jsonb(left), now, vo),
        )
