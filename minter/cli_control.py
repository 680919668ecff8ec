"""Commands that change who may do what, at run time: clients, bans, signing keys. All are audited (I8)."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from joserfc.jwk import ECKey

from minter import alive, catalogue, database, keyring, keys, wiring
from minter.clients import Ban, Client
from minter.console import AsJson, as_table, guarded, open_service, read_object, show, whoami
from minter.dialects import OPERATIONS
from minter.errors import InvalidRequest, SettingsError, UnknownClient
from minter.keystore import new_master_key
from minter.scopes import check_path
from minter.storages import squash

clients_app = typer.Typer(no_args_is_help=True, help="Register, change and disable clients.")
keys_app = typer.Typer(no_args_is_help=True, help="Make, rotate and revoke signing keys.")

BanKind = Literal["client", "on_behalf_of", "vo", "activity", "storage", "path"]
MOST_SHOWN, MOST_LISTED = 20, 10_000
"""Living tokens that are named on a terminal, and in JSON; the counts are of all."""

Operations = Annotated[list[str] | None, typer.Option("--operation", help="Allowed operation; all if none.")]
Paths = Annotated[list[str] | None, typer.Option("--path", help="Allowed path prefix; all if none.")]
MaxLifetime = Annotated[int | None, typer.Option(help="Longest token, in seconds.")]
ReplyQueues = Annotated[
    list[str] | None, typer.Option("--reply-queue", help="Durable queue that answers may go to.")
]
JweKey = Annotated[
    Path | None, typer.Option(help="Public JWK that answers on durable queues are encrypted to.")
]
NewJweKey = Annotated[
    Path | None,
    typer.Option(help="Make the key for answers on durable queues; write its private JWK here, mode 600."),
]
SecretFile = Annotated[Path | None, typer.Option(help="Make a secret for HTTP and write it here, mode 600.")]
Reason = Annotated[str, typer.Option(help="Why, for the audit.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the whole."""
    app.add_typer(clients_app, name="clients")
    app.add_typer(keys_app, name="keys")
    app.command("ban")(ban)
    app.command("unban")(unban)
    app.command("bans")(bans)


@contextmanager
def _private_file(path: Path | None, text: str) -> Iterator[None]:
    """Write a secret to a new file that only its owner can read, before what it is for is done.

    An existing file is not overwritten; if what it is for fails, the file goes again.
    """
    if path is None:
        yield
        return
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    except FileExistsError:
        raise InvalidRequest(f"{path} exists already; name a new file") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield
    except BaseException:
        path.unlink()
        raise


# ── clients ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Limits:
    """Limits as given on the command line; what is None was not given."""

    operations: list[str] | None
    paths: list[str] | None
    max_lifetime: int | None
    reply_queues: list[str] | None
    jwe_key: Path | None
    new_jwe_key: Path | None
    private_jwk: str = ""

    def columns(self) -> dict[str, Any]:
        """Return the columns that they set; raises InvalidRequest."""
        if unknown := set(self.operations or ()) - set(OPERATIONS):
            raise InvalidRequest(f"unknown operations {sorted(unknown)}, expected {', '.join(OPERATIONS)}")
        if reserved := [q for q in self.reply_queues or () if q.startswith("minter.")]:
            raise InvalidRequest(f"queues {reserved} have the engine's own prefix; choose other names")
        given = {
            "operations": None if self.operations is None else sorted(self.operations),
            "paths": None if self.paths is None else [check_path(p) for p in self.paths],
            "max_lifetime_seconds": self.max_lifetime,
            "reply_queues": self.reply_queues,
            "jwe_key": self._key(),
        }
        return {name: value for name, value in given.items() if value is not None}

    def _key(self) -> dict[str, Any] | None:
        if self.jwe_key is not None and self.new_jwe_key is not None:
            raise InvalidRequest("--jwe-key and --new-jwe-key exclude each other")
        if self.new_jwe_key is not None:
            made = ECKey.generate_key("P-256", auto_kid=True)
            self.private_jwk = json.dumps(made.as_dict(private=True))
            return dict(made.as_dict(private=False))
        return keys.check_jwe_key(read_object(self.jwe_key, "key")) if self.jwe_key else None


@clients_app.command("add")
@guarded
def clients_add(
    name: str,
    vo: Annotated[str, typer.Option()],
    operation: Operations = None,
    path: Paths = None,
    max_lifetime: MaxLifetime = None,
    reply_queue: ReplyQueues = None,
    jwe_key: JweKey = None,
    new_jwe_key: NewJweKey = None,
    secret_file: SecretFile = None,
    as_json: AsJson = False,
) -> None:
    """Register a client: the AMQP user that it will connect as."""
    limits = _Limits(operation, path, max_lifetime, reply_queue, jwe_key, new_jwe_key)
    columns = limits.columns()
    service = open_service()
    service.prepare()
    client = Client(
        client_id=0, name=name, vo=vo, sub=str(wiring.new_uuid7()),
        operations=frozenset(columns.get("operations", ())), paths=tuple(columns.get("paths", ())),
        max_lifetime_seconds=max_lifetime, reply_queues=tuple(reply_queue or ()),
        jwe_key=columns.get("jwe_key"),
    )  # fmt: skip
    secret = wiring.new_secret()
    with _private_file(new_jwe_key, limits.private_jwk), _private_file(secret_file, secret):
        catalogue.add_client(service.pool, client, whoami())
        if secret_file is not None:
            service.set_secret(client, secret, whoami())
    show(
        as_json,
        {"name": name, "vo": vo, "sub": client.sub},
        lambda: f"client {name} of VO {vo}: sub {client.sub}",
    )


@clients_app.command("change")
@guarded
def clients_change(
    name: str,
    operation: Operations = None,
    path: Paths = None,
    max_lifetime: MaxLifetime = None,
    reply_queue: ReplyQueues = None,
    jwe_key: JweKey = None,
    new_jwe_key: NewJweKey = None,
    unlimited: Annotated[
        list[str] | None, typer.Option(help="Drop a limit: operations, paths, max_lifetime_seconds.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set what is given, and leave all else; it binds whatever is recorded after it."""
    dropped: dict[str, Any] = {"operations": [], "paths": [], "max_lifetime_seconds": None}
    if unknown := set(unlimited or ()) - dropped.keys():
        raise InvalidRequest(f"no limits {sorted(unknown)}, expected {', '.join(dropped)}")
    limits = _Limits(operation, path, max_lifetime, reply_queue, jwe_key, new_jwe_key)
    columns = limits.columns()
    columns |= {name: dropped[name] for name in unlimited or ()}
    if not columns:
        raise InvalidRequest("nothing to change; name a limit, a queue or a key")
    with _private_file(new_jwe_key, limits.private_jwk):
        catalogue.change_client(open_service().pool, name, columns, whoami())
    show(
        as_json,
        {"name": name, "changed": sorted(columns)},
        lambda: f"client {name}: {', '.join(columns)} set",
    )


@clients_app.command("rotate")
@guarded
def clients_rotate(
    name: str,
    secret_file: Annotated[Path, typer.Option(help="Write the new secret here, mode 600.")],
    keep_hours: Annotated[
        float, typer.Option(help="How long the old secret is still taken.", min=0, max=720)
    ] = 24,
    as_json: AsJson = False,
) -> None:
    """Give a client a new secret for HTTP."""
    service = open_service()
    client = _clients(service).get(name)
    if client is None:
        raise UnknownClient(f"client {name!r} is not registered; run: minter clients list")
    secret = wiring.new_secret()
    with _private_file(secret_file, secret):
        service.set_secret(client, secret, whoami(), timedelta(hours=keep_hours))
    show(as_json, {"name": name}, lambda: f"client {name} has a new secret, in {secret_file}")


@clients_app.command("disable")
@guarded
def clients_disable(name: str, as_json: AsJson = False) -> None:
    """Refuse all that a client asks, and list what it holds that works."""
    service = open_service()
    catalogue.disable_client(service.pool, name, whoami(), disabled=True)
    _show_living(service, as_json, f"client {name} is disabled", Ban("client", name))


@clients_app.command("enable")
@guarded
def clients_enable(name: str, as_json: AsJson = False) -> None:
    """Serve a disabled client again."""
    catalogue.disable_client(open_service().pool, name, whoami(), disabled=False)
    show(as_json, {"name": name}, lambda: f"client {name} is enabled")


@clients_app.command("list")
@guarded
def clients_list(as_json: AsJson = False) -> None:
    """List clients and their limits."""
    found = list(_clients(open_service()).values())
    headings = ("name", "vo", "sub", "operations", "paths", "max lifetime s", "reply queues", "disabled")
    show(
        as_json,
        found,
        lambda: as_table(
            "Clients",
            headings,
            [
                (
                    c.name, c.vo, c.sub, ", ".join(sorted(c.operations)) or "all",
                    ", ".join(c.paths) or "all", c.max_lifetime_seconds, ", ".join(c.reply_queues),
                    c.disabled or None,
                )
                for c in found
            ],
        ),
    )  # fmt: skip


def _clients(service: wiring.Service) -> dict[str, Client]:
    with database.transaction(service.pool) as connection:
        return dict(database.read_control(connection).clients)


# ── bans ─────────────────────────────────────────────────────────────────────────────────────


def _ban(kind: str, value: str, vo: str | None) -> Ban:
    if kind == "path":
        value = check_path(squash(value))
    return Ban(kind, value, vo)


def _check_known(service: wiring.Service, ban: Ban) -> None:
    """Raise InvalidRequest for a name that nothing has: a ban with a typing error bans nobody."""
    known = catalogue.names(service.pool, ban.kind)
    if known is not None and ban.value not in known:
        near = ", ".join(get_close_matches(ban.value, known, 3)) or "none is near it"
        raise InvalidRequest(f"no {ban.kind} is named {ban.value!r}; {near}")


@guarded
def ban(
    kind: BanKind,
    value: str,
    reason: Reason,
    vo: Annotated[str | None, typer.Option(help="Only in this VO; in all if none.")] = None,
    as_json: AsJson = False,
) -> None:
    """Refuse all that it covers from now on, and list what is out and works."""
    service = open_service()
    made = _ban(kind, value, vo)
    _check_known(service, made)
    catalogue.add_ban(service.pool, made, reason, whoami())
    _show_living(service, as_json, f"{kind} {value} is banned", made)


@guarded
def unban(
    kind: BanKind,
    value: str,
    vo: Annotated[str | None, typer.Option(help="The VO that was named with the ban.")] = None,
    as_json: AsJson = False,
) -> None:
    """Lift a ban."""
    catalogue.lift_ban(open_service().pool, _ban(kind, value, vo), whoami())
    show(as_json, {"kind": kind, "value": value}, lambda: f"{kind} {value} is not banned any more")


@guarded
def bans(
    kind: Annotated[BanKind | None, typer.Option(help="With --value: list what works under it.")] = None,
    value: Annotated[str | None, typer.Option()] = None,
    as_json: AsJson = False,
) -> None:
    """List the bans in force, or the living tokens under one."""
    service = open_service()
    if kind is not None and value is not None:
        _show_living(service, as_json, f"{kind} {value}", _ban(kind, value, None))
        return
    found = catalogue.list_bans(service.pool)
    headings = ("kind", "value", "vo", "reason", "since")
    show(as_json, found, lambda: as_table("Bans", headings, [tuple(b.values()) for b in found]))


def _show_living(service: wiring.Service, as_json: bool, done: str, what: Ban) -> None:
    """Say what was done and what still works: nothing but revoking its key stops a token (I9)."""
    living = alive.under(service.pool, what.kind, what.value, what.vo, service.clock())
    most = MOST_LISTED if as_json else MOST_SHOWN
    storages: Counter[str] = Counter()
    found: list[alive.Living] = []
    until = 0
    for token in living:
        storages[token.storage] += 1
        until = max(until, token.exp)
        if len(found) < most:
            found.append(token)
    total = storages.total()
    show(
        as_json,
        {"done": done, "total": total, "storages": storages, "until": until or None, "alive": found},
        lambda: as_table(
            f"{done}; {total} tokens are out and work"
            + (f", the last until {database.instant(until):%F %T} UTC; tell the sites" if until else ""),
            ("storage", "jti", "scope", "until"),
            [(t.storage, t.jti, t.scope, database.instant(t.exp)) for t in found]
            + [(s, f"{n} in all", "", "") for s, n in storages.most_common() if total > len(found)],
        ),
    )


# ── keys ─────────────────────────────────────────────────────────────────────────────────────


@keys_app.command("master")
@guarded
def keys_master() -> None:
    """Print a fresh master key, to be kept where only the workers can read it."""
    typer.echo(new_master_key())


@keys_app.command("create")
@guarded
def keys_create(vo: Annotated[str, typer.Option()], as_json: AsJson = False) -> None:
    """Make a signing key: an issuer's first is active at once, a later one stands by."""
    service = open_service()
    service.prepare()
    if vo not in service.loaded.settings.issuers:
        raise SettingsError(f"no [issuers.{vo}] in the settings")
    algorithm = service.loaded.settings.issuers[vo].algorithm
    kid, state = service.create_key(vo, algorithm, whoami())
    show(
        as_json,
        {"kid": kid, "state": state, "algorithm": algorithm},
        lambda: f"key {kid} ({algorithm}) of VO {vo} is {state}",
    )


@keys_app.command("list")
@guarded
def keys_list(as_json: AsJson = False) -> None:
    """List keys with their states and instants."""
    service = open_service()
    rotation = service.engine.rotation
    with database.transaction(service.pool) as connection:
        ring = database.read_keys(connection)
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
        lambda: as_table(
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
def keys_rotate(vo: Annotated[str, typer.Option()], as_json: AsJson = False) -> None:
    """Put the standby in the active key's place; beat does it when the active key's time is over."""
    service = open_service()
    key = keyring.rotate(service.pool, vo, service.clock(), service.engine.rotation, whoami())
    service.maintain_keys(whoami())
    show(as_json, {"kid": key.kid}, lambda: f"key {key.kid} of VO {vo} signs now; a new standby is published")


@keys_app.command("revoke")
@guarded
def keys_revoke(
    kid: str,
    reason: Reason,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, only say what it kills.")] = False,
    force: Annotated[
        bool, typer.Option(help="Let a standby sign that verifiers may not have fetched yet.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Kill every token that a key signed: the only way to stop one, as fast as verifiers' caches."""
    service = open_service()
    slow = f"verifiers go on trusting it for their caches' time: {alive.VERIFIER_CACHES}"
    if yes:  # first the revocation, then the list: reading it takes its time
        policy = service.engine.rotation
        if force:
            policy = keys.RotationPolicy(0, policy.lifetime_seconds, policy.resign_seconds)
        keyring.revoke(service.pool, kid, service.clock(), policy, whoami(), reason)
        for problem in service.maintain_keys(whoami()):
            typer.echo(problem, err=True)
        said = f"key {kid} is revoked; {slow}"
    else:
        said = f"revoking {kid} kills these ({slow}); repeat with --yes"
    _show_living(service, as_json, said, Ban("key", kid))
    if not yes:
        raise typer.Exit(1)


@keys_app.command("rewrap")
@guarded
def keys_rewrap(vo: Annotated[str, typer.Option()], as_json: AsJson = False) -> None:
    """Encrypt a VO's secrets under its new master key.

    First give every process both master keys, the new one first and a comma between; then run
    this; then take the old one away.
    """
    service = open_service()
    count = keyring.rewrap(service.pool, service.keystore, vo, whoami())
    show(
        as_json,
        {"vo": vo, "secrets": count},
        lambda: f"{count} secrets of VO {vo} are under the first master key",
    )
