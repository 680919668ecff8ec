"""HTTP client of one external IAM: requests tokens, and checks them before they are used.

The answers of an IAM are checked like any other input: their size and time are bounded, redirects are not
followed, and a token with more scope, a longer life or another audience than requested is rejected
(RFC 6749, RFC 8693).
"""

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Literal
from urllib.parse import urlencode, urlsplit

import jwt
import msgspec
import urllib3

from minter.bounded_http import pool_manager, read
from minter.errors import (
    InvalidGrant,
    Lost,
    Misconfigured,
    ProviderAway,
    ProviderRefused,
    ProviderTokenRejected,
    Unavailable,
)
from minter.jws import UNREADABLE, is_compact
from minter.policy.limits import MAX_DATE
from minter.providers.answers import Asked, Documents, Obtained
from minter.providers.authentication import Authenticator, Form
from minter.providers.dialects import Provider, Target
from minter.providers.reading import (
    key_for,
    may_point_at,
    plain,
    reason_of,
    scope_words,
    seconds_of,
    text_of,
    within,
)
from minter.storages.dialects import DEFAULT_MAX_TOKEN_BYTES

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 256 * 1024
LEEWAY_SECONDS = 60
"""Largest accepted difference, in seconds, between an IAM's clock and ours."""
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "ES512", "EdDSA"]
_TYPE = "urn:ietf:params:oauth:token-type:"
_GRANT_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_TRANSIENT_CODES = frozenset({"temporarily_unavailable", "server_error", "slow_down"})
_OK, _UNAUTHORIZED, _NOT_FOUND, _TOO_MANY, _SERVER = 200, 401, 404, 429, 500
_REDIRECTS = range(300, 400)
_SECRET_LENGTH = 8
MAX_JTI = 255


class IAM:
    """A client of one external IAM; may be used by several threads.

    `documents` returns the IAM's metadata, with `fresh=True` newer if possible; `secret` is our client
    secret at the IAM, or a PEM private key.
    """

    def __init__(
        self,
        provider: Provider,
        secret: str,
        documents: Callable[..., Documents],
        clock: Callable[[], datetime],
        ca: str | None = None,
    ) -> None:
        self.provider = provider
        self._secret = secret
        self._authenticated = Authenticator(provider, secret)
        self.documents = documents
        self._clock = clock
        self._http = pool_manager(provider.timeout_seconds, ca, provider.in_flight)

    def __repr__(self) -> str:
        """Name the provider; the secret stays hidden."""
        return f"IAM({self.provider.name})"

    # ── documents ────────────────────────────────────────────────────────────────────────────

    def fetch_documents(self) -> Documents:
        """Fetch discovery and JWKS; raises ProviderAway if they are not valid or not of this provider."""
        base = self.provider.issuer.rstrip("/")
        found = self._discovered(base)
        named = text_of(found, "issuer")
        if named.rstrip("/") != base:
            raise ProviderAway(
                f"provider {self.provider.name}: discovery names another issuer, {named[:200]!r}, expected "
                f"{base}"
            )
        jwks = self._get(self._endpoint(found, "jwks_uri")).get("keys")
        usable = [key for key in jwks if isinstance(key, dict)] if isinstance(jwks, list) else []
        if not usable:
            raise ProviderAway(f"provider {self.provider.name}: the JWKS has no keys")
        return Documents(
            named,
            self._endpoint(found, "token_endpoint"),
            usable,
            self._endpoint(found, "introspection_endpoint", needed=False),
            self._endpoint(found, "revocation_endpoint", needed=False),
        )

    def _discovered(self, base: str) -> dict[str, Any]:
        """Return the discovery document, from either place that a standard names (RFC 8414 §3.1, OIDC)."""
        parts = urlsplit(base)
        inserted = f"{parts.scheme}://{parts.netloc}/.well-known/"
        urls = dict.fromkeys(
            (
                f"{base}/.well-known/openid-configuration",
                f"{inserted}openid-configuration{parts.path}",
                f"{inserted}oauth-authorization-server{parts.path}",
            )
        )
        status = 0
        for url in urls:
            status, told, _ = self._call("GET", url)
            if status == _OK and told is not None:
                return told
            if status != _NOT_FOUND:
                break
        raise ProviderAway(f"provider {self.provider.name} answers {status} for its discovery document")

    def _endpoint(self, found: Mapping[str, Any], name: str, *, needed: bool = True) -> str:
        """Return an endpoint of the discovery document, if this provider may point at it."""
        url = text_of(found, name)
        if may_point_at(url, self.provider.issuer, self.provider.hosts):
            return url
        if not needed:
            return ""
        raise ProviderAway(
            f"provider {self.provider.name}: its {name} is {url[:200]!r}, expected a URL at the host of its "
            "issuer or below it, or at one listed in hosts of [[providers]]"
        )

    def _get(self, url: str) -> dict[str, Any]:
        status, told, _ = self._call("GET", url)
        if status != _OK or told is None:
            raise ProviderAway(f"provider {self.provider.name} answers {status} for {url[:200]}")
        return told

    # ── tokens ───────────────────────────────────────────────────────────────────────────────

    def client_credentials(self, asked: Asked) -> Obtained:
        """Request a token by client credentials (RFC 6749 §4.4); raises ProviderAway or ProviderRefused."""
        target = self.provider.how.credentials_target
        return self._token([("grant_type", "client_credentials"), *self._wish(asked, target)], asked)

    def exchange(self, asked: Asked, subject: str) -> Obtained:
        """Exchange a subject token, also for a refresh token (RFC 8693 §2.1).

        Raises ProviderAway or ProviderRefused.
        """
        how = self.provider.how
        form = [
            ("grant_type", _GRANT_EXCHANGE),
            ("subject_token", subject),
            ("subject_token_type", _TYPE + "access_token"),
            *self._wish(asked, how.target, " offline_access" if how.offline_scope else ""),
        ]
        if how.refresh_type:
            form.append(("requested_token_type", _TYPE + "refresh_token"))
        return self._token(form, asked)

    def refresh(self, asked: Asked, refresh_token: str) -> Obtained:
        """Request an access token with a refresh token (RFC 6749 §6).

        Raises ProviderAway or ProviderRefused; the error is Lost if the refresh token may be spent.
        """
        form = [("grant_type", "refresh_token"), ("refresh_token", refresh_token)]
        return self._token([*form, *self._wish(asked, self.provider.how.target)], asked)

    def introspect(self, token: str, hint: Literal["access_token", "refresh_token"]) -> dict[str, Any]:
        """Return the IAM's introspection of a token (RFC 7662); raises ProviderAway or ProviderRefused."""
        return self._post(
            self.documents().introspection_endpoint, [("token", token), ("token_type_hint", hint)]
        )

    def revoke(self, refresh_token: str) -> None:
        """Revoke a refresh token and all tokens that descend from it (RFC 7009).

        Raises ProviderAway or ProviderRefused.
        """
        form = [("token", refresh_token), ("token_type_hint", "refresh_token")]
        self._post(self.documents().revocation_endpoint, form)

    def _wish(self, asked: Asked, target: Target, more: str = "") -> Form:
        provider = self.provider
        by_scope = [provider.audience_scope + audience for audience in asked.audience]
        scope = " ".join([asked.scope + more, *(by_scope if provider.audience_scope else ())])
        token_request = [("scope", scope)]
        if target != "none":
            targets = asked.audience if provider.how.separate else (" ".join(asked.audience),)
            token_request += [(target, one) for one in targets]
        if provider.how.lifetime_parameter:
            token_request.append((provider.how.lifetime_parameter, str(asked.cap_seconds)))
        return token_request

    def _token(self, form: Form, asked: Asked) -> Obtained:
        told = self._post(self.documents().token_endpoint, form)
        refresh, access = text_of(told, "refresh_token"), text_of(told, "access_token")
        if not (access or refresh):
            raise Lost(f"provider {self.provider.name} answers without a token")
        if told.get("issued_token_type") == _TYPE + "refresh_token" and not refresh:
            refresh, access = access, ""  # RFC 8693 §2.2.1: access_token has the issued token
        if not access:
            return Obtained(refresh=refresh)
        try:
            self._check_type(told.get("token_type"))
            scope, expires_at, jti = self._checked(access, asked)
        except (ProviderTokenRejected, Unavailable) as error:
            return Obtained(refresh=refresh, error=error)
        except Exception:  # the token is malformed; the refresh token beside it must be kept
            logger.exception("a token of provider %s could not be checked", self.provider.name)
            return Obtained(refresh=refresh, error=self._rejected("it cannot be read", ""))
        has = set(scope.split(" "))
        dropped = tuple(word for word in asked.scope.split(" ") if word not in has)
        return Obtained(access, scope, expires_at, refresh, jti, dropped)

    # ── what came back ───────────────────────────────────────────────────────────────────────

    def _check_type(self, kind: object) -> None:
        """Raise ProviderTokenRejected unless a token is a bearer token (RFC 6750); an absent type is one."""
        if kind is not None and str(kind).lower() != "bearer":
            raise self._rejected(f"its token_type is {str(kind)[:50]!r}, expected Bearer", "token_type")

    def _checked(self, token: str, asked: Asked) -> tuple[str, int, str]:
        """Return scope, exp and jti of an access token; raises ProviderTokenRejected if they do not fit.

        A narrower scope than requested is accepted; a shorter life is accepted down to `least_seconds`.
        """
        if len(token) > DEFAULT_MAX_TOKEN_BYTES:
            raise self._rejected(f"it has {len(token)} bytes, expected at most {DEFAULT_MAX_TOKEN_BYTES}", "")
        claims = self.verified(token)
        if claims.get("cnf") is not None:
            raise self._rejected("it is bound to a key that nobody here has", "cnf")
        audience = claims.get("aud", [])
        names = [audience] if isinstance(audience, str) else audience
        extra_audiences = {*self.provider.extra_audiences} - {*asked.audience}
        if not isinstance(names, list) or {*map(str, names)} - extra_audiences != {*asked.audience}:
            raise self._rejected(f"its audience is {str(audience)[:200]!r}", "aud")
        words = scope_words(claims.get("scope", ""))
        if words is None:
            raise self._rejected("its scope is no text", "scope")
        extra, by_scope = self.provider.how.extra_scopes, self.provider.audience_scope
        granted = [w for w in words if w not in extra and not (by_scope and w.startswith(by_scope))]
        if not granted:
            raise self._rejected("it grants nothing of what was asked for", "scope")
        if wider := [w for w in granted if not within(w, asked.scope)]:
            raise self._rejected(f"scope {wider[0][:200]!r} was not asked for", "scope")
        left = int(claims["exp"]) - self._clock().timestamp()
        if left > asked.cap_seconds + LEEWAY_SECONDS:
            raise self._rejected(f"it lives {left:.0f} s, expected at most {asked.cap_seconds} s", "exp")
        if left < asked.least_seconds:
            raise self._rejected(f"it lives {left:.0f} s, expected at least {asked.least_seconds} s", "exp")
        return " ".join(granted), int(claims["exp"]), str(claims.get("jti", ""))[:MAX_JTI]

    def verified(self, token: str, audience: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return the claims of a token that this provider signed and that is valid now.

        If `audience` is given, the token must name one of its values. Raises ProviderTokenRejected.
        """
        documents = self.documents()
        try:
            if not is_compact(token):
                raise ValueError
            header = jwt.get_unverified_header(token)
            key = key_for(documents.jwks, header) or key_for(self.documents(fresh=True).jwks, header)
            if key is None:
                raise self._rejected("no key of the provider has its kid", "")
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=_ALGORITHMS,
                issuer=[documents.issuer],
                audience=audience,
                leeway=LEEWAY_SECONDS,
                # Times are checked below, by this object's clock: PyJWT would use the system's.
                options={"require": ["exp", "iss"], "verify_aud": audience is not None, "verify_exp": False,
                         "verify_nbf": False, "verify_iat": False},
            )  # fmt: skip
        except jwt.InvalidIssuerError:  # the signature was good by then
            told = jwt.decode(token, options={"verify_signature": False}).get("iss")
            raise self._rejected(
                f"its iss is {str(told)[:200]!r}, the discovery document says {documents.issuer!r}", "iss"
            ) from None
        except (jwt.PyJWKError, jwt.InvalidKeyError) as error:
            why = f"the provider's key {str(header.get('kid'))[:100]!r} is malformed: {error}"
            raise self._rejected(why, "") from None
        except UNREADABLE as error:
            raise self._rejected(f"it does not verify ({type(error).__name__})", "") from None
        now = self._clock().timestamp()
        for name in ("exp", "nbf", "iat"):
            at = claims.get(name, now if name == "exp" else 0)
            if isinstance(at, bool) or not isinstance(at, int | float) or not abs(at) < MAX_DATE:
                raise self._rejected(f"{name} is no number", name)
            if at <= now if name == "exp" else at > now + LEEWAY_SECONDS:
                raise self._rejected(f"it is not valid now, by its {name}", name)
        return claims

    def _rejected(self, why: str, claim: str) -> ProviderTokenRejected:
        fields = {"claim": claim} if claim else {}
        return ProviderTokenRejected(
            f"a token of provider {self.provider.name} was rejected: {why}", **fields
        )

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────

    def _post(self, url: str, form: Form) -> dict[str, Any]:
        """Send a form, authenticated; raises ProviderRefused, Misconfigured, ProviderAway or Lost."""
        name = self.provider.name
        if not url:
            raise ProviderAway(f"provider {name} has no such endpoint in its discovery document")
        status, told, retry_after = self._call("POST", url, form)
        if status == _OK and told is not None:
            return told
        if status == _OK:
            if url == self.documents().revocation_endpoint:
                return {}
            raise Lost(f"provider {name} answers with what is no JSON object")
        code, description = text_of(told, "error"), text_of(told, "error_description")
        for secret in (self._secret, *(value for _, value in form)):
            description = description.replace(secret, "…") if len(secret) >= _SECRET_LENGTH else description
        why = f"provider {name} answers {status} {plain(code)} {plain(description)}".strip()
        if status == _TOO_MANY or (code in _TRANSIENT_CODES and status < _SERVER):
            raise ProviderAway(why, retry_after=retry_after)
        # A 401 in any shape is about our credentials, unless it names the grant or the token in it.
        about_us = status == _UNAUTHORIZED and code not in ("invalid_grant", "invalid_token")
        if about_us or code in ("invalid_client", "unauthorized_client"):
            raise Misconfigured(f"{why}; are client_id and secret_file of [[providers]] right?")
        if status in _REDIRECTS:
            raise Misconfigured(f"{why}: redirects are not followed; is the issuer of [[providers]] right?")
        if status >= _SERVER or told is None or not code:
            # For example, after a gateway's time-out nobody knows whether the IAM served the request.
            raise Lost(why, retry_after=retry_after)
        raise ProviderRefused(why, provider=name, provider_error=plain(code))

    def _call(
        self, method: str, url: str, form: Form | None = None
    ) -> tuple[int, dict[str, Any] | None, float]:
        """Return status, JSON object (or None) and Retry-After in seconds of an answer.

        The size and the total time of the answer are bounded.
        """
        headers = {"Accept": "application/json"}
        body = None
        if form is not None:
            form = self._authenticated(
                form, headers, lambda: self.documents().token_endpoint, self._clock().timestamp()
            )
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            body = urlencode(form)
        try:
            with self._http.request(
                method, url, body=body, headers=headers, redirect=False, preload_content=False
            ) as response:
                content = read(response, MAX_ANSWER_BYTES)
                status, said = response.status, response.headers.get("Retry-After", "")
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as error:
            raise self._away(error) from None
        except (urllib3.exceptions.HTTPError, TimeoutError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise self._away(error) from None
            raise Lost(f"provider {self.provider.name}: {reason_of(error)}") from None
        try:
            told = msgspec.json.decode(content)
        except (msgspec.DecodeError, RecursionError):
            told = None
        return status, told if isinstance(told, dict) else None, seconds_of(said, self._clock())

    def _away(self, error: Exception) -> ProviderAway:
        return ProviderAway(f"provider {self.provider.name} cannot be reached ({reason_of(error)})")


def check_subject(iam: IAM, token: str, audience: tuple[str, ...]) -> dict[str, Any]:
    """Return the claims of a subject token of this provider that names us in `aud`; raises InvalidGrant."""
    try:
        return iam.verified(token, audience)
    except ProviderTokenRejected as error:
        why = error.message.partition(": ")[2]
        raise InvalidGrant(
            f"the subject token is not accepted: {why}; it must be signed by {iam.provider.issuer}, be valid "
            f"now, and name one of {', '.join(audience)} in aud"
        ) from None
