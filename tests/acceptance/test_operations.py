"""What operators ask and do: status, check, dead letters, audit, keys and secrets that leaked."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import kombu
import pytest
from amqp.exceptions import AccessRefused

from minter.broker.publisher import Publisher
from minter.client import FileRequest, MinterClient, new_request_id
from minter.contract import names
from minter.database import migrations
from minter.errors import Unavailable, Undeliverable
from minter.service import Service
from minter.tokens.keystore import new_master_key
from tests.acceptance.conftest import Running
from tests.acceptance.test_workers import OTHER, SE
from tests.conftest import ROOT, _admin, _dsn, load_settings
from tests.servers import RabbitMQ
from workers import replies


def status(running: Running, **environ: str) -> tuple[int, str, dict[str, dict[str, Any]]]:
    """Return exit code, worst level, and the lines by part."""
    done = With(running, environ).minter("status", "--json", check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    return done.returncode, told["status"], {line["part"]: line for line in told["lines"]}


class With:
    """The running engine as commands with other environment variables see it."""

    def __init__(self, running: Running, environ: dict[str, str]) -> None:
        self._running, self._environ = running, environ

    def minter(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        before = self._running.environ
        self._running.environ = {**before, **self._environ}
        try:
            return self._running.minter(*arguments, check=check)
        finally:
            self._running.environ = before


def test_status_says_what_runs_and_what_does_not(running: Running, client: MinterClient) -> None:
    assert client.mint([FileRequest(sources=(SE + "status",))]).tokens
    code, worst, parts = status(running)
    assert (code, worst) == (3, "warning")
    assert parts["worker"]["text"] == "2 running"
    assert {parts[p]["level"] for p in ("worker", "postgres", "clock", "schema", "partitions", "broker")} == {
        "ok"
    }
    assert parts["beat"] == {"level": "warning", "part": "beat", "text": "none running; start: minter beat"}
    assert parts["standby"]["level"] == "warning"
    text = running.minter("status", check=False).stdout
    assert max(map(len, text.splitlines())) < 110  # the URL of the key set is longer than a line
    assert "worker" in text


def test_status_goes_on_when_half_is_down(running: Running) -> None:
    code, worst, parts = status(running, MINTER_DSN="host=127.0.0.1 port=1 user=minter dbname=x")
    assert (code, worst) == (1, "failed")
    assert "refused" in parts["postgres"]["text"]
    assert parts["broker"]["level"] == "ok"
    code, _, parts = status(running, MINTER_BROKER_URL="amqp://guest:guest@127.0.0.1:1//")
    assert (code, parts["broker"]["level"]) == (1, "failed")
    assert parts["postgres"]["level"] == "ok"
    assert "guest:guest" not in json.dumps(parts)


def test_a_wrong_master_key_is_told(running: Running) -> None:
    code, _, parts = status(running, MINTER_MASTER_KEY_ALPEN=new_master_key())
    assert code == 1
    assert parts["alpen ES256"]["level"] == "failed"
    assert "does not open" in parts["alpen ES256"]["text"]
    done = With(running, {"MINTER_MASTER_KEY_ALPEN": new_master_key()}).minter("check", check=False)
    assert done.returncode == 1
    assert "does not open" in done.stdout


def test_check_finds_a_database_without_schema_and_a_changed_issuer(
    running: Running, postgres_dsn: str, tmp_path: Path
) -> None:
    name = f"minter_empty_{uuid.uuid4().hex[:8]}"
    _admin(postgres_dsn, f"CREATE DATABASE {name}")
    service = Service(load_settings(_dsn(postgres_dsn, name)))
    try:
        other = With(running, {"MINTER_DSN": _dsn(postgres_dsn, name)})
        done = other.minter("check", check=False)
        assert (done.returncode, "run: minter db upgrade" in done.stdout) == (1, True)
        migrations.upgrade(service.pool)
        with service.pool.begin() as tx:
            tx.exec_driver_sql(
                "INSERT INTO issuers (vo, iss) VALUES ('alpen', 'https://elsewhere.example.org/')"
            )
        done = other.minter("check", check=False)
        assert (done.returncode, "correct issuers.alpen.iss" in done.stdout) == (1, True)
    finally:
        service.pool.dispose()
        _admin(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")


# ── dead letters ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bury(running: Running) -> Iterator[Callable[..., UUID]]:
    """Put a request of the client on the queue of dead letters; return its request_id."""
    with kombu.Connection(running.url()) as connection:
        publisher = Publisher(kombu.Connection(running.broker.url))

        def put(**more: object) -> UUID:
            request_id = new_request_id()
            file = {"sources": [SE + uuid.uuid4().hex], "destinations": [OTHER + "d"]}
            request = {"request_id": str(request_id), "files": [file], **more}
            body = json.dumps([[request], {}, {}]).encode()
            why = Undeliverable("it stopped a worker")
            publisher.publish([replies.dead_letter(body, {"task": names.MINT}, "rucio-alpen", why)])
            return request_id

        yield put
        publisher.close()
        del connection


def dead(running: Running, *arguments: object) -> Any:
    return json.loads(running.minter("dead", *arguments, "--json").stdout)


def test_dead_letters_are_listed_served_and_dropped(
    running: Running, client: MinterClient, bury: Callable[..., UUID]
) -> None:
    running.minter("dead", "drop", "--all")
    first, second = bury(), bury()
    listed = dead(running, "list")
    assert [(d["client"], d["reason"], d["why"]) for d in listed] == [
        ("rucio-alpen", "undeliverable", "it stopped a worker")
    ] * 2
    assert str(first) in json.dumps(dead(running, "show", listed[0]["id"])["body"])
    assert dead(running, "requeue", listed[0]["id"]) == {"served": [listed[0]["id"]]}
    assert len(client.fetch(first).tokens) == 2
    assert [d["id"] for d in dead(running, "list")] == [listed[1]["id"]]
    assert dead(running, "drop", listed[1]["id"]) == {"dropped": [listed[1]["id"]]}
    assert dead(running, "list") == []
    changes = json.loads(running.minter("audit", "--action", "dead", "--json").stdout)
    assert [(c["action"], c["subject"]) for c in changes[:2]] == [
        ("dead.drop", listed[1]["id"]), ("dead.requeue", listed[0]["id"]),
    ]  # fmt: skip
    assert running.rows("SELECT count(*) FROM requests WHERE request_id = %s", second) == [(0,)]


def test_a_dead_letter_that_is_refused_again_stays(running: Running, bury: Callable[..., UUID]) -> None:
    running.minter("dead", "drop", "--all")
    bury(vo="nowhere")
    (letter,) = dead(running, "list")
    done = running.minter("dead", "requeue", "--all", check=False)
    assert (done.returncode, letter["id"] in done.stderr) == (1, True)
    assert dead(running, "list") == [letter]
    for wrong in (("drop",), ("drop", "x"), ("requeue", letter["id"], "--all"), ("show", "x")):
        assert running.minter("dead", *wrong, check=False).returncode == 1
    running.minter("dead", "drop", "--all")


# ── leaks ────────────────────────────────────────────────────────────────────────────────────


def test_revoke_force_makes_the_standby_itself(running: Running, client: MinterClient) -> None:
    before = client.mint([FileRequest(sources=(SE + "leak",))]).tokens[0]
    ring = json.loads(running.minter("keys", "list", "--json").stdout)
    (active,) = (k for k in ring if (k["state"], k["algorithm"]) == ("active", "ES256"))
    for standby in (k for k in ring if k["state"] == "prepared"):
        running.minter("keys", "revoke", standby["kid"], "--reason", "test", "--yes")
    with running.service.pool.begin() as tx:
        tx.exec_driver_sql("DELETE FROM signing_keys WHERE state = 'prepared'")
    assert (
        running.minter("keys", "revoke", active["kid"], "--reason", "leak", "--yes", check=False).returncode
        == 3
    )
    running.minter("keys", "revoke", active["kid"], "--reason", "leak", "--yes", "--force")
    after = client.mint([FileRequest(sources=(SE + "leak2",))]).tokens[0]
    assert before.jti != after.jti
    ring = json.loads(running.minter("keys", "list", "--json").stdout)
    assert {k["state"] for k in ring if k["kid"] == active["kid"]} == {"revoked"}
    assert "leak" in running.minter("audit", "--subject", active["kid"], "--json").stdout


def test_recovery_from_a_leaked_key_survives_kill_9(running: Running, client: MinterClient) -> None:
    """Live tokens are made anew once, and clients find them under the old request_id, whoever was killed."""
    ids = [new_request_id() for _ in range(300)]
    before = {
        id_: client.mint([FileRequest(sources=(SE + f"recover/{n}",))], request_id=id_).tokens[0]
        for n, id_ in enumerate(ids)
    }
    ring = json.loads(running.minter("keys", "list", "--json").stdout)
    (active,) = (k for k in ring if (k["state"], k["algorithm"]) == ("active", "ES256"))
    kid = active["kid"]
    assert "run: minter keys revoke" in running.minter("keys", "recover", kid, check=False).stderr
    running.minter("keys", "revoke", kid, "--reason", "leak", "--yes", "--force")
    looked = running.minter("keys", "recover", kid, check=False)
    assert looked.returncode == 1
    assert "repeat with --yes" in looked.stdout
    count = "SELECT count(*) FROM requests WHERE renews = ANY(%s)"
    killed = subprocess.Popen(
        [sys.executable, "-m", "minter.cli", "keys", "recover", kid, "--yes", "--processes", "1"],
        env=running.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    while running.rows(count, ids) == [(0,)]:  # a batch has 200 of the 300 requests
        assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert running.rows(count, ids) > [(0,)]
    done = running.minter("keys", "recover", kid, "--yes", "--json", check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert (told["made"], told["unmade"]) == (told["tokens"], [])
    assert told["tokens"] >= len(ids)
    after = {id_: client.fetch(id_).tokens[0] for id_ in ids}
    assert {token.jti for token in after.values()}.isdisjoint({token.jti for token in before.values()})
    assert [after[id_].scope for id_ in ids] == [before[id_].scope for id_ in ids]
    assert running.rows(count, ids) == [(len(ids),)]
    again = client.mint([FileRequest(sources=(SE + "recover/0",))], request_id=ids[0]).tokens[0]
    assert again.reveal() == after[ids[0]].reveal()


def test_a_leaked_secret_is_refused_at_once(running: Running, tmp_path: Path) -> None:
    running.minter("clients", "rotate", "rucio-alpen", "--secret-file", tmp_path / "one")
    running.minter("clients", "rotate", "rucio-alpen", "--secret-file", tmp_path / "two", "--now")
    kept = "SELECT count(*) FROM clients WHERE name = 'rucio-alpen' AND old_secret_until > now()"
    assert running.rows(kept) == [(0,)]
    wrong = running.minter("clients", "rotate", "rucio-alpn", "--secret-file", tmp_path / "x", check=False)
    assert "did you mean 'rucio-alpen'?" in wrong.stderr


# ── the broker ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.rabbitmq
def test_a_broker_that_takes_no_messages_is_told_and_nobody_hangs(running: Running) -> None:
    """RabbitMQ takes the first message of each connection while its alarm is on, and then reads no more."""
    if not isinstance(running.broker, RabbitMQ):
        pytest.skip("the embedded broker has no alarms")
    ctl, file = str(running.broker.ctl), FileRequest(sources=(SE + "blocked",))

    def watermark(share: str) -> None:
        subprocess.run([ctl, "set_vm_memory_high_watermark", share], check=True, capture_output=True)

    request_id = new_request_id()
    with running.client() as before:  # both workers have sent answers
        tokens = [before.mint([file], request_id=request_id).tokens[0].reveal() for _ in range(20)]
    try:
        watermark("0.0000001")
        _until(lambda: status(running)[2]["broker"]["level"] == "failed")
        code, _, parts = status(running)
        assert (code, "takes no messages" in parts["broker"]["text"]) == (1, True)
        started = time.monotonic()
        with running.client(timeout_seconds=4) as client, pytest.raises(Unavailable):
            client.mint([file])
        assert time.monotonic() - started < 15, "the client waits beyond its time-out"
    finally:
        watermark("0.6")
    _until(lambda: status(running)[2]["broker"]["level"] == "ok")
    with running.client(timeout_seconds=60) as after:
        again = after.mint([file], request_id=request_id).tokens[0].reveal()
    assert {again} == set(tokens)


@pytest.mark.rabbitmq
def test_a_wrong_amqp_password_is_told_apart_from_a_broker_that_is_away(running: Running) -> None:
    if not isinstance(running.broker, RabbitMQ):
        pytest.skip("the embedded broker has no users")
    away, wrong = "amqp://guest:guest@127.0.0.1:1//", f"amqp://guest:wrong@127.0.0.1:{running.broker.port}//"
    for url, why in ((away, "the broker cannot be reached: "), (wrong, "the broker refuses: ACCESS_REFUSED")):
        told = status(running, MINTER_BROKER_URL=url)[2]["broker"]["text"]
        assert told.startswith(why)
        for command in (("broker", "setup", "--no-clients"), ("dead", "list")):
            done = With(running, {"MINTER_BROKER_URL": url}).minter(*command, check=False)
            assert (done.returncode, why in done.stderr) == (3, True), done.stderr
        with (
            MinterClient(url, "rucio-alpen", timeout_seconds=1) as client,
            pytest.raises(Unavailable, match=why),
        ):
            client.mint([FileRequest(sources=(SE + "password",))])


def test_a_new_amqp_password_replaces_the_old_one(running: Running, tmp_path: Path) -> None:
    if not isinstance(running.broker, RabbitMQ):
        pytest.skip("the embedded broker has no users")
    old, path = running.url(), tmp_path / "password.json"
    ctl = ("--rabbitmqctl", running.broker.ctl)
    running.minter("broker", "password", "rucio-alpen", "--passwords", path, *ctl)
    assert path.stat().st_mode & 0o777 == 0o600
    running.passwords |= json.loads(path.read_text())
    (running.broker.folder / "passwords.json").write_text(json.dumps(running.passwords))
    with running.client() as client:
        assert client.mint([FileRequest(sources=(SE + "password",))]).tokens
    with pytest.raises((OSError, AccessRefused)), kombu.Connection(old) as refused:
        refused.connect()
    again = running.minter("broker", "password", "rucio-alpen", "--passwords", path, *ctl, check=False)
    assert again.returncode == 1, "a file with another password was overwritten"
    wrong = running.minter(
        "broker", "password", "rucio-alpn", "--passwords", tmp_path / "x", *ctl, check=False
    )
    assert "did you mean 'rucio-alpen'?" in wrong.stderr
    changes = running.minter("audit", "--action", "client.amqp_password", "--json").stdout
    assert "rucio-alpen" in changes
    assert running.passwords["rucio-alpen"] not in changes


def _until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
