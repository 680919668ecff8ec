"""Per-file tokens in DIRAC's FTS3Agent: Minter fills the transfer jobs of FTS3Job.

Tested with DIRAC 9.1 and fts3 3.14 (tests/acceptance/test_foreign.py). Call `install()` in an extension of
the FTS3Agent. Set the options URL, Client, SecretFile and CA in the CS, below Systems/DataManagement/Agents/
FTS3Agent/Minter. SEs need no token options: Minter knows from its own settings which SEs take tokens.
"""

from pathlib import Path
from typing import Any

from DIRAC import S_ERROR, S_OK, gConfig
from DIRAC.DataManagementSystem.Client.FTS3Job import FTS3Job

from minter.client import MinterClient, MinterError

OPTIONS = "/Systems/DataManagement/Agents/FTS3Agent/Minter"


def connect() -> MinterClient:
    """Return a client with the options of the CS."""
    option = gConfig.getValue
    return MinterClient(
        option(f"{OPTIONS}/URL", ""),
        option(f"{OPTIONS}/Client", ""),
        Path(option(f"{OPTIONS}/SecretFile", "")).read_text().strip(),
        ca=option(f"{OPTIONS}/CA", "") or None,
    )


def install(minter: MinterClient | None = None) -> None:
    """Make FTS3Job get its tokens from Minter: those of the files, and the one for submitting to FTS."""
    minter = minter or connect()
    construct, generate = FTS3Job._constructTransferJob, FTS3Job.generateContext  # noqa: SLF001

    def with_tokens(self: Any, *arguments: Any, tokensEnabled: bool = False, **options: Any) -> Any:  # noqa: N803
        made = construct(self, *arguments, tokensEnabled=False, **options)
        if not made["OK"] or not tokensEnabled:
            return made
        job, files = made["Value"]
        try:
            filled = minter.fill_job(job, fts=self.ftsServer, on_behalf_of=self.username or "")
        except MinterError as error:
            return S_ERROR(f"no tokens for this job: {error}")
        if filled.job is None:
            return S_ERROR(f"no tokens for this job: {filled.refused[0]['error']['error_description']}")
        filled.job["params"]["job_metadata"]["useTokens"] = True
        self.minter_bearer = filled.bearer.reveal()
        given = {f["metadata"]["fileID"] for f in filled.job["files"] if "fileID" in (f["metadata"] or {})}
        return S_OK((filled.job, files & given))  # a refused file keeps its state and is tried again

    def context(
        self: Any, server: str, ucert: str | None, fts_access_token: str | None = None, **options: Any
    ) -> Any:
        bearer = getattr(self, "minter_bearer", None)
        return generate(server, None if bearer else ucert, bearer or fts_access_token, **options)

    FTS3Job._constructTransferJob, FTS3Job.generateContext = with_tokens, context  # noqa: SLF001
