"""The life of tokens through real workers: what DIRAC and Rucio do with tokens that they got."""

import json

import pytest

from minter.cli.demo import read_jobs
from minter.client import FileReport, FileRequest, JobReport, MinterClient, MintResult, new_request_id
from minter.errors import Expired, InvalidRequest, UnknownRequest
from tests.acceptance.conftest import Raw, Running
from tests.acceptance.test_workers import OTHER, SE
from tests.conftest import EXAMPLES


def named(*names: str) -> list[FileRequest]:
    return [
        FileRequest(sources=(SE + n,), destinations=(OTHER + n,), size=10**9, external_id=n) for n in names
    ]


def reveal(result: MintResult) -> list[str]:
    return [t.reveal() for t in result.tokens]


def test_tokens_are_fetched_renewed_reported_and_cancelled(running: Running, client: MinterClient) -> None:
    made = client.mint(named("life-a", "life-b"))
    (request_id,) = made.request_ids
    assert reveal(client.fetch(request_id)) == reveal(made)

    renewed = client.renew(request_id, files=[1])
    assert {t.file for t in renewed.tokens} == {1}
    assert {t.jti for t in renewed.tokens}.isdisjoint(t.jti for t in made.tokens)

    told = client.report(
        [FileReport(state="finished", external_id="life-a"), FileReport(state="active", external_id="?")]
    )
    assert (told.tokens, told.unknown) == (2, ("files[1]",))

    cancelled = client.cancel(request_id)
    assert cancelled.tokens == 2  # those of life-a have ended already
    assert {a.jti for a in cancelled.alive} == {t.jti for t in made.tokens}
    with pytest.raises(Expired, match="was cancelled"):
        client.fetch(request_id)
    assert running.rows(
        "SELECT t.external_id, s.state::text FROM tokens t JOIN token_states s USING (jti)"
        " WHERE external_id LIKE 'life-%%' GROUP BY 1, 2 ORDER BY 1"
    ) == [("life-a", "finished"), ("life-b", "cancelled")]


def test_a_filled_job_is_reported_by_ftss_ids_and_renewed(client: MinterClient) -> None:
    (job,) = [job for _, job in read_jobs(EXAMPLES / "rucio-41.5/jobs")][:1]
    filled = client.fill_job(job)
    job_id = new_request_id()
    assert filled.job is not None
    numbers = tuple(range(len(filled.job["files"])))
    told = client.report(
        [FileReport(state="active", job_id=job_id, file_id=9000)],
        jobs=[JobReport(job_id, filled.request_id, numbers, tuple(9000 + n for n in numbers))],
    )
    assert told.tokens == 2
    assert len(client.renew(filled.request_id).tokens) == 2 * len(numbers) + 1  # and one token for FTS


def test_renewing_one_renewal_twice_gives_the_same_tokens(client: MinterClient) -> None:
    made = client.mint(named("life-c"))
    again = new_request_id()
    assert reveal(client.renew(made.request_ids[0], request_id=again)) == reveal(
        client.renew(made.request_ids[0], request_id=again)
    )


def test_what_nobody_knows_is_a_typed_error(client: MinterClient) -> None:
    for call in (client.fetch, client.renew, client.cancel):
        with pytest.raises(UnknownRequest):
            call(new_request_id())


@pytest.mark.parametrize("task", ["renew", "fetch", "report", "cancel"])
def test_broken_follow_ups_are_answered(raw: Raw, task: str) -> None:
    for body, where in ((b"{", "JSON"), (json.dumps([[{"what": 1}], {}, {}]), "what")):
        answer = raw.receive(raw.send(body, task=f"minter.{task}"))
        assert answer["error"]["reason"] == "invalid_request"
        assert where in answer["error"]["error_description"]


def test_more_than_a_request_holds_is_reported_in_chunks(client: MinterClient) -> None:
    told = client.report([FileReport(state="active", external_id=f"none-{n}") for n in range(2_500)])
    assert told.unknown[-1] == "files[2499]"
    assert len(told.unknown) == 2_500


def test_a_report_that_names_nothing_is_refused(client: MinterClient) -> None:
    with pytest.raises(InvalidRequest, match="named by nothing"):
        client.report([FileReport(state="active")])
