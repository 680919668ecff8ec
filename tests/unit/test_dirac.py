# ruff: noqa: ARG002, N802, N803 - names and signatures of DIRAC
"""Tokens for DIRAC, without DIRAC: what is wrapped, and what is left alone (its agent runs in the slow suite)."""

from types import SimpleNamespace
from typing import Any

import pytest

from minter.dirac import jobs


class Job:
    """An FTS3Job with the signatures that were tested."""

    def _constructTransferJob(
        self,
        pinTime: Any,
        allLFNs: Any,
        target_spacetoken: Any,
        protocols: Any = None,
        tokensEnabled: bool = False,
    ) -> Any:
        raise AssertionError

    def submit(
        self,
        context: Any = None,
        ftsServer: Any = None,
        ucert: Any = None,
        pinTime: int = 1,
        protocols: Any = None,
        fts_access_token: Any = None,
    ) -> Any:
        raise AssertionError

    @staticmethod
    def generateContext(ftsServer: Any, ucert: Any, fts_access_token: Any = None, lifetime: int = 1) -> Any:
        return ftsServer, ucert, fts_access_token, lifetime


def fresh() -> tuple[Any, Any]:
    return SimpleNamespace(gTokenManager=object()), type("Fresh", (Job,), {})


def test_a_known_dirac_is_wrapped_once_and_its_static_context_stays() -> None:
    agent, job = fresh()
    jobs.wrap(agent, job, None)
    once = job.submit
    assert once is not Job.submit
    jobs.wrap(agent, job, None)
    assert job.submit is once
    assert job.generateContext("server", "proxy", lifetime=5) == (
        "server",
        "proxy",
        None,
        5,
    )  # the agent's call


@pytest.mark.parametrize("change", ["gone", "other", "no manager"])
def test_a_dirac_that_is_not_known_stays_as_it_is(change: str, caplog: pytest.LogCaptureFixture) -> None:
    agent, job = fresh()
    if change == "gone":
        job.generateContext = None
    elif change == "other":
        job._constructTransferJob = lambda self, allLFNs: (self, allLFNs)
    else:
        del agent.gTokenManager
    jobs.wrap(agent, job, None)
    assert job.submit is Job.submit
    assert "this DIRAC is not known" in caplog.text
