"""What is wrapped in DIRAC: the jobs that FTS3Agent submits, and the token that it fetches for FTS.

DIRAC has no extension point for either. The functions are compared with those that were tested; if one
differs, DIRAC stays as it is, and the log says so.
"""

from functools import partial, wraps
from pathlib import Path
from threading import Lock
from typing import Any

from msgspec import Struct

from minter.client import MinterClient, MinterError
from minter.errors import Unavailable
from minter.wrapping import difference

OPTIONS = "/Systems/DataManagement/Agents/FTS3Agent/Minter"
SECONDS = 5.0
"""How long Minter is waited for, before `Away` decides."""
AWAY = ("wait", "dirac", "x509")
LATER = "fetched when the job needs it"
"""Stands for DIRAC's own token for FTS until it is known that the job needs it."""
SIGNATURES = {
    "_constructTransferJob": (
        "self", "pinTime", "allLFNs", "target_spacetoken", "protocols", "tokensEnabled",
    ),
    "submit": ("self", "context", "ftsServer", "ucert", "pinTime", "protocols", "fts_access_token"),
    "generateContext": ("ftsServer", "ucert", "fts_access_token", "lifetime"),
}  # fmt: skip
"""Parameters of what is wrapped in FTS3Job, in DIRAC 9.1."""


class CSOptions(Struct, frozen=True):
    """The options of one VO in the CS; without a URL Minter is not used."""

    url: str
    client: str
    secret_file: str
    ca: str
    away: str


def read_options(vo: str, dirac_log: Any) -> CSOptions:
    """Return the options for a VO: those of its own section come before the common ones."""
    from DIRAC import gConfig  # noqa: PLC0415 - only DIRAC has DIRAC

    def option(name: str) -> str:
        common = gConfig.getValue(f"{OPTIONS}/{name}", "")
        return str(gConfig.getValue(f"{OPTIONS}/{vo}/{name}", common) if vo else common)

    away = option("Away") or "wait"
    if away not in AWAY:
        dirac_log.error("Away is none of those known, so files wait", f"{OPTIONS}/Away = {away}")
        away = "wait"
    return CSOptions(option("URL"), option("Client"), option("SecretFile"), option("CA"), away)


class Clients:
    """One client for each set of options; it may be used by several threads."""

    def __init__(self) -> None:
        self._made: dict[tuple[CSOptions, str], MinterClient] = {}
        self._lock = Lock()

    def get(self, options: CSOptions) -> MinterClient:
        """Return the client, with the secret that its file has now; raises MinterError for a bad option."""
        path = Path(options.secret_file)
        try:
            secret = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no ASCII text"
            raise MinterError(f"{OPTIONS}/SecretFile {path} cannot be read: {why}") from None
        with self._lock:
            made = self._made.get((options, secret))
            if made is None:
                made = self._made[options, secret] = MinterClient(
                    options.url, options.client, secret, ca=options.ca or None, timeout_seconds=SECONDS
                )
        return made


class TokensLater:
    """Stands for DIRAC's TokenManager client, which is asked for FTS's token only when a job needs it."""

    def getToken(self, **_: Any) -> dict[str, Any]:  # noqa: N802 - DIRAC's name
        """Return LATER, which `Jobs` replaces."""
        return {"OK": True, "Value": {"access_token": LATER}}


class Jobs:
    """What DIRAC's FTS3Job does with tokens of Minter; the functions of DIRAC that it wraps are its own."""

    def __init__(self, job_class: Any, storage_element: Any, manager: Any, dirac_log: Any) -> None:
        self.construct = job_class._constructTransferJob  # noqa: SLF001
        self.submit, self.context = job_class.submit, job_class.generateContext
        self._storage_element = storage_element
        self._manager = manager
        self._log = dirac_log
        self._clients = Clients()

    def constructed(self, job: Any, arguments: tuple[Any, ...], *, tokens: bool) -> Any:
        """Return DIRAC's result of making a job for FTS, with tokens if they are wanted."""
        options = read_options(job.vo, self._log)
        if not (tokens and options.url and self._switched(job)):
            return self.construct(job, *arguments, tokens)
        made = self.construct(job, *arguments, False)
        if not made["OK"]:
            return made
        try:
            content, files = made["Value"]
            return self._filled(job, content, files, options)
        except Unavailable as error:
            self._log.error("Minter is away", f"Away = {options.away}: {error}")
            if options.away == "wait":
                return _refused(error)
            return self.construct(job, *arguments, True) if options.away == "dirac" else made
        except MinterError as error:
            return _refused(error)

    def _filled(self, job: Any, content: dict[str, Any], files: set[Any], options: CSOptions) -> Any:
        minter = self._clients.get(options)
        filled = minter.fill_job(content, fts=job.ftsServer, on_behalf_of=job.username or "")
        if filled.job is None or filled.bearer is None:
            return _refused("; ".join(refused["error"]["error_description"] for refused in filled.refused))
        filled.job["params"]["job_metadata"]["useTokens"] = True
        job.generateContext = partial(self._with_bearer, filled.bearer.reveal())
        kept = {file["metadata"].get("fileID") for file in filled.job["files"]}
        return {"OK": True, "Value": (filled.job, files & kept)}  # refused files are tried again

    def submitted(self, job: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Submit a job with the context that it needs, which is known once the job is made."""
        job.generateContext = partial(self._by_dirac, job.userGroup)
        try:
            return self.submit(job, *arguments, **named)
        finally:
            del job.generateContext  # the class's own again; a token is kept no longer than the call

    def _switched(self, job: Any) -> bool:
        names = [name for name in (job.sourceSE, job.multiHopSE, job.targetSE) if name]
        told = [self._storage_element(name, vo=job.vo).options.get("TokenSupport", "") for name in names]
        return all(str(value).lower() in ("true", "yes") for value in told)

    def _with_bearer(self, bearer: str, server: Any, _ucert: Any, _token: Any = None, **more: Any) -> Any:
        return self.context(server, None, bearer, **more)

    def _by_dirac(self, group: str, server: Any, ucert: Any, token: Any = None, **more: Any) -> Any:
        if token == LATER:
            found = self._manager.getToken(userGroup=group, requiredTimeLeft=3600, scope=["fts"])
            if not found["OK"]:
                return found
            token = found["Value"]["access_token"]
        return self.context(server, ucert, token, **more)


def wrap(agent: Any, job_class: Any, storage_element: Any, dirac_log: Any) -> None:
    """Let FTS3Job get its tokens from Minter: those of the files, and the one for submitting to FTS.

    `agent` is DIRAC's module of the agent, `job_class` its FTS3Job, `storage_element` its StorageElement,
    `dirac_log` its logger, because DIRAC keeps no lines of others.
    """
    if getattr(job_class, "_minter_wrapped", False):
        return
    differences = [difference(job_class, path, expected) for path, expected in SIGNATURES.items()]
    if any(differences) or not hasattr(agent, "gTokenManager"):
        why = "; ".join(filter(None, differences)) or "its agent has no gTokenManager"
        dirac_log.error("this DIRAC is not known, so it stays without tokens of Minter", f"FTS3Job {why}")
        return
    jobs = Jobs(job_class, storage_element, agent.gTokenManager, dirac_log)

    @wraps(jobs.construct)
    def construct(
        self: Any, pinTime: Any, allLFNs: Any, target_spacetoken: Any, protocols: Any = None,  # noqa: N803
        tokensEnabled: bool = False,  # noqa: N803
    ) -> Any:  # fmt: skip
        return jobs.constructed(
            self, (pinTime, allLFNs, target_spacetoken, protocols), tokens=bool(tokensEnabled)
        )

    @wraps(jobs.submit)
    def submit(self: Any, *arguments: Any, **named: Any) -> Any:
        return jobs.submitted(self, arguments, named)

    agent.gTokenManager = TokensLater()
    job_class._constructTransferJob, job_class.submit = construct, submit  # noqa: SLF001
    job_class._minter_wrapped = True  # noqa: SLF001


def _refused(why: object) -> dict[str, Any]:
    """Return DIRAC's error for a job that is not submitted; its files are tried again."""
    return {"OK": False, "Errno": 0, "Message": f"no tokens of Minter for this job: {why}"}
