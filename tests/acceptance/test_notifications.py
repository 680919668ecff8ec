"""Managed tokens over the brokers: handles come at once, tokens later on the client's durable queue."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import kombu
import pytest
from joserfc import jwe, jwk

from minter.broker.publisher import declare
from minter.client import new_request_id
from minter.database import control_changes
from minter.local.fake_iam import Behaviour
from minter.local.servers import Valkey
from tests.acceptance.conftest import Raw, Running
from tests.acceptance.test_managed import settings
from tests.conftest import EXAMPLES, ROOT
from tests.iam_servers import Fake
from tests.integration.test_mint import SE
from tests.servers import RabbitMQ

ME, QUEUE = "rucio-alpen", "rucio-alpen.managed"


class Pushing(Running):
    """An engine with a provider, and the key of its client's queue."""

    iam: Fake
    key: Path


@pytest.fixture(scope="module")
def pushing(
    broker: Valkey | RabbitMQ, database_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pushing]:
    folder = tmp_path_factory.mktemp("pushing")
    iam = Fake()
    iam.start()
    (folder / "iam.secret").touch(mode=0o600)
    (folder / "iam.secret").write_text("minter-secret")
    path = folder / "settings.toml"
    text = (EXAMPLES / "settings.toml").read_text().replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
    path.write_text(text + settings(iam.issuer, "generic"))
    engine = Pushing(broker, database_dsn, folder, settings=path)
    control_changes.sync_providers(engine.service.pool, ["iam"])
    engine.iam = iam
    engine.key = folder / "jwe.json"
    engine.minter("clients", "change", ME, "--reply-queue", QUEUE, "--new-jwe-key", engine.key)
    engine.setup_users()
    if not engine.on_rabbitmq:
        with kombu.Connection(engine.url()) as connection:
            declare(connection, [QUEUE])
    engine.start_worker()
    with (folder / "refresher.log").open("ab") as log:
        refresher = subprocess.Popen(
            [sys.executable, "-m", "minter.cli", "refresher"],
            env=engine.environ,
            stdout=log,
            stderr=log,
            cwd=ROOT,
        )
    yield engine
    refresher.terminate()
    refresher.wait(30)
    engine.close()
    iam.stop()


def next_answer(engine: Pushing, seconds: float = 40) -> dict[str, Any]:
    key = jwk.import_key(json.loads(engine.key.read_text()))
    with kombu.Connection(engine.url()) as connection:
        channel = connection.channel()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            message = channel.basic_get(QUEUE, no_ack=True)
            if message is not None:
                body = message.body if isinstance(message.body, str) else message.body.decode()
                assert message.content_type == "application/jose"
                plaintext = jwe.decrypt_compact(body, key).plaintext
                assert plaintext is not None
                answer: dict[str, Any] = json.loads(plaintext)
                return answer
            time.sleep(0.1)
    raise AssertionError("nothing was pushed")


def ask(engine: Running, name: str, activity: str) -> tuple[str, dict[str, Any]]:
    raw = Raw(engine)
    body: dict[str, Any] = {
        "request_id": str(new_request_id()), "activity": activity, "reply_queue": QUEUE,
        "files": [{"operations": [{"operation": "download", "url": SE + name}], "external_id": name}],
    }  # fmt: skip
    told = raw.ask(body)
    raw.connection.release()
    return body["request_id"], told


def test_a_handle_first_and_then_the_token(pushing: Pushing) -> None:
    request_id, told = ask(pushing, "p/1", "own")
    assert "tokens" not in told  # the tokens go to the durable queue
    first = next_answer(pushing)
    assert first["request_id"] == request_id
    (pending,) = first["pending"]
    second = next_answer(pushing)
    assert second["request_id"] == request_id
    (token,) = second["tokens"]
    assert token["handle"] == pending["handle"]
    assert jwt.decode(token["token"], options={"verify_signature": False})["iss"] == pushing.iam.issuer
    with pushing.service.pool.begin() as tx:
        tx.exec_driver_sql("UPDATE managed SET needed_at = now(), lead_seconds = 60 WHERE state = 'issued'")
    third = next_answer(pushing)
    assert third["tokens"][0]["handle"] == pending["handle"]
    assert third["tokens"][0]["token"] != token["token"]


def test_a_stand_in_is_pushed_too(pushing: Pushing) -> None:
    pushing.iam.server.behaviour = Behaviour(fault="error_500")
    asked = [ask(pushing, f"s/{n}", "own")[0] for n in range(6)]
    tokens: dict[str, Any] = {}
    while set(tokens) != set(asked):  # those asked for after the pause began have no handle first
        answer = next_answer(pushing)
        if answer.get("tokens"):
            tokens[answer["request_id"]] = answer["tokens"]
    pushing.iam.server.behaviour = Behaviour()
    for (token,) in tokens.values():
        assert jwt.decode(token["token"], options={"verify_signature": False})["iss"] != pushing.iam.issuer


def test_a_job_does_not_go_to_a_queue_before_it_is_filled(pushing: Pushing) -> None:
    job: dict[str, Any] = {
        "files": [
            {"sources": [SE + "j/1"], "destinations": [SE + "j/2"], "filesize": 1, "activity": "exchanged"}
        ],
        "params": {},
    }
    raw = Raw(pushing)
    from minter.contract.names import FILL_JOB

    pushing.iam.server.behaviour = Behaviour()
    job["files"][0]["activity"] = "own"
    with pushing.service.pool.begin() as tx:
        tx.exec_driver_sql("UPDATE providers SET open_until = NULL, failures = 0, pauses = 0")
    told = raw.ask({"request_id": str(new_request_id()), "job": job, "reply_queue": QUEUE}, task=FILL_JOB)
    raw.connection.release()
    assert told["error"]["reason"] == "reply_not_allowed"
    assert "eyJ" not in pushing.logs()
