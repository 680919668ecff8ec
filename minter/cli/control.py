"""Commands for bans and signing keys at run time; every change is audited (I8)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Literal

import msgspec
import typer
from msgspec import structs

from minter.cli.tables import (
    MOST_SHOWN,
    AsJson,
    Listing,
    guarded,
    open_service,
    show,
    show_live_tokens,
    whoami,
)
from minter.database import co_issuers, connection, control_changes, keyring, live_tokens
from minter.database.connection import transaction
from minter.database.control import read_control, read_keys
from minter.database.recovery import revocations
from minter.errors import InvalidRequest, SettingsError, Unavailable, UnknownKey
from minter.policy.clients import Ban, Client
from minter.service import Service
from minter.storages.dialects import Algorithm
from minter.tasks import bans as ban_names
from minter.tasks.recovery import Recovery, RecoveryReport
from minter.tokens import keys
from minter.tokens.co_issuer import kid_of
from minter.tokens.keystore import new_master_key

keys_app = typer.Typer(no_args_is_help=True, help="Make, rotate and revoke signing keys.")

KeyAlgorithm = Annotated[Algorithm, typer.Option(help="Only the key of this algorithm.")]
BanKind = Literal["client", "on_behalf_of", "vo", "activity", "storage", "path"]
Reason = Annotated[str, typer.Option(help="Reason, recorded in the audit.")]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.add_typer(keys_app, name="keys")
    app.command("ban")(ban)
    app.command("unban")(unban)
    app.command("bans")(bans)


# ── bans ─────────────────────────────────────────────────────────────────────────────────────


@guarded
def ban(
    kind: BanKind,
    value: str,
    reason: Reason,
    vo: Annotated[str | None, typer.Option(help="Ban in this VO only; in all VOs if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ban a client, account, VO, activity, storage or path, and list its tokens that are still valid."""
    service = open_service()
    made = ban_names.named(kind, value, vo)
    ban_names.check_known(service.pool, made)
    control_changes.add_ban(service.pool, made, reason, whoami())
    show_live_tokens(service, as_json, f"{kind} {value} is banned", made)


@guarded
def unban(
    kind: BanKind,
    value: str,
    vo: Annotated[str | None, typer.Option(help="VO that the ban was limited to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Lift a ban."""
    control_changes.lift_ban(open_service().pool, ban_names.named(kind, value, vo), whoami())
    show(as_json, {"kind": kind, "value": value}, lambda: f"{kind} {value} is not banned any more")


@guarded
def bans(
    kind: Annotated[
        BanKind | None,
        typer.Option(help="With --value: list the live tokens that a ban of this kind covers."),
    ] = None,
    value: Annotated[str | None, typer.Option()] = None,
    as_json: AsJson = False,
) -> None:
    """List the bans in force, or the live tokens that one ban covers."""
    service = open_service()
    if kind is not None and value is not None:
        show_live_tokens(service, as_json, f"{kind} {value}", ban_names.named(kind, value, None))
        return
    found = control_changes.list_bans(service.pool)
    headings = ("kind", "value", "vo", "reason", "since")
    show(as_json, found, lambda: Listing("Bans", headings, [tuple(b.values()) for b in found]))


# ── keys ─────────────────────────────────────────────────────────────────────────────────────


@keys_app.command("master")
@guarded
def keys_master() -> None:
    """Print a new master key; store it where only Minter's processes can read it."""
    typer.echo(new_master_key())


@keys_app.command("create")
@guarded
def keys_create(
    vo: Annotated[str, typer.Option(help="VO of the issuer.")],
    algorithm: KeyAlgorithm | None = None,
    as_json: AsJson = False,
) -> None:
    """Create a signing key of each algorithm: an issuer's first keys sign at once, later ones are standbys."""
    service = open_service()
    service.prepare()
    if vo not in service.loaded.settings.issuers:
        raise SettingsError(f"no [issuers.{vo}] in the settings")
    algorithms = (algorithm,) if algorithm else service.loaded.settings.issuers[vo].algorithms
    made = service.create_keys(vo, algorithms, whoami())
    show(
        as_json,
        [{"kid": k.kid, "state": k.state, "algorithm": k.algorithm} for k in made],
        lambda: "\n".join(f"key {k.kid} ({k.algorithm}) of VO {vo} is {k.state}" for k in made),
    )


@keys_app.command("list")
@guarded
def keys_list(as_json: AsJson = False) -> None:
    """List signing keys with their states and times."""
    service = open_service()
    rotation = service.engine.rotation
    with transaction(service.pool) as connection:
        ring = read_keys(connection)
    headings = (
        "kid",
        "vo",
        "algorithm",
        "state",
        "published",
        "may sign from",
        "signs until",
        "public until",
    )
    show(
        as_json,
        ring,
        lambda: Listing(
            "Signing keys",
            headings,
            [
                (
                    k.kid, k.vo, k.algorithm, k.state, k.published_at,
                    k.activated_at or keys.may_sign_from(k, rotation), keys.signs_until(k, rotation),
                    k.last_exp,
                )
                for k in ring
            ],
        ),
    )  # fmt: skip


@keys_app.command("rotate")
@guarded
def keys_rotate(
    vo: Annotated[str, typer.Option(help="VO of the issuer.")],
    algorithm: KeyAlgorithm | None = None,
    as_json: AsJson = False,
) -> None:
    """Make the standby key of each algorithm sign; beat does this by itself when the active key is due."""
    service = open_service()
    made = service.rotate_keys(vo, [algorithm] if algorithm else [], whoami())
    show(
        as_json,
        [{"kid": k.kid, "algorithm": k.algorithm} for k in made],
        lambda: "\n".join(
            f"{k.algorithm} key {k.kid} of VO {vo} signs now; a new standby is published" for k in made
        ),
    )


@keys_app.command("iam")
@guarded
def keys_iam(
    vo: Annotated[str, typer.Option(help="VO whose IAM signs under the same issuer.")],
    drop: Annotated[str | None, typer.Option(help="kid of a key to remove at once.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the IAM's keys that are published with Minter's (docs/co-issuer.md), or remove one."""
    service = open_service()
    if vo not in service.loaded.co_issuers:
        raise SettingsError(f"no [issuers.{vo}.co_issuer] in the settings")
    if drop is not None:
        co_issuers.drop(service.pool, vo, drop, service.clock(), whoami())
    known = co_issuers.known(service.pool, vo)
    show(
        as_json,
        known,
        lambda: Listing(
            f"{len(known.keys)} keys of the IAM, fetched {known.fetched_at or 'never'}",
            ("kid", "type", "algorithm", "answers without it"),
            [(kid_of(k), k.get("kty"), k.get("alg"), known.missing.get(kid_of(k))) for k in known.keys],
        ),
    )


@keys_app.command("revoke")
@guarded
def keys_revoke(
    kid: str,
    reason: Reason,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Revoke the key; without this, only list the tokens that would become invalid."
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            help="Let a standby key sign, made now if there is none, even if verifiers have not fetched it yet."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Revoke a signing key and so every token that it signed, the only way to stop an issued token.

    A verifier accepts these tokens until its cache of keys expires.
    """
    service = open_service()
    slow = f"verifiers trust the key until their caches expire: {live_tokens.VERIFIER_CACHES}"
    if yes:  # revoke before listing the tokens: reading the list takes time
        policy = service.engine.rotation
        if force:
            policy = keys.RotationPolicy(0, policy.lifetime_seconds, policy.resign_seconds)
            service.ensure_standby(kid, whoami())
        keyring.revoke(service.pool, kid, service.clock(), policy, whoami(), reason)
        for problem in service.maintain_keys(whoami()):
            typer.echo(problem, err=True)
        said = f"key {kid} is revoked; {slow}"
    else:
        said = f"revoking {kid} invalidates these tokens ({slow}); repeat with --yes"
    show_live_tokens(service, as_json, said, Ban("key", kid))
    if not yes:
        raise typer.Exit(1)


@keys_app.command("recover")
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
    key, clients = _revoked_key(service, kid)
    if yes and processes > 1:
        report = _in_processes(kid, processes)
    else:
        number, _, parts = part.partition("/")
        recovery = Recovery(service.engine, service.pool, key, clients)
        report = recovery.run(service.clock(), dry=not yes, part=int(number), parts=int(parts))
    (revoked,) = (r for r in revocations(service.pool, connection.instant(0)) if r.kid == kid)
    trusted = {name: revoked.revoked_at + length for name, length in live_tokens.CACHES.items()}
    facts = {
        **structs.asdict(report),
        "signed_from": revoked.activated_at,
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
    outputs = [child.communicate()[0] for child in children]
    report = RecoveryReport(kid)
    for child, output in zip(children, outputs, strict=True):
        if not output:
            raise Unavailable(f"a part of the recovery ended with {child.returncode}; start it again")
        report.add(msgspec.json.decode(output, type=RecoveryReport))
    return report


def _revoked_key(service: Service, kid: str) -> tuple[keys.Key, dict[int, Client]]:
    """Return a revoked key, and all clients by client_id; raises UnknownKey or InvalidRequest."""
    with transaction(service.pool) as opened:
        control = read_control(opened)
    key = next((k for k in control.ring if k.kid == kid), None)
    if key is None:
        raise UnknownKey(f"no key has the kid {kid!r}; run: minter keys list")
    if key.state != "revoked":
        raise InvalidRequest(f"key {kid} is {key.state}; run: minter keys revoke {kid} --reason … --yes")
    return key, {client.client_id: client for client in control.clients.values()}


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
        yield f"cancel and submit again: job {where}, {job.client}, request {job.request_id}"
    if max(len(report.unmade), len(report.jobs)) > MOST_SHOWN:
        yield f"{len(report.unmade)} not made anew and {len(report.jobs)} jobs in all; --json lists each"
    until = ", ".join(f"by {name} until {at:%F %H:%M} UTC" for name, at in trusted.items())
    yield f"the old key is trusted {until}"


@keys_app.command("rewrap")
@guarded
def keys_rewrap(vo: Annotated[str, typer.Option()], as_json: AsJson = False) -> None:
    """Encrypt a VO's secrets under its new master key.

    First give every process both master keys, separated by a comma, the new one first. Then run this
    command, and then remove the old key.
    """
    service = open_service()
    count = keyring.rewrap(service.pool, service.keystore, vo, whoami())
    show(
        as_json,
        {"vo": vo, "secrets": count},
        lambda: f"{count} secrets of VO {vo} are encrypted under the first master key",
    )
