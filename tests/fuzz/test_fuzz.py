"""Odd input at every entrance: no internal error, no traceback, no dead process, an answer to each.

What the OpenAPI document promises is checked by Schemathesis (tests/acceptance/test_foreign.py). `make fuzz` runs
100 000 cases and prints the seed; MINTER_FUZZ_SEED repeats a run, MINTER_FUZZ_CASES sets the count.
"""

import asyncio
import json
import random
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from minter.client import new_request_id
from minter.contract import names
from minter.errors import MinterError
from minter.providers.answers import Asked, Documents
from minter.providers.dialects import Provider
from minter.providers.iam import IAM
from tests.acceptance.conftest import Raw, Running
from tests.acceptance.served import VO, Served
from tests.acceptance.test_token import HOST, TOP
from tests.acceptance.test_workers import OTHER, SE
from tests.fuzz import mutations
from tests.fuzz.mutations import CASES, SEED

pytestmark = pytest.mark.fuzz
print(f"MINTER_FUZZ_SEED={SEED} MINTER_FUZZ_CASES={CASES}")
AT_ONCE = 200


def mint() -> dict[str, Any]:
    return {
        "request_id": str(new_request_id()), "activity": "Production", "on_behalf_of": "root",
        "files": [{"sources": [SE + uuid.uuid4().hex], "destinations": [OTHER + "d"], "size": 10**9, "external_id": "e"}],
    }  # fmt: skip


def job() -> dict[str, Any]:
    files = [
        {
            "sources": [SE + uuid.uuid4().hex],
            "destinations": [OTHER + "d"],
            "metadata": {"a": 1},
            "filesize": 5,
        }
    ]
    params = {
        "overwrite": True,
        "retry": 1,
        "max_time_in_queue": 24,
        "bring_online": None,
        "job_metadata": {"x": "y"},
    }
    return {"request_id": str(new_request_id()), "job": {"files": files, "params": params}}


MESSAGES: dict[str, Callable[[], dict[str, Any]]] = {
    names.MINT: mint,
    names.FILL_JOB: job,
    names.URLS: lambda: {
        "request_id": str(new_request_id()),
        "urls": [SE + "a"],
        "lifetime_seconds": 900,
    },
    names.FETCH: lambda: {"request_id": str(new_request_id())},
    names.RENEW: lambda: {"request_id": str(new_request_id()), "renews": str(new_request_id()), "files": [0]},
    names.REPORT: lambda: {"reports": [{"external_id": "e", "state": "finished"}]},
    names.CANCEL: lambda: {"request_id": str(new_request_id()), "files": [0], "reason": "test"},
}


def sane(answer: dict[str, Any], body: bytes) -> None:
    """Check that the answer to a body is no internal error."""
    error = (answer.get("error") if isinstance(answer.get("error"), dict) else answer) or {}
    assert error.get("reason") not in ("server_error", "undeliverable"), (answer, body[:3000])


def test_odd_messages_on_the_broker_get_typed_answers(running: Running) -> None:
    rng, left = random.Random(SEED), CASES * 3 // 10
    raw = Raw(running)
    while left > 0:
        body: bytes | None
        sent: dict[str, bytes] = {}
        for _ in range(AT_ONCE):
            task = rng.choice(list(MESSAGES))
            body = mutations.body(rng, [[MESSAGES[task]()], {}, {}])
            sent[raw.send(body, task=task)] = body
        deadline = time.monotonic() + 60
        while sent and time.monotonic() < deadline:
            try:
                raw.connection.drain_events(timeout=1)
            except TimeoutError:
                continue
            while raw.replies:
                reply = raw.replies.pop()
                told = reply.body if isinstance(reply.body, bytes) else reply.body.encode()
                body = sent.pop(reply.properties.get("correlation_id"), None)
                if body is not None:
                    sane(json.loads(told)["result"], body)
        assert not sent, f"no answer to {list(sent.values())[:3]}"
        left -= AT_ONCE
    raw.connection.release()
    assert [p.poll() for p in running.workers] == [None] * len(running.workers)
    assert "Traceback" not in running.logs()


@pytest.fixture(scope="module")
def fuzzed(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The HTTP service with bounds that a fuzz run does not reach."""
    made = Served(tmp_path_factory.mktemp("fuzzed"), postgres_dsn, http="requests_per_second = 100000")
    made.add_client("rucio")
    yield made
    assert made.process is not None
    log, alive = made.log(), made.process.poll() is None
    made.close()
    assert alive
    assert "Traceback" not in log


async def post_all(fuzzed: Served, cases: Iterator[tuple[str, bytes, str]]) -> None:
    """POST (path, body, content type) cases, 16 at once; check that no answer is an internal error."""
    context = ssl.create_default_context(cafile=str(fuzzed.ca))
    auth = ("rucio", fuzzed.secrets["rucio"])
    async with httpx.AsyncClient(base_url=fuzzed.host, verify=context, auth=auth, timeout=60) as http:

        async def work() -> None:
            for path, body, kind in cases:
                answer = await http.post(path, content=body, headers={"Content-Type": kind})
                assert answer.status_code < 500, (path, body[:2000], answer.text)
                assert answer.status_code != 429, answer.text
                assert answer.headers["content-type"] == "application/json"
                sane(answer.json(), body)

        await asyncio.gather(*(work() for _ in range(16)))


def test_odd_bodies_of_tasks_over_http(fuzzed: Served) -> None:
    rng = random.Random(SEED + 1)
    tasks = list(MESSAGES)

    def cases() -> Iterator[tuple[str, bytes, str]]:
        for _ in range(CASES * 2 // 10):
            task = rng.choice(tasks)
            yield (
                f"/{VO}/v1/{names.endpoint(task)}",
                mutations.body(rng, MESSAGES[task]()),
                "application/json",
            )

    asyncio.run(post_all(fuzzed, cases()))


def test_odd_forms_at_the_token_endpoints(fuzzed: Served) -> None:
    rng = random.Random(SEED + 2)
    told = fuzzed.token(
        "rucio", grant_type="client_credentials", scope=f"storage.read:{TOP}", audience=HOST
    ).json()
    exchange = "urn:ietf:params:oauth:grant-type:token-exchange"
    kind = "urn:ietf:params:oauth:token-type:access_token"
    forms = [
        ("token", {"grant_type": "client_credentials", "scope": f"storage.read:{TOP}/a%20b", "audience": HOST}),
        ("token", {"grant_type": exchange, "subject_token": told["access_token"], "subject_token_type": kind,
                   "scope": f"storage.read:{TOP}/d offline_access", "audience": HOST}),
        ("token", {"grant_type": "refresh_token", "refresh_token": told["access_token"], "scope": "storage.read:/"}),
        ("introspect", {"token": told["access_token"], "token_type_hint": "access_token"}),
        ("revoke", {"token": "x" + told["access_token"], "token_type_hint": "refresh_token"}),
    ]  # fmt: skip

    def cases() -> Iterator[tuple[str, bytes, str]]:
        for _ in range(CASES * 3 // 10):
            path, fields = rng.choice(forms)
            yield f"/{VO}/{path}", mutations.form(rng, fields), "application/x-www-form-urlencoded"

    asyncio.run(post_all(fuzzed, cases()))


class OddIAM(IAM):
    """An IAM whose answers are given."""

    answer: tuple[int, dict[str, Any] | None, float] = (200, {}, 0.0)

    def _call(self, *_: object) -> tuple[int, dict[str, Any] | None, float]:
        return self.answer


def test_odd_answers_of_a_provider_are_typed_errors_or_tokens() -> None:
    rng, now = random.Random(SEED + 3), datetime.now(UTC)
    issuer = "https://iam.example.org/"
    key = ec.generate_private_key(ec.SECP256R1())
    provider = Provider(name="iam", issuer=issuer, client_id="minter")
    documents = {
        "issuer": issuer, "token_endpoint": issuer + "token", "jwks_uri": issuer + "jwk",
        "introspection_endpoint": issuer + "introspect", "revocation_endpoint": issuer + "revoke",
    }  # fmt: skip
    public = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    claims = {
        "iss": issuer, "sub": "s", "aud": ["https://se.example.org"], "exp": int(now.timestamp()) + 1000, "jti": "j",
        "iat": int(now.timestamp()), "nbf": int(now.timestamp()), "scope": "storage.read:/a", "client_id": "minter",
    }  # fmt: skip
    asked = Asked("storage.read:/a", ("https://se.example.org",), 3600, 60)
    found = Documents(
        issuer, issuer + "token", [{**public, "kid": "k"}], issuer + "introspect", issuer + "revoke"
    )
    iam = OddIAM(provider, "secret", lambda **_: found, lambda: now)
    outcomes = set()
    for _ in range(CASES * 2 // 10):
        odd = mutations.mutated(rng, claims) if rng.random() < 0.5 else claims
        token = jwt.PyJWS().encode(json.dumps(odd).encode(), key, "ES256", headers={"kid": "k"})
        told = {
            "access_token": token,
            "token_type": "Bearer",
            "refresh_token": "r",
            "expires_in": 1000,
            "scope": "storage.read:/a",
        }
        told = mutations.mutated(
            rng, rng.choice([told, documents, {"keys": [public]}, {"error": "invalid_grant"}])
        )
        status = rng.choice([200, 200, 200, 201, 204, 301, 400, 401, 403, 404, 429, 500, 503])
        iam.answer = (status, told if isinstance(told, dict) else None, float(rng.choice([0, 5, 1e9])))
        ask = rng.choice([
            lambda: iam.client_credentials(asked), lambda: iam.exchange(asked, "s"), lambda: iam.refresh(asked, "r"),
            lambda: iam.introspect("t", "access_token"), lambda: iam.revoke("r"), iam.fetch_documents,
        ])  # fmt: skip
        try:
            ask()
            outcomes.add("answer")
        except MinterError as error:
            outcomes.add(error.reason)
    assert {"answer", "provider_away", "provider_refused"} <= outcomes
