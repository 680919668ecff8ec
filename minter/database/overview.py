"""SQL of `minter status`: the server, its standbys, the recorded issuers, and managed tokens by provider."""

from datetime import datetime
from pathlib import Path

from msgspec import Struct
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import one, synchronous_standbys, transaction


class PostgresServer(Struct, frozen=True, kw_only=True):
    """The Postgres server; `standbys` are (name, state, kind of synchronisation)."""

    version: str
    size: str
    now: datetime
    connections: int
    max_connections: int
    read_only: bool
    wanted_standbys: str
    standbys: list[tuple[str | None, str | None, str | None]]


def server(pool: Pool, patience: float) -> PostgresServer:
    """Return what the server says of itself; raises Unavailable."""
    with transaction(pool, patience) as connection:
        version, size, now, connections, most, read_only = one(
            connection.execute(
                "SELECT current_setting('server_version'),"
                " pg_size_pretty(pg_database_size(current_database())), clock_timestamp(),"
                " (SELECT count(*) FROM pg_stat_activity)::int, current_setting('max_connections')::int,"
                " pg_is_in_recovery()"
            )
        )
        standbys = connection.execute(
            "SELECT application_name, state, sync_state FROM pg_stat_replication ORDER BY 1"
        ).fetchall()
        wanted = synchronous_standbys(connection)
    return PostgresServer(
        version=version, size=size, now=now, connections=connections, max_connections=most,
        read_only=read_only, wanted_standbys=wanted, standbys=standbys,
    )  # fmt: skip


def data_folder(pool: Pool, patience: float) -> Path | None:
    """Return the server's data folder, None if this role may not see it (pg_monitor may)."""
    with transaction(pool, patience) as connection:
        (folder,) = one(
            connection.execute(
                "SELECT CASE WHEN pg_has_role(current_user, 'pg_read_all_settings', 'MEMBER')"
                " THEN current_setting('data_directory') END"
            )
        )
    return Path(folder) if folder else None


def issuers(pool: Pool, patience: float) -> dict[str, str]:
    """Return the recorded `iss` of each VO."""
    with transaction(pool, patience) as connection:
        return dict(connection.execute("SELECT vo, iss FROM issuers").fetchall())


def providers(pool: Pool, patience: float) -> list[tuple[str, datetime | None, int, int, int]]:
    """Return of each provider: name, end of its pause, failures in a row, pending and fresh tokens."""
    with transaction(pool, patience) as connection:
        return connection.execute(
            "SELECT p.name, p.open_until, p.failures, count(m.jti) FILTER (WHERE m.state = 'queued'),"
            " count(m.jti) FILTER (WHERE m.state = 'issued') FROM providers p LEFT JOIN managed m"
            " ON m.provider = p.name AND m.state IN ('queued', 'issued') GROUP BY p.name ORDER BY p.name"
        ).fetchall()
