"""What FTS's events say of transfers: which tokens end, and what is told of them."""

import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec
import pytest
from msgspec import structs

from minter.contract.followups import (
    CancelRequest,
    JobReport,
    ReportRequest,
)
from minter.contract.messages import FillRequest, URLsRequest
from minter.database.ended import EndedToken
from minter.fts.events import FTSEvent
from minter.fts.jobs import from_fill
from minter.local import stack
from minter.policy.requests import decode_urls
from minter.policy.routes import Route
from minter.policy.transfers import Policy
from minter.service import Service
from minter.tasks import answers
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock
from minter.tokens.claims import unverified_claims
from minter.tokens.outcomes import Outcome, Submission
from tests.conftest import rows
from tests.integration.test_lifecycle import ME
from tests.integration.test_mint import OTHER, SE, mint


def event(
    request_id: str = "",
    job_id: UUID | None = None,
    file_id: int = 1,
    state: Literal["active", "finished"] = "finished",
    **more: Any,
) -> FTSEvent:
    return FTSEvent(
        vo="x",
        job_id=job_id or clock.new_uuid7(),
        file_id=file_id,
        external_id=request_id,
        state=state,
        **more,
    )


def states_of(service: Service) -> set[tuple[int, str, str]]:
    return {(file, side, state) for file, side, state in rows(
        service, "SELECT t.file, t.side::text, s.state::text FROM token_states s JOIN tokens t USING (jti)"
    )}  # fmt: skip


def copy_of(service: Service, sources: Iterable[str], external_id: str = "rucio-1", **job: Any) -> Outcome:
    files = [
        {
            "sources": [SE + s for s in sources],
            "destinations": [OTHER + "d"],
            "metadata": {"request_id": external_id},
        }
    ]
    request = from_fill(
        FillRequest(request_id=clock.new_uuid7(), job={"files": job.pop("files", files), "params": job})
    )
    (outcome,) = mint(service, Submission(request, "rucio-alpen"))
    assert outcome.issued
    return outcome


def test_an_event_ends_only_the_tokens_of_its_own_urls(service: Service, lifecycle: Lifecycle) -> None:
    copy_of(service, ["a"])
    foreign = event("rucio-1", source_url=SE + "other", destination_url=OTHER + "d")
    assert lifecycle.events("alpen", [foreign, event("rucio-1")], clock.now()) == (0, 2)
    own = event("rucio-1", source_url=SE + "a", destination_url=OTHER + "d")
    assert lifecycle.events("alpen", [own], clock.now()) == (2, 0)


def test_a_failed_replica_ends_nothing_while_there_are_others(service: Service, lifecycle: Lifecycle) -> None:
    copy_of(service, ["a", "b"])
    urls: dict[str, Any] = {"source_url": SE + "a", "destination_url": OTHER + "d"}
    assert lifecycle.events("alpen", [event("rucio-1", unless_others=True, **urls)], clock.now()) == (0, 0)
    assert lifecycle.events("alpen", [event("rucio-1", **urls)], clock.now()) == (3, 0)


def test_a_failed_file_of_a_bulk_job_ends_where_it_had_one_source(
    service: Service, lifecycle: Lifecycle
) -> None:
    copy_of(service, ["a"])
    urls: dict[str, Any] = {"source_url": SE + "a", "destination_url": OTHER + "d"}
    assert lifecycle.events("alpen", [event("rucio-1", unless_others=True, **urls)], clock.now()) == (2, 0)


def test_a_failed_hop_ends_the_tokens_of_the_hops_that_never_run(
    service: Service, lifecycle: Lifecycle
) -> None:
    hops = [
        {"sources": [SE + "a"], "destinations": [OTHER + "b"]},
        {"sources": [OTHER + "b"], "destinations": [SE + "c"]},
    ]
    outcome = copy_of(service, [], files=hops, multihop=True)
    job_id = clock.new_uuid7()
    request_id = outcome.submission.request.request_id
    lifecycle.report(
        "rucio-alpen", ReportRequest(jobs=(JobReport(job_id, request_id, (0, 1), (7, 8)),)), clock.now()
    )
    assert lifecycle.events("alpen", [event(job_id=job_id, file_id=7, ends_chain=True)], clock.now()) == (
        4,
        0,
    )
    assert {file for file, _, _ in states_of(service)} == {0, 1}


def test_every_replica_of_a_file_is_known_by_its_own_id(service: Service, lifecycle: Lifecycle) -> None:
    outcome = copy_of(service, ["a", "b"])
    job_id, request_id = clock.new_uuid7(), outcome.submission.request.request_id
    jobs = (JobReport(job_id, request_id, (0,), (7,), ((7, 8),)),)
    lifecycle.report("rucio-alpen", ReportRequest(jobs=jobs), clock.now())
    assert lifecycle.events("alpen", [event(job_id=job_id, file_id=8)], clock.now()) == (3, 0)


def test_a_job_belongs_to_each_client_that_reported_it(service: Service, lifecycle: Lifecycle) -> None:
    stack.add_client(service, "other", "alpen", "test")
    first = copy_of(service, ["a"]).submission.request.request_id
    job_id = clock.new_uuid7()
    stranger = ReportRequest(jobs=(JobReport(job_id, first, (0,), (7,)),))
    assert lifecycle.report("other", stranger, clock.now()).unknown == ["jobs[0]"]
    assert not lifecycle.report("rucio-alpen", stranger, clock.now()).unknown


def test_a_transfer_that_ends_is_told_in_one_line_with_what_its_tokens_had_left(
    service: Service, lifecycle: Lifecycle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minter.transfers")
    seen: list[EndedToken] = []
    lifecycle = Lifecycle(service.engine, service.store, seen.append)
    outcome = copy_of(service, ["a"])
    urls: dict[str, Any] = {"source_url": SE + "a", "destination_url": OTHER + "d"}
    begun, ended = clock.now() + timedelta(seconds=100), clock.now() + timedelta(days=3)
    lifecycle.events("alpen", [structs.replace(event("rucio-1", **urls), state="active")], begun)
    assert not caplog.records
    for _ in range(2):  # FTS's messages may come twice
        lifecycle.events("alpen", [event("rucio-1", **urls)], ended)
    (record,) = caplog.records
    told = vars(record)["event"]
    assert told["external_id"] == "rucio-1"
    assert (told["vo"], told["client"]) == ("alpen", "rucio-alpen")
    assert [t["side"] for t in told["tokens"]] == ["source", "destination"]
    expiry = {i.jti: i.exp for i in outcome.issued if i.slot.side != "service"}
    assert [t["jti"] for t in told["tokens"]] == list(expiry)
    for token in seen:
        assert token.waited == pytest.approx(100, abs=5)
        assert token.left_at_start == pytest.approx(expiry[str(token.jti)] - begun.timestamp(), abs=1)
        assert token.left_at_end < 0
    lifecycle.cancel("rucio-alpen", CancelRequest(external_ids=("rucio-1",)), ended)
    assert len(caplog.records) == 1


def test_a_signed_url_is_the_same_when_it_is_asked_for_again(service: Service) -> None:
    old = service.engine.policy
    shared = Route(name="open data", via="url", operations=("read",))
    service.engine.policy = Policy(old.directories, (shared, *old.routes), ())
    wire = URLsRequest(request_id=clock.new_uuid7(), urls=(SE + "a b", "davs://nowhere.example.org/f"))
    asked = Submission(decode_urls(msgspec.json.encode(wire)), ME)
    first, again = (answers.answer(mint(service, asked)[0], clock.now()) for _ in range(2))
    assert first.urls == again.urls
    assert not first.tokens
    (url,) = first.urls
    assert url.signed.startswith(SE.replace("davs", "https").replace(":443", "") + "a%20b?authz=")
    payload = unverified_claims(url.signed.rpartition("=")[2].removeprefix("Bearer%20").encode())[1]
    assert (payload["jti"], payload["exp"]) == (url.jti, url.exp)
    assert [r.error["reason"] for r in again.refusals] == ["unknown_storage"]
    assert url.signed.rpartition("=")[2] not in repr(first) + repr(url)
    loose = [note.text for note in first.notes]
    assert len(loose) == (service.engine.policy.matching_of("alpen", url.storage) != "exact")
    service.engine.policy = old  # the route was removed
    gone = answers.answer(mint(service, asked)[0], clock.now())
    assert not gone.urls
    assert [r.error["reason"] for r in gone.refusals] == ["unknown_storage", "operation_not_allowed"]


def test_a_hop_that_never_ran_has_no_line(
    service: Service, lifecycle: Lifecycle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minter.transfers")
    hops = [
        {"sources": [SE + "a"], "destinations": [OTHER + "b"]},
        {"sources": [OTHER + "b"], "destinations": [SE + "c"]},
    ]
    request_id = copy_of(service, [], files=hops, multihop=True).submission.request.request_id
    job_id = clock.new_uuid7()
    lifecycle.report(ME, ReportRequest(jobs=(JobReport(job_id, request_id, (0, 1), (7, 8)),)), clock.now())
    lifecycle.events("alpen", [event(job_id=job_id, file_id=7, ends_chain=True)], clock.now())
    (record,) = caplog.records
    assert vars(record)["event"]["file"] == 0
