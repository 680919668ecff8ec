"""The engine on a real Postgres: I2, I3, I9, clients and times."""

import json
import threading
from datetime import datetime, timedelta
from typing import Any, Never
from uuid import UUID

import psycopg
import pytest
from jwt.utils import base64url_encode
from msgspec import structs

from minter.contract.messages import FileRequest, MintRequest
from minter.database import connection, control_changes, recording
from minter.errors import Unavailable
from minter.policy.requests import from_mint
from minter.service import Service
from minter.tokens import clock
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
