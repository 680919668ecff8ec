"""Signing keys: generation, signing, rotation instants and the public key set (JWKS).

The states of a key are `prepared → active → old`; `revoked` can follow any of them. All instants are
functions of a key's own dates and the policy (I6); the module reads no clock and stores no key.
"""

import base64
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Literal

import jwt
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from jwt.utils import base64url_encode
from msgspec import Struct, structs

from minter.errors import InvalidRequest, NoUsableKey, TokenRejected, UnknownKey
from minter.policy.limits import HARD_MAX_SECONDS
from minter.storages.dialects import ALGORITHMS, Algorithm
from minter.tokens.jwe import CANNOT_ENCRYPT, encrypted

KeyState = Literal["prepared", "active", "old", "revoked"]

RSA_BITS = 2048
_P256_BYTES = 32

# RFC 6979: the same payload and key give the same signature, so a token can be made again from its row (I4).
_DETERMINISTIC = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


class _DeterministicES256(ECAlgorithm):
    """PyJWT's ES256 with RFC 6979 nonces."""

    def sign(self, msg: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
        r, s = decode_dss_signature(key.sign(msg, _DETERMINISTIC))
        return r.to_bytes(_P256_BYTES) + s.to_bytes(_P256_BYTES)


_ALGORITHMS: dict[str, ECAlgorithm | RSAAlgorithm] = {
    "ES256": _DeterministicES256(ECAlgorithm.SHA256),
    "RS256": RSAAlgorithm(RSAAlgorithm.SHA256),
}


class RotationPolicy(Struct, frozen=True, forbid_unknown_fields=True):
    """When keys may sign and how long they stay; the defaults are WLCG §4.3.1's recommendations."""

    publish_seconds: int = 2 * 86400
    """A new key is public this long before it signs: one key-cache expiration."""
    lifetime_seconds: int = 180 * 86400
    """How long a key signs new tokens."""
    resign_seconds: int = 24 * 3600
    """How long an old key signs recorded tokens again, before its private half is destroyed."""


class Key(Struct, frozen=True, eq=False):
    """One key as it is recorded in the database, without its private half."""

    key_id: int
    vo: str
    kid: str
    algorithm: Algorithm
    state: KeyState
    public_jwk: dict[str, str]
    published_at: datetime
    activated_at: datetime | None = None
    retired_at: datetime | None = None
    last_exp: datetime | None = None


class Signer:
    """A private key that can sign; its `repr` shows only the algorithm and the kid."""

    def __init__(self, private_key: PrivateKeyTypes, algorithm: Algorithm) -> None:
        self._private_key = private_key
        self._algorithm = _ALGORITHMS[algorithm]
        self.algorithm = algorithm
        self.public_jwk = public_jwk(private_key.public_key(), algorithm)
        self.kid = self.public_jwk["kid"]
        header = {"alg": algorithm, "kid": self.kid, "typ": "JWT"}
        self._head = base64url_encode(json.dumps(header, separators=(",", ":")).encode()) + b"."

    def __repr__(self) -> str:
        """Name the key without showing it."""
        return f"Signer({self.algorithm}, {self.kid})"

    def sign(self, payload: bytes) -> bytes:
        """Return the compact JWS of `payload` (RFC 7515 §3.1); equal payloads give equal bytes."""
        signing_input = self._head + base64url_encode(payload)
        signature = self._algorithm.sign(signing_input, self._private_key)  # type: ignore[arg-type]
        return signing_input + b"." + base64url_encode(signature)

    def private_pem(self) -> bytes:
        """Return the private key as unencrypted PKCS#8 PEM, for the keystore to encrypt."""
        return self._private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def generate(algorithm: Algorithm) -> Signer:
    """Make a new key, whose kid begins with no `-`: a command would take it for an option.

    All randomness is from the operating system's generator.
    """
    while True:
        made = Signer(
            ec.generate_private_key(ec.SECP256R1())
            if algorithm == "ES256"
            else rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS),
            algorithm,
        )
        if not made.kid.startswith("-"):
            return made


def load_signer(pem: bytes, algorithm: Algorithm) -> Signer:
    """Load a private key, and check that its public half verifies a signature made with it."""
    signer = Signer(serialization.load_pem_private_key(pem, None), algorithm)
    verify(signer.sign(b'{"probe":true}'), signer.public_jwk)
    return signer


def thumbprint(jwk: dict[str, str]) -> str:
    """Return the JWK thumbprint, SHA-256, base64url (RFC 7638 §3)."""
    members = ("crv", "kty", "x", "y") if jwk["kty"] == "EC" else ("e", "kty", "n")
    canonical = json.dumps({m: jwk[m] for m in members}, separators=(",", ":"), sort_keys=True)
    return base64.urlsafe_b64encode(sha256(canonical.encode()).digest()).rstrip(b"=").decode()


def public_jwk(public_key: PublicKeyTypes, algorithm: Algorithm) -> dict[str, str]:
    """Return the public JWK (RFC 7517 §4) with `kid`, `use` and `alg`."""
    algorithm_of: Any = _ALGORITHMS[algorithm]
    made = algorithm_of.to_jwk(public_key, as_dict=True)
    jwk = {name: made[name] for name in ("kty", "crv", "x", "y", "n", "e") if name in made}
    return {**jwk, "kid": thumbprint(jwk), "use": "sig", "alg": algorithm}


def check_jwe_key(key: dict[str, Any]) -> dict[str, Any]:
    """Check and return a client's public JWK, which encrypts answers on durable queues.

    Raises InvalidRequest unless the key is EC on P-256, or RSA of at least 2048 bits, and no private key.
    """
    private = {"d", "p", "q", "dp", "dq", "qi", "k"} & key.keys()
    try:
        strong = key.get("kty") == "EC" and key.get("crv") == "P-256"
        if key.get("kty") == "RSA":
            strong = jwt.PyJWK({**key, "alg": "RS256"}).key.key_size >= RSA_BITS
        if strong and not private:
            encrypted(b"probe", key)
    except CANNOT_ENCRYPT:
        strong = False
    if private or not strong:
        raise InvalidRequest(
            "not a key that answers can be encrypted to, expected a public JWK: EC P-256 or RSA of at "
            f"least {RSA_BITS} bits" + (", without private members" if private else "")
        )
    return key


def verify(token: bytes, jwk: dict[str, str]) -> None:
    """Verify a signature made here; raises TokenRejected. `claims.check_token` checks the claims."""
    key = jwt.PyJWK(jwk)
    try:
        jwt.api_jws.decode(token, key.key, algorithms=[jwk["alg"]])
    except jwt.InvalidTokenError as error:
        raise TokenRejected(f"signature by key {jwk['kid']} does not verify") from error


# ── rotation (I6) ────────────────────────────────────────────────────────────────────────────


def may_sign_from(key: Key, policy: RotationPolicy) -> datetime:
    """Return the instant at which a prepared key has been public long enough to sign."""
    return key.published_at + timedelta(seconds=policy.publish_seconds)


def signs_until(key: Key, policy: RotationPolicy) -> datetime | None:
    """Return the instant at which an active key is due to be replaced; None if it was never active."""
    if key.activated_at is None:
        return None
    return key.activated_at + timedelta(seconds=policy.lifetime_seconds)


def resigns_until(key: Key, policy: RotationPolicy) -> datetime | None:
    """Return the instant at which an old key's private half is destroyed; None if the key is not old."""
    if key.retired_at is None:
        return None
    return key.retired_at + timedelta(seconds=policy.resign_seconds)


def active(ring: Iterable[Key], vo: str) -> dict[Algorithm, Key]:
    """Return the issuer's active key of each algorithm; raises NoUsableKey if there is none at all."""
    found = {key.algorithm: key for key in ring if key.vo == vo and key.state == "active"}
    if not found:
        raise NoUsableKey(f"issuer of VO {vo!r} has no active signing key; run: minter keys create --vo {vo}")
    return found


def signing_key(active_keys: Mapping[Algorithm, Key], verifiable: Collection[Algorithm]) -> Key:
    """Return the key to sign a token with: the fastest algorithm that all of its audiences verify.

    An issuer whose key of a verifiable algorithm is not public for long enough signs with what it has: the
    token serves every audience whose dialect is more careful than its software.
    """
    usable = [a for a in ALGORITHMS if a in active_keys]
    return active_keys[next((a for a in usable if a in verifiable), usable[0])]


def may_resign(key: Key, now: datetime, policy: RotationPolicy) -> bool:
    """Return whether recorded tokens of this key may still be signed again (I4)."""
    if key.state == "active":
        return True
    until = resigns_until(key, policy)
    return key.state == "old" and until is not None and now < until


def is_public(key: Key, now: datetime) -> bool:
    """Return whether the key belongs in the JWKS: until its last token has expired, never if revoked."""
    if key.state == "revoked":
        return False
    return key.state != "old" or key.last_exp is None or now <= key.last_exp


def jwks(ring: Iterable[Key], now: datetime) -> dict[str, list[dict[str, str]]]:
    """Return the public key set (RFC 7517 §5)."""
    return {"keys": [key.public_jwk for key in ring if is_public(key, now)]}


def rotate(
    ring: Sequence[Key], vo: str, algorithm: Algorithm, now: datetime, policy: RotationPolicy
) -> list[Key]:
    """Return the ring after the oldest ready `prepared` key of an algorithm became the active one.

    Raises NoUsableKey if no such key has been public for long enough.
    """
    ready = [k for k in _of(ring, vo, algorithm, "prepared") if may_sign_from(k, policy) <= now]
    if not ready:
        raise NoUsableKey(
            f"issuer of VO {vo!r} has no prepared {algorithm} key that has been public for "
            f"{policy.publish_seconds} s"
        )
    successor = min(ready, key=lambda k: k.published_at)
    return [_after_rotation(key, successor, now) for key in ring]


def _of(ring: Iterable[Key], vo: str, algorithm: Algorithm, state: KeyState) -> list[Key]:
    return [k for k in ring if (k.vo, k.algorithm, k.state) == (vo, algorithm, state)]


def _after_rotation(key: Key, successor: Key, now: datetime) -> Key:
    if key is successor:
        return structs.replace(key, state="active", activated_at=now)
    if (key.vo, key.algorithm, key.state) == (successor.vo, successor.algorithm, "active"):
        last_exp = now + timedelta(seconds=HARD_MAX_SECONDS)
        return structs.replace(key, state="old", retired_at=now, last_exp=last_exp)
    return key


def revoke(ring: Sequence[Key], kid: str, now: datetime, policy: RotationPolicy) -> list[Key]:
    """Return the ring with the key `kid` revoked; for an active key, a ready standby takes over (I6).

    The standby is of the same algorithm. With `publish_seconds` 0 in the policy, a standby may take over
    before verifiers know its public key.
    """
    revoked = next((k for k in ring if k.kid == kid), None)
    if revoked is None:
        raise UnknownKey(f"no key has the kid {kid!r}; run: minter keys list")
    if revoked.state == "revoked":
        raise UnknownKey(f"key {kid} is revoked already")
    if revoked.state == "active":
        ring = rotate(ring, revoked.vo, revoked.algorithm, now, policy)
    return [structs.replace(k, state="revoked") if k.kid == kid else k for k in ring]


def due(
    ring: Sequence[Key], vo: str, algorithms: Iterable[Algorithm], now: datetime, policy: RotationPolicy
) -> list[tuple[Literal["create", "rotate"], Algorithm]]:
    """Return what an issuer's ring needs now, by algorithm: a new standby, or a rotation.

    An algorithm that the issuer did not use before gets a standby, which signs once it has been public for
    long enough. For an issuer without any active key the list is empty: only an operator makes its first key.
    """
    if not any(k.vo == vo and k.state == "active" for k in ring):
        return []
    found: list[tuple[Literal["create", "rotate"], Algorithm]] = []
    for algorithm in algorithms:
        standby = _of(ring, vo, algorithm, "prepared")
        ready = any(may_sign_from(k, policy) <= now for k in standby)
        until = next((signs_until(k, policy) for k in _of(ring, vo, algorithm, "active")), now)
        if not standby:
            found.append(("create", algorithm))
        elif ready and until is not None and until <= now:
            found.append(("rotate", algorithm))
    return found


def spent(ring: Iterable[Key], now: datetime, policy: RotationPolicy) -> list[Key]:
    """Return the old keys whose private halves are to be destroyed: they may no longer re-sign tokens."""
    return [key for key in ring if key.state == "old" and not may_resign(key, now, policy)]
