"""What is wrapped in Rucio: submitting jobs to FTS, and deleting from storages.

Rucio has no extension point for either (rucio#8584 proposes one), so named functions are wrapped when their
module is imported. Each is compared with the signature that was tested; on any other, the module stays as it
is, and the log says so.
"""

import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from minter.client import FileOperation, FileRequest, MinterClient
from minter.errors import MinterError, Unavailable
from minter.wrapping import difference

logger = logging.getLogger("minter.rucio")

ATTRIBUTE = "minter"
"""RSE attribute that switches an RSE to tokens of Minter."""
SECONDS = 5.0
"""How long Minter is waited for, before `away` decides."""
AWAY = ("wait", "rucio", "x509")
TOKEN_SCHEMES = ("davs", "https")

SIGNATURES = {
    ("rucio.transfertool.fts3", "FTS3Transfertool.submit"): ("self", "transfers", "job_params", "timeout"),
    ("rucio.transfertool.fts3", "FTS3Transfertool._file_from_transfer"): ("self", "transfer", "job_params"),
    ("rucio.daemons.reaper.reaper", "delete_from_storage"): (
        "heartbeat_handler", "hb_payload", "replicas", "prot", "rse_info", "is_staging",
        "auto_exclude_threshold", "logger",
    ),
    ("rucio.daemons.reaper.reaper", "request_token"): ("audience", "scope", "use_cache"),
    ("rucio.daemons.reaper.reaper", "determine_audience_for_rse"): ("rse_id",),
}  # fmt: skip
"""Parameters of what is wrapped, in Rucio 41.5."""


# ── settings of rucio.cfg ────────────────────────────────────────────────────────────────────


def option(name: str, vo: str = "", default: str | None = None) -> str:
    """Return an option of [minter], that of the VO if it has one of its own; raises MinterError."""
    from rucio.common.config import config_get  # noqa: PLC0415 - only Rucio has Rucio

    for key in (f"{name}-{vo}", name) if vo else (name,):
        found = config_get("minter", key, raise_exception=False, default=None, check_config_table=False)
        if found is not None:
            return str(found)
    if default is None:
        raise MinterError(f"rucio.cfg has no [minter] {name}")
    return default


def connect(vo: str = "") -> MinterClient:
    """Return a client with the options of [minter]; raises MinterError for a missing one."""
    path = Path(option("secret_file", vo))
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise MinterError(f"[minter] secret_file {path} cannot be read: {error.strerror}") from None
    ca = option("ca", vo, "") or None
    return MinterClient(option("url", vo), option("client", vo), secret, ca=ca, timeout_seconds=SECONDS)


def away() -> str:
    """Return what is done while Minter is away: `wait`, `rucio` or `x509`."""
    chosen = option("away", default="wait")
    if chosen not in AWAY:
        logger.error("[minter] away = %r is none of %s; waiting", chosen, ", ".join(AWAY))
        return "wait"
    return chosen


def switched(attributes: Any) -> bool:
    """Say whether an RSE with these attributes is switched to Minter."""
    return str(attributes.get(ATTRIBUTE, "")).lower() in ("true", "1", "yes")


# ── the conveyor submitter ───────────────────────────────────────────────────────────────────


def wrap_fts3(module: ModuleType) -> None:
    """Let FTS3Transfertool submit jobs of switched RSEs with one token for each file and storage."""
    tool = module.FTS3Transfertool
    submit, from_transfer = tool.submit, tool._file_from_transfer  # noqa: SLF001 - wrapped by name, see SIGNATURES
    exceptions = sys.modules["rucio.common.exception"]

    @wraps(from_transfer)
    def filled_file(self: Any, transfer: Any, job_params: dict[str, str]) -> dict[str, Any]:
        files: list[dict[str, Any]] | None = getattr(self, "_minter_files", None)
        return files.pop(0) if files else from_transfer(self, transfer, job_params)

    @wraps(submit)
    def with_tokens(
        self: Any, transfers: Sequence[Any], job_params: dict[str, str], timeout: int | None = None
    ) -> str:
        ours = {_of_minter(transfer) for transfer in transfers}
        if ours == {False}:
            return str(submit(self, transfers, job_params, timeout))
        if len(ours) > 1:  # a job has tokens for all its files or for none; Rucio submits each alone then
            raise exceptions.DuplicateFileTransferSubmission("RSEs with and without tokens of Minter")
        before = self.token, self.cert, dict(self.headers)
        try:
            self.token = None  # no RSE-wide tokens
            try:
                job = _filled(module, self, from_transfer, transfers, job_params, exceptions)
            except Unavailable as error:
                return _while_away(error, self, before, submit, transfers, job_params, timeout, exceptions)
            self.cert, self.headers["Authorization"] = None, f"Bearer {job.bearer.reveal()}"
            self._minter_files = job.job["files"]
            return str(submit(self, transfers, job.job["params"], timeout))
        finally:
            self._minter_files = None
            self.token, self.cert, headers = before
            self.headers.clear()
            self.headers.update(headers)

    tool._file_from_transfer, tool.submit = filled_file, with_tokens  # noqa: SLF001


def _of_minter(transfer: Any) -> bool:
    rses = [transfer.dst.rse, *(source.rse for source in transfer.sources)]
    return all(switched(rse.attributes) for rse in rses)


def _filled(
    module: ModuleType, tool: Any, from_transfer: Callable[..., dict[str, Any]], transfers: Sequence[Any],
    job_params: dict[str, str], exceptions: ModuleType,
) -> Any:  # fmt: skip
    """Return the job filled by Minter; raises Unavailable, or Rucio's error for a file that is refused."""
    files = [from_transfer(tool, transfer, job_params) for transfer in transfers]
    job = json.loads(json.dumps({"files": files, "params": job_params}, cls=module.APIEncoder))
    vo = str(getattr(transfers[0].rws.scope, "vo", ""))
    try:
        with connect(vo) as minter:
            filled = minter.fill_job(job, fts=tool.external_host)
    except Unavailable:
        raise
    except MinterError as error:
        raise exceptions.TransferToolWrongAnswer(f"no tokens of Minter: {error}") from error
    if filled.refused or filled.bearer is None or filled.job is None:
        why = "; ".join(f"{r['index']}: {r['error']['error_description']}" for r in filled.refused)
        tool.logger(logging.WARNING, "Minter refused files of a job: %s", why or "FTS is not in its settings")
        wrong = exceptions.DuplicateFileTransferSubmission if len(transfers) > 1 else None
        raise (wrong or exceptions.TransferToolWrongAnswer)(why)
    return filled


def _while_away(
    error: Unavailable, tool: Any, before: tuple[Any, Any, Any], submit: Callable[..., Any],
    transfers: Sequence[Any], job_params: dict[str, str], timeout: int | None, exceptions: ModuleType,
) -> str:  # fmt: skip
    chosen = away()
    tool.logger(logging.ERROR, "Minter is away (%s), [minter] away = %s", error, chosen)
    if chosen == "wait":
        raise exceptions.TransferToolTimeout(f"Minter is away: {error}") from error
    if chosen == "rucio":
        tool.token = before[0]
    return str(submit(tool, transfers, job_params, timeout))


# ── the reaper ───────────────────────────────────────────────────────────────────────────────


def wrap_reaper(module: ModuleType) -> None:
    """Let the reaper delete each file of a switched RSE with a token for that file."""
    delete, request = module.delete_from_storage, module.request_token
    audience_of = module.determine_audience_for_rse
    local = threading.local()

    @wraps(audience_of)
    def noted(rse_id: str) -> Any:
        local.switched = _is_switched(rse_id)
        return audience_of(rse_id)

    @wraps(request)
    def not_for_a_whole_rse(audience: str, scope: str, use_cache: bool = True) -> Any:
        if getattr(local, "switched", False):
            local.switched, local.asked = False, (audience, scope)
            return None  # `delete_from_storage` gets one for each file
        return request(audience, scope, use_cache)

    @wraps(delete)
    def with_tokens(
        heartbeat_handler: Any, hb_payload: Any, replicas: Sequence[Any], prot: Any, rse_info: Any,
        is_staging: bool, auto_exclude_threshold: int, logger: Callable[..., None] = logging.log,
    ) -> list[Any]:  # fmt: skip
        def original(some: Sequence[Any], protocol: Any) -> list[Any]:
            rest = (protocol, rse_info, is_staging, auto_exclude_threshold, logger)
            return list(delete(heartbeat_handler, hb_payload, some, *rest))

        if prot.attributes["scheme"] not in TOKEN_SCHEMES or is_staging or not _is_switched(rse_info["id"]):
            return original(replicas, prot)

        def by_rucio() -> list[Any]:
            asked = getattr(local, "asked", None)
            more = {"auth_token": request(*asked) if asked else None, "logger": logger}
            make = module.rsemgr.create_protocol
            return original(replicas, make(rse_info, "delete", scheme=prot.attributes["scheme"], **more))

        try:
            tokens = _tokens_to_delete(replicas, logger)
        except MinterError as error:
            chosen = away() if isinstance(error, Unavailable) else "wait"
            told = "no tokens of Minter to delete on %s (%s), [minter] away = %s"
            logger(logging.ERROR, told, rse_info["rse"], error, chosen)
            if chosen == "wait":
                return []  # the replicas stay marked, and are tried again
            return by_rucio() if chosen == "rucio" else original(replicas, prot)
        return _delete_each(module, original, replicas, tokens, prot, rse_info, logger)

    module.determine_audience_for_rse = noted  # type: ignore[attr-defined]
    module.request_token = not_for_a_whole_rse  # type: ignore[attr-defined]
    module.delete_from_storage = with_tokens  # type: ignore[attr-defined]


def _is_switched(rse_id: str) -> bool:
    from rucio.core.rse import list_rse_attributes  # noqa: PLC0415 - only Rucio has Rucio

    return switched(list_rse_attributes(rse_id, use_cache=True))


def _delete_each(
    module: ModuleType, original: Callable[[Sequence[Any], Any], list[Any]], replicas: Sequence[Any],
    tokens: Sequence[str | None], prot: Any, rse_info: Any, logger: Callable[..., None],
) -> list[Any]:  # fmt: skip
    """Delete each replica with a token of its own; return those that are deleted, as Rucio does."""
    deleted: list[Any] = []
    scheme = prot.attributes["scheme"]
    for replica, token in zip(replicas, tokens, strict=True):
        if token is None and replica["pfn"]:
            continue
        own = prot
        if token is not None:
            make = module.rsemgr.create_protocol
            own = make(rse_info, "delete", scheme=scheme, auth_token=token, logger=logger)
        deleted += original([replica], own)
    return deleted


def _tokens_to_delete(replicas: Sequence[Any], logger: Callable[..., None]) -> list[str | None]:
    """Return a token to delete each replica, None for one that has no URL or is refused."""
    asked = [number for number, replica in enumerate(replicas) if replica["pfn"]]
    found: list[str | None] = [None] * len(replicas)
    if not asked:
        return found
    vo = str(getattr(replicas[0]["scope"], "vo", ""))
    files = [FileRequest(operations=(FileOperation("delete", str(replicas[n]["pfn"])),)) for n in asked]
    with connect(vo) as minter:
        result = minter.mint(files)
    for token in result.tokens:
        found[asked[token.file]] = token.reveal()
    for refused in result.refusals:
        logger(
            logging.WARNING,
            "Minter gives no token to delete %s: %s",
            replicas[asked[refused.file]]["pfn"],
            refused.error,
        )
    return found


# ── wrapping at import ───────────────────────────────────────────────────────────────────────

WRAPPERS: dict[str, Callable[[ModuleType], None]] = {
    "rucio.transfertool.fts3": wrap_fts3,
    "rucio.daemons.reaper.reaper": wrap_reaper,
}


def problem(module: ModuleType) -> str:
    """Return how a module differs from the tested one, empty if it does not."""
    for (name, path), expected in SIGNATURES.items():
        if name == module.__name__ and (why := difference(module, path, expected)):
            return why
    return ""


def wrap(module: ModuleType) -> None:
    """Wrap a module of Rucio, or log why it stays as it is."""
    if getattr(module, "_minter_wrapped", False):
        return
    if why := problem(module):
        logger.error(
            "this Rucio is not known, so it stays without tokens of Minter: %s %s", module.__name__, why
        )
        return
    module._minter_wrapped = True  # type: ignore[attr-defined]  # noqa: SLF001
    WRAPPERS[module.__name__](module)


class _AfterImport(MetaPathFinder):
    """Wraps a module right after its own import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WRAPPERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            wrap(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Wrap what is imported already, and the rest when it is imported."""
    sys.meta_path.insert(0, _AfterImport())
    for name in WRAPPERS:
        module = sys.modules.get(name)
        if module is not None and not problem(module):
            wrap(module)
