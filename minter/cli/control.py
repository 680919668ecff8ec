"""Commands for bans and signing keys at run time; every change is audited (I8)."""

from typing import Annotated, Literal

import typer

from minter.cli import recovery
from minter.cli.tables import AsJson, Listing, guarded, open_service, show, show_live_tokens, whoami
from minter.database import co_issuers, control_changes, keyring, live_tokens
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.errors import SettingsError
from minter.policy.clients import Ban
from minter.storages.dialects import Algorithm
from minter.tasks import bans as ban_names
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
    recovery.register(keys_app)
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


@keys_app.command("revoke", context_settings=recovery.KIDS)
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
