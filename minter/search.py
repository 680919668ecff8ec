"""Searches for tokens, as operators ask: by what is known of a token, in the database and the archive."""

import time
import uuid
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path
from urllib.parse import unquote

from minter.database import archive as archives
from minter.database import traces
from minter.database.traces import Refusals, TraceRecord
from minter.errors import InvalidRequest, RequestError
from minter.policy.plans import SEVERAL_STORAGES
from minter.service import Service
from minter.storages.urls import readings

FTS_ID_DIGITS = 16
WALK_SECONDS = 0.2
"""A walk begins no step that would end later, if it takes GROWTH times as long as the one before."""
FIRST_STEP, GROWTH = timedelta(minutes=5), 4


def of_request(
    service: Service, request: uuid.UUID, folder: Path | None = None
) -> tuple[list[TraceRecord], list[Refusals]]:
    """Return the tokens and refusals of a request, from the archive `folder` if the database has none."""
    found, refusals = traces.find_request(service.pool, request)
    if folder is not None and not found:
        found, archived = archives.find_request(folder, request, _until(service))
        refusals = refusals or archived
    return found, refusals


def find(
    service: Service, by: str, value: object, since: datetime, limit: int, folder: Path | None = None
) -> list[TraceRecord]:
    """Return the newest tokens by one of the searches of `minter.database.traces`; a path may be a URL.

    With an archive `folder`, its files are read, too, where the database has too few.

    Raises the error of `Directory.locate` if a URL names a file of no VO.
    """
    is_url = by == "path" and "://" in str(value)
    values, storages = files_of(service, str(value)) if is_url else ({value}, None)
    until = _until(service)
    found = [t for v in values for t in traces.find(service.pool, by, v, since, until, limit)]
    if folder is not None and len(found) < limit:
        found += [t for v in values for t in archives.find(folder, by, v, since, until, limit)]
    return traces.newest([t for t in found if storages is None or t.storage in storages], limit)


def newest(service: Service, by: str, value: object, limit: int) -> tuple[list[TraceRecord], datetime | None]:
    """Return newest tokens by a search that walks back, and where WALK_SECONDS ended it, if they did.

    It reads tokens by their issue, so recent uses of older shared tokens may be missing where it stopped. The
    walk ends as soon as it has `limit` tokens. A client that asked nothing for long, say, would otherwise
    cost a look at every token of the retention.
    """
    found: list[TraceRecord] = []
    until, since, oldest, step = _until(service), service.clock(), service.since(), FIRST_STEP
    ends, took = time.monotonic() + WALK_SECONDS, 0.0
    while len(found) < limit and since > oldest and time.monotonic() + GROWTH * took <= ends:
        began, since = time.monotonic(), max(oldest, since - step)
        found += traces.find(service.pool, by, value, since, until, limit - len(found), by_issue=True)
        until, step, took = since, GROWTH * step, time.monotonic() - began
    return traces.newest(found, limit), since if len(found) < limit and since > oldest else None


def by_text(service: Service, text: str, limit: int) -> tuple[list[TraceRecord], list[Refusals]]:
    """Return the tokens and refusals in the database that a text names, newest tokens first.

    It may be a URL, a path, a request_id, a jti, the id of an FTS token or job, or an external id. Raises
    InvalidRequest for an empty one, or the error of `find`.
    """
    text = text.strip()
    if not text:
        raise InvalidRequest("expected a URL, path, request_id, jti, FTS token or job id, or external id")
    since = service.since()
    if text.startswith("/") or "://" in text:
        return find(service, "path", unquote(text) if "%" in text else text, since, limit), []
    try:
        named = uuid.UUID(text)
    except ValueError:
        named = None
    if named is not None:
        found, refusals = of_request(service, named)
        if not (found or refusals):
            found = find(service, "jti", named, service.since(jti=named), limit)
        if not (found or refusals) and (request := traces.request_of_job(service.pool, named)):
            found, refusals = of_request(service, request)
        if found or refusals:
            return found[:limit], refusals
    if len(text) == FTS_ID_DIGITS and set(text.lower()) <= set("0123456789abcdef"):
        return find(service, "fts_token_id", fts_token_id(text), since, limit), []
    return find(service, "external_id", text, since, limit), []


def fts_token_id(text: str) -> int:
    """Return FTS's id of a token as Postgres keeps it; raises InvalidRequest if it is not 16 hex digits."""
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != FTS_ID_DIGITS // 2:
        raise InvalidRequest(f"{text!r} is not an FTS token id, expected {FTS_ID_DIGITS} hex digits")
    return int.from_bytes(raw, signed=True)


def files_of(service: Service, url: str) -> tuple[set[object], set[str]]:
    """Return the VO-relative paths and the storages that a URL names, as it is or percent-encoded.

    Raises the error of `Directory.locate` if it names a file of no VO.
    """
    paths, storages = set[object](), set[str]()
    for directory, spelling in product(service.loaded.policy.directories.values(), readings(url)):
        try:
            area, found = directory.locate(spelling)
        except RequestError as error:
            wrong = error
            continue
        paths.add(found)
        storages |= {area.storage, SEVERAL_STORAGES}
    if not paths:
        raise wrong
    return paths, storages


def _until(service: Service) -> datetime:
    return service.clock() + timedelta(days=1)
