"""What the recording transaction writes: I8, rows of earlier releases, constraints, and its statements."""

import json
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from jwt.utils import base64url_encode
from msgspec import structs

from minter.contract.messages import FillRequest, MintRequest
from minter.database import connection, control_changes, traces
from minter.errors import SettingsError
from minter.fts.jobs import from_fill
from minter.local import stack
from minter.policy.requests import from_mint
from minter.policy.transfers import Policy
from minter.service import Service
from minter.tasks import answers
from minter.tokens import clock, keys
from minter.tokens.keys import Signer
from minter.tokens.outcomes import Submission
from minter.tokens.records import fts_token_id
from tests.conftest import rows
from tests.integration.test_mint import OTHER, SE, asked_file, mint, submission, tokens


def test_found_by_jti_path_request_and_ftss_token_id(service: Service) -> None:
    (outcome,) = mint(service, submission("a"))
    issued = outcome.issued[0]
    since, until = service.since(1), clock.now() + timedelta(days=1)
    path = "/atlas/atlasdatadisk/rucio/data/a"
    for by, value in (("jti", issued.jti), ("path", path), ("fts_token_id", fts_token_id(issued.token))):
        (found,) = traces.find(service.pool, by, value, since, until)
        assert (str(found.jti), found.client, found.storage) == (
            issued.jti,
            "rucio-alpen",
            "BOREAS-T2_DATADISK",
        )
    recorded, refused = traces.find_request(service.pool, outcome.submission.request.request_id)
    assert [str(one.jti) for one in recorded] == [i.jti for i in outcome.issued]
    assert {(one.client, one.kind) for one in recorded} == {("rucio-alpen", "mint")}
    assert not refused
    assert not traces.find(service.pool, "jti", issued.jti, since - timedelta(days=9), since)


def test_changes_of_control_tables_are_audited(service: Service) -> None:
    stack.add_client(service, "dirac", "alpen", "ann")
    assert ("ann", "client.add", "dirac") in rows(service, "SELECT actor, action, subject FROM audit")
    assert "key.create" in {a for (a,) in rows(service, "SELECT action FROM audit")}


def test_a_row_of_release_0_1_gives_the_token_that_0_1_signed(service: Service, es256: Signer) -> None:
    """tests/vectors/row-0.1.json was written by release 0.1 and is never changed."""
    from tests.conftest import ROOT

    vector = json.loads((ROOT / "tests/vectors/row-0.1.json").read_text())
    assert es256.sign(vector["payload"].encode()).decode() == vector["token"]


# ── constraints of the schema ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO signing_keys (vo, kid, algorithm, state, public_jwk, private_key, activated_at) SELECT vo, 'x', algorithm, 'active', '{\"kid\": \"x\"}', private_key, now() FROM signing_keys",
        "UPDATE signing_keys SET private_key = NULL",
        "UPDATE signing_keys SET state = 'old'",
        'UPDATE signing_keys SET public_jwk = public_jwk || \'{"d": "secret"}\'',
        "UPDATE issuers SET iss = 'http://x/'",
        "INSERT INTO clients (name, vo, sub) VALUES ('a:b', 'alpen', 's')",
        "INSERT INTO clients (name, vo, sub) VALUES ('ok', 'nowhere', 's')",
        "INSERT INTO control VALUES (false, 1)",
        "UPDATE tokens SET state = 'queued'",
        "UPDATE tokens SET payload = NULL",
        "UPDATE requests SET error = '{}'",
        "INSERT INTO bans (kind, value, reason) VALUES ('moon', 'x', 'y')",
    ],
)
def test_the_schema_refuses_what_must_not_be(service: Service, statement: str) -> None:
    mint(service, submission("a"))
    with pytest.raises(psycopg.errors.IntegrityError), connection.transaction(service.pool) as tx:
        tx.execute(statement)


def test_every_controlled_table_bumps_the_version(service: Service) -> None:
    versions = [rows(service, "SELECT version FROM control")[0][0]]
    for statement in ("UPDATE clients SET disabled_at = NULL", "UPDATE bans SET reason = ''", "UPDATE signing_keys SET last_exp = NULL",
                      "UPDATE issuers SET iss = iss", "UPDATE storages SET name = name"):  # fmt: skip
        with connection.transaction(service.pool) as tx:
            tx.execute(statement)
        versions.append(rows(service, "SELECT version FROM control")[0][0])
    assert versions == list(range(versions[0], versions[0] + 6))


# ── statements ───────────────────────────────────────────────────────────────────────────────


def test_few_tokens_go_with_the_commit_and_more_cost_one_copy(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    mint(service, submission("warm"))
    seen: list[str] = []
    note: Callable[[str], object] = seen.append
    execute, copy = psycopg.Cursor.execute, psycopg.Cursor.copy
    monkeypatch.setattr(
        psycopg.Cursor,
        "execute",
        lambda s, q, *a, **k: (note(_said(q)[:28]), execute(s, q, *a, **k))[1],
    )
    monkeypatch.setattr(psycopg.Cursor, "copy", lambda s, q, *a, **k: (note("COPY"), copy(s, q, *a, **k))[1])
    mint(service, submission("a"))
    one = list(seen)
    seen.clear()
    mint(service, *(submission(f"{n}-a", f"{n}-b") for n in range(50)))
    first = ["BEGIN; SET LOCAL synchronous", "INSERT INTO requests (reques"]
    assert one == [*first, "INSERT INTO tokens (jti, req", "COMMIT"]
    assert seen == [*first, "COPY"]


@pytest.mark.parametrize("files", [1, 12, 13, 40])
def test_rows_are_the_same_whichever_way_they_go(service: Service, files: int) -> None:
    odd = "a\tb\\c\n\u00e9\u20ac'\"\x00d"
    named = [structs.replace(asked_file(str(n)), external_id=f"{odd}{n}") for n in range(files)]
    asked = Submission(
        from_mint(MintRequest(request_id=clock.new_uuid7(), files=tuple(named))), "rucio-alpen"
    )
    (outcome,) = mint(service, asked)
    found = {
        jti: row
        for jti, *row in rows(
            service,
            "SELECT jti::text, external_id, state::text, mode::text, payload, fts_token_id, side::text, file"
            " FROM tokens WHERE request_id = %s",
            asked.request.request_id,
        )
    }
    assert len(outcome.issued) == len(found) == 2 * files
    for issued in outcome.issued:
        external_id, state, mode, payload, token_id, side, file = found[issued.jti]
        assert external_id == f"{odd}{issued.slot.file}".replace("\x00", "")
        assert (state, mode, token_id) == ("issued", "mint", fts_token_id(issued.token))
        assert issued.token.split(b".")[1] == base64url_encode(payload.encode())
        assert (file, side) == (issued.slot.file, issued.slot.side)
    assert tokens(mint(service, asked)[0]) == tokens(outcome)


def _said(query: Any) -> str:
    text = query if isinstance(query, str) else query.as_string()
    return " ".join(text.split())


def test_a_settings_file_that_lost_a_storage_keeps_its_row(service: Service) -> None:
    before = rows(service, "SELECT count(*) FROM storages WHERE retired_at IS NULL")[0][0]
    storages = {k: v for k, v in service.loaded.catalogue().items() if k[1] != "TUNDRA-T3_DATADISK"}
    control_changes.sync_catalogue(service.pool, service.loaded.issuers, storages)
    assert rows(service, "SELECT name FROM storages WHERE retired_at IS NOT NULL") == [
        ("TUNDRA-T3_DATADISK",)
    ]
    assert control_changes.sync_catalogue(service.pool, service.loaded.issuers, storages) == 0
    with pytest.raises(SettingsError, match="cannot become"):
        control_changes.sync_catalogue(service.pool, {"alpen": "https://other.example.org/"}, storages)
    assert before == 25  # 22 RSEs, two FTS, and the entry for several storages


def test_a_filled_job_is_answered_the_same_way_twice(service: Service) -> None:
    job = {
        "files": [{"sources": [SE + "a"], "destinations": [OTHER + "a"], "filesize": 10**9}],
        "params": {"max_time_in_queue": 168},
    }
    asked = Submission(
        from_fill(FillRequest(request_id=uuid.UUID(str(clock.new_uuid7())), job=job)), "rucio-alpen"
    )
    now = clock.now()
    first, again = (answers.answer(mint(service, asked, now=now)[0], now) for _ in range(2))
    assert first == again
    assert first.job is not None
    assert first.job["params"]["max_time_in_queue"] == 168
    twins = [answers.answer(o, now) for o in mint(service, asked, asked, now=now)]
    assert twins == [first, first]
    later = now + timedelta(hours=5)
    told = answers.answer(mint(service, asked, now=later)[0], later).job
    assert told is not None
    assert told["params"]["max_time_in_queue"] == 163


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [({"activity": "x", "auth": "old"}, {"activity": "x"}), (None, {}), ("text", None), ([1], None)],
)
def test_a_route_may_tell_ftss_monitoring_which_tokens_a_transfer_has(
    service: Service, metadata: object, kept: dict[str, Any] | None
) -> None:
    """FTS passes metadata on: `auth`, and jti and mode of each side; a repeat says the same."""
    routes = [structs.replace(r, monitoring=True) for r in service.loaded.policy.routes]
    service.engine.policy = Policy(service.loaded.policy.directories, routes, service.loaded.settings.fts)
    file = {
        "sources": [SE + "a", SE + "b"],
        "destinations": [OTHER + "a"],
        "filesize": 10,
        "metadata": metadata,
    }
    job = {"files": [file], "params": {"job_metadata": {"issuer": "rucio"}}}
    asked = Submission(from_fill(FillRequest(request_id=clock.new_uuid7(), job=job)), "rucio-alpen")
    now = clock.now()
    (outcome,), (again,) = mint(service, asked, now=now), mint(service, asked, now=now)
    filled = answers.answer(outcome, now).job
    assert answers.answer(again, now).job == filled
    assert filled is not None
    assert filled["params"]["job_metadata"] == {"issuer": "rucio", "auth": "minter"}
    found = filled["files"][0]["metadata"]
    if kept is None:
        assert found == metadata
        return
    jtis = {tuple(i.slot[1:]): i.jti for i in outcome.issued}
    assert found == {
        **kept, "auth": "minter",
        "minter": {
            "source": [{"jti": jtis["source", n], "mode": "mint"} for n in (0, 1)],
            "destination": [{"jti": jtis["destination", 0], "mode": "mint"}],
        },
    }  # fmt: skip


def test_a_sample_of_the_signatures_is_verified(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    note: Callable[[bytes], object] = seen.append
    verify = keys.verify
    monkeypatch.setattr(keys, "verify", lambda token, jwk: (note(token), verify(token, jwk)))
    made = sum(
        len(o.issued)
        for o in mint(service, *(submission(*(f"{n}-{m}" for m in range(50))) for n in range(60)))
    )
    assert made / 768 < len(seen) < made / 85  # expected: one in 256
