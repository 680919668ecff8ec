"""A database restored from a dump: later tokens are unknown, and no wrong token is minted."""

import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from minter.contract.followups import FetchRequest, FileReport, ReportRequest
from minter.database import control_changes, keyring, migrations, traces
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.errors import UnknownRequest
from minter.local.servers import _postgres_programs
from minter.policy.clients import Ban
from minter.service import Service
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock, keys
from tests.conftest import _admin, load_settings, rows, with_one_algorithm
from tests.integration.test_mint import mint, submission, tokens

ME = "rucio-alpen"


@pytest.fixture
def service(service: Service) -> Service:
    """An issuer with one algorithm: these tests are about the keys of one."""
    return with_one_algorithm(service)


@pytest.fixture
def dump_and_lose(
    dsn: str, postgres_dsn: str, tmp_path: Path
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a function that dumps the database and one that loses it and restores the dump."""
    file = tmp_path / "dump"
    name = dict(word.split("=", 1) for word in dsn.split())["dbname"]

    def dump() -> None:
        subprocess.run([_postgres_programs() / "pg_dump", "--format=custom", "--file", file, dsn], check=True)

    def lose_and_restore() -> None:
        _admin(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")
        _admin(postgres_dsn, f"CREATE DATABASE {name}")
        subprocess.run(
            [_postgres_programs() / "pg_restore", "--exit-on-error", "--dbname", dsn, file], check=True
        )

    return dump, lose_and_restore


def test_restored_from_a_dump(
    service: Service, dsn: str, dump_and_lose: tuple[Callable[[], None], Callable[[], None]]
) -> None:
    dump, lose_and_restore = dump_and_lose
    before, after = submission("before"), submission("after")
    (known,) = mint(service, before)
    service.maintain_keys("me")
    dump()
    (lost,) = mint(service, after)
    service.pool.dispose()
    lose_and_restore()

    again = Service(load_settings(dsn))
    migrations.upgrade(again.pool)
    again.prepare()
    lifecycle = Lifecycle(again.engine, again.store)
    now = clock.now()
    # A request from before the dump gives the same bytes under its request_id.
    assert tokens(mint(again, before)[0]) == tokens(known)
    # A request from after the dump is unknown, and the answer says so.
    since, until = now - timedelta(days=1), now + timedelta(days=1)
    assert traces.find(again.pool, "jti", lost.issued[0].jti, since, until) == []
    assert lifecycle.report(
        ME,
        ReportRequest(
            files=(
                FileReport(state="active", external_id="before"),
                FileReport(state="active", external_id="after"),
            )
        ),
        now,
    ).unknown == ["files[1]"]
    with pytest.raises(UnknownRequest):
        lifecycle.fetch(ME, FetchRequest(after.request.request_id), now)
    # The repeated request gets other tokens, each with its row, signed by a key that is public.
    (renewed,) = mint(again, after)
    assert {i.jti for i in renewed.issued}.isdisjoint(i.jti for i in lost.issued)
    with transaction(again.pool) as connection:
        ring = read_keys(connection)
    public = {jwk["kid"]: jwk for jwk in keys.jwks(ring, now)["keys"]}
    (kid,) = {k.kid for k in ring if k.state == "active"}
    for issued in (*renewed.issued, *lost.issued):
        keys.verify(issued.token, public[kid])
    assert rows(again, "SELECT count(*) FROM tokens WHERE external_id = 'after'") == [(2,)]
    again.pool.dispose()


def test_what_operators_must_do_again_after_a_restore(
    service: Service, dsn: str, dump_and_lose: tuple[Callable[[], None], Callable[[], None]]
) -> None:
    """Bans and revocations since the dump are lost until an operator repeats them."""
    dump, lose_and_restore = dump_and_lose
    service.maintain_keys("me")
    with transaction(service.pool) as tx:
        tx.execute("UPDATE signing_keys SET published_at = published_at - interval '3 days'")
        ((kid,),) = tx.execute("SELECT kid FROM signing_keys WHERE state = 'active'").fetchall()
    dump()
    control_changes.add_ban(service.pool, Ban("path", "/atlas"), "leak", "me")
    keyring.revoke(service.pool, kid, clock.now(), service.engine.rotation, "me", "leak")
    service.pool.dispose()
    lose_and_restore()
    again = Service(load_settings(dsn))
    assert control_changes.list_bans(again.pool) == []
    keyring.revoke(again.pool, kid, clock.now(), again.engine.rotation, "me", "leak, again")
    with transaction(again.pool) as connection:
        assert [k.state for k in read_keys(connection)] == ["revoked", "active"]
    assert mint(again, submission("a"))[0].issued
    again.pool.dispose()
