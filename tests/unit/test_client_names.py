"""The public names of `minter.client`, and their types: mypy checks `typed`, which no test calls."""

from collections.abc import Mapping
from typing import Any, assert_type
from uuid import UUID

import minter.client
from minter.client import (
    Changed,
    FileOperation,
    FileReport,
    FileRequest,
    FilledJob,
    JobReport,
    LiveToken,
    MinterClient,
    MinterError,
    MintResult,
    Pending,
    Refusal,
    SignedURL,
    Token,
    find_bearer_token,
    new_request_id,
)


def test_all_has_every_public_name_and_no_other() -> None:
    modules = {"amqp", "bearer", "client", "http", "results"}
    public = {name for name in vars(minter.client) if not name.startswith("_")} - modules
    assert public == set(minter.client.__all__)


def typed(minter: MinterClient, job: Mapping[str, Any], url: str) -> None:
    """Use every public name as a caller would, under mypy's strict mode."""
    request_id = assert_type(new_request_id(), UUID)
    file = FileRequest(sources=(url,), destinations=(url,), size=10**9, external_id="1")
    in_place = FileRequest(operations=(FileOperation("delete", url),))
    result = assert_type(minter.mint([file, in_place], request_id=request_id), MintResult)
    assert_type(minter.mint_many([file], chunk=10, progress=lambda _done, _all: None), MintResult)
    assert_type(minter.renew(request_id, files=[0]), MintResult)
    assert_type(minter.fetch(request_id), MintResult)
    assert_type(result.tokens, tuple[Token, ...])
    assert_type(result.refusals, tuple[Refusal, ...])
    assert_type(result.pending, tuple[Pending, ...])
    assert_type(result.tokens[0].reveal(), str)
    filled = assert_type(minter.fill_job(job, fts="fts3.example.org"), FilledJob)
    assert_type(filled.bearer, Token | None)
    assert_type(minter.fill_jobs([job]), list[FilledJob | MinterError])
    assert_type(minter.mint([file], subject_token=find_bearer_token()), MintResult)
    assert_type(minter.sign_url(url), SignedURL)
    told = minter.report(
        [FileReport(state="finished", request_id=request_id, file=0)],
        jobs=[JobReport(request_id, request_id, (0,))],
    )
    assert_type(told, Changed)
    assert_type(minter.cancel(request_id), Changed)
    assert_type(told.alive, tuple[LiveToken, ...])
