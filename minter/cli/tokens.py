"""The commands `mint` (fill a job), `explain` (show a decision), `verify` and `diagnose` (look at a token)."""

import json
import uuid
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer

from minter.cli.tables import AsJson, client_of, guarded, open_service, read_object, show, token_on_input
from minter.client import MinterClient, new_request_id
from minter.contract.messages import FileOperation, FileRequest, FillRequest, MintRequest
from minter.contract.operations import OPERATIONS
from minter.database import traces
from minter.database.connection import instant, transaction
from minter.database.control import read_keys
from minter.errors import InvalidRequest, RequestError, TokenRejected
from minter.fts.jobs import from_fill
from minter.jws import is_compact
from minter.policy.diagnose import Verdict, storage_verdicts
from minter.policy.explain import explain as explain_decision
from minter.policy.requests import Request, from_mint
from minter.private_files import new_private_file
from minter.service import Service, load_settings
from minter.storages.directory import Area
from minter.storages.urls import readings
from minter.tokens import claims, keys
from minter.tokens.keys import Key

JobFile = Annotated[Path, typer.Option("--job", help="File with an FTS job as JSON; - reads standard input.")]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command("mint")(mint)
    app.command("explain")(explain)
    app.command("verify")(verify)
    app.command("diagnose")(diagnose)


@guarded
def mint(
    job: JobFile,
    client: Annotated[str | None, typer.Option(help="Client name, if the broker URL has no user.")] = None,
    fts: Annotated[str | None, typer.Option(help="URL of the FTS that the job goes to.")] = None,
    request_id: Annotated[uuid.UUID | None, typer.Option(help="request_id of a request to repeat.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the filled job (mode 600).")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Fill an FTS job with tokens through the broker. Tokens are written only to --output."""
    loaded = load_settings()
    name = client or loaded.settings.broker.local_client or None
    content = read_object(job, "job")
    with ExitStack() as stack:
        file = stack.enter_context(new_private_file(output)) if output is not None else None
        minter = stack.enter_context(
            MinterClient(loaded.broker_url, name, timeout_seconds=timeout, ca=loaded.broker_ca)
        )
        try:
            filled = minter.fill_job(content, request_id=request_id, fts=fts)
            if file is not None and filled.job is not None:
                json.dump(filled.job, file)
        finally:
            if output is not None and file is not None and not file.tell():
                output.unlink()
    facts = {
        "request_id": str(filled.request_id),
        "files": len(filled.job["files"]) if filled.job else 0,
        "max_time_in_queue": filled.job["params"]["max_time_in_queue"] if filled.job else None,
        "refused": filled.refused,
        "dropped_sources": filled.dropped_sources,
        "output": str(output) if output and filled.job else None,
    }
    show(
        as_json,
        facts,
        lambda: (
            f"request {filled.request_id}: {facts['files']} files filled, "
            f"{len(filled.refused)} refused"
            + "".join(f"\n  file {r['index']}: {r['error']['error_description']}" for r in filled.refused)
        ),
    )
    if filled.refused:
        raise typer.Exit(1)


@guarded
def explain(
    job: Annotated[
        Path | None, typer.Option(help="File with an FTS job as JSON; - reads standard input.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="URL of a file, as a client, FTS or a storage's log writes it.")
    ] = None,
    operation: Annotated[str, typer.Option(help="Operation on the file of --url.")] = "read",
    client: Annotated[str | None, typer.Option(help="Registered client that the decision is for.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show every step of the decision on an FTS job, or on one file, without minting tokens.

    A log may have the URL percent-encoded. If both readings of --url name files of the VO, both are explained.
    """
    if (job is None) == (url is None):
        raise InvalidRequest("expected exactly one of --job and --url")
    service = open_service()
    name, control = client_of(service, client)
    if job is not None:
        requests = [from_fill(FillRequest(request_id=new_request_id(), job=read_object(job, "job")))]
    else:
        requests = [_request_for(reading, operation) for reading in readings(url or "")]
    decisions = [(r, service.loaded.policy.decide(r, control.clients[name], control.bans)) for r in requests]
    granted = [one for one in decisions if not one[1].refused]
    lines = [line for r, decided in granted or decisions[:1] for line in explain_decision(decided, r.notes)]
    show(as_json, lines, lambda: "\n".join(lines))
    if not granted:
        raise typer.Exit(1)


def _request_for(url: str, operation: str) -> Request:
    """Return the request of one operation on one file; raises InvalidRequest for an unknown operation."""
    try:
        wanted = msgspec.convert({"operation": operation, "url": url}, FileOperation)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{error}; an operation is one of {', '.join(OPERATIONS)}") from None
    return from_mint(MintRequest(request_id=new_request_id(), files=(FileRequest(operations=(wanted,)),)))


@guarded
def verify(
    file: Annotated[
        Path,
        typer.Argument(help="File with the token; - is standard input, or at a terminal your bearer token."),
    ] = Path("-"),
    as_json: AsJson = False,
) -> None:
    """Verify a token's signature, key, expiry and database row, and print its claims."""
    text = _token_in(file)
    service = open_service()
    header, unverified = claims.unverified_claims(text.encode())
    with transaction(service.pool) as connection:
        ring = read_keys(connection)
    key = next((k for k in ring if k.kid == header.get("kid")), None)
    if key is None:
        raise TokenRejected(f"no key of this engine has the kid {header.get('kid')!r}")
    keys.verify(text.encode(), key.public_jwk)
    now = service.clock()
    problems = []
    if not keys.is_public(key, now):
        problems.append(f"the token's key is {key.state} and not in the JWKS")
    if int(str(unverified["exp"])) <= now.timestamp():
        problems.append("the token has expired")
    found = traces.find(
        service.pool, "jti", uuid.UUID(str(unverified["jti"])), service.since(400), now + timedelta(days=1)
    )
    if not found or json.loads(found[0].payload) != unverified:
        problems.append("no database row records this token")
    facts = {"valid": not problems, "problems": problems, "header": header, "claims": unverified}
    show(as_json, facts, lambda: json.dumps(facts, indent=2))
    if problems:
        raise typer.Exit(1)


@guarded
def diagnose(
    token: Annotated[
        str, typer.Argument(help="jti of a token, or the file that holds one; - is standard input.")
    ],
    url: Annotated[str, typer.Argument(help="URL of a file, as a client, FTS or a storage's log writes it.")],
    operation: Annotated[str, typer.Option(help="Operation on the file.")] = "read",
    as_json: AsJson = False,
) -> None:
    """Predict how the storage of a URL answers a token, and say what would have to change.

    The prediction rests on the settings and on the storage's dialect; the storage itself is not asked.
    """
    service = open_service()
    with transaction(service.pool) as connection:
        ring = read_keys(connection)
    presented = _presented(service, token)
    key = next((k for k in ring if k.kid == presented.kid), None)
    verdicts = _token_verdicts(presented, key, service.clock())
    vo = key.vo if key is not None else next(iter(service.loaded.issuers))
    if operation not in OPERATIONS:
        raise InvalidRequest(f"operation {operation!r} is not one of {', '.join(OPERATIONS)}")
    area, path = _located(service, vo, url)
    verdicts += storage_verdicts(
        presented.payload, key.algorithm if key else "none", area, path, operation, service.loaded.issuers[vo]
    )
    refused = [v for v in verdicts if not v.passes]
    facts = {
        "allowed": not refused,
        "storage": area.storage,
        "dialect": area.dialect.name,
        "verdicts": verdicts,
    }
    show(
        as_json,
        facts,
        lambda: (
            f"{area.storage} ({area.dialect.software}) would {'refuse' if refused else 'allow'} this token to {operation} {path}\n"
            + "\n".join(
                f"{'ok     ' if v.passes else 'refused'} {v.check}: {v.text}" for v in refused or verdicts
            )
        ),
    )
    if refused:
        raise typer.Exit(1)


class _Presented(NamedTuple):
    """A token by its jti, or as it is (`text`)."""

    kid: str
    payload: dict[str, Any]
    cancelled: bool = False
    text: str | None = None


def _presented(service: Service, token: str) -> _Presented:
    """Return the token with a jti from the record, or that of a file; raises InvalidRequest."""
    jti = _uuid(token)
    if jti is None:
        text = _token_in(Path(token))
        header, payload = claims.unverified_claims(text.encode())
        return _Presented(str(header.get("kid")), payload, text=text)
    until = service.clock() + timedelta(days=1)
    found = traces.find(service.pool, "jti", jti, service.since(400, jti), until)
    if not found:
        raise InvalidRequest(f"no token with the jti {jti} is on record")
    return _Presented(found[0].kid, json.loads(found[0].payload), found[0].state == "cancelled")


def _token_verdicts(presented: _Presented, key: Key | None, now: datetime) -> list[Verdict]:
    """Return what can be said of a token without its storage: key, times, state and signature."""
    payload = presented.payload
    known = key is not None and keys.is_public(key, now)
    end = int(payload["exp"])
    verdicts = [
        Verdict(known, "key", f"key {presented.kid} must be in the issuer's JWKS"),
        Verdict(end > now.timestamp(), "expiry", f"the token ends at {instant(end):%F %T} UTC"),
        Verdict(
            int(payload.get("nbf", 0)) <= now.timestamp(),
            "not before",
            "the token is not valid yet: are the clocks right?",
        ),
        Verdict(
            not presented.cancelled,
            "state",
            "the token was cancelled; storages take it until it expires, and it is not given again",
        ),
    ]
    if presented.text is not None and key is not None:
        signed = _signed(presented.text, key)
        verdicts.append(Verdict(signed, "signature", "the signature must verify with the key"))
    return verdicts


def _uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def _signed(token: str, key: keys.Key) -> bool:
    try:
        keys.verify(token.encode(), key.public_jwk)
    except TokenRejected:
        return False
    return True


def _located(service: Service, vo: str, url: str) -> tuple[Area, str]:
    """Return the area and path of a URL as it is, or percent-encoded; raises the error of `locate`."""
    *others, last = readings(url)
    for reading in others:
        with suppress(RequestError):
            return service.loaded.policy.directories[vo].locate(reading)
    return service.loaded.policy.directories[vo].locate(last)


def _token_in(file: Path) -> str:
    if "eyJ" in str(file):
        raise InvalidRequest("others can see a command's arguments: give the token on standard input")
    try:
        text = token_on_input() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InvalidRequest(f"{file} cannot be read: {error}") from None
    if not is_compact(text.strip()):
        raise TokenRejected("not a token, expected a JWT in compact form (RFC 7515 §3.1)")
    return text.strip()
