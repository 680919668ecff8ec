"""Minter under the issuer of a real Keycloak behind nginx: a real XRootD that trusts that issuer only."""

import os
import random
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.issuer import co_issuer, well_known
from minter.tokens import clock
from tests.acceptance.served import VO, Served
from tests.acceptance.test_xrootd import ROUTES, curl, token
from tests.conftest import rows
from tests.iam_servers import Keycloak
from tests.servers import Nginx, XRootD, free_ports

pytestmark = pytest.mark.slow
CERTS = "/realms/vo/protocol/openid-connect/certs"
STEPS = int(os.environ.get("MINTER_CO_ISSUER_STEPS", "16"))
"""Random steps: rotations of both signers, outages and garbage of the IAM."""
READ = "storage.read:/vo/dir/file1"
LOCATIONS = """
location = {certs} {{ root {web}; default_type application/json; add_header Cache-Control "public, max-age=600"; }}
location = /keys {{
    if (-f {folder}/away) {{ return 503; }}
    if (-f {folder}/garbage) {{ return 200 "<html>Sign in</html>"; }}
    proxy_pass {keycloak}{certs};
}}
location / {{ proxy_pass {keycloak}; }}
"""
SETTINGS = """
[[storages]]
vo = "alpen"
name = "A"
dialect = "xrootd-5.5"
base_path = "/grid"
audience = ["https://se.example.org"]
endpoints = [{{ host = "localhost", port = {port}, prefix = "/grid/vo" }}]

[issuers.alpen.co_issuer]
keys = "https://localhost:{nginx}/keys"
ca = "ca.pem"
path = "{certs}"
url = "https://tokens.example.org/alpen/"
prefix = "minter-"
"""


class Site:
    """Keycloak, nginx, Minter and XRootD; `step` does one thing to the keys and brings all up to date."""

    def __init__(self, folder: Path, postgres_dsn: str) -> None:
        self.folder = folder
        nginx, storage = free_ports(2)
        self.web = folder / "web"
        self.web.mkdir()
        self.keycloak = Keycloak(folder / "keycloak", f"https://localhost:{nginx}")
        keycloak = f"http://127.0.0.1:{self.keycloak.port}"
        more = SETTINGS.format(port=storage, nginx=nginx, certs=CERTS) + ROUTES
        self.served = Served(folder, postgres_dsn, more, iam=self.keycloak.issuer)
        self.nginx = Nginx(
            folder / "nginx", nginx, folder,
            LOCATIONS.format(certs=CERTS, web=self.web, folder=folder, keycloak=keycloak),
        )  # fmt: skip
        self.keycloak.start()
        self.nginx.start()
        self.served.add_client("minter-rucio")
        self.storage = XRootD(folder / "a", storage, self.served.ca)
        fragment = self.served.minter("storages", "site-config", "--storage", "A").stdout
        assert f"issuer = {self.keycloak.issuer}\n" in fragment
        self.storage.configure(fragment)
        (self.storage.files / "grid/vo/dir").mkdir(parents=True)
        for name in ("file1", "file2"):
            (self.storage.files / "grid/vo/dir" / name).write_text(name)
        self.ahead = timedelta()
        self.served.service.clock = lambda: clock.now() + self.ahead
        self.priority = 100

    def stop(self) -> None:
        self.storage.stop()
        self.served.close()
        self.nginx.stop()
        self.keycloak.stop()

    def publish(self) -> None:
        """Write the file as `minter publish --watch` does a minute later"""
        self.ahead += timedelta(seconds=61)
        with transaction(self.served.service.pool) as connection:
            ring = read_keys(connection)
        merged = co_issuer.files(self.served.service, ring)
        well_known.write(self.web, dict(merged.values()))

    def refresh(self) -> None:
        """Let the storage forget the keys that it knows: its cache would hold them for ten minutes."""
        self.storage.stop()
        shutil.rmtree(self.storage.folder / "cache")
        (self.storage.folder / "cache").mkdir()
        self.storage.start()

    def rotate(self) -> None:
        """Let Minter's standby sign, as if it had been public for two days."""
        rows(
            self.served.service,
            "UPDATE signing_keys SET published_at = now() - interval '3 days' RETURNING 1",
        )
        self.served.minter("keys", "rotate", "--vo", VO, "--algorithm", "ES256")

    def tokens(self) -> list[str]:
        """Return a fresh token of each signer, for the same file."""
        mine = token(self.served, self.storage, "download", "dir/file1", owner="minter-rucio")
        return [mine, self.keycloak.token("minter-scoped", f"{READ} aud:https://se.example.org")]

    def reads(self, bearer: str, name: str = "file1") -> int:
        return curl(self.storage, bearer, "GET", f"dir/{name}")


@pytest.fixture(scope="module")
def site(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    XRootD.need()
    Nginx.need()
    made = Site(tmp_path_factory.mktemp("site"), postgres_dsn)
    yield made
    made.stop()


def kid_of(bearer: str) -> str:
    return str(jwt.get_unverified_header(bearer)["kid"])


def test_a_site_that_trusts_the_iam_takes_tokens_of_both(site: Site) -> None:
    site.publish()
    site.refresh()
    mine, theirs = site.tokens()
    assert {jwt.decode(t, options={"verify_signature": False})["iss"] for t in (mine, theirs)} == {
        site.keycloak.issuer
    }
    for bearer in (mine, theirs):
        assert (site.reads(bearer), site.reads(bearer, "file2")) == (200, 403)


def test_random_rotations_outages_and_garbage(site: Site) -> None:
    """None is refused that should pass, none is accepted that should not."""
    seed = int(os.environ.get("MINTER_CO_ISSUER_SEED", str(random.randrange(2**32))))
    print(f"MINTER_CO_ISSUER_SEED={seed}")
    chosen = random.Random(seed)
    site.publish()
    misses = dict.fromkeys(site.keycloak.kids(), 0)
    issued: list[tuple[str, bool]] = []
    forger = ec.generate_private_key(ec.SECP256R1())
    for _ in range(STEPS):
        step = chosen.choice(["iam", "retire", "minter", "away", "garbage", "nothing"])
        good, fault = step not in ("away", "garbage"), site.folder / step
        if step == "iam":
            site.priority += 1
            site.keycloak.rotate(site.priority)
        elif step == "retire" and len(site.keycloak.kids()) > 1:
            site.keycloak.retire()
        elif step == "minter":
            site.rotate()
        elif not good:
            fault.touch()
        site.publish()
        fault.unlink(missing_ok=True)
        if good:  # a key is gone when two good answers in a row lacked it
            now = site.keycloak.kids()
            misses = {kid: 0 if kid in now else misses.get(kid, 0) + 1 for kid in {*misses, *now}}
        site.refresh()
        mine, theirs = site.tokens()
        issued = [*issued, (mine, True), (theirs, False)][-8:]
        for bearer, ours in issued:
            passes = ours or misses[kid_of(bearer)] < 2
            assert site.reads(bearer) == (200 if passes else 403), (seed, step)
        for bearer in (mine, theirs):
            claims = jwt.decode(bearer, options={"verify_signature": False})
            forged = jwt.encode(claims, forger, "ES256", {"kid": kid_of(bearer)})
            assert site.reads(forged) == 403, (seed, step)
