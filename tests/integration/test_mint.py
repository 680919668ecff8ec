"""The engine on a real Postgres: I2, I3, I4, I8, I9, and the number of statements for a request."""

import json
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Never
from uuid import UUID

import psycopg
import pytest
from jwt.utils import base64url_encode
from msgspec import structs

from minter.contract.messages import FileRequest, FillRequest, MintRequest
from minter.database import connection, control_changes, recording, traces
from minter.errors import SettingsError, Unavailable
from minter.fts.jobs import from_fill
from minter.local import stack
from minter.policy.requests import from_mint
from minter.policy.transfers import Policy
from minter.service import Service
from minter.storages.dialects import Algorithm
from minter.tasks import answers
from minter.tokens import clock, keys
from minter.tokens.keys import Signer
from minter.tokens.keystore import new_master_key
from minter.tokens.outcomes import Outcome, Submission
from minter.tokens.records import fts_token_id
from tests.conftest import load_settings, rows

SE = "davs://se01.boreas.example.org:443/atlas/atlasdatadisk/rucio/data/"
OTHER = "davs://webdav1.fjord.example.org/data/atlas/datadisk/rucio/data/"


def submission(
    *names: str, request_id: UUID | None = None, client: str = "rucio-alpen", **options: Any
) -> Submission:
    files = tuple(
        FileRequest(sources=(SE + n,), destinations=(OTHER + n,), size=10**9, external_id=n) for n in names
    )
    return Submission(
        from_mint(MintRequest(request_id=request_id or clock.new_uuid7(), files=files, **options)), client
    )


def asked_file(name: str) -> FileRequest:
    return FileRequest(sources=(SE + name,), destinations=(OTHER + name,))


def mint(service: Service, *submissions: Submission, now: datetime | None = None) -> list[Outcome]:
    return service.engine.mint_many(list(submissions), now or clock.now())


def tokens(outcome: Outcome) -> list[bytes]:
    return [i.token for i in outcome.issued]


def reason(outcome: Outcome) -> str:
    assert outcome.error is not None
    return outcome.error.reason


def count(service: Service, table: str = "tokens") -> int:
    found: int = rows(service, f"SELECT count(*) FROM {table}")[0][0]
    return found


# ── I2, I3 ───────────────────────────────────────────────────────────────────────────────────


def test_every_token_has_its_row_with_the_exact_payload(service: Service) -> None:
    (outcome,) = mint(service, submission("a", "b"))
    assert len(outcome.issued) == 4
    for issued in outcome.issued:
        ((payload, token_id, state, exp, external_id),) = rows(
            service,
            "SELECT payload, fts_token_id, state, extract(epoch FROM expires_at)::bigint, external_id FROM tokens WHERE jti = %s",
            issued.jti,
        )
        assert issued.token.split(b".")[1] == base64url_encode(payload.encode())
        assert token_id == fts_token_id(issued.token)
        assert (state, exp) == ("issued", json.loads(payload)["exp"])
        assert external_id in ("a", "b")


def test_durability_is_on(service: Service) -> None:
    for name, expected in (("fsync", "on"), ("synchronous_commit", "on"), ("full_page_writes", "on")):
        assert rows(service, f"SHOW {name}") == [(expected,)]


def test_nothing_is_recorded_when_the_transaction_fails(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Never:
        raise psycopg.OperationalError("server closed the connection")

    monkeypatch.setattr(recording.PostgresRecording, "copy_tokens", broken)
    with pytest.raises(Unavailable, match="nothing was handed out"):
        mint(service, submission("a"))
    assert count(service) == count(service, "requests") == 0


def test_refusals_are_recorded_and_final(service: Service) -> None:
    bad = submission("a")
    file = structs.replace(bad.request.files[0])
    request = structs.replace(bad.request, files=(file,), vo="other")
    (first,) = mint(service, Submission(request, bad.client))
    assert reason(first) == "unknown_vo"
    (again,) = mint(service, Submission(request, bad.client))
    assert (reason(again), again.repeated) == ("unknown_vo", True)
    assert count(service, "requests") == 1


def test_one_bad_file_fails_alone_and_its_refusal_is_repeated(service: Service) -> None:
    good = submission("a").request
    bad = from_mint(MintRequest(request_id=good.request_id, files=(
        FileRequest(sources=(SE + "a",)), FileRequest(sources=("davs://nowhere.example.org/f",)))))  # fmt: skip
    first, again = (mint(service, Submission(bad, "rucio-alpen"))[0] for _ in range(2))
    assert len(first.issued) == len(again.issued) == 1
    assert first.refusals == again.refusals
    assert first.refusals[0]["error"]["reason"] == "unknown_storage"


# ── I4 ───────────────────────────────────────────────────────────────────────────────────────


def test_asked_twice_same_bytes_also_in_one_batch_from_another_process_and_later(
    service: Service, dsn: str
) -> None:
    asked = submission("a", "b")
    first, twin = mint(service, asked, asked)
    assert tokens(first) == tokens(twin)
    assert twin.repeated
    other = Service(load_settings(dsn))
    (again,) = mint(other, asked, now=clock.now() + timedelta(minutes=5))
    other.pool.dispose()
    assert tokens(again) == tokens(first)
    assert count(service) == 4


def rotate(service: Service, algorithm: Algorithm) -> keys.Signer:
    """Let a new key sign from now on; return its signer."""
    with control_changes.controlling(service.pool, "test", "retire", "alpen", {}) as tx:
        tx.execute("UPDATE signing_keys SET state = 'old', retired_at = now()")
    signer = keys.generate(algorithm)
    with control_changes.controlling(service.pool, "test", "key", "alpen", {}) as tx:
        tx.execute(
            "INSERT INTO signing_keys (vo, kid, algorithm, state, public_jwk, private_key, activated_at)"
            " VALUES ('alpen', %s, %s, 'active', %s, %s, now())",
            (signer.kid, algorithm, json.dumps(signer.public_jwk), service.keystore.seal("alpen", signer)),
        )
    return signer


def test_rs256_too(service: Service) -> None:
    signer = rotate(service, "RS256")
    asked = submission("a")
    first, again = (mint(service, asked)[0] for _ in range(2))
    assert tokens(first) == tokens(again)
    keys.verify(first.issued[0].token, signer.public_jwk)


def test_other_content_under_the_same_id_is_a_conflict(service: Service) -> None:
    id_ = clock.new_uuid7()
    mint(service, submission("a", request_id=id_))
    (other,) = mint(service, submission("b", request_id=id_))
    assert (reason(other), other.issued) == ("conflict", [])
    one, two = mint(
        service, submission("c", request_id=(new := clock.new_uuid7())), submission("d", request_id=new)
    )
    assert {one.error and one.error.reason, two.error and two.error.reason} == {None, "conflict"}


def test_a_twin_with_the_recorded_content_gets_its_tokens_beside_one_with_other_content(
    service: Service,
) -> None:
    id_ = clock.new_uuid7()
    good = submission("a", request_id=id_)
    (first,) = mint(service, good)
    for batch in ([submission("b", request_id=id_), good], [good, submission("b", request_id=id_)]):
        outcomes = {o.submission is good: o for o in mint(service, *batch)}
        assert tokens(outcomes[True]) == tokens(first)
        assert reason(outcomes[False]) == "conflict"


def test_a_key_that_does_not_open_is_told_and_stops_nothing_else(service: Service, dsn: str) -> None:
    asked = submission("a")
    mint(service, asked)
    other = Service(load_settings(dsn, MINTER_MASTER_KEY_ALPEN=new_master_key()))
    outcomes = mint(other, asked, submission("b"))
    assert [reason(o) for o in outcomes] == ["no_usable_key"] * 2
    other.pool.dispose()
    assert mint(service, asked)[0].issued


def test_text_that_postgres_cannot_hold_is_recorded_without_it(service: Service) -> None:
    url = "davs://nowhere.example.org/\\u0000x\x00"
    odd = from_mint(
        MintRequest(
            request_id=clock.new_uuid7(),
            activity="a\x00b",
            files=(FileRequest(sources=(url,)), asked_file("a")),
        )
    )
    first, again = (mint(service, Submission(odd, "rucio-alpen"))[0] for _ in range(2))
    assert len(first.issued) == len(again.issued) == 2
    assert [r["error"]["reason"] for r in again.refusals] == ["unknown_storage"]


def test_another_client_may_use_the_same_id(service: Service) -> None:
    stack.add_client(service, "dirac", "alpen", "tests")
    id_ = clock.new_uuid7()
    one, two = mint(service, submission("a", request_id=id_), submission("a", request_id=id_, client="dirac"))
    assert not one.error
    assert not two.error
    assert set(tokens(one)).isdisjoint(tokens(two))


@pytest.mark.parametrize(("left", "given"), [(300, True), (299, False)])
def test_a_token_is_given_again_while_it_lives_for_five_minutes(
    service: Service, left: int, given: bool
) -> None:
    asked = submission("a")
    now = clock.now().replace(microsecond=0)
    first = mint(service, asked, now=now)[0]
    exp = min(i.exp for i in first.issued)
    assert len({i.exp for i in first.issued}) == 1
    again = mint(service, asked, now=datetime.fromtimestamp(exp - left, UTC))[0]
    assert tokens(again) == (tokens(first) if given else [])


def test_a_token_that_no_longer_covers_the_need_is_expired_with_an_offer(service: Service) -> None:
    asked = submission("a")
    mint(service, asked)
    # Only the time that the engine is given is late; the token's lifetime is 6 h at most.
    (late,) = mint(service, asked, now=clock.now() + timedelta(hours=6))
    assert late.error is not None
    assert (late.error.reason, late.error.fields) == ("expired", {"renew": True})


def test_an_old_key_resigns_for_a_day_and_a_revoked_one_never(service: Service) -> None:
    asked = submission("a")
    (first,) = mint(service, asked)
    with control_changes.controlling(service.pool, "test", "retire", "alpen", {}) as tx:
        tx.execute("UPDATE signing_keys SET state = 'old', retired_at = now() - interval '23 hours'")
    service.create_keys("alpen", ("ES256", "RS256"), "tests")
    assert tokens(mint(service, asked)[0]) == tokens(first)
    with control_changes.controlling(service.pool, "test", "retire", "alpen", {}) as tx:
        tx.execute("UPDATE signing_keys SET retired_at = now() - interval '25 hours' WHERE state = 'old'")
    assert reason(mint(service, asked)[0]) == "expired"
    with control_changes.controlling(service.pool, "test", "revoke", "alpen", {}) as tx:
        tx.execute(
            "UPDATE signing_keys SET state = 'revoked', revoked_at = now(), private_key = NULL WHERE state = 'old'"
        )
    assert reason(mint(service, asked)[0]) == "expired"


def test_two_processes_with_the_same_requests_at_once_give_one_outcome(service: Service, dsn: str) -> None:
    asked = [submission(f"f{n}") for n in range(40)]
    others = [Service(load_settings(dsn)) for _ in range(3)]
    results = {}

    def work(number: int, engine: Service) -> None:
        results[number] = [mint(engine, *asked[i : i + 5]) for i in range(0, 40, 5)]

    threads = [threading.Thread(target=work, args=(n, s)) for n, s in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flat = [[tokens(o) for batch in results[n] for o in batch] for n in range(3)]
    assert flat[0] == flat[1] == flat[2]
    assert count(service) == 80
    for other in others:
        other.pool.dispose()


# ── clients and times ────────────────────────────────────────────────────────────────────────


def test_unknown_and_disabled_clients_and_a_body_that_lies(service: Service) -> None:
    assert reason(mint(service, submission("a", client="nobody"))[0]) == "unknown_client"
    lying = submission("a")
    lying = Submission(structs.replace(lying.request, client="dirac"), "rucio-alpen")
    assert reason(mint(service, lying)[0]) == "client_mismatch"
    with control_changes.controlling(service.pool, "test", "disable", "rucio-alpen", {}) as tx:
        tx.execute("UPDATE clients SET disabled_at = now()")
    assert reason(mint(service, submission("a"))[0]) == "unknown_client"
    assert count(service, "requests") == 0


def ban(service: Service, kind: str, value: str) -> None:
    with control_changes.controlling(service.pool, "test", "ban", value, {}) as tx:
        tx.execute("INSERT INTO bans (kind, value, reason) VALUES (%s, %s, 'test')", (kind, value))


def test_a_ban_binds_the_next_commit_and_withholds_what_is_asked_again(service: Service) -> None:
    asked = submission("a", "b")
    assert mint(service, asked)[0].issued
    ban(service, "path", "/data/atlas/datadisk/rucio/data/a")
    (again,) = mint(service, asked)
    assert (reason(again), again.issued) == ("banned", [])
    only_b = FileRequest(sources=(SE + "b",), destinations=(OTHER + "b",))
    fresh = from_mint(MintRequest(request_id=clock.new_uuid7(), files=(asked_file("a"), only_b)))
    (partly,) = mint(service, Submission(fresh, "rucio-alpen"))
    assert {i.slot[0] for i in partly.issued} == {1}
    ban(service, "client", "rucio-alpen")
    assert reason(mint(service, asked)[0]) == "banned"
    assert reason(mint(service, submission("c"))[0]) == "banned"


def test_a_ban_waits_for_a_recording_under_way_and_binds_all_after_it(service: Service, dsn: str) -> None:
    with service.engine.store.recording() as tx:
        tx.control()
        done = threading.Event()
        other = Service(load_settings(dsn))

        def work() -> None:
            ban(other, "client", "rucio-alpen")
            done.set()

        thread = threading.Thread(target=work)
        thread.start()
        assert not done.wait(0.3)
    thread.join(5)
    assert done.is_set()
    assert reason(mint(service, submission("a"))[0]) == "banned"
    other.pool.dispose()


def test_no_usable_key_is_told_and_not_recorded(service: Service) -> None:
    with control_changes.controlling(service.pool, "test", "revoke", "alpen", {}) as tx:
        tx.execute("UPDATE signing_keys SET state = 'revoked', revoked_at = now(), private_key = NULL")
    asked = submission("a")
    assert reason(mint(service, asked)[0]) == "no_usable_key"
    assert count(service, "requests") == 0
    # With a key the same request succeeds: the earlier error was not final.
    with control_changes.controlling(service.pool, "test", "delete", "alpen", {}) as tx:
        tx.execute("DELETE FROM signing_keys")
    service.create_keys("alpen", ("ES256", "RS256"), "tests")
    assert mint(service, asked)[0].issued


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_off_by_an_hour_signs_nothing(dsn: str, hours: int) -> None:
    wrong = Service(load_settings(dsn), clock=lambda: clock.now() + timedelta(hours=hours))
    outcomes = mint(wrong, submission("a"), submission("b"), now=wrong.clock())
    assert {reason(o) for o in outcomes} == {"clock_skew"}
    assert not any(o.issued for o in outcomes)
    assert count(wrong, "requests") == 0
    wrong.pool.dispose()


def test_a_missing_partition_is_told_and_passes(service: Service) -> None:
    (name,) = rows(service, "SELECT 'tokens_' || to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD')")[0]
    with connection.transaction(service.pool) as tx:
        tx.execute(f"DROP TABLE {name}")
    asked = submission("a")
    with pytest.raises(Unavailable, match="no partition for this day"):
        mint(service, asked)
    assert name in service.make_partitions()
    assert mint(service, asked)[0].issued


# ── I8, and rows of earlier releases ─────────────────────────────────────────────────────────


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
