"""The engine as clients see it: real workers, both brokers, good and bad input."""

import base64
import bz2
import json
import re
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import kombu
import pytest
import uuid_utils
from amqp.exceptions import AccessRefused
from joserfc import jwe, jwk

from minter.broker import rabbitmq
from minter.broker.publisher import declare
from minter.cli.demo import fts_objections, read_jobs
from minter.client import FileOperation, FileRequest, FilledJob, MinterClient, new_request_id
from minter.contract import names
from minter.contract.messages import MAX_NEEDS
from minter.database import control_changes
from minter.database.connection import transaction
from minter.errors import (
    Banned,
    ClientMismatch,
    Conflict,
    InvalidRequest,
    MinterError,
    Unavailable,
    UnknownClient,
    UnknownStorage,
    UnknownVO,
    from_dict,
)
from minter.tokens import clock
from tests.acceptance.conftest import Raw, Running
from tests.conftest import EXAMPLES
from tests.servers import RabbitMQ
from workers.outbox import MAX_REFUSED

SE = "davs://se01.boreas.example.org:443/atlas/atlasdatadisk/rucio/data/"
OTHER = "davs://webdav1.fjord.example.org/data/atlas/datadisk/rucio/data/"


def files(count: int, tag: str = "f") -> list[FileRequest]:
    return [
        FileRequest(sources=(f"{SE}{tag}{n}",), destinations=(f"{OTHER}{tag}{n}",), size=10**9)
        for n in range(count)
    ]


def request(**changes: object) -> dict[str, Any]:
    return {"request_id": str(new_request_id()), "files": [{"sources": [SE + "x"]}], **changes}


# ── valid requests ───────────────────────────────────────────────────────────────────────────


def test_mint_and_repeat_by_request_id(client: MinterClient) -> None:
    id_ = new_request_id()
    first = client.mint(files(3), request_id=id_)
    assert [(t.file, t.side) for t in first.tokens] == [
        (n, s) for n in range(3) for s in ("destination", "source")
    ]
    again = client.mint(files(3), request_id=id_)
    assert [t.reveal() for t in again.tokens] == [t.reveal() for t in first.tokens]
    with pytest.raises(Conflict):
        client.mint(files(2), request_id=id_)


def test_a_token_hides_itself(client: MinterClient) -> None:
    (token,) = client.mint([FileRequest(sources=(SE + "x",))]).tokens
    assert token.reveal().count(".") == 2
    for shown in (str(token), repr(token), f"{token}"):
        assert token.reveal() not in shown
        assert token.reveal().split(".")[2] not in shown


def test_mint_many_in_chunks_with_progress(client: MinterClient) -> None:
    seen = []
    result = client.mint_many(files(250), chunk=100, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(100, 250), (200, 250), (250, 250)]
    assert sorted({t.file for t in result.tokens}) == list(range(250))
    assert len(result.tokens) == 500
    assert len(result.request_ids) == 3


def test_an_answer_beyond_eight_mebibytes_arrives_whole(client: MinterClient) -> None:
    wide = [
        FileRequest(
            sources=tuple(f"{SE}{'d' * 450}/{n}-{i}" for i in range(8)), destinations=(f"{OTHER}{n}",)
        )
        for n in range(MAX_NEEDS // 9)
    ]
    result = client.mint(wide)
    assert sum(len(t.reveal()) for t in result.tokens) > 8 * 1024 * 1024
    assert len({t.jti for t in result.tokens}) == MAX_NEEDS // 9 * 9


def test_every_job_of_rucio_is_filled_as_fts_wants_it(client: MinterClient) -> None:
    jobs = [job for _, job in read_jobs(EXAMPLES / "rucio-41.5/jobs")]
    answers = client.fill_jobs(jobs)
    filled = [f for f in answers if isinstance(f, FilledJob)]
    assert len(filled) == len(answers)
    now = int(clock.now().timestamp())
    assert [o for f in filled if f.job for o in fts_objections(f.job, now)] == []
    reasons = [r["error"]["reason"] for f in filled for r in f.refused]
    assert Counter(reasons) == {
        "endpoint_takes_no_token": 26,
        "invalid_path": 11,  # names that FTS, StoRM or every verifier reads otherwise
        "lifetime_not_allowed": 3,  # 12 h of staging at a StoRM, whose tokens live 6 h
    }
    assert sum(len(f.dropped_sources) for f in filled) == 2
    assert all(f.bearer and f.bearer.scope == "fts" for f in filled if f.job)
    assert all(f.job is None and f.bearer is None for f in filled if len(f.refused) == 3 and not f.job)


def test_other_operations(client: MinterClient) -> None:
    result = client.mint(
        [
            FileRequest(
                operations=tuple(FileOperation(o, SE + "f") for o in ("delete", "upload", "download", "stat"))
            )
        ]
    )
    assert [t.scope.split(":")[0] for t in result.tokens] == [
        "storage.modify",
        "storage.create",
        "storage.read",
        "storage.read",
    ]


def test_celerys_own_client_understands_the_answer(running: Running, raw: Raw) -> None:
    correlation = raw.send(request())
    raw.receive(correlation)
    (reply,) = [r for r in raw.replies if r.properties["correlation_id"] == correlation]
    envelope = json.loads(reply.body)
    assert (envelope["task_id"], envelope["status"], envelope["traceback"]) == (correlation, "SUCCESS", None)


# ── invalid requests ─────────────────────────────────────────────────────────────────────────


def errors(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [answer["error"]] if answer.get("error") else [r["error"] for r in answer["refusals"]]


BAD_PATHS = [
    "../../etc/passwd",
    "a/../b",
    "a/%2e%2e/b",
    "a/%2E%2E%2Fb",
    "a/%252e%252e/b",
    "a\\..\\b",
    "a/./b",
    "a/",
    "nul\x00",
    "line\n",
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=repr)
def test_traversal_in_every_encoding(raw: Raw, path: str) -> None:
    (error,) = errors(raw.ask(request(files=[{"sources": [SE + path]}])))
    assert error["reason"] == "invalid_path"


BROKEN = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe\x00",
    "empty": b"",
    "null": b"null",
    "not args": b'{"request_id": 1}',
    "no argument": b"[[], {}, {}]",
    "two arguments": b"[[1, 2], {}, {}]",
    "a number": b"[[1], {}, {}]",
    "deep": b"[" * 20_000,
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_broken_messages_get_an_answer(running: Running, raw: Raw, body: bytes) -> None:
    if not running.on_rabbitmq and body == BROKEN["not UTF-8"]:
        body = b"\xc3("  # kombu's Redis transport carries text
    answer = raw.ask(body.decode("latin1") if not running.on_rabbitmq else body)
    assert answer["error"]["reason"] == "invalid_request"


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"request_id": "x"}, "$.request_id"), ({"request_id": str(uuid.uuid4())}, "UUIDv7"), ({"files": []}, "$.files"),
        ({"files": [{"sources": ["davs://h/f"]}] * 100_000}, "$.files"), ({"files": [{"sources": [SE + "x" * 9000]}]}, "$.files[0].sources[0]"),
        ({"files": [{"operations": [{"operation": "chmod", "url": SE}]}]}, "operation"), ({"surprise": 1}, "surprise"),
    ],
)  # fmt: skip
def test_schema_violations_say_where(raw: Raw, changes: dict[str, Any], where: str) -> None:
    answer = raw.ask(request(**changes))
    assert answer["error"]["reason"] == "invalid_request"
    assert where in answer["error"]["error_description"]


def test_ten_megabytes(raw: Raw) -> None:
    answer = raw.ask(request(activity="x" * 10_000_000))
    assert "too large" in answer["error"]["error_description"]


def test_four_kilobytes_of_path(raw: Raw) -> None:
    (error,) = errors(raw.ask(request(files=[{"sources": [SE + "d/" * 1900 + "f"]}])))
    assert error["reason"] == "scope_too_large"


@pytest.mark.parametrize("days", [-40, 1])
def test_ids_from_the_far_past_or_future(raw: Raw, days: int) -> None:
    milliseconds = int((time.time() + days * 86400) * 1000)
    id_ = uuid.UUID(int=(milliseconds << 80) | 7 << 76 | 2 << 62 | 1)
    assert raw.ask(request(request_id=str(id_)))["error"]["reason"] == "invalid_request"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"vo": "other"}, UnknownVO), ({"client": "dirac"}, ClientMismatch),
        ({"files": [{"sources": ["davs://nowhere.example.org/f"]}]}, UnknownStorage),
        ({"files": [{"sources": ["http://se01.boreas.example.org/atlas/f"]}]}, None),
        ({"files": [{"sources": ["davs://se01.boreas.example.org/elsewhere/f"]}]}, None),
        ({"lifetime_seconds": 7 * 3600}, None),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_told(raw: Raw, changes: dict[str, Any], error: type[MinterError]) -> None:
    (found,) = errors(raw.ask(request(**changes)))
    if error is not None:
        assert isinstance(from_dict(found), error)
    assert found["error_description"]


def test_one_bad_file_fails_alone_unless_all_or_nothing(raw: Raw) -> None:
    mixed = [{"sources": [SE + "a"]}, {"sources": ["davs://nowhere.example.org/f"]}, {"sources": [SE + "c"]}]
    answer = raw.ask(request(files=mixed))
    assert [t["file"] for t in answer["tokens"]] == [0, 2]
    assert [r["file"] for r in answer["refusals"]] == [1]
    strict = raw.ask(request(files=mixed, all_or_nothing=True))
    assert not strict.get("tokens")
    assert sorted(r["file"] for r in strict["refusals"]) == [0, 1, 2]


def test_duplicates_in_one_batch_and_in_two(running: Running, raw: Raw) -> None:
    body = request()
    sent = [raw.send(body) for _ in range(5)]
    answers = [raw.receive(c) for c in sent]
    time.sleep(0.2)
    answers.append(raw.ask(body))
    assert len({a["tokens"][0]["token"] for a in answers}) == 1
    assert running.rows("SELECT count(*) FROM tokens WHERE request_id = %s", body["request_id"]) == [(1,)]


@pytest.mark.parametrize(
    "task", ["minter.maintain", "celery.backend_cleanup", "celery.chord", "os.system", ""]
)
def test_internal_and_unknown_tasks_are_refused(raw: Raw, task: str) -> None:
    assert raw.ask(request(), task=task)["error"]["reason"] == "invalid_request"


def test_a_message_without_celerys_headers_gets_an_answer(raw: Raw) -> None:
    assert raw.ask(request(), headers={})["error"]["reason"] == "invalid_request"


ODD_HEADERS = [{"task": ["minter.mint"]}, {"task": 5}, {"task": {"a": 1}}, {"task": None}, {"id": "x"}]


@pytest.mark.parametrize("headers", ODD_HEADERS, ids=str)
def test_odd_headers_get_an_answer(raw: Raw, headers: dict[str, Any]) -> None:
    assert raw.ask(request(), headers=headers)["error"]["reason"] == "invalid_request"


def test_an_unknown_compression_gets_an_answer(raw: Raw) -> None:
    answer = raw.ask(request(), headers={"task": names.MINT, "id": "x", "compression": "application/x-nope"})
    assert answer["error"]["reason"] == "invalid_request"


@pytest.mark.rabbitmq
def test_a_body_in_a_charset_of_the_senders_gets_an_answer(running: Running, raw: Raw) -> None:
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker carries text")
    correlation = uuid.uuid4().hex
    message = raw.channel.prepare_message(
        b"\\ud800", content_type="application/json", content_encoding="unicode_escape",
        headers={"task": names.MINT, "id": "x"},
        properties={"reply_to": raw.reply_to, "correlation_id": correlation, "user_id": raw.name},
    )  # fmt: skip
    raw.channel.basic_publish(message, exchange=names.REQUEST_EXCHANGE, routing_key=names.REQUEST_QUEUE)
    assert raw.receive(correlation)["error"]["reason"] == "invalid_request"


def test_a_compressed_body_is_not_inflated(raw: Raw) -> None:
    packed = bz2.compress(b" " * 10_000_000)
    headers = {"task": names.MINT, "id": "x", "compression": "application/x-bz2"}
    body = base64.b64encode(packed).decode() if not raw.running.on_rabbitmq else packed
    assert raw.ask(body, headers=headers)["error"]["reason"] == "invalid_request"


def test_a_job_that_is_none(raw: Raw) -> None:
    answer = raw.ask({"request_id": str(new_request_id()), "job": {"files": 3}}, task=names.FILL_JOB)
    assert "$.job.files" in answer["error"]["error_description"]


def test_a_reply_address_of_another_is_not_used(running: Running, raw: Raw) -> None:
    victim = kombu.Connection(running.broker.url)
    queue = kombu.Queue(
        f"{names.reply_prefix('dirac')}victim", channel=victim.channel(), durable=False, auto_delete=True
    )
    got: list[Any] = []
    kombu.Consumer(queue.channel, [queue], on_message=got.append, no_ack=True).consume()
    raw.send(request(), reply_to=queue.name)
    raw.send(request(), reply_to=names.REQUEST_QUEUE)
    raw.send(request(), reply_to=None)
    raw.ask(request())
    with pytest.raises(TimeoutError):
        victim.drain_events(timeout=1)
    assert not got
    victim.release()


def test_the_worker_goes_on(client: MinterClient) -> None:
    assert client.mint(files(1)).tokens


# ── RabbitMQ's own checks ────────────────────────────────────────────────────────────────────


def test_the_broker_keeps_clients_apart(running: Running) -> None:
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker serves one local client")
    attempts: tuple[Callable[[Any], Any], ...] = (
        lambda c: c.basic_get(names.REQUEST_QUEUE),
        lambda c: c.basic_get(names.DEAD_LETTER_QUEUE),
        lambda c: c.queue_declare(f"{names.reply_prefix('dirac')}x"),
        lambda c: c.basic_publish_confirm(
            c.prepare_message(b"x", content_encoding="utf-8"),
            exchange="",
            routing_key=names.INTERNAL_QUEUE,
        ),
        lambda c: c.basic_publish_confirm(
            c.prepare_message(b"x", content_encoding="utf-8"),
            exchange=names.INTERNAL_EXCHANGE,
            routing_key=names.INTERNAL_QUEUE,
        ),
        lambda c: c.basic_publish_confirm(
            c.prepare_message(b"x", content_encoding="utf-8", properties={"user_id": "dirac"}),
            exchange=names.REQUEST_EXCHANGE,
            routing_key=names.REQUEST_QUEUE,
        ),
    )
    for attempt in attempts:
        with (
            kombu.Connection(running.url()) as connection,
            pytest.raises(Exception, match=r"403|406|ACCESS_REFUSED|PRECONDITION"),
        ):
            attempt(connection.channel())


def test_a_message_without_a_user_gets_no_token(running: Running, raw: Raw) -> None:
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker serves one local client")
    answer = raw.ask(request(), user_id=None)
    assert isinstance(from_dict(answer["error"]), UnknownClient)


# ── control while running ────────────────────────────────────────────────────────────────────


def test_bans_and_keys_bind_running_workers_at_once(running: Running, client: MinterClient) -> None:
    with control_changes.controlling(running.service.pool, "test", "ban", "x", {}) as tx:
        tx.execute("INSERT INTO bans (kind, value, reason) VALUES ('activity', 'T0', 'test')")
    with pytest.raises(Banned):
        client.mint(files(1), activity="T0")
    assert client.mint(files(1)).tokens
    with control_changes.controlling(running.service.pool, "test", "revoke", "x", {}) as tx:
        tx.execute("UPDATE signing_keys SET state = 'revoked', revoked_at = now(), private_key = NULL")
    with pytest.raises(Unavailable, match="minter keys create"):
        client.mint(files(1))
    with control_changes.controlling(running.service.pool, "test", "new key", "x", {}) as tx:
        tx.execute("DELETE FROM tokens")
        tx.execute("DELETE FROM requests")
        tx.execute("DELETE FROM signing_keys")
    running.service.create_keys("alpen", ("ES256", "RS256"), "test")
    assert client.mint(files(1)).tokens


def test_a_warm_shutdown_loses_nothing(running: Running) -> None:
    with running.client() as client:
        ids = [new_request_id() for _ in range(300)]
        from minter.contract.messages import MintRequest

        asked = [MintRequest(request_id=i, files=tuple(files(1))) for i in ids]
        answers = client.ask(names.MINT, asked)
        first = next(answers)
        for worker in list(running.workers):
            worker.send_signal(signal.SIGTERM)
        running.start_worker()
        assert len([first, *answers]) == 300
    for worker in running.workers[:2]:
        assert worker.wait(30) == 0
    assert "Traceback" not in running.logs()


def test_the_schema_of_answers(raw: Raw) -> None:
    import jsonschema

    from schemas.__main__ import generate

    schema = generate()["answer.json"]
    for body, task in (
        (request(), names.MINT), (request(vo="other"), names.MINT),
        ({"request_id": str(uuid_utils.uuid7()), "job": {"files": [{"sources": [SE + "a"], "destinations": [OTHER + "a"]}]}}, names.FILL_JOB),
    ):  # fmt: skip
        answer = raw.ask(body, task=task)
        jsonschema.validate(answer, schema)
        for token in answer.get("tokens", []):
            claims = json.loads(base64.urlsafe_b64decode(token["token"].split(".")[1] + "=="))
            jsonschema.validate(claims, generate()["token.json"])


def test_wrong_client_options(running: Running) -> None:
    with running.client() as client, pytest.raises(InvalidRequest):
        client.mint_many(files(1), chunk=0)


# ── shares ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("own", [True, False], ids=["own queue", "common queue"])
def test_a_greedy_client_delays_its_own_requests_only(running: Running, own: bool) -> None:
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker serves one local client")
    greedy, honest = Raw(running, "dirac"), Raw(running)
    own_exchange = names.client_requests("dirac")
    where: dict[str, Any] = {"exchange": own_exchange, "key": own_exchange} if own else {}
    # A queue of its own may hold any number; in the common one, those that the workers hold take turns.
    count = 700 if own else 200
    large = [{"sources": [f"{SE}g{n}"], "destinations": [f"{OTHER}g{n}"]} for n in range(100)]
    sent = [greedy.send(request(files=large), **where) for _ in range(count)]
    answered = []
    for _ in range(5):
        assert "error" not in honest.ask(request())
        answered.append(len({r.properties["correlation_id"] for r in greedy.replies}))
    greedy.connection.drain_events(timeout=20)
    assert len(greedy.replies) < count / 2, "the honest client waited for the greedy one"
    assert all("error" not in greedy.receive(correlation, 120) for correlation in sent)
    for raw in (greedy, honest):
        raw.connection.release()


def test_messages_that_are_no_requests_take_turns_too(running: Running) -> None:
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker serves one local client")
    greedy, honest = Raw(running, "dirac"), Raw(running)
    own = names.client_requests("dirac")
    for _ in range(3_000):
        greedy.send(b"{", headers={"task": "none"}, exchange=own, key=own)
    for _ in range(3):
        assert "error" not in honest.ask(request())
    with kombu.Connection(running.broker.url) as connection:
        left = connection.default_channel.queue_declare(own, passive=True).message_count
        connection.default_channel.queue_purge(own)
    assert left > 0, "the honest client waited for all of them"
    for raw in (greedy, honest):
        raw.connection.release()


def test_a_queue_that_cannot_be_used_stops_nobody(running: Running, client: MinterClient) -> None:
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker serves one local client")
    name = f"odd-{uuid.uuid4().hex[:6]}"
    with kombu.Connection(running.broker.url) as connection:
        kombu.Queue(names.client_requests(name), channel=connection.default_channel, durable=True).declare()
    running.minter("clients", "add", name, "--vo", "alpen")
    deadline = time.monotonic() + 30
    while f"minter.requests.{name} cannot be used" not in running.logs():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(0.5)  # the worker that told it goes on
    assert client.mint(files(1)).tokens
    with kombu.Connection(running.broker.url) as connection:
        connection.default_channel.queue_delete(names.client_requests(name))


def test_nobody_else_may_write_to_a_clients_queue(running: Running, raw: Raw) -> None:
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker checks no permissions")
    other = names.client_requests("dirac")
    raw.send(request(), exchange=other, key=other)
    with pytest.raises(AccessRefused, match=re.escape(other)):
        raw.connection.drain_events(timeout=10)


def test_workers_find_the_queue_of_a_new_client(running: Running) -> None:
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker serves one local client")
    name = f"new-{uuid.uuid4().hex[:6]}"
    running.minter("clients", "add", name, "--vo", "alpen")
    running.setup_users()
    with running.client(name) as client:
        assert client.mint(files(1)).tokens


def test_a_client_uses_the_common_queue_until_its_own_is_set_up(running: Running) -> None:
    if not isinstance(running.broker, RabbitMQ):
        pytest.skip("the embedded broker serves one local client")
    ctl = [str(running.broker.ctl), "--quiet", "set_permissions", "rucio-alpen"]
    own, write, read = rabbitmq.permissions("rucio-alpen")
    before = f"^{names.REQUEST_EXCHANGE}$".replace(".", "[.]")
    try:
        subprocess.run([*ctl, own, before, read], check=True)
        with running.client() as client:
            assert client.mint(files(1)).tokens
    finally:
        subprocess.run([*ctl, own, write, read], check=True)


# ── durable queues ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def consumer(running: Running) -> tuple[str, jwk.ECKey]:
    """A client with a durable queue and a key of its own, registered through the CLI."""
    name = f"fts-{uuid.uuid4().hex[:6]}"
    key = jwk.ECKey.generate_key("P-256")
    path = running.folder / "consumer.json"
    path.write_text(json.dumps(key.as_dict(private=False)))
    running.minter(
        "clients", "add", name, "--vo", "alpen", "--reply-queue", f"{name}.jobs", "--jwe-key", path
    )
    if running.on_rabbitmq:
        running.setup_users()
        running.url(name)
    else:
        with kombu.Connection(running.broker.url) as connection:
            declare(connection, [f"{name}.jobs"])
    return name, key


def test_answers_for_a_durable_queue_are_encrypted_to_its_client(
    running: Running, consumer: tuple[str, jwk.ECKey]
) -> None:
    name, key = consumer
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker serves one local client, which has no key")
    raw = Raw(running, name)
    job = {"files": [{"sources": [SE + "q"], "destinations": [OTHER + "q"]}]}
    body = {"request_id": str(new_request_id()), "job": job, "reply_queue": f"{name}.jobs"}
    receipt = raw.ask(body, task=names.FILL_JOB)
    assert receipt["request_id"] == body["request_id"]
    assert "job" not in receipt
    assert "error" not in receipt
    message = raw.connection.channel().basic_get(f"{name}.jobs", no_ack=True)
    assert message.properties["content_type"] == "application/jose"
    assert message.properties["delivery_mode"] == 2
    assert "eyJhbGciOiJFUzI1NiI" not in str(message.body)
    plaintext = jwe.decrypt_compact(message.body, key).plaintext
    assert plaintext is not None
    answer = json.loads(plaintext)
    assert answer["job"]["files"][0]["source_tokens"][0].count(".") == 2
    raw.connection.release()


def test_a_full_queue_is_the_trouble_of_its_client_only(
    running: Running, consumer: tuple[str, jwk.ECKey], client: MinterClient
) -> None:
    name, _ = consumer
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker has no limits for queues")
    assert isinstance(running.broker, RabbitMQ)
    limit = '{"max-length":1,"overflow":"reject-publish"}'
    subprocess.run(
        [running.broker.ctl, "set_policy", f"full-{name}", f"^{name}", limit, "--apply-to", "queues"],
        check=True,
        capture_output=True,
    )
    raw = Raw(running, name)
    queue = f"{name}.jobs"

    def ask() -> Any:
        job = {"files": [{"sources": [SE + uuid.uuid4().hex], "destinations": [OTHER + "q"]}]}
        return raw.ask(
            {"request_id": str(new_request_id()), "job": job, "reply_queue": queue}, task=names.FILL_JOB
        )

    channel = raw.connection.channel()
    for _ in range(2):
        assert "error" not in ask()  # the second answer finds the queue full
    assert client.mint([FileRequest(sources=(SE + "f",))]).tokens
    for _ in range(2):
        message, deadline = None, time.monotonic() + 20
        while message is None and time.monotonic() < deadline:
            message = channel.basic_get(queue, no_ack=True)
            time.sleep(0.1)
        assert message is not None
    for _ in range(2 * MAX_REFUSED + 3):  # there are two workers
        ask()
    assert client.mint([FileRequest(sources=(SE + "f",))]).tokens
    told: list[tuple[str, str]] = []
    deadline = time.monotonic() + 20
    with kombu.Connection(running.broker.url) as operators:
        channel = operators.channel()
        while not told and time.monotonic() < deadline:
            dead = channel.basic_get(names.DEAD_LETTER_QUEUE, no_ack=True)
            if dead is None:
                time.sleep(0.1)
            elif dead.headers["minter-client"] == name:
                told.append((dead.headers["minter-reason"], dead.headers["minter-description"]))
    assert {reason for reason, _ in told} == {"undeliverable"}
    assert all(queue in why for _, why in told)
    subprocess.run([running.broker.ctl, "clear_policy", f"full-{name}"], check=True, capture_output=True)
    raw.connection.release()


def test_a_queue_that_is_not_the_clients_is_refused(
    running: Running, raw: Raw, consumer: tuple[str, jwk.ECKey]
) -> None:
    for queue in (f"{consumer[0]}.jobs", names.REQUEST_QUEUE, "minter.reply.dirac.x"):
        answer = raw.ask(request(reply_queue=queue))
        assert answer["error"]["reason"] == "reply_not_allowed"
    assert (
        running.minter(
            "clients", "add", "x", "--vo", "alpen", "--reply-queue", "minter.requests", check=False
        ).returncode
        == 1
    )


def test_an_amqps_broker_is_verified(running: Running) -> None:
    if not running.on_rabbitmq:
        pytest.skip("the embedded broker is a local socket")
    assert isinstance(running.broker, RabbitMQ)
    url = (
        running.url()
        .replace("amqp://", "amqps://")
        .replace(f"127.0.0.1:{running.broker.port}", f"localhost:{running.broker.tls_port}")
    )
    folder = running.folder / "ca"
    folder.mkdir()
    (folder / "ca.pem").write_text(running.broker.ca.read_text())
    subprocess.run(["openssl", "rehash", folder], check=True)
    for ca in (running.broker.ca, folder):
        with MinterClient(url, ca=str(ca)) as trusting:
            assert trusting.mint(files(1, "tls")).tokens
    with MinterClient(url, timeout_seconds=2) as doubting, pytest.raises(Unavailable):
        doubting.mint(files(1, "tls"))


def test_the_maintenance_task_makes_the_missing_partition(running: Running) -> None:
    (name,) = running.rows(
        "SELECT max(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'tokens'::regclass"
    )[0]
    with transaction(running.service.pool) as tx:
        tx.execute(f"DROP TABLE {name}")
    with kombu.Connection(running.broker.url) as connection:
        message = {"headers": {"task": "minter.maintain", "id": "1"}, "exchange": names.INTERNAL_EXCHANGE}
        producer = kombu.Producer(connection.channel())
        producer.publish([[], {}, {}], routing_key=names.INTERNAL_QUEUE, serializer="json", **message)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not running.rows("SELECT to_regclass(%s)", name)[0][0]:
        time.sleep(0.1)
    assert running.rows("SELECT to_regclass(%s)", name)[0][0] == name
