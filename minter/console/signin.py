"""Signing in to the console: sessions, the one-time link, and OpenID Connect at the VO's IAM.

Sessions are in the memory of the one process that serves the console: a restart signs everybody out. With
OpenID Connect (Core §3.1, code flow with PKCE), groups of the ID token or of the userinfo give the role.
"""

import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jwt
import requests
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.requests_client import OAuth2Session
from msgspec import Struct

from minter.errors import InvalidClient, OperationNotAllowed, ProviderAway
from minter.policy.clients import fits
from minter.sections import ConsoleSettings

Role = Literal["viewer", "operator"]
SESSION_SECONDS = 8 * 3600
DISCOVERY_SECONDS = 300
MOST = 1_000
"""Sessions; the oldest give way."""
IAM_SECONDS = 10.0
LEEWAY_SECONDS = 60
ALGORITHMS = ["RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"]


class Person(Struct, frozen=True):
    """Someone who is signed in; `form_key` is in every form that this person is given."""

    name: str
    role: Role
    form_key: str


class Sessions:
    """People who are signed in, by unguessable keys, for SESSION_SECONDS; at most MOST of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._people: OrderedDict[str, tuple[float, Person]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, person: Person) -> str:
        """Open a session; return its key."""
        key = secrets.token_urlsafe(32)
        with self._lock:
            self._people[key] = self._clock() + SESSION_SECONDS, person
            while len(self._people) > MOST:
                self._people.popitem(last=False)
        return key

    def find(self, key: str) -> Person | None:
        """Return the person of a session, None if it has ended."""
        with self._lock:
            until, person = self._people.get(key, (0.0, None))
        return person if until > self._clock() else None

    def end(self, key: str) -> None:
        """End a session."""
        with self._lock:
            self._people.pop(key, None)


class SignIn:
    """Who is signed in, and how people sign in."""

    def __init__(
        self,
        wanted: ConsoleSettings,
        secret: str,
        folder: Path = Path(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sessions = Sessions(clock)
        self.iam = OpenID(wanted, secret, folder) if wanted.oidc_issuer else None
        self._link = secrets.token_urlsafe(32)
        self._one = threading.Lock()

    def link(self, base: str) -> str:
        """Return the link that signs in once, as operator."""
        return f"{base}/enter?key={self._link}"

    def enter(self, key: str, name: str) -> str | None:
        """Sign in with the key of the one-time link; return the session's key, None for a wrong one."""
        with self._one:
            if not self._link or not hmac.compare_digest(key.encode(), self._link.encode()):
                return None
            self._link = ""
        return self.open(name, "operator")

    def open(self, name: str, role: Role) -> str:
        """Open a session; return its key."""
        return self.sessions.add(Person(name, role, secrets.token_urlsafe(16)))


class OpenID:
    """The console as a client of the VO's IAM.

    What a sign-in must remember (state, nonce and PKCE's verifier) is in a cookie of the browser that began
    it: strangers who begin a thousand take nobody's place.
    """

    def __init__(self, wanted: ConsoleSettings, secret: str, folder: Path) -> None:
        self._wanted = wanted
        self._secret = secret
        self._ca = str(folder / wanted.ca) if wanted.ca else True
        self._known: tuple[float, dict[str, Any]] = (float("-inf"), {})

    def start(self) -> tuple[str, str]:
        """Return the IAM's URL to sign in at, and the cookie of the sign-in; raises ProviderAway."""
        state, nonce, verifier = (secrets.token_urlsafe(n) for n in (32, 16, 48))
        with self._client() as client:
            endpoint = self._discovery(client)["authorization_endpoint"]
            url, _ = client.create_authorization_url(
                endpoint, state=state, nonce=nonce, code_verifier=verifier
            )
        return str(url), f"{state}.{nonce}.{verifier}"

    def finish(self, cookie: str, state: str, code: str) -> tuple[str, Role]:
        """Return name and role of the person whom the IAM sent back.

        Raises InvalidClient for another browser's sign-in, or an answer of the IAM that proves nothing,
        OperationNotAllowed for a person without a role, ProviderAway if the IAM does not answer.
        """
        begun, nonce, verifier = cookie.split(".") if cookie.count(".") == 2 else ("", "", "")  # noqa: PLR2004
        if not begun or not hmac.compare_digest(begun.encode(), state.encode()):
            raise InvalidClient("this sign-in did not begin in this browser; sign in again")
        try:
            with self._client() as client:
                discovery = self._discovery(client)
                token = client.fetch_token(discovery["token_endpoint"], code=code, code_verifier=verifier)
                claims = self._claims(client, discovery, token, nonce)
        except (requests.RequestException, AuthlibBaseError, jwt.PyJWTError, KeyError, ValueError) as error:
            raise InvalidClient(f"the IAM's answer proves no identity ({type(error).__name__})") from error
        return self._name(claims), self._role(claims)

    def _claims(
        self, client: OAuth2Session, discovery: Mapping[str, Any], token: Mapping[str, Any], nonce: str
    ) -> dict[str, Any]:
        keys = jwt.PyJWKSet.from_dict(client.get(discovery["jwks_uri"], withhold_token=True).json()).keys
        kid = jwt.get_unverified_header(token["id_token"]).get("kid")
        key = next((k for k in keys if kid in (None, k.key_id)), None)
        if key is None:
            raise ValueError("no key has the kid of the ID token")
        claims: dict[str, Any] = jwt.decode(
            token["id_token"], key, ALGORITHMS, audience=self._wanted.client_id,
            issuer=self._wanted.oidc_issuer, leeway=LEEWAY_SECONDS,
            options={"require": ["sub", "iat", "exp", "aud", "iss"]},
        )  # fmt: skip
        if not hmac.compare_digest(str(claims.get("nonce", "")), nonce):
            raise ValueError("another nonce")
        if self._wanted.group_claim not in claims and "userinfo_endpoint" in discovery:
            told = client.get(discovery["userinfo_endpoint"]).json()
            if told.get("sub") == claims["sub"]:
                claims = {**told, **claims}
        return claims

    def _discovery(self, client: OAuth2Session) -> dict[str, Any]:
        at, known = self._known
        if time.monotonic() - at < DISCOVERY_SECONDS:
            return known
        try:
            url = self._wanted.oidc_issuer.rstrip("/") + "/.well-known/openid-configuration"
            answer = client.get(url, withhold_token=True)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
        except (requests.RequestException, ValueError) as error:
            why = type(error).__name__
            raise ProviderAway(f"no discovery document of {self._wanted.oidc_issuer} ({why})") from error
        if found.get("issuer") != self._wanted.oidc_issuer:
            raise ProviderAway(f"the discovery document is not of {self._wanted.oidc_issuer}: see [console]")
        self._known = time.monotonic(), found
        return found

    def _client(self) -> OAuth2Session:
        wanted = self._wanted
        made = OAuth2Session(
            wanted.client_id, self._secret, scope=wanted.oidc_scope, redirect_uri=f"{wanted.url}/callback",
            code_challenge_method="S256", default_timeout=IAM_SECONDS,
        )  # fmt: skip
        made.verify, made.trust_env = self._ca, False
        return made

    def _name(self, claims: Mapping[str, Any]) -> str:
        """Return a name for people to read, with the `sub`, which is nobody else's, for the audit."""
        shown = claims.get("preferred_username") or claims.get("email")
        return f"{shown} ({claims['sub']})"[:200] if shown else str(claims["sub"])[:200]

    def _role(self, claims: Mapping[str, Any]) -> Role:
        told = claims.get(self._wanted.group_claim) or []
        groups = [str(group) for group in told] if isinstance(told, list) else [str(told)] if told else []
        for role, patterns in (("operator", self._wanted.operators), ("viewer", self._wanted.viewers)):
            if any(fits(group, patterns) for group in groups):
                return "operator" if role == "operator" else "viewer"
        raise OperationNotAllowed(
            f"{self._name(claims)} is in no group of [console] operators or viewers; "
            f"{self._wanted.group_claim} has {len(groups)} groups"
        )
