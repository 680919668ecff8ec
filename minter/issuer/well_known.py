"""Discovery documents and JWKS, also as files that any web server or CDN can serve (WLCG §4.2.1).

With files, verification survives an outage of Minter. A file is replaced whole, by rename: XRootD keeps
an empty or half-written key set for ten minutes and refuses every token meanwhile. The JWKS is written
before the discovery document that names it.
"""

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from minter.errors import NoUsableKey, SettingsError
from minter.tokens import keys
from minter.tokens.keys import Key

DISCOVERY = ".well-known/openid-configuration"
JWKS = "jwks.json"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
GRANTS = ("client_credentials", "refresh_token", EXCHANGE)
_encode = msgspec.json.Encoder(order="sorted").encode


def documents(ring: Iterable[Key], issuers: Mapping[str, str], now: datetime) -> dict[str, bytes]:
    """Return the files of every issuer by their path on the host, JWKS before discovery.

    An issuer with a sub-path has its discovery document in both forms (RFC 8414 §3.1). An issuer without a
    public key is left out, never published empty. Raises NoUsableKey if no issuer has a public key.
    """
    ring = tuple(ring)
    found: dict[str, bytes] = {}
    for vo, issuer in issuers.items():
        public = keys.jwks((k for k in ring if k.vo == vo), now)
        if not public["keys"]:
            continue
        discovery = _encode(metadata(issuer, sorted({k["alg"] for k in public["keys"]})))
        key_set, *forms = names(issuer)
        found[key_set] = _encode(public)
        found |= dict.fromkeys(forms, discovery)
    if not found:
        raise NoUsableKey("no issuer has a public key; run: minter keys create --vo VO")
    return found


def names(issuer: str) -> list[str]:
    """Return the paths of an issuer's documents on its host: the JWKS, then discovery in every form."""
    path = urlsplit(issuer).path.strip("/")
    below = f"{path}/" if path else ""
    return [f"{below}{JWKS}", f"{below}{DISCOVERY}", *([f"{DISCOVERY}/{path}"] if path else [])]


def metadata(issuer: str, algorithms: list[str]) -> dict[str, object]:
    """Return the discovery document (OpenID Connect Discovery §3, RFC 8414 §2)."""
    methods = ["client_secret_basic", "client_secret_post", "private_key_jwt"]
    found: dict[str, object] = {
        "issuer": issuer,
        "jwks_uri": f"{issuer}{JWKS}",
        "grant_types_supported": sorted(GRANTS),
        "response_types_supported": [],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": algorithms,
    }
    for name, path in (("token", "token"), ("introspection", "introspect"), ("revocation", "revoke")):
        found[f"{name}_endpoint"] = f"{issuer}{path}"
        found[f"{name}_endpoint_auth_methods_supported"] = methods
        found[f"{name}_endpoint_auth_signing_alg_values_supported"] = ["ES256", "RS256"]
    return found


def write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write the files into a folder, each whole or not at all; return the paths that changed.

    Raises SettingsError if the folder cannot be written.
    """
    changed = []
    for name, content in files.items():
        path = folder / name
        try:
            if path.is_file() and path.read_bytes() == content:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from error
        changed.append(path)
    return changed
