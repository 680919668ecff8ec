"""The issuer as files: the files for verifiers are replaced whole, through rotation and revocation."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from joserfc import jwk, jws

from minter.database import keyring
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.errors import NoUsableKey, SettingsError
from minter.issuer import jwks_cache, well_known
from minter.service import Service
from minter.tokens import clock
from minter.tokens.keys import Key
from tests.conftest import with_one_algorithm
from tests.integration.test_mint import mint, submission

ISSUERS = {"alpen": "https://tokens.vo-alpen.example.org/alpen/"}
KEYS = "alpen/jwks.json"


@pytest.fixture
def service(service: Service) -> Service:
    """An issuer with one algorithm: these tests are about the keys of one."""
    return with_one_algorithm(service)


def ring(service: Service) -> list[Key]:
    with transaction(service.pool) as connection:
        return read_keys(connection)


def files(service: Service, now: datetime | None = None) -> dict[str, bytes]:
    return well_known.documents(ring(service), ISSUERS, now or clock.now())


def test_both_forms_of_discovery_name_the_key_set(service: Service, tmp_path: Path) -> None:
    made = files(service)
    assert list(made) == [
        KEYS,
        "alpen/.well-known/openid-configuration",
        "alpen/.well-known/oauth-authorization-server",
        ".well-known/openid-configuration/alpen",
        ".well-known/oauth-authorization-server/alpen",
    ]
    well_known.write(tmp_path, made)
    for name in list(made)[1:]:
        document = json.loads((tmp_path / name).read_bytes())
        assert document["issuer"] == ISSUERS["alpen"]
        assert document["jwks_uri"] == "https://tokens.vo-alpen.example.org/alpen/jwks.json"
    (outcome,) = mint(service, submission("a"))
    published = jwk.KeySet.import_key_set(json.loads((tmp_path / KEYS).read_bytes()))
    for issued in outcome.issued:
        jws.deserialize_compact(issued.token, published, algorithms=["ES256"])
    assert b'"d"' not in (tmp_path / KEYS).read_bytes()


def test_an_issuer_at_the_root_of_its_host(service: Service) -> None:
    made = well_known.documents(ring(service), {"alpen": "https://tokens.example.org/"}, clock.now())
    assert list(made) == [
        "jwks.json",
        ".well-known/openid-configuration",
        ".well-known/oauth-authorization-server",
    ]


@pytest.mark.parametrize(
    ("issuers", "missing"),
    [
        (("exp/north/", "exp/south/"), 0),
        (("", "south/"), 2),
        (("south/", ""), 2),
        (("exp/", "exp/south/", "third/"), 2),
        (("exp/south/", "exp/"), 2),
        (("", "a/", "a/b/"), 4),
    ],
)
def test_issuers_inside_one_another_are_files_as_far_as_files_can(
    issuers: Sequence[str], missing: int, tmp_path: Path
) -> None:
    issuers = [f"https://tokens.example.org/{path}" for path in issuers]
    places = well_known.places(issuers)
    files = well_known.as_files(dict.fromkeys(places, b"{}"))
    assert len(well_known.write(tmp_path, files)) == len(places) - missing
    assert len(well_known.left_out(issuers)) == missing
    for issuer in issuers:
        for path in well_known.names(issuer)[:3]:
            assert (tmp_path / path).is_file()


def test_issuers_on_several_hosts_have_a_folder_each(tmp_path: Path) -> None:
    issuers = ["https://tokens.alpen.example.org/", "https://tokens.boreal.example.org:8443/"]
    files = well_known.as_files({place: place[0].encode() for place in well_known.places(issuers)})
    well_known.write(tmp_path, files)
    assert (tmp_path / "tokens.alpen.example.org/jwks.json").read_text() == "tokens.alpen.example.org"
    assert (tmp_path / "tokens.boreal.example.org_8443/jwks.json").is_file()


def test_issuers_that_cannot_be_files_together_are_refused() -> None:
    with pytest.raises(SettingsError, match="a file and a folder"):
        well_known.left_out(["https://tokens.example.org/", "https://tokens.example.org/jwks.json/"])


def test_the_documents_please_strict_parsers(service: Service) -> None:
    made = files(service)
    openid = json.loads(made["alpen/.well-known/openid-configuration"])
    server = json.loads(made["alpen/.well-known/oauth-authorization-server"])
    assert openid["id_token_signing_alg_values_supported"] == ["RS256"]  # OpenID Connect Discovery §3
    assert openid.items() > server.items()
    assert [] not in openid.values()  # RFC 8414 §3.2


def test_only_what_changed_is_written_and_never_half(service: Service, tmp_path: Path) -> None:
    assert len(well_known.write(tmp_path, files(service))) == 5
    assert well_known.write(tmp_path, files(service)) == []
    service.maintain_keys("me")
    assert well_known.write(tmp_path, files(service)) == [tmp_path / KEYS]
    assert (
        len(json.loads((tmp_path / KEYS).read_bytes())["keys"]) == 2
    )  # the standby is public before it signs
    assert not list(tmp_path.rglob("*.partial"))


def test_a_revoked_key_leaves_at_once_and_an_old_one_stays(service: Service) -> None:
    service.maintain_keys("me")
    with transaction(service.pool) as tx:
        tx.execute("UPDATE signing_keys SET published_at = published_at - interval '3 days'")
    first, second = (k.kid for k in ring(service))
    keyring.rotate(service.pool, "alpen", "ES256", clock.now(), service.engine.rotation, "me")
    kids = {k["kid"] for k in json.loads(files(service)[KEYS])["keys"]}
    assert kids == {first, second}
    late = clock.now() + timedelta(days=9)
    assert {k["kid"] for k in json.loads(files(service, late)[KEYS])["keys"]} == {second}
    keyring.revoke(service.pool, first, clock.now(), service.engine.rotation, "me", "leak")
    assert {k["kid"] for k in json.loads(files(service)[KEYS])["keys"]} == {second}


def test_an_empty_key_set_is_never_published(service: Service, tmp_path: Path) -> None:
    well_known.write(tmp_path, files(service))
    before = (tmp_path / KEYS).read_bytes()
    with transaction(service.pool) as tx:
        tx.execute("UPDATE signing_keys SET state = 'revoked', revoked_at = now(), private_key = NULL")
    with pytest.raises(NoUsableKey, match="minter keys create"):
        well_known.write(tmp_path, files(service))
    assert (tmp_path / KEYS).read_bytes() == before


def test_a_folder_that_cannot_be_written(service: Service, tmp_path: Path) -> None:
    (tmp_path / "alpen").write_text("a file where the folder should be")
    with pytest.raises(SettingsError, match="cannot be written"):
        well_known.write(tmp_path, files(service))


def test_the_jwks_cache_is_as_verifiers_look_for_it(service: Service, tmp_path: Path) -> None:
    """A file named by the SHA-256 of the issuer, and one for all; entries stay while they are good."""
    issuer, now = ISSUERS["alpen"], clock.now()

    def write(at: datetime) -> set[str]:
        made = jwks_cache.entries(ring(service), ISSUERS, at, tmp_path)
        return {path.name for path in well_known.write(tmp_path, made)}

    name = sha256(issuer.encode()).hexdigest()
    assert write(now) == {name, "cache.json"}
    entry = json.loads((tmp_path / name).read_bytes())[issuer]
    assert json.loads((tmp_path / "cache.json").read_bytes()) == {issuer: entry}
    assert entry["jwks"] == json.loads(files(service)[KEYS])
    assert now.timestamp() < entry["next_update"] < entry["expiration"] <= now.timestamp() + 86_400
    assert write(now + timedelta(minutes=4)) == set()
    assert write(now + timedelta(minutes=6)) == {name, "cache.json"}
    service.create_keys("alpen", ["ES256"], "tests")
    assert write(now + timedelta(minutes=7)) == {name, "cache.json"}
    assert len(json.loads((tmp_path / name).read_bytes())[issuer]["jwks"]["keys"]) == 2
    (tmp_path / name).write_text("{")
    assert name in write(now + timedelta(minutes=8))
