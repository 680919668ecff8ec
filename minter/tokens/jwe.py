"""Answers encrypted to a client's public key (RFC 7516), for queues on which they may lie."""

from collections.abc import Mapping

from joserfc import jwe, jwk
from joserfc.errors import JoseError

from minter.jws import UNREADABLE

CANNOT_ENCRYPT = (*UNREADABLE, JoseError)
"""Errors of `encrypted` for a key that is malformed or off its curve."""

_PUBLIC = ("kty", "crv", "x", "y", "n", "e")
"""The members that make a public key; its use and operations, which libraries fill in, do not matter here."""


def encrypted(body: bytes, key: Mapping[str, str]) -> bytes:
    """Return a compact JWE of the body to a public JWK, EC P-256 or RSA."""
    algorithm = "ECDH-ES+A256KW" if key["kty"] == "EC" else "RSA-OAEP-256"
    header = {"alg": algorithm, "enc": "A256GCM", "cty": "application/json"}
    public = jwk.import_key({name: key[name] for name in _PUBLIC if name in key})
    return jwe.encrypt_compact(header, body, public, algorithms=[algorithm, "A256GCM"]).encode()
