"""Changes at run time of clients, bans, keys and master keys: audited and effective at once (I6, I8, I9)."""

import json
from datetime import timedelta
from typing import Any

import pytest

from minter.database import control_changes, keyring, live_tokens
from minter.database.connection import transaction
from minter.database.control import read_control, read_keys
from minter.errors import Banned, Expired, InvalidRequest, NoUsableKey, UnknownClient, UnknownKey, UnknownVO
from minter.policy.clients import Ban
from minter.service import Service
from minter.tokens import clock, keys, keystore
from minter.tokens.keystore import new_master_key
from minter.tokens.mint import MAX_LOCKED_NEEDS
from minter.tokens.outcomes import Observed
from tests.conftest import MASTER_KEY, load_settings, rows, with_one_algorithm
from tests.integration.test_mint import mint, submission, tokens

ME = "rucio-alpen"
VO = "alpen"


@pytest.fixture
def service(service: Service) -> Service:
    """An issuer with one algorithm: these tests are about the keys of one."""
    return with_one_algorithm(service)


def ring(service: Service) -> list[keys.Key]:
    with transaction(service.pool) as connection:
        return read_keys(connection)


def states(service: Service) -> list[str]:
    return [k.state for k in ring(service)]


def audited(service: Service) -> list[tuple[Any, ...]]:
    return rows(service, "SELECT actor, action, subject FROM audit WHERE actor = 'me' ORDER BY audit_id")


def backdate_keys(service: Service, days: int) -> None:
    with transaction(service.pool) as tx:
        tx.execute("UPDATE signing_keys SET published_at = published_at - %s, activated_at = activated_at - %s",
                   (timedelta(days=days),) * 2)  # fmt: skip


# ── clients ──────────────────────────────────────────────────────────────────────────────────


def test_a_changed_limit_binds_the_next_request(service: Service) -> None:
    control_changes.change_client(
        service.pool, ME, {"operations": ["read"], "max_lifetime_seconds": 1200}, "me"
    )
    (outcome,) = mint(service, submission("a"))
    assert [r["error"]["reason"] for r in outcome.refusals] == [
        "neighbour_refused",
        "operation_not_allowed",
    ] or {r["error"]["reason"] for r in outcome.refusals} == {"neighbour_refused", "operation_not_allowed"}
    assert outcome.issued == []
    control_changes.change_client(service.pool, ME, {"operations": []}, "me")
    (outcome,) = mint(service, submission("b"))
    issued = json.loads(keys_payload(outcome.issued[0].token))
    assert issued["exp"] - issued["iat"] == 1200
    assert audited(service) == [("me", "client.change", ME)] * 2


def keys_payload(token: bytes) -> bytes:
    import base64

    part = token.split(b".")[1]
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def test_a_disabled_client_gets_nothing_until_it_is_enabled(service: Service) -> None:
    one = submission("a")
    mint(service, one)
    control_changes.disable_client(service.pool, ME, "me", disabled=True)
    assert isinstance(mint(service, one)[0].error, UnknownClient)
    control_changes.disable_client(service.pool, ME, "me", disabled=False)
    assert mint(service, one)[0].issued


def test_a_change_of_nobody_is_refused(service: Service) -> None:
    with pytest.raises(UnknownClient, match="minter clients list"):
        control_changes.change_client(service.pool, "nobody", {"operations": []}, "me")
    with pytest.raises(InvalidRequest, match="max_lifetime_seconds"):
        control_changes.change_client(service.pool, ME, {"max_lifetime_seconds": -1}, "me")
    assert audited(service) == []


def test_a_secret_is_kept_as_a_keyed_hash_and_the_old_one_for_a_while(service: Service) -> None:
    with transaction(service.pool) as connection:
        client = read_control(connection).clients[ME]
    first, second = keystore.new_secret(), keystore.new_secret()
    service.set_secret(client, first, "me")
    service.set_secret(client, second, "me", timedelta(hours=1))
    ((new, old, until),) = rows(
        service,
        "SELECT secret_hash, old_secret_hash, old_secret_until > now() FROM clients WHERE name = %s",
        ME,
    )
    pepper = control_changes.secrets_key(service.pool, VO, b"unused")
    assert bytes(new) == service.keystore.hash_secret(VO, pepper, second)
    assert bytes(old) == service.keystore.hash_secret(VO, pepper, first)
    assert until
    assert len(first) >= 43
    assert rows(service, "SELECT count(*) FROM clients WHERE clients::text LIKE %s", f"%{second}%") == [(0,)]


# ── bans (I9) ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "value", "covered"),
    [
        ("client", ME, {"a", "b"}),
        ("vo", VO, {"a", "b"}),
        ("on_behalf_of", "mallory", {"a"}),
        ("activity", "Production Input", {"b"}),
        ("path", "the files' directory", {"a", "b"}),
    ],
)
def test_a_ban_binds_at_once_and_lists_what_is_alive(
    service: Service, kind: str, value: str, covered: set[str]
) -> None:
    one = submission("a", on_behalf_of="mallory", activity="Data Brokering")
    two = submission("b", activity="Production Input")
    mint(service, one, two)
    if kind == "path":
        value = (
            json.loads(rows(service, "SELECT payload FROM tokens LIMIT 1")[0][0])["scope"]
            .split(":")[1]
            .rpartition("/")[0]
        )
    living = list(
        live_tokens.under(service.pool, kind, value, None, clock.now(), service.loaded.policy.matching_of)
    )
    names = {token.scope.rpartition("/")[2] for token in living}
    assert names == covered
    control_changes.add_ban(service.pool, Ban(kind, value), "test", "me")
    errors = [o.error or o.refusals for o in mint(service, one, two)]
    assert any(isinstance(e, Banned) for e in errors)
    with pytest.raises(InvalidRequest, match="banned already"):
        control_changes.add_ban(service.pool, Ban(kind, value), "again", "me")
    control_changes.lift_ban(service.pool, Ban(kind, value), "me")
    assert all(o.issued for o in mint(service, one, two))
    assert [action for _, action, _ in audited(service)] == ["ban", "unban"]


def test_a_path_ban_finds_encoded_names_and_wider_grants(service: Service) -> None:
    mint(service, submission("run 1/file", "run 2/file"))
    (scope,) = {
        t.scope
        for t in live_tokens.under(
            service.pool, "path", "/", None, clock.now(), service.loaded.policy.matching_of
        )
        if "run%201" in t.scope and "read" in t.scope.partition(":")[0]
    }
    directory = scope.split(":")[1].replace("%20", " ").rpartition("/")[0]
    found = list(
        live_tokens.under(
            service.pool, "path", directory, None, clock.now(), service.loaded.policy.matching_of
        )
    )
    assert found
    assert all("run%201" in t.scope for t in found)


@pytest.mark.parametrize("stage", ["decided", "inserted", "copied"])
def test_a_ban_does_not_wait_for_a_large_batch_and_binds_it(service: Service, stage: str) -> None:
    """The batch is made anew: nothing that it recorded before the ban is kept or handed out."""
    large = submission(*(f"f{n}" for n in range(MAX_LOCKED_NEEDS // 2 + 1)))
    assert large.request.weight > MAX_LOCKED_NEEDS
    banned: list[str] = []

    def observe(observed: Observed) -> None:
        if observed.stage == stage and not banned:
            banned.append(stage)
            control_changes.add_ban(service.pool, Ban("client", ME), "test", "me")

    service.engine.observe = observe
    (outcome,) = mint(service, large)
    assert banned
    assert isinstance(outcome.error, Banned)
    assert outcome.issued == []
    assert rows(service, "SELECT count(*) FROM tokens") == [(0,)]
    assert rows(service, "SELECT error->>'reason' FROM requests") == [("banned",)]
    control_changes.lift_ban(service.pool, Ban("client", ME), "me")
    assert len(mint(service, submission(*(f"g{n}" for n in range(300))))[0].issued) == 600


def test_bans_that_cannot_be(service: Service) -> None:
    with pytest.raises(UnknownVO):
        control_changes.add_ban(service.pool, Ban("client", ME, "nowhere"), "test", "me")
    with pytest.raises(InvalidRequest, match="is not banned"):
        control_changes.lift_ban(service.pool, Ban("client", ME), "me")
    with pytest.raises(InvalidRequest, match="unknown kind"):
        list(
            live_tokens.under(
                service.pool, "planet", "x", None, clock.now(), service.loaded.policy.matching_of
            )
        )


# ── keys (I6) ────────────────────────────────────────────────────────────────────────────────


def test_beat_makes_a_standby_rotates_it_in_and_destroys_the_old_one(service: Service) -> None:
    assert states(service) == ["active"]
    (done,) = service.maintain_keys("me")
    assert "made, prepared" in done
    assert service.maintain_keys("me") == []  # no key is due
    backdate_keys(service, 181)
    one = submission("a")
    (before,) = mint(service, one)
    (done,) = service.maintain_keys("me")
    assert "signs now" in done
    assert states(service) == ["old", "active"]
    assert tokens(mint(service, one)[0]) == tokens(before)  # within the re-sign window
    (after,) = mint(service, submission("b"))
    assert after.issued[0].token.split(b".")[0] != before.issued[0].token.split(b".")[0]
    with transaction(service.pool) as tx:
        tx.execute("UPDATE signing_keys SET retired_at = retired_at - interval '25 hours'")
    assert any("destroyed" in d for d in service.maintain_keys("me"))
    assert rows(service, "SELECT count(*) FROM signing_keys WHERE private_key IS NULL") == [(1,)]
    assert isinstance(mint(service, one)[0].error, Expired)
    assert keys.is_public(ring(service)[0], clock.now())  # until the last token that it signed has expired


def test_a_standby_that_is_not_public_long_enough_does_not_sign(service: Service) -> None:
    service.maintain_keys("me")
    with pytest.raises(NoUsableKey, match="has no prepared ES256 key that has been public"):
        keyring.rotate(service.pool, VO, "ES256", clock.now(), service.engine.rotation, "me")
    (kid,) = [k.kid for k in ring(service) if k.state == "active"]
    with pytest.raises(NoUsableKey):
        keyring.revoke(service.pool, kid, clock.now(), service.engine.rotation, "me", "leaked")
    assert states(service) == ["active", "prepared"]
    assert [a for _, a, _ in audited(service)] == ["key.create"]


def test_a_revoked_key_signs_nothing_and_its_standby_takes_over(service: Service) -> None:
    service.maintain_keys("me")
    backdate_keys(service, 3)
    one = submission("a")
    mint(service, one)
    (kid,) = [k.kid for k in ring(service) if k.state == "active"]
    assert (
        len(
            list(
                live_tokens.under(
                    service.pool, "key", kid, None, clock.now(), service.loaded.policy.matching_of
                )
            )
        )
        == 2
    )
    keyring.revoke(service.pool, kid, clock.now(), service.engine.rotation, "me", "leaked")
    assert states(service) == ["revoked", "active"]
    assert kid not in {jwk["kid"] for jwk in keys.jwks(ring(service), clock.now())["keys"]}
    assert rows(
        service, "SELECT private_key IS NULL, revoked_at IS NOT NULL FROM signing_keys WHERE kid = %s", kid
    ) == [(True, True)]
    assert isinstance(mint(service, one)[0].error, Expired)  # the recorded token is not signed again
    assert mint(service, submission("b"))[0].issued
    # The key's list still has the token, for the sites; a ban's list has only tokens that verify.
    assert (
        len(
            list(
                live_tokens.under(
                    service.pool, "key", kid, None, clock.now(), service.loaded.policy.matching_of
                )
            )
        )
        == 2
    )
    assert {
        t.scope[-1]
        for t in live_tokens.under(
            service.pool, "vo", VO, None, clock.now(), service.loaded.policy.matching_of
        )
    } == {"b"}
    with pytest.raises(UnknownKey, match="revoked already"):
        keyring.revoke(service.pool, kid, clock.now(), service.engine.rotation, "me", "again")
    with pytest.raises(UnknownKey, match="minter keys list"):
        keyring.revoke(service.pool, "nothing", clock.now(), service.engine.rotation, "me", "x")


def test_another_process_signs_with_the_new_key_at_once(service: Service, dsn: str) -> None:
    other = Service(load_settings(dsn))
    mint(other, submission("a"))
    service.maintain_keys("me")
    backdate_keys(service, 3)
    new = keyring.rotate(service.pool, VO, "ES256", clock.now(), service.engine.rotation, "me")
    mint(other, submission("b"))
    assert rows(
        service, "SELECT k.kid FROM tokens JOIN signing_keys k USING (key_id) WHERE external_id = 'b' LIMIT 1"
    ) == [(new.kid,)]
    other.pool.dispose()


# ── master keys (I5) ─────────────────────────────────────────────────────────────────────────


def test_the_master_key_is_changed_without_a_gap(service: Service, dsn: str) -> None:
    one = submission("a")
    (before,) = mint(service, one)
    with transaction(service.pool) as connection:
        client = read_control(connection).clients[ME]
    secret = keystore.new_secret()
    service.set_secret(client, secret, "me")
    fresh = new_master_key()
    both = Service(load_settings(dsn, MINTER_MASTER_KEY_ALPEN=f"{fresh},{MASTER_KEY}"))
    assert tokens(mint(both, one)[0]) == tokens(before)
    assert keyring.rewrap(both.pool, both.keystore, VO, "me") == 2
    alone = Service(load_settings(dsn, MINTER_MASTER_KEY_ALPEN=fresh))
    assert tokens(mint(alone, one)[0]) == tokens(before)
    pepper = control_changes.secrets_key(alone.pool, VO, b"unused")
    assert rows(service, "SELECT secret_hash FROM clients WHERE name = %s", ME) == [
        (alone.keystore.hash_secret(VO, pepper, secret),)
    ]
    stale = Service(load_settings(dsn))  # a process that was started with the old master key only
    assert isinstance(mint(stale, submission("b"))[0].error, NoUsableKey)
    for made in (both, alone, stale):
        made.pool.dispose()


def test_a_rewrap_without_the_right_key_changes_nothing(service: Service, dsn: str) -> None:
    wrong = Service(load_settings(dsn, MINTER_MASTER_KEY_ALPEN=new_master_key()))
    before = rows(service, "SELECT private_key FROM signing_keys")
    with pytest.raises(NoUsableKey, match="does not open"):
        keyring.rewrap(wrong.pool, wrong.keystore, VO, "me")
    assert rows(service, "SELECT private_key FROM signing_keys") == before
    wrong.pool.dispose()
