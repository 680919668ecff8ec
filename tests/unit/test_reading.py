"""What external IAMs write differently: keys, dates, hosts and members of answers."""

from datetime import UTC, datetime
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from minter.providers.reading import key_for, may_point_at, plain, seconds_of, text_of

EC = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True)
EC_2 = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True)
RSA = RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048).public_key(), as_dict=True)
ES256, RS256 = {"alg": "ES256", "kid": "1"}, {"alg": "RS256", "kid": "1"}


@pytest.mark.parametrize(
    ("keys", "header", "found"),
    [
        ([EC | {"kid": "1"}], ES256, EC),
        ([EC | {"kid": 1}], ES256, EC),
        ([EC | {"kid": "1"}], {"alg": "ES256", "kid": 1}, EC),
        ([EC], ES256, EC),
        ([EC | {"kid": None}], ES256, EC),
        ([EC | {"kid": "1"}], {"alg": "ES256"}, EC),
        ([EC | {"kid": "1", "use": None}], ES256, EC),
        ([EC | {"kid": "1"}, EC | {"kid": "1"}], ES256, EC),
        ([RSA | {"kid": "1"}, EC | {"kid": "1"}], ES256, EC),
        ([RSA | {"kid": "1"}, EC | {"kid": "1"}], RS256, RSA),
        ([RSA, EC], {"alg": "RS256"}, RSA),
        ([EC | {"kid": "1"}, EC_2 | {"kid": "2"}], ES256, EC),
        ([EC | {"kid": "1", "key_ops": ["verify"]}], ES256, EC),
        ([EC | {"kid": "1", "key_ops": ["encrypt"]}], ES256, None),
        ([EC | {"kid": "1", "use": "enc"}], ES256, None),
        ([EC | {"kid": "1", "alg": "RS256"}], ES256, None),
        ([EC | {"kid": "1"}, EC_2 | {"kid": "1"}], ES256, None),
        ([EC | {"kid": "2"}], ES256, None),
        ([EC, EC_2], ES256, None),
        ([RSA | {"kid": "1"}], ES256, None),
        ([], ES256, None),
    ],
)  # fmt: skip
def test_a_key_is_found_however_it_is_numbered(
    keys: list[dict[str, Any]], header: dict[str, Any], found: dict[str, Any] | None
) -> None:
    key = key_for(keys, header)
    told = None if key is None else type(key.Algorithm).to_jwk(key.key, as_dict=True)
    assert told == found


NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7), (" 7 ", 7), ("0", 0), ("9" * 400, 3600), ("-1", 0), ("7.5", 0), ("", 0), ("soon", 0), ("٧", 0),
        ("Wed, 25 Nov 2026 12:00:30 GMT", 30), ("Wednesday, 25-Nov-26 12:00:30 GMT", 30),
        ("Wed Nov 25 12:00:30 2026", 30), ("Wed, 25 Nov 2026 12:00:30 -0000", 30),
        ("Wed, 25 Nov 2026 13:00:30 +0100", 30), ("Wed, 25 Nov 2026 11:00:00 GMT", 0),
        ("Fri, 25 Nov 2126 12:00:00 GMT", 3600),
    ],
)  # fmt: skip
def test_retry_after_is_read_in_every_form(header: str, seconds: int) -> None:
    assert seconds_of(header, NOW) == seconds


@given(st.text())
def test_retry_after_is_always_within_its_bounds(header: str) -> None:
    assert 0 <= seconds_of(header, NOW) <= 3600


ISSUER = "https://iam.example.org/realms/vo"


@pytest.mark.parametrize(
    ("url", "hosts", "may"),
    [
        ("https://iam.example.org/token", (), True),
        ("https://IAM.example.org/token", (), True),
        ("https://keys.iam.example.org/jwks", (), True),
        ("https://login.example.org/token", (), False),
        ("https://login.example.org/token", ("login.example.org",), True),
        ("https://evil-iam.example.org/token", (), False),
        ("https://eviliam.example.org/token", (), False),
        ("https://iam.example.org.evil.example/token", (), False),
        ("https://iam.example.org@evil.example/token", (), False),
        ("https://iam.example.org:8443/token", (), False),
        ("http://iam.example.org/token", (), False),
        ("ftp://iam.example.org/token", (), False),
        ("https://169.254.169.254/x", (), False),
        ("https://iam.example.org/token#x", (), False),
        ("https://[::1/token", (), False),
        ("", (), False),
    ],
)
def test_a_provider_points_at_its_own_hosts_only(url: str, hosts: tuple[str, ...], may: bool) -> None:
    assert may_point_at(url, ISSUER, hosts) is may


@pytest.mark.parametrize("value", [None, 5, [], {}, True])
def test_a_member_that_is_no_text_is_none(value: object) -> None:
    assert text_of({"refresh_token": value}, "refresh_token") == ""


def test_a_text_of_an_iam_shows_no_token() -> None:
    token = jwt.encode({"sub": "x"}, "k" * 32, "HS256")
    assert plain(f"bad {token}\n\x07 request") == "bad request"
