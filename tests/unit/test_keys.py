"""Keys: thumbprints, RFC 6979, and rotation as a state machine (I6)."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from jwt.utils import base64url_encode
from msgspec import structs

from minter.errors import InvalidRequest, NoUsableKey
from minter.policy.limits import HARD_MAX_SECONDS
from minter.storages.dialects import ALGORITHMS, Algorithm
from minter.tokens import keys
from minter.tokens.keys import Key, RotationPolicy, Signer

POLICY = RotationPolicy()
START = datetime(2026, 11, 22, tzinfo=UTC)
SIGNERS = [keys.generate("ES256") for _ in range(4)]


def test_the_thumbprint_is_rfc_7638s() -> None:
    example = {  # RFC 7638 §3.1
        "kty": "RSA", "alg": "RS256", "kid": "2011-04-29", "e": "AQAB",
        "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",
    }  # fmt: skip
    assert keys.thumbprint(example) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


def test_ecdsa_is_rfc_6979s() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = 0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721  # RFC 6979 A.2.5
    key = ec.derive_private_key(secret, ec.SECP256R1())
    es256: Any = keys._ALGORITHMS["ES256"]
    signature = es256.sign(b"sample", key)
    assert signature.hex().upper() == (
        "EFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716"
        "F7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8"
    )


def test_a_public_jwk_has_what_verifiers_want_and_nothing_private(es256: Signer, rs256: Signer) -> None:
    assert set(es256.public_jwk) == {"kty", "crv", "x", "y", "kid", "use", "alg"}
    assert set(rs256.public_jwk) == {"kty", "n", "e", "kid", "use", "alg"}
    assert es256.kid == keys.thumbprint(es256.public_jwk)
    assert "PRIVATE" not in repr(es256)


class Rotation(RuleBasedStateMachine):
    """A published key always verifies what it signed; a key signs only when it was public long enough."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.ring: list[Key] = []
        self.made = 0
        self.tokens: list[tuple[str, datetime, datetime]] = []  # kid, issued, exp
        self.revoked: set[str] = set()
        self.public_since: dict[str, datetime] = {}

    @initialize()
    def first(self) -> None:
        for algorithm in ALGORITHMS:
            self.prepare(algorithm)
        self.ring = [structs.replace(k, state="active", activated_at=self.now) for k in self.ring]
        self.first_kids = {k.kid for k in self.ring}

    @rule(algorithm=st.sampled_from(ALGORITHMS))
    def prepare(self, algorithm: Algorithm) -> None:
        kid = f"kid{self.made}"
        self.made += 1
        self.ring.append(Key(self.made, "vo", kid, algorithm, "prepared", {"kid": kid}, self.now))
        self.public_since[kid] = self.now

    @rule(hours=st.integers(1, 96))
    def wait(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    @rule(
        life=st.integers(900, HARD_MAX_SECONDS),
        verifiable=st.sampled_from([{"ES256"}, {"RS256"}, {"ES256", "RS256"}]),
    )
    def sign(self, life: int, verifiable: set[Algorithm]) -> None:
        try:
            active = keys.active(self.ring, "vo")
        except NoUsableKey:
            return
        key = keys.signing_key(active, verifiable)
        assert key.algorithm in verifiable or not verifiable & active.keys()
        assert key.algorithm == "ES256" or not {"ES256"} & verifiable & active.keys()
        if key.kid not in self.first_kids:
            assert self.now - self.public_since[key.kid] >= timedelta(seconds=POLICY.publish_seconds)
        self.tokens.append((key.kid, self.now, self.now + timedelta(seconds=life)))

    @rule(algorithm=st.sampled_from(ALGORITHMS))
    def rotate(self, algorithm: Algorithm) -> None:
        others = [k for k in self.ring if k.algorithm != algorithm]
        try:
            self.ring = keys.rotate(self.ring, "vo", algorithm, self.now, POLICY)
        except NoUsableKey:
            return
        assert [k for k in self.ring if k.algorithm != algorithm] == others

    @rule()
    def maintain(self) -> None:
        for change, algorithm in keys.due(self.ring, "vo", ALGORITHMS, self.now, POLICY):
            if change == "create":
                self.prepare(algorithm)
            else:
                self.ring = keys.rotate(self.ring, "vo", algorithm, self.now, POLICY)

    @precondition(lambda self: any(k.state != "revoked" for k in self.ring))
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        kid = data.draw(st.sampled_from([k.kid for k in self.ring if k.state != "revoked"]))
        try:
            self.ring = keys.revoke(self.ring, kid, self.now, POLICY)
        except NoUsableKey:
            return
        self.revoked.add(kid)

    @invariant()
    def every_living_token_verifies_unless_its_key_was_revoked(self) -> None:
        published = {jwk["kid"] for jwk in keys.jwks(self.ring, self.now)["keys"]}
        assert not published & self.revoked
        for kid, _, exp in self.tokens:
            if exp >= self.now and kid not in self.revoked:
                assert kid in published

    @invariant()
    def there_is_at_most_one_active_key_an_algorithm_and_old_ones_resign_for_a_day(self) -> None:
        active = [k.algorithm for k in self.ring if k.state == "active"]
        assert len(active) == len(set(active))
        for key in self.ring:
            if key.state == "old":
                assert key.retired_at is not None
                assert keys.may_resign(key, self.now, POLICY) == (
                    self.now < key.retired_at + timedelta(hours=24)
                )
            assert not (key.state in ("revoked", "prepared") and keys.may_resign(key, self.now, POLICY))


Rotation.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRotation = Rotation.TestCase


def test_revoking_the_active_key_puts_the_standby_in_its_place_at_once() -> None:
    ring = [
        Key(1, "vo", "a", "ES256", "active", {"kid": "a"}, START, activated_at=START),
        Key(2, "vo", "b", "ES256", "prepared", {"kid": "b"}, START),
    ]
    with pytest.raises(NoUsableKey):
        keys.revoke(ring, "a", START + timedelta(hours=1), POLICY)  # b is not public long enough
    after = keys.revoke(ring, "a", START + timedelta(days=2), POLICY)
    assert [k.state for k in after] == ["revoked", "active"]
    assert [j["kid"] for j in keys.jwks(after, START)["keys"]] == ["b"]


def test_without_an_active_key_the_error_says_what_to_run() -> None:
    with pytest.raises(NoUsableKey, match="minter keys create --vo vo"):
        keys.active([], "vo")


def test_an_issuer_gets_the_key_of_another_algorithm_without_a_gap() -> None:
    """An issuer of an earlier release signs with what it has until the other key has been public for long."""
    ring = [
        Key(1, "vo", "a", "ES256", "active", {"kid": "a"}, START, activated_at=START),
        Key(2, "vo", "b", "ES256", "prepared", {"kid": "b"}, START),
    ]
    assert keys.due(ring, "vo", ALGORITHMS, START, POLICY) == [("create", "RS256")]
    assert keys.signing_key(keys.active(ring, "vo"), {"RS256"}).kid == "a"
    ring.append(Key(3, "vo", "c", "RS256", "prepared", {"kid": "c"}, START))
    soon = START + timedelta(seconds=POLICY.publish_seconds - 1)
    assert keys.due(ring, "vo", ALGORITHMS, soon, POLICY) == []
    then = START + timedelta(seconds=POLICY.publish_seconds)
    assert keys.due(ring, "vo", ALGORITHMS, then, POLICY) == [("rotate", "RS256")]
    ring = keys.rotate(ring, "vo", "RS256", then, POLICY)
    assert [k.state for k in ring] == ["active", "prepared", "active"]
    active = keys.active(ring, "vo")
    assert keys.signing_key(active, {"RS256"}).kid == "c"
    assert keys.signing_key(active, {"ES256", "RS256"}).kid == "a"


def _point(**changes: object) -> dict[str, Any]:
    key = json.loads(ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()))
    return {name: value for name, value in (key | changes).items() if value is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"x": "AAAA"},
        {"x": base64url_encode(bytes(32)).decode(), "y": base64url_encode(bytes(32)).decode()},
        {"x": base64url_encode(b"\xff" * 32).decode()},
        {"x": None},
        {"y": None},
        {"x": 5},
        {"crv": "P-384"},
        {"kty": ["EC"]},
        {"d": base64url_encode(b"\x01" * 32).decode()},
    ],
)
def test_a_key_that_nothing_can_be_encrypted_to_is_refused(changes: dict[str, Any]) -> None:
    assert keys.check_jwe_key(_point())
    with pytest.raises(InvalidRequest, match="EC P-256 or RSA"):
        keys.check_jwe_key(_point(**changes))


def test_a_weak_or_broken_rsa_key_is_refused() -> None:
    good = json.loads(RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048).public_key()))
    assert keys.check_jwe_key(good)
    weak = json.loads(RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key()))
    even = good | {"n": base64url_encode((1 << 2047).to_bytes(256, "big")).decode()}
    for key in (weak, even, good | {"n": None}, good | {"e": "AA"}):
        with pytest.raises(InvalidRequest):
            keys.check_jwe_key(key)


def test_no_kid_looks_like_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 64 thumbprints begins with `-`; such a key is not used."""
    kids = iter(["-L7-A6vqbmQv", "-h", "vU-quPRp0cCV"])
    thumbprint = keys.thumbprint
    monkeypatch.setattr(keys, "thumbprint", lambda jwk: next(kids, None) or thumbprint(jwk))
    assert keys.generate("ES256").kid == "vU-quPRp0cCV"
