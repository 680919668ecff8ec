"""Recovery from a leaked key: live tokens are made anew once, and asked for under their old request_id."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import jwt
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minter.contract.followups import CancelRequest, FetchRequest, FileReport, JobReport, ReportRequest
from minter.contract.messages import FillRequest, URLsRequest
from minter.database import control_changes, keyring
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.errors import Banned, Expired, NoUsableKey, Unavailable
from minter.fts.jobs import from_fill
from minter.policy.clients import Ban
from minter.policy.requests import decode_urls
from minter.policy.routes import Route
from minter.policy.transfers import Policy
from minter.service import Service
from minter.tasks import recovery as recoveries
from minter.tasks.lifecycle import Lifecycle
from minter.tasks.recovery import Recovery, RecoveryReport
from minter.tokens import clock, keys
from minter.tokens.claims import unverified_claims
from minter.tokens.outcomes import Submission
from minter.tokens.replacements import replacement_id
from tests.conftest import EXAMPLES, MASTER_KEY, load_settings, rows
from tests.integration.test_mint import SE, count, mint, submission, tokens
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
    return Recovery(service.engine, service.pool, key, service.clock).run(dry=dry)


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


def a_job(service: Service) -> Submission:
    """Return one of Rucio's jobs, whose storages take tokens of both algorithms."""
    job = json.loads(min((EXAMPLES / "rucio-41.5/jobs").glob("*.json")).read_text())
    return Submission(from_fill(FillRequest(request_id=clock.new_uuid7(), job=job)), ME)


def report(service: Service, **wire: Any) -> None:
    Lifecycle(service.engine, service.store).report(ME, ReportRequest(**wire), service.clock())


@pytest.mark.parametrize("order", ["ERE", "RER", "RERER", "EERR"])
def test_keys_of_both_algorithms_leak_one_after_the_other(service: Service, order: str) -> None:
    one = a_job(service)
    (outcome,) = mint(service, one)
    assert len({kid_of(token) for token in tokens(outcome)}) == 2
    for letter in order:
        done = recover(service, revoke(service, {"E": "ES256", "R": "RS256"}[letter]))
        assert done.made == done.tokens > 0
        new = fetched(service, one.request.request_id)
        assert [lasting(token) for token in new] == [lasting(token) for token in tokens(outcome)]


def test_both_keys_leak_before_the_first_recovery(service: Service) -> None:
    one = a_job(service)
    (outcome,) = mint(service, one)
    leaked = [revoke(service, "ES256"), revoke(service, "RS256")]
    for key in leaked:
        recover(service, key)
    new = fetched(service, one.request.request_id)
    assert [lasting(token) for token in new] == [lasting(token) for token in tokens(outcome)]
    assert {kid_of(token) for token in new}.isdisjoint({key.kid for key in leaked})


def test_a_file_that_ended_does_not_withhold_the_others(service: Service) -> None:
    one = submission("a", "b")
    mint(service, one)
    report(service, files=(FileReport(state="finished", external_id="a"),))
    done = recover(service, revoke(service))
    assert (done.tokens, done.made) == (2, 2)
    told = Lifecycle(service.engine, service.store).fetch(
        ME, FetchRequest(one.request.request_id), service.clock()
    )
    assert [token.file for token in told.tokens] == [1, 1]
    assert [(r.file, r.error["reason"]) for r in told.refusals] == [(0, "expired"), (0, "expired")]


def test_a_file_that_is_refused_now_is_renewed_when_it_is_allowed_again(service: Service) -> None:
    """A ban during a recovery refuses only what it covers, and not for ever."""
    one = submission("a", "b")
    mint(service, one)
    key = revoke(service)
    path = "/atlas/atlasdatadisk/rucio/data/b"
    control_changes.add_ban(service.pool, Ban("path", path), "leak", "tests")
    done = recover(service, key)
    assert (done.made, [(u.tokens, u.request_id) for u in done.unmade]) == (2, [(2, one.request.request_id)])
    control_changes.lift_ban(service.pool, Ban("path", path), "tests")
    assert len(fetched(service, one.request.request_id)) == 2
    again = recover(service, key)
    assert (again.tokens, again.made, again.unmade) == (4, 4, [])
    assert len(fetched(service, one.request.request_id)) == 4
    assert count(service) == 8


def test_a_ban_of_the_whole_client_does_not_last_for_ever(service: Service) -> None:
    one = submission("a")
    mint(service, one)
    key = revoke(service)
    control_changes.add_ban(service.pool, Ban("client", ME), "leak", "tests")
    assert recover(service, key).made == 0
    control_changes.lift_ban(service.pool, Ban("client", ME), "tests")
    assert recover(service, key).made == 2
    assert len(fetched(service, one.request.request_id)) == 2


def test_another_request_under_the_id_of_a_replacement_is_none(service: Service) -> None:
    """The kid is public: a client may take the id for a request that it may no longer make."""
    one = submission("a", on_behalf_of="alice")
    (outcome,) = mint(service, one)
    key = revoke(service)
    mint(
        service,
        submission("b", on_behalf_of="mallory", request_id=replacement_id(one.request.request_id, key.kid)),
    )
    control_changes.add_ban(service.pool, Ban("on_behalf_of", "mallory"), "leak", "tests")
    done = recover(service, key)
    assert (done.tokens, done.made) == (2, 2)
    new = fetched(service, one.request.request_id)
    assert [lasting(token) for token in new] == [lasting(token) for token in tokens(outcome)]


def test_a_token_for_fts_alone_is_made_anew(service: Service) -> None:
    directory = service.engine.policy.directories["alpen"]
    source, target = [
        directory.url(area.storage, f"{area.root}/f", area.audience)
        for area in sorted(directory.areas(), key=lambda area: area.storage)
        if "ES256" not in area.dialect.algorithms and not area.tape
    ][:2]
    job = {"files": [{"sources": [source], "destinations": [target], "filesize": 1000}], "params": {}}
    made = from_fill(FillRequest(request_id=clock.new_uuid7(), job=job))
    (outcome,) = mint(service, Submission(made, ME))
    key = revoke(service)
    assert [kid_of(token) for token in tokens(outcome)].count(key.kid) == 1
    done = recover(service, key)
    assert (done.tokens, done.made) == (1, 1)
    new = fetched(service, made.request_id)
    assert [lasting(token) for token in new] == [lasting(token) for token in tokens(outcome)]


def test_what_is_cancelled_or_reported_under_the_old_id_ends_the_new_tokens(service: Service) -> None:
    lifecycle = Lifecycle(service.engine, service.store)
    first, second = submission("a", "b"), submission("c")
    mint(service, first, second)
    recover(service, revoke(service))
    new = {unverified_claims(t.encode())[1]["jti"] for t in fetched(service, first.request.request_id)}
    told = lifecycle.cancel(ME, CancelRequest(request_id=first.request.request_id), service.clock())
    assert new <= {live.jti for live in told.alive}
    report(service, files=(FileReport(state="finished", request_id=second.request.request_id, file=0),))
    assert recover(service, revoke(service)).tokens == 0
    with pytest.raises(Expired):
        fetched(service, first.request.request_id)


def test_jobs_submitted_again_are_not_cancelled_and_later_leaks_find_them(service: Service) -> None:
    one = a_job(service)
    mint(service, one)
    before, after = clock.new_uuid7(), clock.new_uuid7()
    report(service, jobs=(JobReport(before, one.request.request_id, (0,)),))
    first = revoke(service)
    assert [job.job_id for job in recover(service, first).jobs] == [before]
    report(service, jobs=(JobReport(after, one.request.request_id, (0,)),))
    assert [job.job_id for job in recover(service, first, dry=True).jobs] == [before]
    second = revoke(service)
    assert [job.job_id for job in recover(service, second).jobs] == [after]


def test_urls_are_not_signed_with_replacements(service: Service) -> None:
    """A URL's token is of one file and read only, whatever other routes would give."""
    policy = service.engine.policy
    routes = (
        Route(name="open data", via="url", operations=("read",)),
        Route(name="wide", via="direct", operations=("read",), granularity="storage"),
    )
    service.engine.policy = Policy(policy.directories, routes)
    wire = URLsRequest(request_id=clock.new_uuid7(), urls=(SE + "a",))
    one = Submission(decode_urls(msgspec.json.encode(wire)), ME)
    mint(service, one)
    done = recover(service, revoke(service))
    assert (done.tokens, done.made, done.unmade[0].request_id) == (1, 0, one.request.request_id)
    assert "sign these under a new request_id" in done.unmade[0].why
    (repeated,) = mint(service, one)
    assert isinstance(repeated.error, Expired)


def test_concurrent_recoveries_make_each_token_once(service: Service, dsn: str) -> None:
    asked = [submission(f"{n}") for n in range(40)]
    mint(service, *asked)
    key = revoke(service)
    services = [Service(load_settings(dsn)) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        done = list(threads.map(lambda one: recover(one, key), services))
    for one in services:
        one.pool.dispose()
    assert {report.tokens for report in done} == {80}
    assert recover(service, key).made == 80
    assert rows(
        service, "SELECT count(*), count(DISTINCT renews) FROM requests WHERE renews IS NOT NULL"
    ) == [(40, 40)]


@pytest.mark.parametrize("command", [["revoke", "--reason", "leak", "--yes"], ["recover"], ["cancel-jobs"]])
def test_a_kid_that_looks_like_an_option_is_taken(command: list[str], dsn: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minter.cli", "keys", command[0], "-L7-A6vqbmQv", *command[1:]],
        env={**os.environ, "MINTER_SETTINGS": str(EXAMPLES / "settings.toml"), "MINTER_DSN": dsn,
             "MINTER_MASTER_KEY_ALPEN": MASTER_KEY},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no key has the kid '-L7-A6vqbmQv'" in done.stderr


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
        "not cancelled", "FINISHED", "CANCELED", "UNKNOWN",
    ]  # fmt: skip
    code, told = run("--yes")
    assert (code, told[str(jobs[0])]) == (0, "CANCELED")
    claims = [unverified_claims(b.removeprefix("Bearer ").encode())[1] for b in fts.bearers]
    assert {(c["scope"], c["client_id"]) for c in claims} == {("fts", ME)}
    assert key.kid not in {kid_of(b.removeprefix("Bearer ")) for b in fts.bearers}
