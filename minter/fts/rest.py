"""FTS's REST interface, as far as submitting jobs needs it."""

import hashlib
import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import urlparse

import msgspec
import urllib3
from msgspec import Struct

from minter import logs
from minter.bounded_http import pool_manager, read
from minter.contract.messages import TokenAnswer
from minter.errors import FTSAway, FTSBlocked, JobBroken, JobRefused, RequestError, Unavailable

logger = logging.getLogger("minter.fts")

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""FTS lists the files of a job with all of their metadata."""
BASE_ID = uuid.UUID("01874efb-4735-4595-bc9c-591aef8240c9")
"""FTS's namespace of deterministic job ids: uuid5(uuid5(BASE_ID, VO), sid)."""
_FINAL = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
"""Statuses with which FTS refuses a job for good. Any other error comes from a proxy or is temporary: 401
and 403 mean that FTS does not know Minter's issuer, perhaps only for now."""


_OPERATORS = re.compile(
    r"unmanaged tokens are not allowed|unmanaged_tokens|issuer|token provider|not support\w* token",
    re.IGNORECASE,
).search
"""Refusals that are about FTS's settings for this VO, not about the job (FTS 3.13 and 3.14)."""
_MADE_BEFORE = (HTTPStatus.CONFLICT, HTTPStatus.INTERNAL_SERVER_ERROR)
"""Statuses after which FTS may have the job."""
BROKEN_DELAYS_SECONDS = (1.0, 2.0)
"""Pauses between the tries of a job that FTS answers with 500."""


class Submitted(Struct, frozen=True):
    """A job that FTS has; `replica_ids` are its ids of each file, in the job's order, empty if unknown."""

    job_id: uuid.UUID
    replica_ids: tuple[tuple[int, ...], ...]


class _Answer(NamedTuple):
    """Status and body of FTS's answer."""

    status: int
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")


class FTSClient:
    """A client of FTS's REST interface that submits and cancels jobs."""

    def __init__(self, url: str, *, ca: str | None = None, timeout_seconds: float = 60.0) -> None:
        self._url = url.rstrip("/")
        self._http = pool_manager(timeout_seconds, ca)
        self._vo: str | None = None

    def submit(self, job: Mapping[str, Any], bearer: TokenAnswer, request_id: str) -> Submitted:
        """Submit a job, or find it if FTS has it already; raises FTSAway or JobRefused."""
        params = dict(job.get("params") or {})
        if params.get("id_generator") != "deterministic" or not params.get("sid"):
            params |= {"id_generator": "deterministic", "sid": request_id}
        made = {**job, "params": params}
        for delay in (*BROKEN_DELAYS_SECONDS, None):
            answer = self._call("POST", "/jobs", bearer, made, told=_MADE_BEFORE)
            if answer.status != HTTPStatus.INTERNAL_SERVER_ERROR:
                break
            # FTS may have the job all the same: its answer was lost, or it failed after the commit.
            job_id = self._job_id(bearer, str(params["sid"]))
            if self._has(job_id, bearer):
                break
            if delay is None:
                said = logs.redact(answer.text)[:300]
                raise JobBroken(f"FTS answers 500 to this job each time, and does not have it: {said}")
            time.sleep(delay)
        if answer.status in _MADE_BEFORE:
            job_id = self._job_id(bearer, str(params["sid"]))
            if not self._is_ours(job_id, bearer, made):
                raise JobRefused(
                    f"FTS has another job under the sid {params['sid']}; submit it under a new one"
                )
            logger.info("FTS has job %s already", job_id)
        else:
            job_id = uuid.UUID(_said(answer, "job_id"))
        return Submitted(job_id, self._replica_ids(job_id, bearer, made))

    def cancel(self, job_id: uuid.UUID, bearer: TokenAnswer) -> str:
        """Cancel a job; return its state, which stays as it was if the job had ended, or UNKNOWN.

        UNKNOWN is a job that FTS does not have, because it ended long ago. Raises FTSAway or JobRefused.
        """
        answer = self._call("DELETE", f"/jobs/{job_id}", bearer, told=(HTTPStatus.NOT_FOUND,))
        return "UNKNOWN" if answer.status == HTTPStatus.NOT_FOUND else _said(answer, "job_state")

    def _has(self, job_id: uuid.UUID, bearer: TokenAnswer) -> bool:
        answer = self._call("GET", f"/jobs/{job_id}", bearer, told=(HTTPStatus.NOT_FOUND,))
        return answer.status != HTTPStatus.NOT_FOUND

    def _job_id(self, bearer: TokenAnswer, sid: str) -> uuid.UUID:
        if self._vo is None:
            self._vo = _said(self._call("GET", "/whoami", bearer), "vos", 0)
        return uuid.uuid5(uuid.uuid5(BASE_ID, self._vo), sid)

    def _files(self, job_id: uuid.UUID, bearer: TokenAnswer) -> list[dict[str, Any]]:
        files = _json(self._call("GET", f"/jobs/{job_id}/files", bearer))
        if not isinstance(files, list) or not all(isinstance(f, dict) for f in files):
            raise FTSAway("FTS lists a job's files in an unexpected form")
        return files

    def _is_ours(self, job_id: uuid.UUID, bearer: TokenAnswer, job: Mapping[str, Any]) -> bool:
        """Say whether the job that FTS has was made with these tokens: FTS may write URLs otherwise."""
        theirs = self._files(job_id, bearer)
        if all({"src_token_id", "dst_token_id"} <= f.keys() for f in theirs):
            return {(f["src_token_id"], f["dst_token_id"]) for f in theirs} == {
                (_token_id(source), _token_id(destination))
                for file in job["files"]
                for source in file["source_tokens"]
                for destination in file["destination_tokens"]
            }
        return {f.get("dest_surl") for f in theirs} == {
            urlparse(url.strip()).geturl() for file in job["files"] for url in file["destinations"]
        }

    def _replica_ids(
        self, job_id: uuid.UUID, bearer: TokenAnswer, job: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], ...]:
        """Return FTS's ids of each file, in the job's order; none if they cannot be read."""
        try:
            found: dict[int, list[int]] = {}
            for place, file in enumerate(self._files(job_id, bearer)):
                found.setdefault(int(file.get("file_index", place)), []).append(int(file["file_id"]))
        except (Unavailable, RequestError, KeyError, TypeError, ValueError):
            return ()
        if len(found) != len(job["files"]):
            return ()
        return tuple(tuple(sorted(found[index])) for index in sorted(found))

    def _call(
        self,
        method: str,
        path: str,
        bearer: TokenAnswer,
        body: object | None = None,
        told: Sequence[int] = (),
    ) -> _Answer:
        """Ask FTS; errors other than those `told` are raised: JobRefused for good, FTSBlocked, or FTSAway."""
        headers = {"Authorization": f"Bearer {bearer.token}", "Content-Type": "application/json"}
        content = None if body is None else msgspec.json.encode(body)
        try:
            with self._http.request(
                method, self._url + path, headers=headers, body=content, redirect=False, preload_content=False
            ) as response:
                answer = _Answer(response.status, read(response, MAX_ANSWER_BYTES))
        except (urllib3.exceptions.HTTPError, TimeoutError) as error:
            raise FTSAway(f"FTS cannot be reached ({type(error).__name__})") from None
        if HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES or answer.status in told:
            return answer
        if answer.status not in _FINAL:
            raise FTSAway(f"FTS answers {answer.status}")
        said = logs.redact(answer.text)[:300]
        if _OPERATORS(said):
            raise FTSBlocked(f"FTS refuses every job ({answer.status}), its operators must act: {said}")
        raise JobRefused(f"FTS refuses the job ({answer.status}): {said}")


def _token_id(token: str) -> str:
    """Return FTS's id of a token: the first 16 hex digits of its SHA-1."""
    return hashlib.sha1(token.encode(), usedforsecurity=False).hexdigest()[:16]


def _json(answer: _Answer) -> Any:
    try:
        return msgspec.json.decode(answer.content)
    except msgspec.DecodeError:
        raise FTSAway(f"FTS answers {answer.status} without valid JSON") from None


def _said(answer: _Answer, *keys: str | int) -> str:
    """Return one value of a JSON answer as text; raises FTSAway if the answer does not have it."""
    value = _json(answer)
    try:
        for key in keys:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        raise FTSAway(f"FTS answers without {'.'.join(map(str, keys))}") from None
    return str(value)
