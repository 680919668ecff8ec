# ruff: noqa: ARG002, N802, N803 - names and signatures of DIRAC
"""Tokens for DIRAC, without DIRAC: what is wrapped, and what is left alone (its agent runs in the slow suite)."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diraccfg import CFG
from msgspec import structs

from minter.client import MinterError
from minter.dirac import jobs
from tests.conftest import ROOT


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
    jobs.wrap(agent, job, None, None)
    once = job.submit
    assert once is not Job.submit
    jobs.wrap(agent, job, None, None)
    assert job.submit is once
    assert job.generateContext("server", "proxy", lifetime=5) == (
        "server",
        "proxy",
        None,
        5,
    )  # the agent's call


@pytest.mark.parametrize("change", ["gone", "other", "no manager"])
def test_a_dirac_that_is_not_known_stays_as_it_is(change: str) -> None:
    agent, job = fresh()
    said: list[str] = []
    if change == "gone":
        job.generateContext = None
    elif change == "other":
        job._constructTransferJob = lambda self, allLFNs: (self, allLFNs)
    else:
        del agent.gTokenManager
    jobs.wrap(agent, job, None, SimpleNamespace(error=lambda *words: said.append(" ".join(words))))
    assert job.submit is Job.submit
    assert "this DIRAC is not known" in said[0]


@pytest.mark.parametrize("content", [b"\xff\xfe", "sécret".encode(), None])
def test_a_secret_that_cannot_be_sent_is_an_error_of_minters(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    options = jobs.CSOptions("https://tokens.example.org/vo/", "dirac", str(path), "", "wait")
    with pytest.raises(MinterError, match="SecretFile"):
        jobs.Clients().get(options)


def test_the_options_that_the_docs_print_are_read_as_they_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/configure-clients.md").read_text()
    start = page.index("    Systems\n")
    found = CFG()
    found.loadFromBuffer(page[start : page.index("\n\n", start)])
    monkeypatch.setitem(sys.modules, "DIRAC", SimpleNamespace(gConfig=SimpleNamespace(
        getValue=lambda path, default: found.getOption(path.lstrip("/"), default)
    )))  # fmt: skip
    common, own = jobs.read_options("atlas", None), jobs.read_options("lhcb", None)
    assert (common.url, common.client, common.away) == (
        "https://tokens.example.org/vo/",
        "dirac-prod",
        "wait",
    )
    assert own == structs.replace(common, url="https://tokens.example.org/lhcb/")
