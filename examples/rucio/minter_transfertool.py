"""Per-file tokens in Rucio's conveyor-submitter: an FTS3Transfertool with jobs that Minter fills.

Tested with Rucio 41.5 (tests/acceptance/test_foreign.py). In rucio.cfg:

    [minter]
    url = https://tokens.example.org/atlas/
    client = rucio-prod
    secret_file = /opt/rucio/etc/minter.secret
    ca = /etc/grid-security/certificates

`register()` replaces FTS3Transfertool; call it where the conveyor daemons start. RSEs need no
`oidc_support`: Minter knows from its own settings which storages take tokens.
"""

import json
import logging
from pathlib import Path
from typing import Any

from rucio.common.config import config_get
from rucio.common.exception import DuplicateFileTransferSubmission, TransferToolWrongAnswer
from rucio.common.utils import APIEncoder
from rucio.core import transfer as transfer_core
from rucio.transfertool.fts3 import FTS3Transfertool

from minter.client import MinterClient, MinterError


def connect() -> MinterClient:
    """Return a client with the options of [minter] in rucio.cfg."""
    return MinterClient(
        config_get("minter", "url"),
        config_get("minter", "client"),
        Path(config_get("minter", "secret_file")).read_text().strip(),
        ca=config_get("minter", "ca", raise_exception=False, default=None),
    )


class MinterTransfertool(FTS3Transfertool):
    """Submits the jobs of FTS3Transfertool with one token for each file and storage."""

    def __init__(self, external_host: str, oidc_support: bool = False, **options: Any) -> None:
        super().__init__(external_host, oidc_support=False, **options)  # no RSE-wide tokens
        self._minter = connect()
        self._filled: list[dict[str, Any]] = []

    def _file_from_transfer(self, transfer: Any, job_params: dict[str, str]) -> dict[str, Any]:
        if self._filled:
            return self._filled.pop(0)
        return super()._file_from_transfer(transfer, job_params)

    def submit(self, transfers: Any, job_params: dict[str, str], timeout: int | None = None) -> str:
        """Fill and submit the job; if a file is refused, Rucio submits each file alone."""
        files = [super(MinterTransfertool, self)._file_from_transfer(t, job_params) for t in transfers]
        job = json.loads(json.dumps({"files": files, "params": job_params}, cls=APIEncoder))
        try:
            filled = self._minter.fill_job(job, fts=self.external_host)
        except MinterError as error:
            raise TransferToolWrongAnswer(f"no tokens: {error}") from error
        if filled.refused:
            why = "; ".join(f"{r['index']}: {r['error']['error_description']}" for r in filled.refused)
            self.logger(logging.WARNING, "Minter refused files of a job: %s", why)
            raise (DuplicateFileTransferSubmission if len(transfers) > 1 else TransferToolWrongAnswer)(why)
        self.cert, self.headers["Authorization"] = None, f"Bearer {filled.bearer.reveal()}"
        self._filled = filled.job["files"]
        return super().submit(transfers, filled.job["params"], timeout)


def register() -> None:
    """Make every conveyor daemon of this process use MinterTransfertool."""
    transfer_core.TRANSFERTOOL_CLASSES_BY_NAME[FTS3Transfertool.external_name] = MinterTransfertool
