"""Subject tokens of external IAMs: who signed them, and whether they are meant for us (RFC 8693 §2.1)."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jwt
from msgspec import structs

from minter.errors import InvalidGrant
from minter.jws import UNREADABLE, is_compact
from minter.policy.limits import MAX_ACT_DEPTH
from minter.policy.token_requests import SubjectToken
from minter.providers.iam import IAM, check_subject
from minter.providers.reading import scope_words


class Subjects:
    """Verifies subject tokens; `iams` is called for the first token: without one no secrets are needed.

    `own_kids` returns the kids of Minter's keys, whose tokens are no provider's.
    """

    def __init__(
        self,
        issuers: Mapping[str, str],
        iams: Callable[[], Mapping[str, IAM]],
        own_kids: Callable[[], Collection[str]],
    ) -> None:
        self._issuers = issuers
        self._own_kids = own_kids
        self._make = iams
        self._iams: Mapping[str, IAM] | None = None

    def verify(self, vo: str, subject: SubjectToken) -> SubjectToken:
        """Verify a subject token, and return it with its claims; raises InvalidGrant or ProviderAway."""
        return structs.replace(subject, **self._held(vo, subject.token))

    def _held(self, vo: str, token: str) -> dict[str, object]:
        if self._iams is None:
            self._iams = self._make()
        try:
            if not is_compact(token):
                raise ValueError
            unverified = jwt.decode(token, options={"verify_signature": False})
            kid = jwt.get_unverified_header(token).get("kid")
        except UNREADABLE:
            raise InvalidGrant(
                "the subject token is no JWT, expected an access token of a provider"
            ) from None
        if kid in self._own_kids():  # where the IAM signs under the same issuer (ADR 16)
            raise InvalidGrant("the subject token is Minter's own, expected an access token of a provider")
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
        if claims.get("cnf") is not None:
            raise InvalidGrant(
                "the subject token is bound to a key (cnf), and no proof is taken here: send a bearer token"
            )
        sub, client = claims.get("sub"), claims.get("client_id") or claims.get("azp") or ""
        if not isinstance(sub, str) or not sub or not isinstance(client, str):
            raise InvalidGrant("the subject token's sub, client_id or azp is missing or no text")
        words = scope_words(claims.get("scope", ""))
        if words is None:
            raise InvalidGrant("the subject token's scope is no text")
        return {
            "provider": iam.provider.name,
            "scope": " ".join(words),
            "expires_at": int(claims["exp"]),
            "sub": sub,
            "client": client,
            "act": _actors(claims, iam.provider.client_id, names_us),
        }


def _actors(claims: Mapping[str, Any], client_id: str, names_us: Collection[str]) -> dict[str, Any] | None:
    """Return the chain of actors that a subject token names, for whoever acts next (RFC 8693 §4.1, §4.4).

    Raises InvalidGrant if the token may not be acted with by us, or if its chain is malformed or too long.
    """
    may = claims.get("may_act")
    if may is not None and not (isinstance(may, dict) and may.get("sub") in (client_id, *names_us)):
        raise InvalidGrant("the subject token's may_act names somebody else than this engine")
    chain, subs = claims.get("act"), list[str]()
    while chain is not None:
        if not isinstance(chain, dict) or not isinstance(chain.get("sub"), str) or len(subs) >= MAX_ACT_DEPTH:
            raise InvalidGrant(f"the subject token's act is malformed, or names over {MAX_ACT_DEPTH} actors")
        subs.append(chain["sub"])
        chain = chain.get("act")
    found: dict[str, Any] | None = None
    for sub in reversed(subs):
        found = {"sub": sub} if found is None else {"sub": sub, "act": found}
    return found
