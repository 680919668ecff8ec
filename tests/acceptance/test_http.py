"""Transfers over HTTP, the public documents, and the protection of the service against abuse."""

import concurrent.futures
import itertools
import json
import os
import signal
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs

from minter.client import FileReport, FileRequest, JobReport, MinterClient, new_request_id
from minter.errors import InvalidClient, InvalidRequest, SettingsError, Unavailable, UnknownRequest
from minter.local.servers import Postgres
from minter.tokens import clock, keys
from minter.tokens.claims import unverified_claims
from tests.acceptance.served import VO, Served
from tests.acceptance.test_token import HOST, TOP
from tests.conftest import EXAMPLES, rows
from tests.integration.test_deadlines import children, set_standby
from tests.integration.test_mint import OTHER, SE
from tests.servers import free_ports

COPY = FileRequest(sources=(SE + "h/a",), destinations=(OTHER + "h/a",), size=10**9, external_id="h-a")


@pytest.fixture
def client(served: Served) -> Iterator[MinterClient]:
    with served.client() as made:
        yield made


# ── documents ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "path",
    [
        f"/{VO}/.well-known/openid-configuration",
        f"/{VO}//.well-known/openid-configuration",
        f"//{VO}/.well-known/openid-configuration",
        f"/.well-known/openid-configuration/{VO}",
        f"/{VO}/.well-known/oauth-authorization-server",
        f"/.well-known/oauth-authorization-server/{VO}",
    ],
)
def test_discovery_in_every_form_that_clients_ask_for(served: Served, path: str) -> None:
    with served.http() as http:
        answer = http.get(served.host + path)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "public, max-age=600"
    found = answer.json()
    assert found["issuer"] == served.iss
    assert {found[f"{e}_endpoint"] for e in ("token", "introspection", "revocation")} == {
        f"{served.iss}{p}" for p in ("token", "introspect", "revoke")
    }


def test_the_key_set_verifies_what_is_minted(served: Served, client: MinterClient) -> None:
    with served.http() as http:
        published = {key["kid"]: key for key in http.get(f"/{VO}/jwks.json").json()["keys"]}
    assert {key["alg"] for key in published.values()} == {"ES256", "RS256"}
    for token in client.mint([COPY]).tokens:
        header, _ = unverified_claims(token.reveal().encode())
        keys.verify(token.reveal().encode(), published[header["kid"]])


def test_the_files_of_publish_are_the_same_documents(served: Served, tmp_path: Path) -> None:
    served.minter("publish", tmp_path)
    with served.http() as http:
        for path in (f"{VO}/jwks.json", f"{VO}/.well-known/openid-configuration"):
            assert http.get(f"/{path}").json() == json.loads((tmp_path / path).read_text())


@pytest.mark.parametrize("request_line", [b"GET /ready HTTP/1.0", b"HEAD /health HTTP/1.0"])
def test_http_1_0_is_served_as_haproxys_checks_speak_it(served: Served, request_line: bytes) -> None:
    context = ssl.create_default_context(cafile=served.folder / "ca.pem")
    with (
        socket.create_connection(("localhost", served.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(request_line + b"\r\n\r\n")
        assert connection.recv(1024).startswith((b"HTTP/1.0 200 OK", b"HTTP/1.1 200 OK"))


@pytest.mark.parametrize("host", ["evil.example", "localhost", "127.0.0.1:1"])
def test_an_issuer_at_a_path_of_its_own_is_found_under_every_host(served: Served, host: str) -> None:
    with served.http() as http:
        told = http.get(f"/{VO}/.well-known/openid-configuration", headers={"Host": host}).json()
        assert told["issuer"] == served.iss
        for path in ("/@/jwks.json", f"/@localhost:{served.port}/{VO}/jwks.json", f"//@evil/{VO}/jwks.json"):
            assert http.get(served.host + path).status_code == 404


def test_whoever_guesses_secrets_is_slowed_down_alone(served: Served) -> None:
    def guess(peer: str, times: int) -> list[int]:
        """Guess with a client of this thread's own: httpx closes connections under others that share one."""
        form, headers = {"x": "y"}, {"X-Forwarded-For": peer}
        with served.http() as http:
            told = [
                http.post(f"/{VO}/token", data=form, auth=("rucio", "wrong"), headers=headers)
                for _ in range(times)
            ]
        return [answer.status_code for answer in told]

    with concurrent.futures.ThreadPoolExecutor(50) as threads:
        statuses = threads.map(guess, ["192.0.2.1, 192.0.2.7"] * 50, [8] * 50)
        assert set(itertools.chain.from_iterable(statuses)) == {401, 429}
    assert guess("192.0.2.8", 1) == [401]
    with served.http("rucio") as http:
        assert http.get(f"/{VO}/v1/trace", params={"path": "/x"}).status_code == 200


def test_a_second_service_on_the_same_port_is_refused(served: Served) -> None:
    second = served.minter("serve", check=False)
    assert second.returncode != 0
    assert f":{served.port}: Address already in use" in second.stderr


def test_a_request_that_needs_too_many_tokens_is_refused(served: Served) -> None:
    urls = [f"davs://se01.boreas.example.org:443/atlas/{n}" for n in range(64)]
    files = [{"sources": urls, "destinations": urls} for _ in range(63)]
    with served.http("rucio") as http:
        told = http.post(f"/{VO}/v1/mint", json={"request_id": str(new_request_id()), "files": files})
    assert told.status_code == 400
    assert "at most 8000; split it" in told.json()["error"]["error_description"]


def test_health_and_readiness(served: Served) -> None:
    with served.http() as http:
        assert http.get("/health").json() == {"status": "alive"}
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/nothing").json()["error"] == "invalid_request"


# ── transfers ────────────────────────────────────────────────────────────────────────────────


def test_the_whole_life_of_a_request(client: MinterClient) -> None:
    made = client.mint([COPY], activity="Production")
    assert [t.side for t in made.tokens] == ["destination", "source"]
    (id_,) = made.request_ids
    again = client.mint([COPY], activity="Production", request_id=id_)
    fetched = client.fetch(id_)
    assert [t.reveal() for t in made.tokens] == [t.reveal() for t in again.tokens]
    assert {t.reveal() for t in made.tokens} == {t.reveal() for t in fetched.tokens}
    renewed = client.renew(id_)
    assert {t.scope for t in renewed.tokens} == {t.scope for t in made.tokens}
    told = client.report(
        [FileReport(state="active", external_id="h-a")],
        jobs=[JobReport(clock.new_uuid7(), id_, (0,))],
    )
    assert told.tokens >= 4
    assert {s["state"] for s in client.trace(request_id=id_)} == {"active"}
    assert client.cancel(id_).tokens == 2
    assert {s["state"] for s in client.trace(external_id="h-a")} >= {"cancelled"}


def test_a_job_of_rucios_is_filled(client: MinterClient) -> None:
    job = json.loads((EXAMPLES / "rucio-41.5/jobs/multihop-1.json").read_text())
    filled = client.fill_job(job.get("job", job))
    assert filled.bearer is not None
    assert filled.job is not None
    assert all(f["source_tokens"] and f["destination_tokens"] for f in filled.job["files"])


def test_many_files_in_many_requests_at_once(client: MinterClient) -> None:
    files = [FileRequest(sources=(SE + f"many/{n}",)) for n in range(950)]
    result = client.mint_many(files, chunk=100)
    assert [t.file for t in result.tokens] == list(range(950))
    whole = client.mint(files)  # one answer, whatever its size
    assert len(whole.tokens) == 950


def test_lone_requests_that_come_together_share_their_transactions(served: Served) -> None:
    served.add_client("crowd")
    before = commits(served)
    with served.client("crowd") as one, concurrent.futures.ThreadPoolExecutor(16) as threads:
        results = list(threads.map(lambda n: one.mint([FileRequest(sources=(SE + f"c/{n}",))]), range(200)))
    assert len({r.tokens[0].jti for r in results}) == 200
    assert commits(served) - before < 400  # tests that requests share transactions, not their speed


def commits(served: Served) -> int:
    from tests.conftest import rows

    found: int = rows(
        served.service, "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
    )[0][0]
    return found


def test_errors_are_typed_with_their_status(served: Served, client: MinterClient) -> None:
    with pytest.raises(UnknownRequest):
        client.fetch(clock.new_uuid7())
    with served.http("rucio") as http:
        cases: list[tuple[str | bytes, int, str]] = [
            (b"{", 400, "invalid_request"),
            (b'{"request_id": "x"}', 400, "invalid_request"),
            (json.dumps({"request_id": str(uuid.uuid4()), "files": [{"sources": [SE + "a"]}]}), 400, "invalid_request"),
            (json.dumps({"request_id": str(clock.new_uuid7()), "files": [{"sources": [SE + "a"]}], "client": "x"}), 401, "client_mismatch"),
            (json.dumps({"request_id": str(clock.new_uuid7()), "files": [{"sources": [SE + "a"]}], "reply_queue": "q"}), 403, "reply_not_allowed"),
        ]  # fmt: skip
        for body, status, reason in cases:
            answer = http.post(f"/{VO}/v1/mint", content=body, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["reason"]) == (status, reason), body
        id_ = str(clock.new_uuid7())
        first, second = (
            http.post(f"/{VO}/v1/mint", json={"request_id": id_, "files": [{"sources": [SE + n]}]})
            for n in "ab"
        )
        assert (first.status_code, second.status_code) == (200, 409)


def test_one_client_sees_nothing_of_anothers(served: Served, client: MinterClient) -> None:
    (id_,) = client.mint([COPY]).request_ids
    served.add_client("stranger")
    with served.client("stranger") as other:
        assert other.trace(request_id=id_) == []
        with pytest.raises(UnknownRequest):
            other.fetch(id_)
        assert other.cancel(external_ids=["h-a"]).unknown == ("external_ids[0]",)


# ── who asks ─────────────────────────────────────────────────────────────────────────────────


def test_only_who_knows_the_secret_is_served(served: Served) -> None:
    wrong = MinterClient(served.iss, "rucio", "wrong", ca=str(served.ca))
    nobody = MinterClient(served.iss, "nobody", served.secrets["rucio"], ca=str(served.ca))
    for one in (wrong, nobody):
        with pytest.raises(InvalidClient) as refused:
            one.mint([COPY])
        assert "authentication failed" in refused.value.message
    with served.http() as http:
        answer = http.post(f"/{VO}/v1/mint", json={})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Basic realm="minter"')


def test_a_rotated_secret_works_at_once_and_the_old_one_as_long_as_was_said(
    served: Served, tmp_path: Path
) -> None:
    served.add_client("turning")
    old = served.secrets["turning"]
    with served.client("turning") as one:
        one.mint([COPY])
    served.minter("clients", "rotate", "turning", "--secret-file", tmp_path / "secret", "--keep-hours", "1")
    new = (tmp_path / "secret").read_text().strip()
    assert new != old
    for secret in (new, old):
        MinterClient(served.iss, "turning", secret, ca=str(served.ca)).mint([COPY])


def test_a_disabled_client_is_refused_at_once(served: Served) -> None:
    served.add_client("gone")
    with served.client("gone") as one:
        one.mint([COPY])
        served.minter("clients", "disable", "gone")
        with pytest.raises(Exception, match=r"disabled|authentication failed"):
            one.mint([COPY])


def test_plain_http_to_another_host_and_unknown_cas_are_refused(served: Served) -> None:
    with pytest.raises(SettingsError, match="plain http"):
        MinterClient("http://tokens.example.org/vo/", "a", "b")
    with pytest.raises(InvalidRequest, match="no secret"):
        MinterClient(served.iss, "a")
    with pytest.raises(SettingsError, match="not trusted"):
        MinterClient(served.iss, "rucio", served.secrets["rucio"]).mint([COPY])


# ── abuse ────────────────────────────────────────────────────────────────────────────────────


def test_too_much_is_refused_before_it_is_read(served: Served) -> None:
    with served.http("rucio") as http:
        large = http.post(
            f"/{VO}/v1/mint", content=b"[" * (9 << 20), headers={"Content-Type": "application/json"}
        )
        assert large.status_code == 400
        assert "too large" in large.json()["error"]["error_description"]
        try:
            many = http.get("/health", headers={f"x-{n}": "y" * 1000 for n in range(200)})
        except httpx.TransportError:  # the service may close the connection before all headers are sent
            return
        assert many.status_code in (400, 431)


def test_odd_requests_are_the_callers_fault(served: Served) -> None:
    headers: Any = {"Authorization": b"Basic \xc3\xa9"}
    with served.http() as http:
        assert http.post(f"/{VO}/v1/mint", content=b"{}", headers=headers).status_code == 401
        assert http.head(f"/{VO}/jwks.json").status_code == 200
    with served.http("rucio") as http:
        earliest = "00000000-0000-7000-8000-000000000000"
        assert http.get(f"/{VO}/v1/trace", params={"jti": earliest}).json() == {"tokens": []}
        latest = "ffffffff-ffff-7fff-bfff-ffffffffffff"
        for by, value in (("jti", "f" * 32), ("jti", "0" * 32), ("request_id", "x"), ("jti", latest)):
            assert http.get(f"/{VO}/v1/trace", params={by: value}).status_code == 400
        assert http.get(f"/{VO}/v1/trace?external_id=a%00b").json() == {"tokens": []}
        for query in ("", "path=/a&jti=x", "path=/a&path=/b", "path=/a&since=1", "external_id=&=null"):
            assert http.get(f"/{VO}/v1/trace?{query}").status_code == 400


@pytest.mark.parametrize(
    "body",
    [b"token=%ff", b"token=\xff", b"%ff=x", b"token=a&token=b", b"&".join(b"f%d=x" % n for n in range(33))],
)
def test_what_is_no_form_is_refused(served: Served, body: bytes) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    with served.http("rucio") as http:
        answer = http.post(f"/{VO}/revoke", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
        assert any(why in answer.json()["error_description"] for why in ("not a form", "more than once"))


def test_every_answer_has_the_headers_that_keep_it_from_being_a_page(served: Served) -> None:
    with served.http() as http:
        for path in ("/health", "/nothing", f"/{VO}/jwks.json"):
            answer = http.get(path)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-type"] == "application/json"
            assert "<script>" not in http.get(f"/{VO}/v1/<script>").text


@pytest.mark.slow
def test_slow_clients_are_dropped_and_others_served_meanwhile(postgres_dsn: str, tmp_path: Path) -> None:
    from tests.acceptance.served import Served

    served = Served(tmp_path, postgres_dsn, processes=1, http="body_seconds = 1.0\nheader_seconds = 1.0")
    try:
        served.add_client("rucio")
        context = ssl.create_default_context(cafile=str(served.ca))
        slow = []
        for start in (
            b"GET /health HTTP/1.1\r\nHost: x\r\n",
            b"POST /alpen/token HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\n\r\na",
        ):
            made = context.wrap_socket(
                socket.create_connection(("localhost", served.port)), server_hostname="localhost"
            )
            made.sendall(start)
            made.settimeout(10)
            slow.append(made)
        with served.client() as one:
            assert one.mint([COPY]).tokens
        began = time.monotonic()
        for made in slow:
            assert b"200" not in made.recv(4096)
            made.close()
        assert time.monotonic() - began < 8
    finally:
        served.close()


def test_a_client_that_is_too_fast_is_told_when_to_come_back(postgres_dsn: str, tmp_path: Path) -> None:
    from tests.acceptance.served import Served

    served = Served(tmp_path, postgres_dsn, processes=1, http="requests_per_second = 2")
    try:
        served.add_client("rucio")
        served.add_client("other")
        with served.http("rucio") as http:
            statuses = [http.get(f"/{VO}/v1/trace", params={"path": "/x"}) for _ in range(40)]
        assert {s.status_code for s in statuses} == {200, 429}
        assert statuses[-1].headers["retry-after"] == "1"
        with served.http("other") as http:
            assert http.get(f"/{VO}/v1/trace", params={"path": "/x"}).status_code == 200
        with served.client() as patient:
            assert patient.mint([COPY]).tokens  # the client waits and gets its token
    finally:
        served.close()


def test_each_process_tells_prometheus_of_itself(postgres_dsn: str, tmp_path: Path) -> None:
    from tests.acceptance.served import Served
    from tests.integration.test_metrics import scrape

    (port,) = free_ports(1)
    served = Served(tmp_path, postgres_dsn, f"[metrics]\nfirst_port = {port - 10}\n", processes=1)
    try:
        served.add_client("rucio")
        with served.client() as one:
            one.mint([COPY])
        seen = scrape(port)
        assert seen["minter_http_responses_total", ("endpoint", f"/{VO}/v1/mint"), ("status", "200")] == 1
        assert seen["minter_requests_total", ("kind", "mint"), ("outcome", "granted"), ("vo", VO)] == 1
    finally:
        served.close()


def test_postgres_away_is_not_ready_and_nothing_is_refused_for_good(
    postgres_dsn: str, tmp_path: Path
) -> None:
    from tests.acceptance.served import Served
    from tests.conftest import _admin

    served = Served(tmp_path, postgres_dsn, processes=1)
    try:
        served.add_client("rucio")
        with served.client(timeout_seconds=3) as one, served.http() as http:
            one.mint([COPY])
            _admin(postgres_dsn, f"ALTER DATABASE {served.database} ALLOW_CONNECTIONS false")
            _admin(
                postgres_dsn,
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{served.database}'",
            )
            deadline = time.monotonic() + 5  # `/ready` checks at most once a second
            while http.get("/ready").status_code != 503:
                assert time.monotonic() < deadline
            assert http.get("/health").status_code == 200
            assert http.get(f"/{VO}/jwks.json").status_code == 200
            id_ = clock.new_uuid7()
            with pytest.raises(Unavailable):
                one.mint([COPY], request_id=id_)
            form = {"grant_type": "client_credentials", "scope": f"storage.read:{TOP}/f", "audience": HOST}
            with concurrent.futures.ThreadPoolExecutor() as threads, served.http("rucio") as rucio:
                held = threads.submit(rucio.post, f"/{VO}/token", data=form)
                with pytest.raises(concurrent.futures.TimeoutError):
                    held.result(2)
                _admin(postgres_dsn, f"ALTER DATABASE {served.database} ALLOW_CONNECTIONS true")
                assert held.result().status_code == 200
            assert one.mint([COPY], request_id=id_).tokens
    finally:
        served.close()


@pytest.mark.slow
def test_ready_tells_within_two_seconds_that_nothing_can_be_written(
    postgres_dsn: str, tmp_path: Path
) -> None:
    """A missing standby hangs commits, a stopped server hangs everything; `/health` goes on."""
    postgres = Postgres(tmp_path / "postgres")
    postgres.start()
    served = Served(tmp_path, postgres.dsn)
    try:
        served.add_client("rucio")
        with served.http() as http, served.client(timeout_seconds=20) as client:
            assert http.get("/ready").json() == {"status": "ready"}
            assert client.mint([COPY]).tokens
            set_standby(postgres, "nobody")
            time.sleep(1)
            told = timed(http, "/ready")
            assert (told.status_code, told.json()["reason"]) == (503, "unavailable")
            assert told.headers["retry-after"]
            assert timed(http, "/health").status_code == 200
            with pytest.raises(Unavailable, match="standby"):
                client.mint([structs.replace(COPY, external_id="standby")])
            set_standby(postgres, "")
            deadline = time.monotonic() + 10
            while http.get("/ready").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert postgres.process is not None
            family = [postgres.process.pid, *children(postgres.process.pid)]
            for pid in family:
                os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(1)
                assert timed(http, "/ready").status_code == 503
                assert timed(http, "/health").status_code == 200
            finally:
                for pid in family:
                    os.kill(pid, signal.SIGCONT)
    finally:
        set_standby(postgres, "")  # or the database could not be dropped
        served.close()
        postgres.stop()


def timed(http: httpx.Client, path: str) -> httpx.Response:
    """Return the answer to a request, which comes within two seconds."""
    started = time.monotonic()
    told = http.get(path)
    assert time.monotonic() - started < 2
    return told


def test_every_process_tells_that_it_runs(served: Served) -> None:
    found = rows(served.service, "SELECT role, host, abs(skew_seconds) < 1 FROM processes")
    assert found == [("serve", socket.gethostname(), True)] * 2
