"""Decisions of the FTS forwarder: which errors are tried again, are final, or cancel nothing."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest

from minter.client import JobReport
from minter.contract.messages import Answer, FillRequest
from minter.errors import FTSAway, FTSBlocked, JobBroken, JobRefused, JobTooLate, Unavailable
from minter.fts import rest
from minter.fts.jobs import from_fill
from minter.fts.rest import FTSClient, Submitted
from minter.service import Service
from minter.tasks.answers import answer
from minter.tokens import clock
from minter.tokens.outcomes import Submission
from tests.integration.test_mint import OTHER, SE, mint
from tests.simulators import FakeFTS
from workers.fts_forwarder import Forwarder

_Client: Any = object  # so that the fake may stand where a MinterClient does


class Engine(_Client):
    """Records what the forwarder reports; the first `away` reports fail."""

    def __init__(self, away: int = 0) -> None:
        self.away = away
        self.reports: list[JobReport] = []
        self.cancelled: list[UUID] = []

    def report(self, *, jobs: Sequence[JobReport]) -> None:
        if self.away:
            self.away -= 1
            raise Unavailable("the engine is away")
        self.reports += jobs

    def cancel(self, request_id: UUID) -> None:
        self.cancelled.append(request_id)


@pytest.fixture
def filled(service: Service) -> Answer:
    entries = [{"sources": [SE + n], "destinations": [OTHER + n], "filesize": 10} for n in ("a", "b")]
    request = from_fill(FillRequest(request_id=clock.new_uuid7(), job={"files": entries, "params": {}}))
    (outcome,) = mint(service, Submission(request, "rucio-alpen"))
    return answer(outcome, clock.now())


def test_a_job_that_is_submitted_is_never_undone(fts: FakeFTS, filled: Answer) -> None:
    """The engine is down after FTS accepted the job, for longer than the bearer token lives."""
    engine, clock = Engine(away=1), [time.time()]
    forwarder = Forwarder(engine, FTSClient(fts.url), None, lambda: clock[0])
    done: dict[str, Submitted] = {}
    with pytest.raises(Unavailable):
        forwarder.forward(filled, done)
    clock[0] += 30 * 86400
    submitted = forwarder.forward(filled, done)
    assert submitted is not None
    assert submitted.replica_ids == ((1000,), (1001,))
    assert (fts.posts, len(engine.reports), engine.cancelled) == (1, 1, [])
    # Another process gets the same message: it cannot know about the job, so it cancels nothing.
    again = Forwarder(engine, FTSClient(fts.url), None, lambda: clock[0])
    with pytest.raises(JobTooLate) as caught:
        again.forward(filled)
    again.refused(filled, caught.value)
    assert engine.cancelled == []


def test_only_fts_can_refuse_a_job(fts: FakeFTS, filled: Answer) -> None:
    engine = Engine()
    forwarder = Forwarder(engine, FTSClient(fts.url), None)
    for fault in ("404", "408", "502", "503", "302", "html", "odd"):
        fts.faults = [fault]
        with pytest.raises(FTSAway):
            forwarder.forward(filled)
    fts.faults = ["400"]
    with pytest.raises(JobRefused, match="refuses the job") as caught:
        forwarder.forward(filled)
    forwarder.refused(filled, caught.value)
    assert engine.cancelled == [uuid.UUID(filled.request_id)]


def test_fts_is_told_the_token_and_keeps_the_jobs_own_params(fts: FakeFTS, filled: Answer) -> None:
    Forwarder(Engine(), FTSClient(fts.url), None).forward(filled)
    (job,) = fts.jobs.values()
    assert job["params"]["unmanaged_tokens"] is True
    assert job["params"]["sid"] == filled.request_id
    assert filled.bearer is not None
    assert fts.bearers == {f"Bearer {filled.bearer.token}"}
    assert filled.job is not None
    assert json.dumps(job["files"]) == json.dumps(filled.job["files"])


def test_a_job_that_breaks_fts_is_set_aside_and_keeps_its_tokens(
    fts: FakeFTS, filled: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "BROKEN_DELAYS_SECONDS", (0.0, 0.0))
    engine = Engine()
    forwarder = Forwarder(engine, FTSClient(fts.url), None)
    fts.faults = ["500"] * 3
    with pytest.raises(JobBroken, match="does not have it") as caught:
        forwarder.forward(filled)
    forwarder.refused(filled, caught.value)
    assert (fts.posts, engine.cancelled) == (3, [])
    fts.faults = ["500"]  # and one that passes is no trouble
    assert forwarder.forward(filled)


def test_a_job_that_fts_has_although_it_answered_500_is_found(
    fts: FakeFTS, filled: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "BROKEN_DELAYS_SECONDS", (0.0, 0.0))
    fts.faults = ["500-kept"]
    submitted = Forwarder(Engine(), FTSClient(fts.url), None).forward(filled)
    assert submitted is not None
    assert str(submitted.job_id) in fts.jobs
    assert fts.posts == 1


@pytest.mark.parametrize("why", ["Unmanaged tokens are not allowed!", "Unknown token issuer: https://x/"])
def test_what_is_the_operators_trouble_waits(fts: FakeFTS, filled: Answer, why: str) -> None:
    engine = Engine()
    forwarder = Forwarder(engine, FTSClient(fts.url), None)
    fts.refuses = why
    with pytest.raises(FTSBlocked, match="operators"):
        forwarder.forward(filled)
    assert engine.cancelled == []
    fts.refuses = ""
    assert forwarder.forward(filled)


@pytest.mark.parametrize("old", [False, True])
def test_a_job_that_fts_has_already_is_known_by_its_tokens(fts: FakeFTS, filled: Answer, old: bool) -> None:
    fts.old = old
    first = Forwarder(Engine(), FTSClient(fts.url), None).forward(filled)
    assert Forwarder(Engine(), FTSClient(fts.url), None).forward(filled) == first
    (job,) = fts.jobs.values()
    for file in job["files"]:
        if old:
            file["destinations"] = [file["destinations"][0] + "x"]
        else:
            file["source_tokens"] = ["other"]
    with pytest.raises(JobRefused, match="another job"):
        Forwarder(Engine(), FTSClient(fts.url), None).forward(filled)


def test_every_replica_has_an_id(fts: FakeFTS, service: Service) -> None:
    entries = [
        {"sources": [SE + "a", OTHER + "a2"], "destinations": [OTHER + "a"]},
        {"sources": [SE + "b"], "destinations": [OTHER + "b"]},
    ]
    request = from_fill(FillRequest(request_id=clock.new_uuid7(), job={"files": entries, "params": {}}))
    (outcome,) = mint(service, Submission(request, "rucio-alpen"))
    engine = Engine()
    Forwarder(engine, FTSClient(fts.url), None).forward(answer(outcome, clock.now()))
    (report,) = engine.reports
    assert report.replica_ids == ((1000, 1001), (1002,))
    assert report.file_ids == (1000, 1002)
