"""Our authentication at an external IAM (RFC 6749 §2.3, RFC 7523 §2.2)."""

import base64
import uuid
from collections.abc import Callable
from urllib.parse import quote_plus

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from minter.errors import SettingsError
from minter.providers.dialects import Provider

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_SECONDS = 60

Form = list[tuple[str, str]]


class Authenticator:
    """Adds our authentication to forms for one provider, by the method of its settings.

    `secret` is our client secret, or a PEM private key; raises SettingsError if it is neither RSA nor EC.
    """

    def __init__(self, provider: Provider, secret: str) -> None:
        self._provider = provider
        self._secret = secret
        self._key = private_key(provider, secret) if provider.authentication == "private_key_jwt" else None

    def __call__(self, form: Form, headers: dict[str, str], audience: Callable[[], str], now: float) -> Form:
        """Return the form with our authentication, or add it to `headers`.

        `audience` returns the token endpoint, for which an assertion is meant; `now` is in Unix seconds.
        """
        provider = self._provider
        if provider.authentication == "client_secret_basic":
            pair = f"{quote_plus(provider.client_id)}:{quote_plus(self._secret)}"
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
            return form
        if self._key is None:
            return [*form, ("client_id", provider.client_id), ("client_secret", self._secret)]
        claims = {
            "iss": provider.client_id, "sub": provider.client_id, "aud": audience(),
            "iat": int(now), "exp": int(now) + ASSERTION_SECONDS, "jti": str(uuid.uuid4()),
        }  # fmt: skip
        algorithm = "ES256" if isinstance(self._key, EllipticCurvePrivateKey) else "RS256"
        kid = {"kid": provider.key_id} if provider.key_id else {}
        assertion = jwt.encode(claims, self._key, algorithm, headers=kid)
        return [
            *form,
            ("client_id", provider.client_id),
            ("client_assertion_type", ASSERTION_TYPE),
            ("client_assertion", assertion),
        ]


def private_key(provider: Provider, pem: str) -> RSAPrivateKey | EllipticCurvePrivateKey:
    """Return our private key at a provider, RSA or EC; raises SettingsError."""
    try:
        key = load_pem_private_key(pem.encode(), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, RSAPrivateKey | EllipticCurvePrivateKey):
        raise SettingsError(
            f"provider {provider.name}: secret_file is no PEM private key, RSA or EC"
        ) from None
    return key
