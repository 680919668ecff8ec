"""The demo: fill Rucio's example FTS jobs through the client and two workers, and verify each token.

Verification shares no code with minting: joserfc checks the signatures, the tokens are compared with
their database rows, and FTS's rules for a submitted job are applied as FTS states them.
"""

import gzip
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from joserfc import jwk, jws
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from minter.cli.tables import trace_table
from minter.client import FileRequest, FilledJob, MinterClient, Token
from minter.contract.messages import FillRequest
from minter.database import traces
from minter.database.connection import transaction
from minter.database.control import read_control, read_keys
from minter.database.traces import TraceRecord
from minter.errors import MinterError
from minter.fts.jobs import from_fill
from minter.local.stack import Stack
from minter.policy.explain import explain
from minter.service import Service
from minter.tokens import keys
from minter.tokens.claims import unverified_claims

FTS_CLAIM_CHARACTERS = 1024
WARM_UP = FileRequest(sources=("davs://se01.boreas.example.org/atlas/atlasdatadisk/rucio/warm/up",))


def read_jobs(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every job of a folder as (file name, body); files are .json or .jsonl, plain or gzipped."""
    for path in sorted(folder.iterdir()):
        if path.name == "index.json":
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        bodies = raw.splitlines() if ".jsonl" in path.name else [raw]
        for body in bodies:
            yield path.name, json.loads(body)


def fts_objections(job: Mapping[str, Any], now: int) -> list[str]:
    """Return what FTS would object to in a job with tokens (facts of fts-rest and fts3 3.14).

    FTS needs both token lists, with one token for each URL. Every token must have iss, sub, nbf, exp,
    scope and aud, must be valid now and for max_time_in_queue hours, and scope and aud must fit columns of
    1024 characters. A job of unmanaged tokens must not hold the scope offline_access.
    """
    objections = []
    params = job["params"]
    if params.get("unmanaged_tokens") is not True:
        objections.append("unmanaged_tokens is not set")
    hours = params.get("max_time_in_queue")
    if not isinstance(hours, int) or hours < 1:
        objections.append(f"max_time_in_queue is {hours!r}")
    for number, file in enumerate(job["files"]):
        for side in ("source", "destination"):
            urls, tokens = file[f"{side}s"], file[f"{side}_tokens"]
            if not urls or len(urls) != len(tokens):
                objections.append(f"file {number}: {len(tokens)} tokens for {len(urls)} {side}s")
            for url, token in zip(urls, tokens, strict=False):
                objections += [
                    f"file {number} {side}: {o}" for o in _token_objections(token, url, hours, now)
                ]
    return objections


def _token_objections(token: str, url: str, hours: int, now: int) -> Iterator[str]:
    claims = unverified_claims(token.encode())[1]
    missing = {"iss", "nbf", "exp", "scope", "aud", "sub"} - claims.keys()
    if missing:
        yield f"claims missing: {sorted(missing)}"
        return
    audience = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
    if len(" ".join(audience)) > FTS_CLAIM_CHARACTERS or len(str(claims["scope"])) > FTS_CLAIM_CHARACTERS:
        yield "scope or aud does not fit FTS's column"
    if "offline_access" in str(claims["scope"]).split():
        yield "offline_access in an unmanaged token"
    if int(str(claims["nbf"])) > now or int(str(claims["iat"])) > now:
        yield "not valid yet"
    if int(str(claims["exp"])) < now + hours * 3600:
        yield "expires before the job's time in the queue is over"
    host = (urlsplit(url).hostname or "").lower()
    if not any(host in a for a in audience):
        yield f"audience {audience} is not the endpoint's"


class Verifier:
    """Checks tokens with joserfc and the public keys alone, and reads the rows that record them."""

    def __init__(self, service: Service) -> None:
        with transaction(service.pool) as connection:
            ring = read_keys(connection)
        self._service = service
        self._keys = jwk.KeySet.import_key_set(keys.jwks(ring, service.clock()))  # type: ignore[arg-type]

    def verify(self, token: str) -> dict[str, Any]:
        """Return the claims of a token if its signature verifies; raises joserfc's error otherwise."""
        verified = jws.deserialize_compact(token, self._keys, algorithms=["ES256", "RS256"])
        claims: dict[str, Any] = json.loads(verified.payload)
        return claims

    def rows(self, request_id: Any) -> dict[str, TraceRecord]:
        """Return the recorded tokens of a request by jti."""
        found, _ = traces.find_request(self._service.pool, request_id)
        return {str(one.jti): one for one in found}


class Demo:
    """One run of the demo."""

    def __init__(self, stack: Stack, console: Console, jobs_folder: Path) -> None:
        self.stack = stack
        self.service = stack.service
        self.console = console
        self.jobs = list(read_jobs(jobs_folder))
        self.failures: list[str] = []
        self.verified = 0
        self.tokens: list[tuple[TraceRecord, dict[str, Any]]] = []
        self.algorithms: defaultdict[str, set[str]] = defaultdict(set)

    def run(self) -> int:
        """Run the demo; return 0 if there are tokens and every token and job passed every check, else 1."""
        filled, seconds = self._fill()
        self._verify(filled)
        self._tables()
        self._refusals(filled)
        self._one(filled)
        count = len(self.tokens)
        self.console.print(
            f"\n[bold]{count} tokens for {len(self.jobs)} jobs in {seconds:.2f} s: "
            f"{count / seconds:,.0f} tokens/s[/bold], from client to client, recorded and durable."
        )
        self.console.print(f"{self.verified} of {count} tokens verified by joserfc and equal to their rows.")
        for failure in self.failures[:20]:
            self.console.print(f"[red]FAILED[/red] {failure}", markup=True)
        return 1 if self.failures or self.verified != count or not count else 0

    def _fill(self) -> tuple[list[FilledJob | MinterError], float]:
        url = self.stack.environ["MINTER_BROKER_URL"]
        name = self.service.loaded.settings.broker.local_client
        with MinterClient(url, name) as client, Progress(console=self.console) as progress:
            client.mint([WARM_UP])  # connects, so that connecting is not part of the measured rate
            bar = progress.add_task("filling Rucio's FTS jobs", total=len(self.jobs))
            started = time.perf_counter()
            filled = client.fill_jobs(
                [job for _, job in self.jobs],
                progress=lambda done, _: progress.update(bar, completed=done),
            )
            return filled, time.perf_counter() - started

    def _verify(self, filled: Sequence[FilledJob | MinterError]) -> None:
        verifier = Verifier(self.service)
        now = int(self.service.clock().timestamp())
        for (name, _), job in zip(self.jobs, filled, strict=True):
            if isinstance(job, MinterError):
                self.failures.append(f"{name}: {job}")
                continue
            if job.job is not None:
                self.failures += [f"{name}: {o}" for o in fts_objections(job.job, now)]
            rows = verifier.rows(job.request_id)
            for token in _tokens(job):
                claims = verifier.verify(token)
                row = rows.pop(claims["jti"], None)
                if row is None or json.loads(row.payload) != claims:
                    self.failures.append(f"{name}: token {claims['jti']} differs from its row")
                    continue
                self.verified += 1
                self.tokens.append((row, claims))
                self.algorithms[row.storage].add(str(unverified_claims(token.encode())[0]["alg"]))
            self.failures += [f"{name}: recorded, not delivered: {jti}" for jti in rows]

    def _tables(self) -> None:
        directory = self.service.loaded.policy.directories
        areas = {a.storage: a for d in directory.values() for a in d.areas()}
        by_storage: dict[str, list[dict[str, Any]]] = {}
        for row, claims in self.tokens:
            name = row.storage
            by_storage.setdefault(name, []).append(claims)
        table = Table(title="Tokens by storage")
        for heading in (
            "storage",
            "dialect",
            "algorithm",
            "audience",
            "tokens",
            "scopes beyond read/create/modify of the file",
            "lifetime",
        ):
            table.add_column(heading, justify="right" if heading == "tokens" else "left")
        for name, group in sorted(by_storage.items()):
            area = areas.get(name)
            extras = Counter(q for c in group for q in _extras(c))
            lifetimes = [c["exp"] - c["iat"] for c in group]
            table.add_row(
                name,
                area.dialect.name if area else "",
                ", ".join(sorted(self.algorithms[name])),
                str(group[0]["aud"]),
                str(len(group)),
                ", ".join(f"{q} ×{n}" for q, n in extras.items()) or "none",
                _hours(min(lifetimes), max(lifetimes)),
            )
        self.console.print(table)
        operations = Table(title="Tokens by operation")
        for heading in ("scopes", "tokens", "lifetime"):
            operations.add_column(heading)
        groups: dict[str, list[int]] = {}
        for _, c in self.tokens:
            names = " ".join(sorted({w.partition(":")[0] for w in c["scope"].split(" ")}))
            groups.setdefault(names, []).append(c["exp"] - c["iat"])
        for names, lifecycle in sorted(groups.items()):
            operations.add_row(names, str(len(lifecycle)), _hours(min(lifecycle), max(lifecycle)))
        self.console.print(operations)

    def _refusals(self, filled: Sequence[FilledJob | MinterError]) -> None:
        table = Table(title="Refused, with reasons")
        for heading in ("what", "reason", "example"):
            table.add_column(heading)
        found: dict[tuple[str, str], list[str]] = {}
        for job in filled:
            if isinstance(job, FilledJob):
                for what, entries in (("file", job.refused), ("source", job.dropped_sources)):
                    for entry in entries:
                        error = entry["error"]
                        messages = found.setdefault((what, error["reason"]), [])
                        messages.append(error["error_description"])
        for (what, reason), messages in sorted(found.items()):
            count = f"{len(messages)} {what}{'s' if len(messages) > 1 else ''}"
            table.add_row(count, reason, messages[0])
        self.console.print(table)

    def _one(self, filled: Sequence[FilledJob | MinterError]) -> None:
        """Show one job in detail: a decoded token, the output of explain, and the trace of its file."""
        number = next(i for i, f in enumerate(filled) if isinstance(f, FilledJob) and f.job)
        job = filled[number]
        assert isinstance(job, FilledJob)
        assert job.job is not None
        token = job.job["files"][0]["destination_tokens"][0]
        header, claims = unverified_claims(token.encode())
        self.console.print("\n[bold]One token, decoded[/bold] (its signature is not shown)")
        self.console.print_json(data={"header": header, "claims": claims})
        request = from_fill(FillRequest(request_id=job.request_id, job=self.jobs[number][1]))
        with transaction(self.service.pool) as connection:
            control = read_control(connection)
        client = control.clients[self.service.loaded.settings.broker.local_client]
        lines = explain(self.service.loaded.policy.decide(request, client, control.bans))
        start = next(i for i, line in enumerate(lines) if line.startswith("file 0 destination"))
        self.console.print("[bold]Why: minter explain[/bold]")
        for line in lines[start : start + 9]:
            self.console.print(line, markup=False, highlight=False)
            if line.startswith("  lifetime"):
                break
        path = str(claims["scope"]).split(" ")[0].partition(":")[2]
        self.console.print(f"[bold]Trace: minter trace --path {path}[/bold]")
        now = self.service.clock()
        self.console.print(trace_table(
            traces.find(
                self.service.pool, "path", path, self.service.since(1), now + timedelta(days=1)
            )
        ))  # fmt: skip


def _tokens(job: FilledJob) -> Iterator[str]:
    for file in job.job["files"] if job.job else ():
        yield from file["source_tokens"]
        yield from file["destination_tokens"]
    if isinstance(job.bearer, Token):
        yield job.bearer.reveal()


def _extras(claims: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of a token's scopes beyond one read, create or modify of its file."""
    words = [w.partition(":") for w in claims["scope"].split(" ")]
    if len(words) > 1:
        main = next((w for w in words if w[0] in ("storage.modify", "storage.create")), words[0])
        for name, _, path in words:
            if (name, _, path) != main:
                yield name if path == main[2] else f"{name} on the directory"


def _hours(low: int, high: int) -> str:
    return f"{low / 3600:.1f} h" if low == high else f"{low / 3600:.1f}-{high / 3600:.1f} h"
