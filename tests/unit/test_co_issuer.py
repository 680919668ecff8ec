"""One key set of two signers: what may change it, and what must not."""

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest

from minter.errors import InvalidRequest
from minter.tokens import keys
from minter.tokens.co_issuer import MAX_KEYS, IamKeys, after, kid_of, merged, read_key_set

NOW = datetime(2026, 11, 28, tzinfo=UTC)
GOOD = [keys.generate("ES256").public_jwk, keys.generate("RS256").public_jwk]
SECRET = {"kty": "oct", "kid": "s", "k": "c2VjcmV0"}
ODD = {"kty": "AKP", "kid": "odd", "alg": "ML-DSA-44", "pub": "AA"}


def body(*found: object) -> bytes:
    return json.dumps({"keys": found}).encode()


def test_a_key_set_is_read_whole_with_keys_of_unknown_types() -> None:
    assert read_key_set(body(*GOOD, ODD)) == [*GOOD, ODD]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "no JWK Set"),
        (b"<html>", "no JWK Set"),
        (b"[]", "no JWK Set"),
        (b"{}", "no JWK Set"),
        (b'{"keys":{}}', "no JWK Set"),
        (b'{"keys":[1]}', "no JWK Set"),
        (b'{"a":' * 5000, "no JWK Set"),
        (body(), "no key that verifies"),
        (body(ODD), "no key that verifies"),
        (body({**GOOD[0], "use": "enc"}), "no key that verifies"),
        (body({**GOOD[0], "x": "!"}), "no key that verifies"),
        (body(GOOD[0], GOOD[0]), "one kid"),
        (body(GOOD[0], SECRET), "private or a symmetric"),
        (body({**GOOD[0], "d": "AA"}), "private or a symmetric"),
        (body({**GOOD[0], "x5u": "\x00"}), "NUL"),
        (body(*({**GOOD[0], "kid": str(n)} for n in range(MAX_KEYS + 1))), "at most"),
    ],
)
def test_anything_else_is_no_key_set(answer: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        read_key_set(answer)


def test_a_key_goes_after_two_answers_without_it() -> None:
    known = after(IamKeys(vo="vo"), GOOD, (), NOW)
    once = after(known, GOOD[:1], (), NOW + timedelta(minutes=1))
    assert {kid_of(k) for k in once.keys} == {kid_of(k) for k in GOOD}
    assert GOOD[1]["kid"] in once.problem
    assert after(once, GOOD, (), NOW).missing == {}, "it came back"
    twice = after(once, GOOD[:1], (), NOW + timedelta(minutes=2))
    assert [kid_of(k) for k in twice.keys] == [GOOD[0]["kid"]]
    assert (twice.problem, twice.fetched_at) == ("", NOW + timedelta(minutes=2))


def test_keys_without_a_kid_are_told_apart() -> None:
    bare = [{name: value for name, value in key.items() if name != "kid"} for key in GOOD]
    known = after(IamKeys(vo="vo"), read_key_set(body(bare[0])), (), NOW)
    assert after(known, read_key_set(body(bare[1])), (), NOW).keys == [bare[1], bare[0]]
    with pytest.raises(InvalidRequest, match="one kid"):
        read_key_set(body(bare[0], bare[0]))


def test_a_kid_of_ours_is_refused_and_nothing_is_merged_before_the_first_answer() -> None:
    with pytest.raises(InvalidRequest, match="point at the merged file"):
        after(IamKeys(vo="vo"), GOOD, {GOOD[1]["kid"]}, NOW)
    with pytest.raises(InvalidRequest, match="not fetched"):
        merged(IamKeys(vo="vo"), GOOD)


def test_1000_rotations_outages_and_garbage_answers_of_either_side() -> None:  # noqa: C901 - one history
    """Whoever verifies with the file takes every token that should pass, and none that should not."""
    chance = random.Random(16)
    pool = [keys.generate("ES256") for _ in range(60)]
    fresh = iter(chance.sample(pool, len(pool)))
    iam, ours = [next(fresh)], [next(fresh)]
    withdrawn: dict[str, tuple[keys.Signer, int]] = {}
    revoked: list[keys.Signer] = []
    known, now = after(IamKeys(vo="vo"), [s.public_jwk for s in iam], (), NOW), NOW
    published = merged(known, [s.public_jwk for s in ours])

    def accepted(signer: keys.Signer) -> bool:
        token = signer.sign(b'{"sub":"x"}').decode()
        kid = jwt.get_unverified_header(token)["kid"]
        for key in jwt.PyJWKSet.from_dict(json.loads(json.dumps(published))).keys:
            if key.key_id == kid:
                jwt.decode(token, key, ["ES256"])
                return True
        return False

    for _ in range(1000):
        now += timedelta(minutes=1)
        what = chance.choices(["nothing", "iam", "withdraw", "ours", "revoke"], [80, 5, 5, 5, 5])[0]
        if what == "iam" and (new := next(fresh, None)):
            iam.append(new)
        elif what == "withdraw" and len(iam) > 1:
            gone = iam.pop(0)
            withdrawn[gone.kid] = gone, 0
        elif what == "ours" and (new := next(fresh, None)):
            ours.append(new)
        elif what == "revoke" and len(ours) > 1:
            revoked.append(ours.pop(0))
        listed: list[Any] = [s.public_jwk for s in iam]
        answer = chance.choices(
            [
                body(*listed),
                None,
                b"<html>",
                body(),
                body(*listed, SECRET),
                body(*listed, ours[0].public_jwk),
            ],
            [70, 10, 5, 5, 5, 5],
        )[0]
        if answer is not None:  # else the IAM is away
            try:
                known = after(known, read_key_set(answer), {s.kid for s in (*ours, *revoked)}, now)
                withdrawn = {kid: (signer, count + 1) for kid, (signer, count) in withdrawn.items()}
            except InvalidRequest:
                pass  # everything stays as it was
        published = merged(known, [s.public_jwk for s in ours])
        in_file = {kid_of(k) for k in known.keys}
        assert all(accepted(s) for s in ours)
        assert all(accepted(s) for s in iam if s.kid in in_file)
        assert not any(accepted(s) for s in revoked)
        assert not any(accepted(signer) for signer, count in withdrawn.values() if count >= 2)
        assert all(
            accepted(signer) for signer, count in withdrawn.values() if count < 2 and signer.kid in in_file
        )
    assert len(revoked) > 5
    assert len(withdrawn) > 5
