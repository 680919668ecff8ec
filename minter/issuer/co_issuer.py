"""Fetches the keys of IAMs under whose issuer Minter signs, and makes the files that merge both (ADR 16)."""

import logging
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import urllib3

from minter import bounded_http
from minter.database import co_issuers
from minter.errors import InvalidRequest
from minter.sections import CoIssuerSettings
from minter.service import Service
from minter.tokens import co_issuer, keys
from minter.tokens.co_issuer import IamKeys
from minter.tokens.keys import Key

logger = logging.getLogger(__name__)

EVERY = timedelta(minutes=1)
"""One process of all asks the IAM in this interval."""
ANSWER_SECONDS = 10.0
_OK = 200
_encode = msgspec.json.Encoder(order="sorted").encode


def files(service: Service, ring: Sequence[Key]) -> dict[str, tuple[str, bytes]]:
    """Return path and content of each co-issued VO's merged key set; a VO without is left out, and logged."""
    found = {}
    for vo, wanted in service.loaded.co_issuers.items():
        known = fetched(service, vo, wanted, ring)
        own = keys.jwks((k for k in ring if k.vo == vo), service.clock())["keys"]
        try:
            found[vo] = wanted.path.lstrip("/"), _encode(co_issuer.merged(known, own))
        except InvalidRequest as error:
            logger.warning("%s: %s", vo, error)
    return found


def note_written(service: Service, vos: Iterable[str]) -> None:
    """Note that the merged files of these VOs are as they should be, for `status` and the alert."""
    for vo in vos:
        co_issuers.note_written(service.pool, vo, service.clock(), EVERY)


def fetched(service: Service, vo: str, wanted: CoIssuerSettings, ring: Sequence[Key]) -> IamKeys:
    """Return the keys of a VO's IAM, after asking it if that is due; its answer may change nothing."""
    now = service.clock()
    if co_issuers.claim(service.pool, vo, now, EVERY):
        known = co_issuers.known(service.pool, vo)
        try:
            answer = co_issuer.read_key_set(_answer(wanted, service.loaded.folder))
            own = {key.kid for key in ring}
            co_issuers.save(service.pool, co_issuer.after(known, answer, own, now))
        except (InvalidRequest, urllib3.exceptions.HTTPError, OSError) as error:
            why = error.message if isinstance(error, InvalidRequest) else type(error).__name__
            logger.warning("the keys of %s's IAM stay as they were: %s", vo, why)
            co_issuers.note_problem(service.pool, vo, why)
    return co_issuers.known(service.pool, vo)


def _answer(wanted: CoIssuerSettings, folder: Path) -> bytes:
    ca = str(folder / wanted.ca) if wanted.ca else None
    http = bounded_http.pool_manager(ANSWER_SECONDS, ca, 1)
    try:
        answer = http.request(
            "GET", wanted.keys, preload_content=False, headers={"Accept": "application/json"}
        )
        if answer.status != _OK:
            raise InvalidRequest(f"the IAM answers {answer.status} for its keys")
        return bounded_http.read(answer, co_issuer.MAX_BYTES)
    finally:
        http.clear()
