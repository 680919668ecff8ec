"""Public keys: rotation and revocation show at every place, in the right order, without a gap (I6)."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

from minter.client import FileRequest
from minter.errors import NoUsableKey
from minter.storages.dialects import Algorithm
from tests.acceptance.served import VO, Served
from tests.conftest import ROOT
from tests.integration.test_mint import SE

PUBLISH_SECONDS = 4
ROTATION = f"[rotation]\npublish_seconds = {PUBLISH_SECONDS}\n"


@pytest.fixture
def served(postgres_dsn: str, tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path, postgres_dsn, ROTATION)
    made.add_client("rucio")
    yield made
    made.close()


@pytest.fixture
def folder(served: Served, tmp_path: Path) -> Iterator[Path]:
    """The files that `minter publish --watch` writes, as a web server would serve them."""
    path = tmp_path / "published"
    process = subprocess.Popen(
        [sys.executable, "-m", "minter.cli", "publish", str(path), "--watch"],
        env=served.environ, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (path / f"{VO}/jwks.json").exists():
        time.sleep(0.1)
    yield path
    process.send_signal(signal.SIGTERM)
    process.wait(20)


class Verifier:
    """Caches keys as FTS and XRootD do: for a fixed time, even if an unknown `kid` comes."""

    def __init__(self, fetch: Callable[[], dict[str, Any]], seconds: float) -> None:
        self.fetch, self.seconds = fetch, seconds
        self.keys: dict[str, Any] = {}
        self.until = 0.0

    def check(self, token: str) -> None:
        if time.monotonic() > self.until:
            self.keys = {k["kid"]: jwt.PyJWK(k).key for k in self.fetch()["keys"]}
            self.until = time.monotonic() + self.seconds
        key = self.keys[jwt.get_unverified_header(token)["kid"]]
        jwt.decode(token, key, algorithms=[ALGORITHM], options={"verify_aud": False})


def served_keys(served: Served) -> Any:
    with served.http() as http:  # a new connection may go to any of the processes
        return http.get(f"/{VO}/jwks.json").json()


ALGORITHM: Algorithm = "ES256"
"""What the storage of these tests verifies fastest."""


def kids(served: Served) -> set[str]:
    return {k["kid"] for k in served_keys(served)["keys"] if k["alg"] == ALGORITHM}


def mint(served: Served, number: int) -> str:
    with served.client() as client:
        return client.mint([FileRequest(sources=(f"{SE}k/{number}",))]).tokens[0].reveal()


def created(served: Served) -> str:
    (made,) = served.service.create_keys(VO, (ALGORITHM,), "tests")
    return made.kid


def test_rotation_is_never_seen_by_a_verifier_that_caches(served: Served, folder: Path) -> None:
    verifiers = [
        Verifier(lambda: served_keys(served), PUBLISH_SECONDS - 2.5),
        Verifier(lambda: json.loads((folder / f"{VO}/jwks.json").read_text()), PUBLISH_SECONDS - 2.5),
    ]
    signed, number = set(), 0

    def go_on(seconds: float) -> None:
        nonlocal number
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            token = mint(served, number := number + 1)
            signed.add(jwt.get_unverified_header(token)["kid"])
            for verifier in verifiers:
                verifier.check(token)

    go_on(1)
    standby = created(served)
    with pytest.raises(NoUsableKey):  # the standby key is not public for long enough
        served.service.rotate_keys(VO, (ALGORITHM,), "tests")
    go_on(PUBLISH_SECONDS + 0.5)
    served.minter("keys", "rotate", "--vo", VO, "--algorithm", ALGORITHM)
    go_on(2)
    assert standby in signed
    assert len(signed) == 2
    assert signed <= kids(served)  # the old key stays as long as its tokens live


def test_a_revoked_key_leaves_every_process_and_file_within_seconds_and_a_standby_signs(
    served: Served, folder: Path
) -> None:
    (first,) = kids(served)
    standby = created(served)
    time.sleep(PUBLISH_SECONDS + 0.5)
    assert kids(served) == {first, standby}
    token = mint(served, 0)
    served.minter("keys", "revoke", first, "--reason", "leaked", "--yes", check=False)
    after = mint(served, 1)
    assert jwt.get_unverified_header(after)["kid"] == standby
    deadline = time.monotonic() + 5
    while (
        first in set().union(*(kids(served) for _ in range(6)))
        or first in (folder / f"{VO}/jwks.json").read_text()
    ):
        assert time.monotonic() < deadline
    with served.http("rucio") as http:
        for one, good in ((token, False), (after, True)):
            assert http.post(f"/{VO}/introspect", data={"token": one}).json()["active"] is good
