"""The commands after a key leaked: `keys recover` and `keys cancel-jobs` (ADR 17)."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated

import msgspec
import typer
from msgspec import structs

from minter.cli.tables import MOST_SHOWN, AsJson, Listing, Progress, guarded, open_service, show
from minter.contract.messages import TokenAnswer
from minter.database import connection, live_tokens
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.database.recovery import revocations
from minter.errors import InvalidRequest, RequestError, Unavailable, UnknownKey
from minter.fts.rest import FTSClient
from minter.policy.clients import fits
from minter.policy.limits import COVER_SECONDS
from minter.service import Service
from minter.tasks.recovery import Recovery, RecoveryReport, RevokedJob, service_token
from minter.tokens import keys

KIDS = {"ignore_unknown_options": True}
"""Settings of commands whose argument is a kid: those of earlier releases may begin with `-`."""


def register(keys_app: typer.Typer) -> None:
    """Add these commands to the commands for keys."""
    keys_app.command("recover", context_settings=KIDS)(keys_recover)
    keys_app.command("cancel-jobs", context_settings=KIDS)(keys_cancel_jobs)


@guarded
def keys_recover(
    kid: str,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Make the live tokens anew; without this, only show what would be done."),
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that sign at the same time, one for each core.")
    ] = os.cpu_count() or 1,
    part: Annotated[str, typer.Option(hidden=True)] = "0/1",
    as_json: AsJson = False,
) -> None:
    """Make every live token of a revoked key anew, and list the FTS jobs that hold such tokens.

    Each request is decided again, with the bans, routes and limits of now. Clients get the new tokens under
    the old request_id. The command may be stopped and started again.
    """
    service = open_service()
    key = _revoked_key(service, kid)
    if yes and processes > 1:
        report = _in_processes(kid, processes)
    else:
        number, _, parts = part.partition("/")
        recovery = Recovery(service.engine, service.pool, key, service.clock)
        of_part = f"part {int(number) + 1} of {parts}: " if parts != "1" else ""
        progress = Progress()

        def note(sofar: RecoveryReport) -> None:
            progress.tell(f"{of_part}{sofar.made} tokens made anew of {sofar.tokens} seen so far")

        report = recovery.run(dry=not yes, part=int(number), parts=int(parts), note=note)
    (revoked,) = (r for r in revocations(service.pool, connection.instant(0)) if r.kid == kid)
    trusted = {name: revoked.revoked_at + length for name, length in live_tokens.CACHES.items()}
    facts = {
        **structs.asdict(report),
        "trusted_from": revoked.published_at,
        "revoked_at": revoked.revoked_at,
        "trusted_until": trusted,
    }
    show(as_json, facts, lambda: "\n".join(_recovery_lines(report, trusted, yes=yes)))
    if report.made < report.tokens:
        raise typer.Exit(1)


def _in_processes(kid: str, parts: int) -> RecoveryReport:
    """Do each part of a recovery in a process of its own; raises Unavailable if one of them fails."""
    command = [sys.executable, "-m", "minter.cli", "keys", "recover", kid, "--yes", "--json"]
    children = [
        subprocess.Popen(  # noqa: S603 - our own command
            [*command, "--processes", "1", "--part", f"{number}/{parts}"], stdout=subprocess.PIPE
        )
        for number in range(parts)
    ]
    try:
        outputs = [child.communicate()[0] for child in children]
    finally:
        for child in children:
            child.terminate()
    report = RecoveryReport(kid)
    for child, output in zip(children, outputs, strict=True):
        if not output:
            raise Unavailable(f"a part of the recovery ended with {child.returncode}; start it again")
        report.add(msgspec.json.decode(output, type=RecoveryReport))
    return report


def _revoked_key(service: Service, kid: str) -> keys.Key:
    """Return a revoked key; raises UnknownKey or InvalidRequest."""
    with transaction(service.pool) as opened:
        ring = read_keys(opened)
    key = next((k for k in ring if k.kid == kid), None)
    if key is None:
        raise UnknownKey(f"no key has the kid {kid!r}; run: minter keys list")
    if key.state != "revoked":
        raise InvalidRequest(f"key {kid} is {key.state}; run: minter keys revoke {kid} --reason … --yes")
    return key


def _recovery_lines(report: RecoveryReport, trusted: dict[str, datetime], *, yes: bool) -> Iterator[str]:
    """Yield the report as text; long lists are cut, and JSON has them whole."""
    owners = ", ".join(f"{name} {count}" for name, count in sorted(report.by_client.items())) or "none"
    yield f"{report.tokens} live tokens of {report.requests} requests ({owners}), {report.made} made anew"
    if not yes and report.made < report.tokens:
        yield "repeat with --yes to make the others anew"
    for name, count in sorted(report.own.items()):
        yield f"{count} tokens of the token endpoint: {name} asks for new ones by itself"
    for lost in report.unmade[:MOST_SHOWN]:
        yield f"not made anew: {lost.tokens} of {lost.client}, request {lost.request_id}: {lost.why}"
    for job in report.jobs[:MOST_SHOWN]:
        where = f"{job.job_id} at {job.fts or 'FTS'}"
        yield f"holds old tokens: job {where}, {job.client}, request {job.request_id}"
    if max(len(report.unmade), len(report.jobs)) > MOST_SHOWN:
        yield f"{len(report.unmade)} not made anew and {len(report.jobs)} jobs in all; --json lists each"
    if report.jobs:
        yield f"cancel these jobs, so that they are submitted again: minter keys cancel-jobs {report.kid}"
    until = ", ".join(f"by {name} until {at:%F %H:%M} UTC" for name, at in trusted.items())
    yield f"the old key is trusted {until}"


@guarded
def keys_cancel_jobs(
    kid: str,
    yes: Annotated[
        bool, typer.Option("--yes", help="Cancel the jobs; without this, only list them.")
    ] = False,
    rate: Annotated[float, typer.Option(min=0.1, help="Jobs that are cancelled a second, at most.")] = 10.0,
    ca: Annotated[
        str | None, typer.Option(help="CA file or folder for FTS; the system's if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cancel the FTS jobs that hold live tokens of a revoked key, so that their clients submit them again.

    FTS takes no other tokens for a job. Each job is cancelled with a token of the client that submitted it. A job
    that has ended stays as it is, and the command may be stopped and started again.
    """
    service = open_service()
    key = _revoked_key(service, kid)
    progress = Progress()
    jobs = (
        Recovery(service.engine, service.pool, key, service.clock)
        .run(dry=True, note=lambda sofar: progress.tell(f"{sofar.tokens} live tokens looked at"))
        .jobs
    )
    bearers: dict[tuple[str, str], TokenAnswer] = {}
    told = []
    for number, job in enumerate(jobs):
        progress.tell(f"{number} of {len(jobs)} jobs done")
        state = "not cancelled"
        if yes:
            time.sleep(1 / rate)
            try:
                state = _cancelled(service, key.vo, job, bearers, ca)
            except (RequestError, Unavailable) as error:
                state = f"not cancelled: {error.message}"
        told.append((job.fts, job.job_id, job.client, job.request_id, state))
    headings = ("fts", "job", "client", "request", "state")
    rows = [dict(zip(headings, row, strict=True)) for row in told]
    show(as_json, rows, lambda: Listing(f"{len(told)} FTS jobs", headings, told))
    if any(state.startswith("not cancelled") for *_, state in told):
        raise typer.Exit(1)


def _cancelled(
    service: Service, vo: str, job: RevokedJob, bearers: dict[tuple[str, str], TokenAnswer], ca: str | None
) -> str:
    """Cancel one job with a token of its client, which is kept in `bearers`; return the job's state."""
    known, now = service.loaded.settings.fts, service.clock()
    url = next((one.url for one in known if one.name == job.fts and fits(vo, one.vos)), "")
    if not url:
        raise InvalidRequest(f"the settings of VO {vo} have no FTS {job.fts!r}")
    bearer = bearers.get((job.client, url))
    if bearer is None or bearer.exp < now.timestamp() + COVER_SECONDS:
        bearer = bearers[job.client, url] = service_token(service.engine, job.client, url, now)
    return FTSClient(url, ca=ca).cancel(job.job_id, bearer)
