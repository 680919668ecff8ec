"""Commands that register, change and disable clients at run time; every change is audited (I8)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from joserfc.jwk import ECKey

from minter.cli.tables import (
    AsJson,
    Listing,
    guarded,
    not_registered,
    open_service,
    read_object,
    show,
    show_live_tokens,
    token_on_input,
    whoami,
)
from minter.contract.operations import OPERATIONS
from minter.database import control_changes
from minter.database.connection import instant, transaction
from minter.database.control import read_control, read_keys
from minter.errors import InvalidRequest
from minter.policy.clients import Ban, Client
from minter.policy.token_requests import SubjectToken
from minter.private_files import write_private_file
from minter.providers.subject_tokens import Subjects
from minter.scopes import check_path
from minter.service import Service
from minter.tokens import keys, keystore

clients_app = typer.Typer(no_args_is_help=True, help="Register, change and disable clients.")

Operations = Annotated[
    list[str] | None,
    typer.Option("--operation", help="Operation the client may ask for; all if none is given."),
]
Paths = Annotated[
    list[str] | None, typer.Option("--path", help="Path prefix the client may ask for; all if none is given.")
]
MaxLifetime = Annotated[int | None, typer.Option(help="Longest lifetime of a token, in seconds.")]
ReplyQueues = Annotated[
    list[str] | None,
    typer.Option("--reply-queue", help="Durable queue that may receive the client's answers."),
]
DefaultAudience = Annotated[
    list[str] | None,
    typer.Option(help="Audience of a token from the token endpoint if the request names none."),
]
Audiences = Annotated[
    list[str] | None,
    typer.Option("--audience", help="Pattern of further audiences, beyond those of storages and FTS."),
]
Scopes = Annotated[
    list[str] | None, typer.Option("--scope", help="Pattern of further scopes, beyond those of storages.")
]
Groups = Annotated[
    list[str] | None, typer.Option("--group", help="Group that the claim wlcg.groups may name.")
]
AuthKey = Annotated[
    Path | None,
    typer.Option(help="File with the public JWK that verifies private_key_jwt assertions (EC P-256 or RSA)."),
]
JweKey = Annotated[
    Path | None, typer.Option(help="File with the public JWK that encrypts answers on durable queues.")
]
NewJweKey = Annotated[
    Path | None,
    typer.Option(
        help="Create the key for answers on durable queues; write its private JWK to this file (mode 600)."
    ),
]
SecretFile = Annotated[
    Path | None, typer.Option(help="Create a secret for HTTP and write it to this file (mode 600).")
]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.add_typer(clients_app, name="clients")


@contextmanager
def _private_file(path: Path | None, text: str) -> Iterator[None]:
    """Write a secret to a new file of mode 600, then run the block; remove the file if the block fails.

    Without a path, no file is written. Raises InvalidRequest if the file exists or cannot be written.
    """
    if path is None:
        yield
        return
    write_private_file(path, text)
    try:
        yield
    except BaseException:
        path.unlink()
        raise


@dataclass
class _Limits:
    """A client's limits from the command line; None means that the option was not given."""

    operations: list[str] | None
    paths: list[str] | None
    max_lifetime: int | None
    reply_queues: list[str] | None
    jwe_key: Path | None
    new_jwe_key: Path | None
    auth_key: Path | None
    default_audience: list[str] | None
    audiences: list[str] | None
    scopes: list[str] | None
    groups: list[str] | None
    private_jwk: str = ""

    def columns(self) -> dict[str, Any]:
        """Return the columns of the client that the given options set; raises InvalidRequest."""
        if unknown := set(self.operations or ()) - set(OPERATIONS):
            raise InvalidRequest(f"unknown operations {sorted(unknown)}, expected {', '.join(OPERATIONS)}")
        if reserved := [q for q in self.reply_queues or () if q.startswith("minter.")]:
            raise InvalidRequest(f"queues {reserved} have the reserved prefix minter.; choose other names")
        given = {
            "operations": None if self.operations is None else sorted(self.operations),
            "paths": None if self.paths is None else [check_path(p) for p in self.paths],
            "max_lifetime_seconds": self.max_lifetime,
            "reply_queues": self.reply_queues,
            "jwe_key": self._key(),
            "auth_key": _auth_key(self.auth_key),
            "default_audience": self.default_audience,
            "audiences": self.audiences,
            "scopes": self.scopes,
            "groups": self.groups,
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


def _auth_key(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    key = keys.check_jwe_key(read_object(path, "key"))
    return {**key, "alg": "ES256" if key["kty"] == "EC" else "RS256"}


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
    auth_key: AuthKey = None,
    default_audience: DefaultAudience = None,
    audience: Audiences = None,
    scope: Scopes = None,
    group: Groups = None,
    secret_file: SecretFile = None,
    as_json: AsJson = False,
) -> None:
    """Register a client; NAME is also the AMQP user that the client connects as."""
    limits = _Limits(
        operation, path, max_lifetime, reply_queue, jwe_key, new_jwe_key, auth_key, default_audience,
        audience, scope, group,
    )  # fmt: skip
    columns = limits.columns()
    service = open_service()
    service.prepare()
    client = service.new_client(
        name, vo,
        operations=frozenset(columns.get("operations", ())), paths=tuple(columns.get("paths", ())),
        max_lifetime_seconds=max_lifetime, reply_queues=tuple(reply_queue or ()),
        jwe_key=columns.get("jwe_key"), default_audience=tuple(default_audience or ()),
        audiences=tuple(audience or ()), scopes=tuple(scope or ()), groups=tuple(group or ()),
    )  # fmt: skip
    secret = keystore.new_secret()
    with _private_file(new_jwe_key, limits.private_jwk), _private_file(secret_file, secret):
        control_changes.add_client(service.pool, client, whoami())
        if "auth_key" in columns:
            control_changes.change_client(service.pool, name, {"auth_key": columns["auth_key"]}, whoami())
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
    auth_key: AuthKey = None,
    default_audience: DefaultAudience = None,
    audience: Audiences = None,
    scope: Scopes = None,
    group: Groups = None,
    unlimited: Annotated[
        list[str] | None,
        typer.Option(
            help="Remove a limit: operations, paths, max_lifetime_seconds; or clear default_audience, audiences, scopes, groups."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change a client's given limits, queues and keys; tokens recorded from now on follow the change."""
    dropped: dict[str, Any] = {
        "operations": [], "paths": [], "max_lifetime_seconds": None,
        "default_audience": [], "audiences": [], "scopes": [], "groups": [],
    }  # fmt: skip
    if unknown := set(unlimited or ()) - dropped.keys():
        raise InvalidRequest(f"unknown limits {sorted(unknown)}, expected {', '.join(dropped)}")
    limits = _Limits(
        operation, path, max_lifetime, reply_queue, jwe_key, new_jwe_key, auth_key, default_audience,
        audience, scope, group,
    )  # fmt: skip
    columns = limits.columns()
    columns |= {name: dropped[name] for name in unlimited or ()}
    if not columns:
        raise InvalidRequest("nothing to change; name a limit, a queue or a key")
    with _private_file(new_jwe_key, limits.private_jwk):
        control_changes.change_client(open_service().pool, name, columns, whoami())
    show(
        as_json,
        {"name": name, "changed": sorted(columns)},
        lambda: f"client {name}: {', '.join(columns)} set",
    )


@clients_app.command("rotate")
@guarded
def clients_rotate(
    name: str,
    secret_file: Annotated[Path, typer.Option(help="File for the new secret (mode 600).")],
    keep_hours: Annotated[
        float, typer.Option(help="Hours for which the old secret is still accepted.", min=0, max=720)
    ] = 24,
    now: Annotated[bool, typer.Option("--now", help="Refuse the old secret at once: it leaked.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a client a new secret for HTTP."""
    service = open_service()
    client = _registered(service, name)
    secret = keystore.new_secret()
    with _private_file(secret_file, secret):
        service.set_secret(client, secret, whoami(), timedelta(hours=0 if now else keep_hours))
    show(as_json, {"name": name}, lambda: f"client {name} has a new secret, in {secret_file}")


@clients_app.command("subject-token")
@guarded
def clients_subject_token(name: str, as_json: AsJson = False) -> None:
    """Store a client's subject token, which is read from standard input, or found as WLCG tools leave it.

    The token is verified and stored encrypted. Routes with mode `exchange` exchange it until it expires.
    """
    service = open_service()
    client = _registered(service, name)
    with transaction(service.pool) as connection:
        kids = [key.kid for key in read_keys(connection)]
    subjects = Subjects(service.loaded.endpoints, service.iams, lambda: kids)
    subject = subjects.verify(client.vo, SubjectToken(token_on_input().strip()))
    columns = {
        "subject_token": service.keystore.seal_token(client.vo, name, "client_subject", subject.token),
        "subject_provider": subject.provider,
        "subject_scope": subject.scope,
        "subject_expires_at": instant(subject.expires_at),
    }
    control_changes.set_subject(service.pool, name, columns, whoami())
    until = columns["subject_expires_at"]
    show(
        as_json,
        {"client": name, "provider": subject.provider, "expires_at": str(until)},
        lambda: f"a subject token of {subject.provider} is stored for client {name}, valid until {until}",
    )


@clients_app.command("disable")
@guarded
def clients_disable(name: str, as_json: AsJson = False) -> None:
    """Disable a client and list its tokens that are still valid."""
    service = open_service()
    control_changes.disable_client(service.pool, name, whoami(), disabled=True)
    show_live_tokens(service, as_json, f"client {name} is disabled", Ban("client", name))


@clients_app.command("enable")
@guarded
def clients_enable(name: str, as_json: AsJson = False) -> None:
    """Enable a disabled client again."""
    control_changes.disable_client(open_service().pool, name, whoami(), disabled=False)
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
        lambda: Listing(
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


def _registered(service: Service, name: str) -> Client:
    known = _clients(service)
    if name not in known:
        raise not_registered(name, known)
    return known[name]


def _clients(service: Service) -> dict[str, Client]:
    with transaction(service.pool) as connection:
        return dict(read_control(connection).clients)
