"""Discovery documents and JWKS, also as files that any web server or CDN can serve (WLCG §4.2.1).

With files, verification survives an outage of Minter. A file is replaced whole, by rename: XRootD keeps
an empty or half-written key set for ten minutes and refuses every token meanwhile. The JWKS is written
before the discovery document that names it.
"""

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import msgspec

from minter.errors import NoUsableKey, SettingsError
from minter.storages.urls import authority_key
from minter.tokens import keys
from minter.tokens.keys import Key

DISCOVERY = ".well-known/openid-configuration"
RFC8414 = ".well-known/oauth-authorization-server"
JWKS = "jwks.json"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
GRANTS = ("client_credentials", "refresh_token", EXCHANGE)
_encode = msgspec.json.Encoder(order="sorted").encode

Place: TypeAlias = tuple[str, str]
"""The host and path of a document."""


def documents(ring: Iterable[Key], issuers: Mapping[str, str], now: datetime) -> dict[str, bytes]:
    """Return every issuer's documents as files, as `by_place` and `as_files` make them."""
    return as_files(by_place(ring, issuers, now))


def by_place(ring: Iterable[Key], issuers: Mapping[str, str], now: datetime) -> dict[Place, bytes]:
    """Return every issuer's documents, JWKS before discovery.

    An issuer with a sub-path has its discovery documents in both forms (RFC 8414 §3.1). An issuer without a
    public key is left out, never published empty. Raises NoUsableKey if no issuer has a public key.
    """
    ring = tuple(ring)
    found: dict[Place, bytes] = {}
    for vo, issuer in issuers.items():
        public = keys.jwks((k for k in ring if k.vo == vo), now)
        if not public["keys"]:
            continue
        discovery = {DISCOVERY: _encode(_openid(issuer)), RFC8414: _encode(_metadata(issuer))}
        for path in names(issuer):
            form = next((form for form in discovery if form in path), None)
            found[issuer_host(issuer), path] = _encode(public) if form is None else discovery[form]
    if not found:
        raise NoUsableKey("no issuer has a public key; run: minter keys create --vo VO")
    return found


def names(issuer: str) -> list[str]:
    """Return the paths of an issuer's documents on its host: the JWKS, then discovery in every form."""
    path = urlsplit(issuer).path.strip("/")
    below = f"{path}/" if path else ""
    forms = (DISCOVERY, RFC8414)
    return [f"{below}{JWKS}", *(f"{below}{form}" for form in forms)] + [
        f"{form}/{path}" for form in forms if path
    ]


def places(issuers: Iterable[str]) -> list[Place]:
    """Return where the documents of issuers are."""
    return [(issuer_host(issuer), path) for issuer in issuers for path in names(issuer)]


def as_files(found: Mapping[Place, bytes]) -> dict[str, bytes]:
    """Return documents by their path in the folder of `publish`, with a folder for each host if many.

    Where the document of one issuer would be the folder of another's, the one with the inserted path is left
    out (RFC 8414 §3.1): `minter serve` has all. Raises SettingsError if issuers cannot be files together.
    """
    hosts = {host for host, _ in found}
    files = {
        path if len(hosts) == 1 else f"{host.replace(':', '_')}/{path}": content
        for (host, path), content in found.items()
    }
    kept: dict[str, bytes] = {}
    for file in sorted(files, key=_inserted):
        if not any(other.startswith(f"{file}/") or file.startswith(f"{other}/") for other in kept):
            kept[file] = files[file]
        elif not _inserted(file):
            raise SettingsError(f"{file} would be a file and a folder: give the issuers other paths")
    return kept


def left_out(issuers: Iterable[str]) -> list[str]:
    """Return the files that `publish` cannot write beside the others; raises SettingsError as `as_files`."""
    every = {place: "/".join(place).encode() for place in places(issuers)}
    kept = as_files(every).values()
    return [name.decode() for name in every.values() if name not in kept]


def _inserted(file: str) -> bool:
    return any(f"{form}/" in file for form in (DISCOVERY, RFC8414))


def issuer_host(issuer: str) -> str:
    """Return the host and port of an issuer in one spelling."""
    return authority_key(urlsplit(issuer).netloc)


def _metadata(issuer: str) -> dict[str, object]:
    """Return the metadata of an authorization server (RFC 8414 §2)."""
    methods = ["client_secret_basic", "client_secret_post", "private_key_jwt"]
    found: dict[str, object] = {
        "issuer": issuer,
        "jwks_uri": f"{issuer}{JWKS}",
        "grant_types_supported": sorted(GRANTS),
        "response_types_supported": ["none"],
    }
    for name, path in (("token", "token"), ("introspection", "introspect"), ("revocation", "revoke")):
        found[f"{name}_endpoint"] = f"{issuer}{path}"
        found[f"{name}_endpoint_auth_methods_supported"] = methods
        found[f"{name}_endpoint_auth_signing_alg_values_supported"] = ["ES256", "RS256"]
    return found


def _openid(issuer: str) -> dict[str, object]:
    """Add the members that OpenID Connect Discovery §3 demands, although no ID token is issued."""
    return _metadata(issuer) | {
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["RS256"],
    }


def write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files into a folder, each whole or not at all; return the paths that changed.

    Raises SettingsError if one cannot be written, after the others.
    """
    changed, wrong = [], list[SettingsError]()
    for name, content in files.items():
        path = folder / name
        try:
            if path.is_file() and path.read_bytes() == content:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with os.fdopen(os.open(partial, flags, 0o644), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            wrong.append(SettingsError(f"{path} cannot be written: {error.strerror}"))
            continue
        changed.append(path)
    if wrong:
        raise wrong[0]
    return changed
