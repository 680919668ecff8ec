"""Minter under the issuer of an IAM that can fail: the file, the keys, the clients, and what status says."""

import json
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jwt
import pytest

from minter import key_status
from minter.contract.messages import FileRequest, MintRequest
from minter.database import co_issuers, control_changes
from minter.database.connection import transaction
from minter.database.control import read_control
from minter.database.keyring import rotate
from minter.errors import InvalidRequest, NoUsableKey, SettingsError, UnknownClient
from minter.issuer import co_issuer, well_known
from minter.lines import Line
from minter.local.stack import add_client
from minter.policy.clients import Client
from minter.policy.requests import from_mint
from minter.service import Service
from minter.settings import Loaded, load
from minter.tokens import clock, keys
from minter.tokens.keys import RotationPolicy
from minter.tokens.outcomes import Outcome, Submission
from tests.conftest import EXAMPLES, MASTER_KEY
from tests.integration.test_mint import SE

IAM_ISS = "https://iam.vo-alpen.example.org"


class IAM(ThreadingHTTPServer):
    """An IAM's key set, and its faults: `status`, or a body of the test's own."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Keys)
        self.signers = [keys.generate("ES256")]
        self.status, self.body, self.asked = 200, b"", 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class _Keys(BaseHTTPRequestHandler):
    server: IAM

    def do_GET(self) -> None:
        self.server.asked += 1
        listed = json.dumps({"keys": [s.public_jwk for s in self.server.signers]}).encode()
        body = self.server.body or listed
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def iam() -> Iterator[IAM]:
    made = IAM()
    yield made
    made.shutdown()
    made.server_close()


def settings(folder: Path, dsn: str, port: int, **changes: str) -> Loaded:
    text = (EXAMPLES / "settings.toml").read_text().replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
    text = text.replace('iss = "https://tokens.vo-alpen.example.org/alpen/"', f'iss = "{IAM_ISS}"')
    table = {"keys": f"http://127.0.0.1:{port}/jwk", "path": "/oauth/jwk", "prefix": "minter-",
             "url": "https://tokens.vo-alpen.example.org/alpen/", **changes}  # fmt: skip
    text += "\n[issuers.alpen.co_issuer]\n" + "".join(
        f'{name} = "{value}"\n' for name, value in table.items()
    )
    path = folder / "settings.toml"
    path.write_text(text)
    return load(path, {"MINTER_DSN": dsn, "MINTER_MASTER_KEY_ALPEN": MASTER_KEY})


class Clock:
    """The time, which a test can put ahead."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return clock.now() + self.ahead


@pytest.fixture
def time() -> Clock:
    return Clock()


@pytest.fixture
def service(dsn: str, tmp_path: Path, iam: IAM, time: Clock) -> Iterator[Service]:
    """An engine on a database without keys and clients of another issuer."""
    made = Service(settings(tmp_path, dsn, iam.server_port), clock=time)
    with transaction(made.pool) as connection:
        connection.execute("TRUNCATE issuers, signing_keys, clients CASCADE")
    made.prepare()
    yield made
    made.pool.dispose()


def published(service: Service) -> dict[str, list[dict[str, str]]]:
    with transaction(service.pool) as connection:
        ring = read_control(connection).ring
    found = co_issuer.files(service, ring)
    return json.loads(dict(found.values())["oauth/jwk"]) if found else {"keys": []}


def kids(service: Service) -> set[str]:
    return {key["kid"] for key in published(service)["keys"]}


def test_first_keys_wait_until_verifiers_know_them(service: Service, iam: IAM) -> None:
    made = service.create_keys("alpen", ["ES256"], "tests")
    assert [key.state for key in made] == ["prepared"]
    assert kids(service) == {iam.signers[0].kid, made[0].kid}
    add_client(service, "minter-rucio", "alpen", "tests")
    assert not mint(service, "minter-rucio").issued
    with pytest.raises(NoUsableKey):
        rotate(service.pool, "alpen", "ES256", service.clock(), RotationPolicy(), "tests")
    with transaction(
        service.pool
    ) as connection:  # Postgres's own clock judges requests, so the key gets older
        connection.execute("UPDATE signing_keys SET published_at = now() - interval '2 days 1 second'")
    rotate(service.pool, "alpen", "ES256", service.clock(), RotationPolicy(), "tests")
    (issued,) = mint(service, "minter-rucio").issued
    (key,) = (k for k in published(service)["keys"] if k["kid"] == made[0].kid)
    claims = jwt.decode(issued.token, jwt.PyJWK(key), options={"verify_aud": False, "verify_iat": False,
                                                               "verify_nbf": False})  # fmt: skip
    assert claims["iss"] == IAM_ISS
    assert claims["sub"].startswith("minter-")
    assert claims["client_id"] == "minter-rucio"


def mint(service: Service, client: str) -> Outcome:
    file = FileRequest(sources=(SE + "co",))
    request = from_mint(MintRequest(request_id=clock.new_uuid7(), files=(file,)))
    (outcome,) = service.engine.mint_many([Submission(request, client)], clock.now())
    return outcome


@pytest.mark.parametrize(
    "body", [b"<html>", b'{"keys":[]}', b"x" * 200_000, b'{"keys":[{"kty":"oct","k":"AA"}]}']
)
def test_garbage_and_outages_change_nothing(service: Service, iam: IAM, time: Clock, body: bytes) -> None:
    before = kids(service)
    time.ahead += timedelta(minutes=2)
    iam.body = body
    assert kids(service) == before
    assert co_issuers.known(service.pool, "alpen").problem
    for answer in (500, 404, 301):
        iam.status, iam.body = answer, b""
        time.ahead += timedelta(minutes=2)
        assert kids(service) == before
        assert str(answer) in co_issuers.known(service.pool, "alpen").problem
    iam.status = 200
    time.ahead += timedelta(minutes=2)
    assert kids(service) == before
    assert co_issuers.known(service.pool, "alpen").problem == ""


def test_the_iam_is_asked_once_a_minute_by_all_processes(service: Service, iam: IAM, time: Clock) -> None:
    for _ in range(5):
        published(service)
    assert iam.asked == 1
    time.ahead += timedelta(minutes=1, seconds=1)
    published(service)
    assert iam.asked == 2


def test_a_withdrawn_key_goes_after_two_answers_or_by_an_operator(
    service: Service, iam: IAM, time: Clock
) -> None:
    first = iam.signers[0].kid
    kids(service)
    iam.signers = [keys.generate("ES256"), keys.generate("ES256")]
    for expected in (True, False):
        time.ahead += timedelta(minutes=2)
        assert (first in kids(service)) is expected
    second = iam.signers[0].kid
    co_issuers.drop(service.pool, "alpen", second, service.clock(), "tests")
    assert second not in kids(service)
    with pytest.raises(InvalidRequest, match="only known key"):
        co_issuers.drop(service.pool, "alpen", iam.signers[1].kid, service.clock(), "tests")
    with pytest.raises(InvalidRequest, match="has no key"):
        co_issuers.drop(service.pool, "alpen", second, service.clock(), "tests")


def test_no_file_is_written_before_the_iams_keys_are_known(service: Service, iam: IAM) -> None:
    iam.status = 503
    service.create_keys("alpen", ["ES256"], "tests")
    assert published(service) == {"keys": []}


def test_keys_that_point_at_the_merged_file_are_noticed(service: Service, iam: IAM, time: Clock) -> None:
    service.create_keys("alpen", ["ES256"], "tests")
    merged = published(service)
    time.ahead += timedelta(minutes=2)
    iam.body = json.dumps(merged).encode()
    assert published(service) == merged
    assert "point at the merged file" in co_issuers.known(service.pool, "alpen").problem


def test_clients_without_the_prefix_are_refused(service: Service) -> None:
    service.create_keys("alpen", ["ES256"], "tests")
    with pytest.raises(UnknownClient, match="must begin with 'minter-'"):
        service.new_client("rucio", "alpen")
    for name, sub in (("rucio", "minter-1"), ("minter-2", "a-person")):  # registered before, or by hand
        control_changes.add_client(service.pool, Client(client_id=0, name=name, vo="alpen", sub=sub), "tests")
        assert isinstance(mint(service, name).error, UnknownClient)


def test_endpoints_are_at_minters_own_address(service: Service) -> None:
    loaded = service.loaded
    assert loaded.issuers == {"alpen": IAM_ISS}
    assert loaded.endpoints == {"alpen": "https://tokens.vo-alpen.example.org/alpen/"}
    assert loaded.own_issuers == {}
    assert well_known.left_out(loaded.own_issuers.values()) == []


def test_status_tells_of_the_merged_keys(service: Service, iam: IAM, time: Clock) -> None:
    def line() -> Line:
        (found,) = key_status._merged(
            co_issuers.known(service.pool, "alpen"), service.loaded.co_issuers["alpen"], service.clock()
        )
        return found

    assert (line().level, "never" in line().text) == ("failed", True)
    published(service)
    co_issuer.note_written(service, ["alpen"])
    assert line().level == "ok"
    iam.signers.append(keys.generate("ES256"))
    time.ahead += timedelta(minutes=2)
    published(service)
    iam.signers.pop()
    time.ahead += timedelta(minutes=2)
    published(service)
    co_issuer.note_written(service, ["alpen"])
    assert (line().level, "lacks" in line().text) == ("warning", True)
    time.ahead += timedelta(minutes=11)
    assert line().level == "failed"


@pytest.mark.parametrize(
    "change",
    [
        {"prefix": ""},
        {"path": "jwk"},
        {"path": "/"},
        {"path": "/../x"},
        {"path": "//jwk"},
        {"url": "http://x/"},
        {"keys": "x"},
    ],
)
def test_a_half_configured_co_issuer_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="co_issuer"):
        settings(tmp_path, "", 1, **change)


def test_an_issuer_of_minters_own_needs_a_slash_at_its_end(tmp_path: Path) -> None:
    text = (EXAMPLES / "settings.toml").read_text().replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
    path = tmp_path / "settings.toml"
    path.write_text(text.replace("https://tokens.vo-alpen.example.org/alpen/", "https://tokens.example.org"))
    with pytest.raises(SettingsError, match="must end in a slash"):
        load(path, {})
