"""Private keys at rest: AES-256-GCM under data keys derived from the issuer's master key (I5).

The master key is 32 bytes, base64url, from the environment or a file; it is never in the database.
The associated data names the row, so a ciphertext moved to another row cannot be decrypted.
"""

import base64
import hmac
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from minter.errors import NoUsableKey, SettingsError
from minter.private_files import read_private_file
from minter.tokens import keys

MASTER_KEY_BYTES = 32
SIGNING_KEY, PEPPER, REFRESH, PROVIDER = "signing_key", "secrets_key", "refresh_token", "provider_token"
"""Purposes: a data key is derived for each of them, and the associated data begins with its purpose."""
_NONCE_BYTES = 12
_VERSION = b"\x01"


class MasterKey:
    """One issuer's master keys: the first encrypts, every one decrypts; `repr` shows the VO only.

    An issuer has more than one only while its master key is being changed (`minter keys rewrap`).
    """

    def __init__(self, vo: str, *materials: bytes) -> None:
        for material in materials:
            if len(material) != MASTER_KEY_BYTES:
                raise SettingsError(
                    f"master key of VO {vo!r} has {len(material)} bytes, expected {MASTER_KEY_BYTES} "
                    "in base64url; make one with: minter keys master"
                )
        self.vo = vo
        self._materials = materials
        self._ciphers: dict[tuple[str, bytes], AESGCM] = {}

    def __repr__(self) -> str:
        """Name the VO without showing a key."""
        return f"MasterKey({self.vo})"

    def _cipher(self, purpose: str, material: bytes) -> AESGCM:
        key = (purpose, material)
        if key not in self._ciphers:
            self._ciphers[key] = AESGCM(self._derived(purpose, material))
        return self._ciphers[key]

    def _derived(self, purpose: str, material: bytes) -> bytes:
        info = f"minter {purpose} {self.vo}".encode()
        return HKDF(SHA256(), 32, salt=None, info=info).derive(material)

    def derive(self, purpose: str) -> list[bytes]:
        """Return the keys derived for one purpose, one from each master key, in the same order."""
        return [self._derived(purpose, material) for material in self._materials]

    def encrypt(self, purpose: str, row: str, secret: bytes) -> bytes:
        """Encrypt `secret` for one row of one purpose."""
        nonce = os.urandom(_NONCE_BYTES)
        cipher = self._cipher(purpose, self._materials[0])
        return _VERSION + nonce + cipher.encrypt(nonce, secret, f"{purpose}:{row}".encode())

    def decrypt(self, purpose: str, row: str, sealed: bytes) -> bytes:
        """Decrypt a secret that was encrypted for this purpose and row; raises NoUsableKey otherwise."""
        nonce, body = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        for material in self._materials:
            with suppress(InvalidTag):
                return self._cipher(purpose, material).decrypt(nonce, body, f"{purpose}:{row}".encode())
        raise NoUsableKey(f"{purpose} {row} of VO {self.vo!r} does not open with this master key")


def new_master_key() -> str:
    """Return a fresh master key in the form that the settings accept."""
    return base64.urlsafe_b64encode(secrets.token_bytes(MASTER_KEY_BYTES)).decode().rstrip("=")


def new_secret() -> str:
    """Return a fresh client secret (256 bits, unreserved characters)."""
    return secrets.token_urlsafe(32)


def read_master_key(vo: str, *, text: str | None, path: Path | None) -> MasterKey:
    """Read an issuer's master keys from `text` (the environment) or a file that only its owner may read.

    Several keys are separated by commas or white space, the new key first. Raises SettingsError.
    """
    if text is None and path is not None:
        text = read_private_file("master key file", path)
    if text is None:
        raise SettingsError(f"VO {vo!r} has no master key; set its environment variable or file")
    words = text.replace(",", " ").split() or [""]
    try:
        return MasterKey(vo, *(base64.urlsafe_b64decode(w + "=" * (-len(w) % 4)) for w in words))
    except ValueError:
        raise SettingsError(f"master key of VO {vo!r} is not base64url") from None


class Keystore:
    """Encrypts and decrypts stored secrets; decrypted signing keys stay in the memory of this process.

    `read` returns the encrypted private half of the key with a key_id, None once it was destroyed.
    """

    def __init__(self, masters: Mapping[str, MasterKey], read: Callable[[int], bytes | None]) -> None:
        self._masters = masters
        self._read = read
        self._open: dict[int, keys.Signer] = {}
        self._refresh: dict[str, list[bytes]] = {}

    def seal(self, vo: str, signer: keys.Signer) -> bytes:
        """Return a new key's private half, encrypted for its row."""
        return self._master(vo).encrypt(SIGNING_KEY, signer.kid, signer.private_pem())

    def refresh_keys(self, vo: str) -> list[bytes]:
        """Return the keys for a VO's own refresh tokens: the first key signs, every key verifies."""
        if vo not in self._refresh:
            self._refresh[vo] = self._master(vo).derive(REFRESH)
        return self._refresh[vo]

    def reseal(self, vo: str, purpose: str, row: str, sealed: bytes) -> bytes:
        """Return a secret re-encrypted under the first master key; raises NoUsableKey."""
        master = self._master(vo)
        return master.encrypt(purpose, row, master.decrypt(purpose, row, sealed))

    def seal_pepper(self, vo: str) -> bytes:
        """Return a fresh key for hashing a VO's client secrets, encrypted for its row."""
        return self._master(vo).encrypt(PEPPER, vo, os.urandom(MASTER_KEY_BYTES))

    def open_pepper(self, vo: str, sealed: bytes) -> bytes:
        """Return the key for hashing a VO's client secrets; raises NoUsableKey."""
        return self._master(vo).decrypt(PEPPER, vo, sealed)

    def hash_secret(self, vo: str, sealed_pepper: bytes, secret: str) -> bytes:
        """Return the keyed hash of a client secret (HMAC-SHA-256); the secret is checked on every call."""
        return hmac.digest(self.open_pepper(vo, sealed_pepper), secret.encode(), "sha256")

    def seal_token(self, vo: str, owner: object, what: str, token: str) -> bytes:
        """Return a provider's token encrypted for its owner's row; `what` names which of its tokens it is."""
        return self._master(vo).encrypt(PROVIDER, f"{what}:{owner}", token.encode())

    def open_token(self, vo: str, owner: object, what: str, sealed: bytes) -> str:
        """Return a provider's token, decrypted; raises NoUsableKey if it was encrypted for another row."""
        return self._master(vo).decrypt(PROVIDER, f"{what}:{owner}", sealed).decode()

    def reseal_token(self, vo: str, owner: object, what: str, sealed: bytes) -> bytes:
        """Return a provider's token re-encrypted under the first master key; raises NoUsableKey."""
        return self.seal_token(vo, owner, what, self.open_token(vo, owner, what, sealed))

    def unlock(self, key: keys.Key) -> keys.Signer:
        """Return the signer of a key; raises NoUsableKey if it is destroyed or cannot be decrypted."""
        signer = self._open.get(key.key_id)
        if signer is None:
            sealed = self._read(key.key_id)
            if sealed is None:
                raise NoUsableKey(f"private half of key {key.kid} was destroyed")
            pem = self._master(key.vo).decrypt(SIGNING_KEY, key.kid, sealed)
            signer = self._open[key.key_id] = keys.load_signer(pem, key.algorithm)
        return signer

    def _master(self, vo: str) -> MasterKey:
        if vo not in self._masters:
            raise NoUsableKey(f"this process has no master key of VO {vo!r}")
        try:
            return self._masters[vo]
        except SettingsError as error:
            raise NoUsableKey(str(error)) from error
