"""Tokens of an external IAM, with real processes: the HTTP service, refreshers, and an IAM that is another server's."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jwt
import pytest

from minter.client import FileOperation, FileReport, FileRequest
from minter.errors import InvalidGrant, InvalidRequest, InvalidScope
from minter.local.fake_iam import Behaviour
from minter.service import Service
from tests.acceptance.served import VO, Served
from tests.conftest import ROOT, rows
from tests.iam_servers import Fake, OidcProvider

SE = "davs://se01.boreas.example.org:443/atlas/atlasdatadisk/rucio/data/"
HOST, TOP = "se01.boreas.example.org", "/atlas/atlasdatadisk/rucio"
OPERATIONS = '["read", "write", "overwrite", "retry", "stat"]'


def settings(issuer: str, dialect: str) -> str:
    return f"""
[[providers]]
name = "iam"
issuer = "{issuer}"
client_id = "minter"
dialect = "{dialect}"
secret_file = "iam.secret"
requests_per_second = 200
timeout_seconds = 2

[[routes]]
name = "by-iam"
activities = ["exchanged"]
operations = {OPERATIONS}
mode = "exchange"
provider = "iam"
transfer_seconds = 36000

[[routes]]
name = "own"
activities = ["own", "stood in for"]
operations = {OPERATIONS}
mode = "client_credentials"
provider = "iam"
fallback = ["minted"]

[[routes]]
name = "minted"
operations = {OPERATIONS}

[[exchanges]]
name = "visitors"
clients = ["rucio"]
providers = ["iam"]
subject_clients = ["rucio"]
scopes = ["storage.read"]
"""


class ServedWithRefreshers(Served):
    """The HTTP service, and refreshers that can be killed."""

    def __init__(self, folder: Path, postgres_dsn: str, iam: Fake | OidcProvider) -> None:
        secret = folder / "iam.secret"
        secret.touch(mode=0o600)
        secret.write_text("minter-secret")
        super().__init__(folder, postgres_dsn, settings(iam.issuer, iam.dialect))
        self.iam = iam
        self.refreshers: list[subprocess.Popen[bytes]] = []
        for name in ("rucio", "consumer", "thief"):
            self.add_client(name)

    def spawn(self, count: int = 1) -> None:
        for _ in range(count):
            with (self.folder / "refresher.log").open("ab") as log:
                self.refreshers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "minter.cli", "refresher"],
                        env=self.environ,
                        stdout=log,
                        stderr=log,
                        cwd=ROOT,
                    )
                )

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        for refresher in self.refreshers:
            refresher.send_signal(number)
            refresher.wait(30)
        self.refreshers.clear()

    def close(self) -> None:
        self.kill(signal.SIGTERM)
        super().close()


@pytest.fixture(scope="module", params=["fake", pytest.param("oidc-provider", marks=pytest.mark.slow)])
def kept(
    request: pytest.FixtureRequest, postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedWithRefreshers]:
    folder = tmp_path_factory.mktemp("kept")
    iam = Fake() if request.param == "fake" else OidcProvider(folder / "iam", AT_TTL="14400")
    iam.start()
    made = ServedWithRefreshers(folder, postgres_dsn, iam)
    made.spawn(2)
    yield made
    made.close()
    iam.stop()


def read(name: str, activity: str, **options: Any) -> dict[str, Any]:
    files = [FileRequest(operations=(FileOperation("download", SE + name),), external_id=name)]
    return {"files": files, "activity": activity, **options}


_Found = TypeVar("_Found")


def until(what: Callable[..., _Found], seconds: float = 60) -> _Found:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def test_from_a_subject_token_to_a_token_kept_fresh(kept: ServedWithRefreshers) -> None:
    subject = kept.iam.subject(f"storage.read:{TOP}")
    with kept.client() as client:
        asked = client.mint(**read("x/1", "exchanged"), subject_token=subject, consumer="consumer")
        assert not asked.refusals, asked.refusals
        (pending,) = asked.pending
        (token,) = until(lambda: client.fetch(*asked.request_ids).tokens)
        assert token.handle == pending.handle
        claims = jwt.decode(token.reveal(), options={"verify_signature": False})
        assert claims["iss"] == kept.iam.issuer
        assert claims["scope"] == f"storage.read:{TOP}/data/x/1"
        assert claims["aud"] == HOST
        rows(kept.service, "SELECT 1")
        with kept.service.pool.begin() as tx:  # the token expires soon
            tx.exec_driver_sql("UPDATE managed SET needed_at = now() WHERE state = 'issued'")
        fresh = until(
            lambda: [t for t in client.fetch(*asked.request_ids).tokens if t.reveal() != token.reveal()]
        )
        assert fresh[0].handle == token.handle
        assert fresh[0].exp >= token.exp
        with kept.client("consumer") as consumer:
            assert consumer.fetch(handles=[token.handle]).tokens[0].reveal() == fresh[0].reveal()
        with kept.client("thief") as thief:
            assert not thief.fetch(handles=[token.handle]).tokens
        (renewed,) = client.renew(*asked.request_ids, subject_token=subject).tokens  # an equal token exists
        assert renewed.handle != token.handle
        with kept.client("consumer") as consumer:  # the first request named this queue
            until(lambda: consumer.fetch(handles=[renewed.handle]).tokens)
        assert client.report([FileReport(state="finished", external_id="x/1")]).tokens == 2
        assert rows(kept.service, "SELECT state::text, refresh FROM managed") == [("finished", None)]
        story = client.trace(external_id="x/1")[0]
        assert (story["mode"], story["state"], story["route"]) == ("exchange", "finished", "by-iam")
        assert str(fresh[0].reveal()) not in str(story)


def test_what_a_subject_token_must_be(kept: ServedWithRefreshers) -> None:
    with kept.client() as client:
        with pytest.raises(InvalidGrant, match="name one of"):
            client.mint(
                **read("x/2", "exchanged"), subject_token=kept.iam.subject(f"storage.read:{TOP}", "rucio")
            )
        with pytest.raises(InvalidGrant, match="no JWT"):
            client.mint(**read("x/2", "exchanged"), subject_token="not-a-token")
        narrow = client.mint(
            **read("x/2", "exchanged"), subject_token=kept.iam.subject("storage.read:/atlas/other")
        )
        assert isinstance(narrow.refusals[0].error, InvalidScope)
        none = client.mint(**read("x/2", "exchanged"))
        assert isinstance(none.refusals[0].error, InvalidGrant)


def test_the_stored_subject_token(kept: ServedWithRefreshers) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minter.cli", "clients", "subject-token", "rucio", "--json"],
        input=kept.iam.subject(f"storage.read:{TOP}"), env=kept.environ, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "eyJ" not in done.stdout
    with kept.client() as client:
        asked = client.mint(**read("x/3", "exchanged"))
        until(lambda: client.fetch(*asked.request_ids).tokens)


def test_a_job_is_filled_when_the_tokens_are_there(kept: ServedWithRefreshers) -> None:
    if isinstance(kept.iam, Fake):
        kept.iam.server.behaviour = Behaviour(life_seconds=4 * 3600)
    job = {
        "files": [{"sources": [SE + "x/4"], "destinations": [SE + "x/5"], "filesize": 1, "activity": "own"}],
        "params": {},
    }
    with kept.client() as client:
        filled = client.fill_job(job)
    assert filled.job is not None
    ((source,),) = [f["source_tokens"] for f in filled.job["files"]]
    assert jwt.decode(source, options={"verify_signature": False})["iss"] == kept.iam.issuer
    assert filled.bearer is not None
    assert filled.bearer.handle == ""


def status_of_provider(kept: ServedWithRefreshers) -> tuple[str, str]:
    """Return level and text of the provider's line in `minter status`."""
    told = json.loads(kept.minter("status", "--json", check=False).stdout)
    (line,) = (line for line in told["lines"] if line["part"] == "provider iam")
    return line["level"], line["text"]


def test_an_outage_is_stood_in_for_and_ends(kept: ServedWithRefreshers) -> None:
    """Also docs/on-call.md, "IAM down": what `minter status` says, and that minted tokens are not concerned."""
    if not isinstance(kept.iam, Fake):
        pytest.skip("a real server fails when it likes")
    with kept.client() as client:
        known = client.mint(**read("y/known", "own"))  # by now the discovery document is known
        until(lambda: client.fetch(*known.request_ids).tokens)
        kept.iam.server.behaviour = Behaviour(fault="error_500")
        waiting = [client.mint(**read(f"y/{n}", "own")) for n in range(8)]
        for asked in waiting:
            (token,) = until(lambda asked=asked: client.fetch(*asked.request_ids).tokens)
            assert jwt.decode(token.reveal(), options={"verify_signature": False})["iss"] == kept.iss
        assert client.mint(**read("y/9", "own")).tokens  # minted at once while the provider is paused
        until(lambda: status_of_provider(kept)[1].startswith("paused until "))
        assert client.mint(**read("y/10", "minted")).tokens
        kept.iam.server.behaviour = Behaviour()
        until(lambda: client.mint(**read(f"z/{uuid.uuid4()}", "own")).pending, 60)
        assert until(lambda: status_of_provider(kept)[0] == "ok")


def test_refreshers_die_and_nothing_is_lost(kept: ServedWithRefreshers) -> None:
    with kept.client() as client:
        asked = [client.mint(**read(f"k/{n}", "own")) for n in range(10)]
        kept.kill()
        kept.spawn(1)
        for one in asked:
            until(lambda one=one: client.fetch(*one.request_ids).tokens, 60)


def test_a_visitors_token_at_the_token_endpoint(kept: ServedWithRefreshers) -> None:
    exchange = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "audience": HOST,
    }
    subject = kept.iam.subject(f"storage.read:{TOP}/data storage.modify:{TOP}/data")
    told = kept.token("rucio", **exchange, subject_token=subject).json()
    claims = jwt.decode(told["access_token"], options={"verify_signature": False})
    assert claims["iss"] == kept.iss
    assert claims["scope"] == f"storage.read:{TOP}/data"  # the exchange rule allows reading only
    assert claims["sub"] == "iam:rucio"
    assert claims["act"]["sub"]
    cases = {
        "invalid_request": {"subject_token": kept.iam.subject(f"storage.read:{TOP}", "rucio")},
        "invalid_scope": {"subject_token": subject, "scope": "storage.read:/atlas/elsewhere"},
        "invalid_target": {"subject_token": subject, "audience": "nobody.example.org"},
    }
    for error, form in cases.items():
        refused = kept.token("rucio", **exchange | form)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"] == error
    refused = kept.token("consumer", **exchange, subject_token=subject).json()
    assert refused["error"] == "invalid_request"
    assert refused["reason"] == "unauthorized_client"
    refused = kept.token(
        "rucio", **exchange, subject_token=subject, scope=f"storage.read:{TOP} offline_access"
    ).json()
    assert refused["error"] == "invalid_request"


def test_nothing_secret_in_logs_or_rows(kept: ServedWithRefreshers) -> None:
    text = (kept.folder / "refresher.log").read_text() + kept.log()
    assert "eyJ" not in text
    assert "minter-secret" not in text
    assert '"provider asked"' in text or "provider asked" in text
    with kept.service.pool.begin() as tx:
        dump = str(tx.exec_driver_sql("SELECT * FROM managed").fetchall()) + str(
            tx.exec_driver_sql("SELECT * FROM clients").fetchall()
        )
    assert "eyJ" not in dump
    assert os.environ.get("HOME")


def test_subject_tokens_do_not_go_over_a_broker(service: Service) -> None:
    from minter.contract import names
    from minter.tasks import dispatch
    from minter.tasks.lifecycle import Lifecycle

    body = f'{{"request_id":"{uuid.uuid4()}","files":[{{"sources":["{SE}a"]}}],"subject_token":"eyJ.x.y"}}'
    with pytest.raises(InvalidRequest, match="over HTTP only"):
        dispatch.submission(
            Lifecycle(service.engine, service.store), names.MINT, "rucio-alpen", body.encode()
        )
    assert VO
