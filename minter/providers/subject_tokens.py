"""Subject tokens of external IAMs: who signed them, and whether they are meant for us (RFC 8693 §2.1)."""

from collections.abc import Callable, Mapping

import jwt
from msgspec import structs

from minter.errors import InvalidGrant
from minter.policy.token_requests import SubjectToken
from minter.providers.iam import IAM, check_subject, scope_words


class Subjects:
    """Verifies subject tokens; `iams` is called for the first token: without one no secrets are needed."""

    def __init__(self, issuers: Mapping[str, str], iams: Callable[[], Mapping[str, IAM]]) -> None:
        self._issuers = issuers
        self._make = iams
        self._iams: Mapping[str, IAM] | None = None

    def verify(self, vo: str, subject: SubjectToken) -> SubjectToken:
        """Verify a subject token, and return it with its claims; raises InvalidGrant or ProviderAway."""
        return structs.replace(subject, **self._held(vo, subject.token))

    def _held(self, vo: str, token: str) -> dict[str, object]:
        if self._iams is None:
            self._iams = self._make()
        try:
            unverified = jwt.decode(token, options={"verify_signature": False})
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise InvalidGrant(
                "the subject token is no JWT, expected an access token of a provider"
            ) from None
        issuer = str(unverified.get("iss", "")).rstrip("/")
        here = [iam for iam in self._iams.values() if iam.provider.serves(vo)]
        iam = next((iam for iam in here if iam.provider.issuer.rstrip("/") == issuer), None)
        if iam is None:
            raise InvalidGrant(
                f"the subject token is of none of this VO's providers, expected one of "
                f"{', '.join(i.provider.issuer for i in here) or 'none: there are no [[providers]]'}"
            )
        names_us = (self._issuers[vo], iam.provider.client_id, *iam.provider.subject_audiences)
        claims = check_subject(iam, token, names_us)
        words = scope_words(claims.get("scope", ""))
        if words is None:
            raise InvalidGrant("the subject token's scope is no text")
        return {
            "provider": iam.provider.name,
            "scope": " ".join(words),
            "expires_at": int(claims["exp"]),
            "sub": str(claims.get("sub", "")),
            "client": str(claims.get("client_id") or claims.get("azp") or ""),
        }
