"""The WLCG JWKS cache: key sets as files from which verifiers work offline (Zenodo 18392301).

A cache folder holds a file for each issuer, named by the hex SHA-256 of the issuer's URL, and `cache.json`
with all of them. An entry is `{issuer: {expiration, next_update, jwks}}`, with times in seconds since the
epoch. A reader asks the issuer again after `next_update`, and trusts the entry until `expiration`.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from minter.tokens import keys
from minter.tokens.keys import Key

ALL = "cache.json"
UPDATE_SECONDS = 600
"""How long a reader uses an entry without asking: as long as HTTP caches, so `keys revoke` holds."""
TRUST_SECONDS = 86_400
"""How long an entry is trusted while the issuer cannot be asked."""
_encode = msgspec.json.Encoder(order="sorted").encode


def file_name(issuer: str) -> str:
    """Return the name of an issuer's file in a cache folder."""
    return sha256(issuer.encode()).hexdigest()


def entries(ring: Iterable[Key], issuers: Mapping[str, str], now: datetime, folder: Path) -> dict[str, bytes]:
    """Return the files of a cache folder; an entry of the folder that is still good stays as it is.

    An issuer without a public key is left out, never written empty.
    """
    ring, files, known = tuple(ring), dict[str, bytes](), dict[str, Any]()
    for vo, issuer in issuers.items():
        public = keys.jwks((k for k in ring if k.vo == vo), now)
        if not public["keys"]:
            continue
        name, at = file_name(issuer), int(now.timestamp())
        entry = _read(folder / name).get(issuer, {})
        if entry.get("jwks") != public or int(entry.get("next_update", 0)) - at < UPDATE_SECONDS // 2:
            entry = {"jwks": public, "next_update": at + UPDATE_SECONDS, "expiration": at + TRUST_SECONDS}
        known[issuer] = entry
        files[name] = _encode({issuer: entry})
    return files | {ALL: _encode(known)}


def _read(path: Path) -> dict[str, Any]:
    """Return the entries of a file, none if it is missing or not of this form."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, Any]])
    except (OSError, msgspec.DecodeError):
        return {}
