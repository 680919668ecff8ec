"""The check of a finished token finds every altered claim, header and scope; two libraries verify tokens."""

import base64
import json
import uuid

import pytest
import scitokens
from cryptography.hazmat.primitives import serialization
from joserfc import jwk, jws

from minter.errors import TokenRejected
from minter.policy.plans import PlannedToken
from minter.tokens import keys
from minter.tokens.claims import build_claims, check_token, unverified_claims
from minter.tokens.keys import Signer
from tests.unit.test_policy import OLD, SE, fill

NOW = 1_795_315_000
ISSUER = "https://tokens.example.org/vo/"
JTI = "01a20118-9ddb-7538-9909-d9caefa00001"
GRANT = next(
    g
    for g in fill((SE,), (OLD,), overwrite=True, max_time_in_queue=2).planned_tokens
    if g.need.side == "destination"
)


def check(token: bytes, signer: keys.Signer, planned: PlannedToken = GRANT) -> None:
    check_token(token, planned, ISSUER, "sub", "rucio", NOW, JTI, signer.kid, signer.algorithm)


def payload(planned: PlannedToken = GRANT) -> bytes:
    return build_claims(planned, ISSUER, "sub", "rucio", NOW, JTI)


def forged(claims: object = None, **header: str) -> bytes:
    """A token as a faulty builder would make it."""
    parts = [{"alg": "ES256", "kid": header.pop("kid", ""), "typ": "JWT", **header}, claims]
    text = [base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=") for p in parts]
    return b".".join([*text, b"c2ln"])


def test_what_was_built_and_signed_passes(es256: Signer, rs256: Signer) -> None:
    for signer in (es256, rs256):
        check(signer.sign(payload()), signer)


MUTATIONS: dict[str, list[object]] = {
    "wlcg.ver": ["1.1", 1.0, None],
    "iss": ["https://tokens.example.org/vo", "https://evil.example.org/", None],
    "sub": ["other", "", 7, None],
    "aud": [
        "https://other.example.org",
        ["https://old.example.org"],
        "https://wlcg.cern.ch/jwt/v1/any",
        None,
    ],
    "scope": ["", "storage.modify:/", ["storage.read:/data/d/f"], None],
    "client_id": ["eve", None],
    "iat": [NOW - 59, NOW + 5, float(NOW - 60), str(NOW - 60), None],
    "nbf": [NOW - 61, NOW, None],
    "exp": [NOW + 10**7, float(NOW), None, True],
    "jti": [str(uuid.UUID(int=uuid.UUID(JTI).int + 1)), "", None],
}


@pytest.mark.parametrize(("claim", "value"), [(c, v) for c, vs in MUTATIONS.items() for v in vs], ids=str)
def test_each_altered_claim_is_caught(claim: str, value: object, es256: Signer) -> None:
    claims = json.loads(payload())
    if value is None:
        del claims[claim]
    else:
        claims[claim] = value
    with pytest.raises(TokenRejected) as caught:
        check(forged(claims, kid=es256.kid), es256)
    assert claim in caught.value.message


@pytest.mark.parametrize("number", range(len(GRANT.scope.split(" "))))
@pytest.mark.parametrize("change", ["{}x", "{}/..", "storage.modify:/", "", "{} storage.read:/"])
def test_each_altered_scope_is_caught(number: int, change: str, es256: Signer) -> None:
    claims = json.loads(payload())
    scopes = claims["scope"].split(" ")
    scopes[number] = change.format(scopes[number])
    with pytest.raises(TokenRejected, match="scope"):
        check(forged({**claims, "scope": " ".join(scopes)}, kid=es256.kid), es256)


def test_an_added_claim_is_caught(es256: Signer) -> None:
    with pytest.raises(TokenRejected, match="ver"):
        check(forged({**json.loads(payload()), "ver": "scitoken:2.0"}, kid=es256.kid), es256)


@pytest.mark.parametrize(
    "header", [{"kid": "other"}, {"alg": "none"}, {"alg": "HS256"}, {"typ": "at+jwt"}, {"crit": ["x"]}]
)
def test_an_altered_header_is_caught(header: dict[str, str], es256: Signer) -> None:
    with pytest.raises(TokenRejected, match="header"):
        check(forged(json.loads(payload()), **{"kid": es256.kid, **header}), es256)


@pytest.mark.parametrize("token", [b"", b"a.b", b"a.b.c.d", b"W10.W10.c2ln", b"\xff.\xff.\xff"])
def test_what_is_no_token_is_no_token(token: bytes) -> None:
    with pytest.raises(TokenRejected):
        unverified_claims(token)


def test_equal_payloads_give_equal_bytes(es256: Signer, rs256: Signer) -> None:
    for signer in (es256, rs256):
        again = keys.load_signer(signer.private_pem(), signer.algorithm)
        assert len({signer.sign(payload()), again.sign(payload()), signer.sign(payload())}) == 1


def test_joserfc_verifies_what_pyjwt_signed(es256: Signer, rs256: Signer) -> None:
    for signer in (es256, rs256):
        key_set = jwk.KeySet.import_key_set({"keys": [{**signer.public_jwk}]})
        found = jws.deserialize_compact(signer.sign(payload()), key_set, algorithms=[signer.algorithm])
        assert found.payload == payload()


def test_scitokens_accepts_exactly_the_file(es256: Signer, rs256: Signer) -> None:
    planned = next(g for g in fill((SE,), (OLD,)).planned_tokens if g.need.side == "source")
    for signer in (es256, rs256):
        pem = signer._private_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        # The token is valid now, because scitokens reads the system clock.
        import time

        token = signer.sign(build_claims(planned, ISSUER, "sub", "rucio", int(time.time()), JTI))
        found = scitokens.SciToken.deserialize(token, audience=planned.audience[0], public_key=pem)
        enforcer = scitokens.Enforcer(ISSUER, audience=planned.audience[0])
        for name in ("wlcg.ver", "client_id"):
            enforcer.add_validator(name, lambda _: True)
        assert enforcer.test(found, "storage.read", "/data/d/f")
        assert not enforcer.test(found, "storage.read", "/data/d/f2")
        assert not enforcer.test(found, "storage.modify", "/data/d/f")


def test_a_signature_is_checked_with_its_own_key(es256: Signer) -> None:
    token = es256.sign(payload())
    keys.verify(token, es256.public_jwk)
    with pytest.raises(TokenRejected, match="does not verify"):
        keys.verify(token, keys.generate("ES256").public_jwk)
    with pytest.raises(TokenRejected, match="does not verify"):
        keys.verify(token[:-4] + b"AAAA", es256.public_jwk)
