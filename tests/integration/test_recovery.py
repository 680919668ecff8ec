"""Recovery from a leaked key: live tokens are made anew once, and asked for under their old request_id."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minter.contract.followups import CancelRequest, FetchRequest, FileReport, JobReport, ReportRequest
from minter.contract.messages import FillRequest
from minter.database import control_changes, keyring
from minter.database.connection import transaction
from minter.database.control import read_control, read_keys
from minter.errors import Banned, Expired, NoUsableKey, Unavailable
from minter.fts.jobs import from_fill
from minter.policy.clients import Ban
from minter.service import Service
from minter.tasks import recovery as recoveries
from minter.tasks.lifecycle import Lifecycle
from minter.tasks.recovery import Recovery, RecoveryReport
from minter.tokens import clock, keys
from minter.tokens.claims import unverified_claims
from minter.tokens.outcomes import Submission
from minter.tokens.replacements import replacement_id
from tests.conftest import EXAMPLES, MASTER_KEY, rows
from tests.integration.test_mint import count, mint, submission, tokens
from tests.integration.test_shared_tokens import downloads, share
from tests.simulators import FakeFTS

ME = "rucio-alpen"


def revoke(service: Service, algorithm: str = "ES256") -> keys.Key:
    """Revoke the active key of an algorithm; a standby signs from then on."""
    with transaction(service.pool) as connection:
        key = next(k for k in read_keys(connection) if (k.algorithm, k.state) == (algorithm, "active"))
    service.ensure_standby(key.kid, "tests")
    keyring.revoke(service.pool, key.kid, service.clock(), keys.RotationPolicy(0), "tests", "leak")
    return key


def recover(service: Service, key: keys.Key, *, dry: bool = False) -> RecoveryReport:
    with transaction(service.pool) as connection:
        clients = read_control(connection).clients
    return Recovery(service.engine, service.pool, key, {c.client_id: c for c in clients.values()}).run(
        service.clock(), dry=dry
    )


def fetched(service: Service, request_id: UUID) -> list[str]:
    told = Lifecycle(service.engine, service.store).fetch(ME, FetchRequest(request_id), service.clock())
    return [token.token for token in told.tokens]


def kid_of(token: str | bytes) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def lasting(token: str | bytes) -> dict[str, Any]:
    """Return the claims that a replacement has in common with its token."""
    claims = unverified_claims(token if isinstance(token, bytes) else token.encode())[1]
    return {name: claims[name] for name in ("scope", "aud", "sub", "client_id", "iss")} | {
        "seconds": claims["exp"] - claims["iat"]
    }


def test_live_tokens_are_made_anew_and_found_under_the_old_request(service: Service) -> None:
    first, second = submission("a", "b"), submission("c")
    (one, two) = mint(service, first, second)
    key = revoke(service)
    with pytest.raises(Expired):
        fetched(service, first.request.request_id)
    looked = recover(service, key, dry=True)
    assert (looked.requests, looked.tokens, looked.made, count(service)) == (2, 6, 0, 6)
    report = recover(service, key)
    assert (report.requests, report.tokens, report.made, report.unmade) == (2, 6, 6, [])
    assert report.by_client == {ME: 6}
    for asked, old in ((first, one), (second, two)):
        new = fetched(service, asked.request.request_id)
        assert [lasting(token) for token in new] == [lasting(token) for token in tokens(old)]
        assert {kid_of(token) for token in new}.isdisjoint({key.kid})
        (repeated,) = mint(service, asked)
        assert [token.decode() for token in tokens(repeated)] == new


def test_a_second_run_makes_nothing_twice(service: Service) -> None:
    mint(service, *(submission(f"{n}") for n in range(5)))
    key = revoke(service)
    recover(service, key)
    before = count(service)
    report = recover(service, key)
    assert (report.tokens, report.made, count(service)) == (10, 10, before)


def test_an_interrupted_run_goes_on(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [submission(f"{n}") for n in range(9)]
    mint(service, *asked)
    key = revoke(service)
    monkeypatch.setattr(recoveries, "MOST_REQUESTS", 2)
    made = service.engine.mint_many
    calls = iter(range(9))

    def fails(*args: Any) -> Any:
        if next(calls) == 2:
            raise Unavailable("killed")
        return made(*args)

    monkeypatch.setattr(service.engine, "mint_many", fails)
    with pytest.raises(Unavailable):
        recover(service, key)
    assert count(service, "requests") == 9 + 4
    report = recover(service, key)
    assert (report.tokens, report.made, count(service, "requests")) == (18, 18, 18)
    assert len({token for one in asked for token in fetched(service, one.request.request_id)}) == 18


def test_bans_and_limits_of_today_apply(service: Service) -> None:
    first, second = submission("a"), submission("b", on_behalf_of="mallory")
    mint(service, first, second)
    key = revoke(service)
    control_changes.add_ban(service.pool, Ban("on_behalf_of", "mallory"), "leak", "tests")
    report = recover(service, key)
    assert (report.made, [u.request_id for u in report.unmade]) == (2, [second.request.request_id])
    assert "mallory" in report.unmade[0].why
    with pytest.raises(Banned):
        fetched(service, second.request.request_id)
    again = recover(service, key)
    assert (again.made, again.unmade) == (report.made, report.unmade)


def test_what_ended_or_expired_is_left(service: Service) -> None:
    lifecycle = Lifecycle(service.engine, service.store)
    done, cancelled, old = submission("done"), submission("cancelled"), submission("old")
    mint(service, done, cancelled)
    mint(service, old, now=service.clock() - timedelta(minutes=4))
    rows(
        service, "UPDATE tokens SET expires_at = now() - interval '1 s' WHERE external_id = 'old' RETURNING 1"
    )
    lifecycle.report(
        ME, ReportRequest(files=(FileReport(state="finished", external_id="done"),)), service.clock()
    )
    lifecycle.cancel(ME, CancelRequest(request_id=cancelled.request.request_id), service.clock())
    key = revoke(service)
    assert recover(service, key).tokens == 0
    with pytest.raises(Expired, match="was cancelled"):
        fetched(service, cancelled.request.request_id)


def test_a_cancelled_request_gets_no_replacement_that_was_made_before(service: Service) -> None:
    one = submission("a")
    mint(service, one)
    recover(service, revoke(service))
    lifecycle = Lifecycle(service.engine, service.store)
    lifecycle.cancel(ME, CancelRequest(request_id=one.request.request_id), service.clock())
    with pytest.raises(Expired, match="was cancelled"):
        fetched(service, one.request.request_id)


def test_a_key_that_leaks_after_the_first_one(service: Service) -> None:
    one = submission("a")
    (outcome,) = mint(service, one)
    recover(service, revoke(service))
    second = revoke(service)
    with pytest.raises(Expired):
        fetched(service, one.request.request_id)
    report = recover(service, second)
    assert (report.tokens, report.made) == (2, 2)
    new = fetched(service, one.request.request_id)
    assert [lasting(token) for token in new] == [lasting(token) for token in tokens(outcome)]
    assert len({kid_of(token) for token in new} | {kid_of(t) for t in tokens(outcome)}) == 2


def test_shared_tokens_are_made_anew_once_for_their_uses(service: Service) -> None:
    share(service)
    asked = [downloads("x", "y"), downloads("z")]
    old = mint(service, *asked)
    assert len({token for outcome in old for token in tokens(outcome)}) == 1
    report = recover(service, revoke(service))
    assert (report.requests, report.tokens, report.made) == (2, 3, 3)
    new = [token for one in asked for token in fetched(service, one.request.request_id)]
    assert (len(new), len(set(new))) == (3, 1)


def test_jobs_in_fts_are_listed_with_their_fts(service: Service) -> None:
    job = json.loads(min((EXAMPLES / "rucio-41.5/jobs").glob("*.json")).read_text())
    made = from_fill(FillRequest(request_id=clock.new_uuid7(), job=job))
    (outcome,) = mint(service, Submission(made, ME))
    job_id = clock.new_uuid7()
    Lifecycle(service.engine, service.store).report(
        ME, ReportRequest(jobs=(JobReport(job_id, made.request_id, (0,)),)), service.clock()
    )
    key = revoke(service)
    report = recover(service, key)
    assert [(j.job_id, j.client, j.request_id) for j in report.jobs] == [(job_id, ME, made.request_id)]
    assert report.jobs[0].fts == service.loaded.settings.fts[0].name
    assert report.made == report.tokens > 0
    assert [lasting(t) for t in fetched(service, made.request_id)] == [lasting(t) for t in tokens(outcome)]


def test_without_a_key_nothing_is_recorded(service: Service) -> None:
    mint(service, submission("a"))
    key = revoke(service)
    rows(service, "DELETE FROM signing_keys WHERE state = 'active' RETURNING kid")
    with pytest.raises(NoUsableKey):
        recover(service, key)
    assert count(service, "requests") == 1


@given(st.uuids(version=4), st.integers(0, 2**48 - 1), st.text(), st.text())
def test_the_id_of_a_replacement(drawn: UUID, milliseconds: int, kid: str, other: str) -> None:
    request_id = UUID(int=milliseconds << 80 | 7 << 76 | drawn.int & ((1 << 76) - 1))
    made = replacement_id(request_id, kid)
    assert (made.version, made.variant, made.int >> 80) == (7, request_id.variant, milliseconds)
    assert made == replacement_id(request_id, kid) != request_id
    assert (made == replacement_id(request_id, other)) == (kid == other)


def test_jobs_with_revoked_tokens_are_cancelled_once(
    service: Service, dsn: str, fts: FakeFTS, tmp_path: Path
) -> None:
    """Whatever FTS answers, the others are cancelled; a job that ended keeps its state."""
    lifecycle = Lifecycle(service.engine, service.store)
    job = json.loads(min((EXAMPLES / "rucio-41.5/jobs").glob("*.json")).read_text())
    jobs = [clock.new_uuid7() for _ in range(4)]
    for job_id in jobs:
        made = from_fill(FillRequest(request_id=clock.new_uuid7(), job=job))
        mint(service, Submission(made, ME))
        lifecycle.report(ME, ReportRequest(jobs=(JobReport(job_id, made.request_id, (0,)),)), service.clock())
    fts.jobs = {str(job_id): job for job_id in jobs[:3]}
    fts.states = {str(jobs[1]): "FINISHED"}
    key = revoke(service)
    text = (EXAMPLES / "settings.toml").read_text().replace("https://fts3-atlas.example.org:8446", fts.url)
    (tmp_path / "settings.toml").write_text(text.replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/'))

    def run(*options: str) -> tuple[int, dict[str, str]]:
        done = subprocess.run(
            [sys.executable, "-m", "minter.cli", "keys", "cancel-jobs", key.kid, "--rate", "100", "--json", *options],
            env={**os.environ, "MINTER_SETTINGS": str(tmp_path / "settings.toml"), "MINTER_DSN": dsn,
                 "MINTER_MASTER_KEY_ALPEN": MASTER_KEY},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, {row["job"]: row["state"] for row in json.loads(done.stdout)}

    assert run() == (1, {str(job_id): "not cancelled" for job_id in jobs})
    assert not fts.bearers
    fts.faults = ["503"]
    code, told = run("--yes")
    assert code == 1
    assert [told[str(job_id)].partition(":")[0] for job_id in jobs] == [
        "not cancelled", "FINISHED", "CANCELED", "not cancelled",
    ]  # fmt: skip
    assert run("--yes")[1][str(jobs[0])] == "CANCELED"
    claims = [unverified_claims(b.removeprefix("Bearer ").encode())[1] for b in fts.bearers]
    assert {(c["scope"], c["client_id"]) for c in claims} == {("fts", ME)}
    assert key.kid not in {kid_of(b.removeprefix("Bearer ")) for b in fts.bearers}
