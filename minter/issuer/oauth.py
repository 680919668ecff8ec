"""The OAuth endpoints of every issuer: `/token`, `/introspect`, `/revoke`.

Forms become token requests, and outcomes become answers. `minter.policy.token_endpoint` decides a token
request; the engine records and signs its token like every other. Refresh tokens are JWTs signed with a key
derived from the VO's master key and absent from every JWKS: DIRAC reads their `exp`, no storage accepts one.
"""

import asyncio
import json
import re
import time
from datetime import datetime
from hashlib import sha256
from itertools import chain
from typing import Any
from uuid import UUID

import jwt
import msgspec
from falcon import asgi

from minter import logs
from minter.database import states
from minter.errors import (
    InvalidGrant,
    InvalidRequest,
    InvalidScope,
    InvalidTarget,
    MinterError,
    RequestError,
    TokenRejected,
    UnauthorizedClient,
    Unavailable,
    UnsupportedGrantType,
)
from minter.issuer.app import SEVERAL, Web, send
from minter.issuer.client_authentication import Account
from minter.issuer.hosts import mounted
from minter.issuer.well_known import EXCHANGE
from minter.jws import UNREADABLE, is_compact
from minter.policy.limits import MAX_CLAIM_CHARACTERS
from minter.policy.requests import Request
from minter.policy.token_requests import Family, SubjectToken, TokenRequest, present
from minter.tokens import clock, keys
from minter.tokens.outcomes import Outcome, Submission

ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a name, RFC 8693 §3
JWT_TOKEN = "urn:ietf:params:oauth:token-type:jwt"  # noqa: S105
REFRESH_TOKEN = "urn:ietf:params:oauth:token-type:refresh_token"  # noqa: S105
REFRESH_TYPE = "rt+jwt"
NOT_ITS_OWN = "the token was issued to another client: nothing was revoked"
_WORDS = re.compile(r'[^\x00-\x1f"\\\x7f-\x9f]*').fullmatch
"""Matches RFC 6749 §3.3, and characters beyond ASCII, to which FTS's scopes may have been decoded."""
HOLD_SECONDS, AGAIN_SECONDS = 20.0, 0.5
"""How long, and how often, a token request is tried while Postgres is away: FTS fails a file at once."""
_KIND = {"client_credentials": "token", "refresh_token": "refresh", EXCHANGE: "exchange"}


def add_routes(app: "asgi.App[Any, Any]", web: Web) -> None:
    """Add every issuer's OAuth endpoints."""
    for vo, issuer in web.service.loaded.endpoints.items():
        one = Issuer(web, vo, web.service.loaded.issuers[vo], issuer)
        for path, endpoint in (("token", _Token), ("introspect", _Introspect), ("revoke", _Revoke)):
            app.add_route(f"{mounted(issuer)}{path}", endpoint(one))


class Issuer:
    """One VO's issuer: reads its access tokens, and reads and makes its refresh tokens."""

    def __init__(self, web: Web, vo: str, iss: str, url: str) -> None:
        self.web = web
        self.vo = vo
        self.iss = iss
        self.token_endpoint = f"{url}token"

    # ── refresh tokens ───────────────────────────────────────────────────────────────────────

    def refresh_token(self, family: Family, client: str) -> str:
        """Return the newest refresh token of a family; equal families give equal bytes."""
        claims = {
            "iss": self.iss,
            "sub": family.sub,
            "aud": self.token_endpoint,
            "client_id": client,
            "iat": int(family.rotated_at.timestamp()),
            "exp": int(family.ends_at.timestamp()),
            "jti": f"{family.family_id}.{family.generation}",
        }
        (key, *_) = self.web.service.keystore.refresh_keys(self.vo)
        return jwt.encode(claims, key, "HS256", headers={"typ": REFRESH_TYPE})

    def read_refresh_token(self, token: str) -> tuple[UUID, int] | None:
        """Return the family and generation of this issuer's refresh token, or None for any other token."""
        if not is_compact(token):
            return None
        for key in self.web.service.keystore.refresh_keys(self.vo):
            try:
                claims = jwt.decode(
                    token,
                    key,
                    algorithms=["HS256"],
                    audience=self.token_endpoint,
                    issuer=self.iss,
                    options={"verify_exp": False, "verify_iat": False},  # the family's row says when it ends
                )
            except UNREADABLE:
                continue
            family, _, generation = str(claims["jti"]).partition(".")
            return UUID(family), int(generation)
        return None

    # ── access tokens ────────────────────────────────────────────────────────────────────────

    def read_access_token(self, token: str) -> tuple[UUID, str]:
        """Return jti and payload of this issuer's valid access token; raises InvalidGrant for any other."""
        try:
            if not is_compact(token):
                raise ValueError
            header = jwt.get_unverified_header(token)
            key = next(k for k in self.web.ring if k.vo == self.vo and k.kid == header.get("kid"))
            if key.state == "revoked":
                raise InvalidGrant("the token was signed by a key that is revoked")
            keys.verify(token.encode(), key.public_jwk)
            payload = jwt.utils.base64url_decode(token.split(".")[1].encode()).decode()
            return UUID(json.loads(payload)["jti"]), payload
        except (*UNREADABLE, StopIteration, TokenRejected):
            raise InvalidGrant(f"not an access token of {self.iss} that verifies") from None

    async def foreign(self, form: dict[str, str]) -> SubjectToken | None:
        """Verify and return a form's subject token if another signed it; raises InvalidGrant."""
        token = form.get("subject_token")
        if token is None or not self.web.service.loaded.settings.providers:
            return None
        try:
            issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
        except UNREADABLE:
            return None
        co_issued = self.vo in self.web.service.loaded.co_issuers and not self._has_our_key(token)
        if issuer == self.iss and not co_issued:
            return None
        return await self.web.verify_subject(self.vo, SubjectToken(token))

    def _has_our_key(self, token: str) -> bool:
        kid = jwt.get_unverified_header(token).get("kid")
        return any(key.vo == self.vo and key.kid == kid for key in self.web.ring)

    # ── answers ──────────────────────────────────────────────────────────────────────────────

    def answer(self, outcome: Outcome, *, exchanged: bool) -> dict[str, Any]:
        """Return the answer of RFC 6749 §5.1 and RFC 8693 §2.2.1; raises the outcome's error."""
        if outcome.error is not None:
            raise outcome.error
        (issued,) = outcome.issued
        told: dict[str, Any] = {
            "access_token": issued.token.decode(),
            "token_type": "Bearer",
            "expires_in": issued.exp - int(self.web.service.clock().timestamp()),
            "scope": issued.scope,
        }
        if exchanged:
            told["issued_token_type"] = ACCESS_TOKEN
        if outcome.family is not None and outcome.client is not None:
            told["refresh_token"] = self.refresh_token(outcome.family, outcome.client.name)
        return told


def token_request_of(
    issuer: Issuer, form: dict[str, str], foreign: SubjectToken | None = None
) -> TokenRequest:
    """Return the token request of a form; `foreign` is its verified subject token from a provider, if any.

    Raises InvalidRequest, InvalidGrant or UnsupportedGrantType.
    """
    grant_type = _needed(form, "grant_type")
    if grant_type not in _KIND:
        raise UnsupportedGrantType(f"grant_type is not one of {', '.join(_KIND)}")
    scope = _words(form, "scope", InvalidScope)
    named = [_words(form, name, InvalidTarget) for name in SEVERAL]
    audience = tuple(dict.fromkeys(chain(*named)))
    if grant_type == "client_credentials":
        return TokenRequest(scope=scope, audience=audience)
    if grant_type == "refresh_token":
        refresh = issuer.read_refresh_token(_needed(form, "refresh_token"))
        if refresh is None:
            raise InvalidGrant("not a refresh token of this issuer")
        return TokenRequest(scope=scope, audience=audience, offline=True, refresh=refresh)
    if _needed(form, "subject_token_type") not in (ACCESS_TOKEN, JWT_TOKEN):
        raise InvalidRequest(f"subject_token_type is not {ACCESS_TOKEN}")
    if form.get("requested_token_type", ACCESS_TOKEN) not in (ACCESS_TOKEN, JWT_TOKEN, REFRESH_TOKEN):
        raise InvalidRequest(f"requested_token_type is neither {ACCESS_TOKEN} nor {REFRESH_TOKEN}")
    if {"actor_token", "actor_token_type"} & form.keys():
        raise InvalidRequest("actor_token is not accepted: the authenticated client is the actor")
    offline = form.get("requested_token_type") == REFRESH_TOKEN or "offline_access" in scope
    if foreign is not None:
        return TokenRequest(scope=scope, audience=audience, offline=offline, foreign=foreign)
    subject = issuer.read_access_token(_needed(form, "subject_token"))
    return TokenRequest(scope=scope, audience=audience, offline=offline, subject=subject)


def _words(form: dict[str, str], name: str, wrong: type[RequestError]) -> tuple[str, ...]:
    """Return the words of a parameter; raises `wrong` if it is too long or has bad characters."""
    text = form.get(name, "")
    if len(text) > MAX_CLAIM_CHARACTERS or not _WORDS(text):
        raise wrong(
            f"{name} has more than {MAX_CLAIM_CHARACTERS} characters, or some that RFC 6749 §3.3 forbids"
        )
    return tuple(text.split())


def _needed(form: dict[str, str], name: str) -> str:
    if name not in form:
        raise InvalidRequest(f"{name} is missing")
    return form[name]


class _Endpoint:
    """An endpoint that takes a form from an authenticated client."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer

    async def _read(self, req: asgi.Request) -> tuple[dict[str, str], Account]:
        web = self._issuer.web
        form = await web.form(req)
        return form, await web.authenticate(req, self._issuer.vo, form)


class _Token(_Endpoint):
    """`/token`: client credentials, exchange, refresh."""

    async def on_post(self, req: asgi.Request, resp: asgi.Response) -> None:
        issuer = self._issuer
        form, account = await self._read(req)
        try:
            token_request = token_request_of(issuer, form, await issuer.foreign(form))
            request = Request(
                clock.new_uuid7(),
                _KIND[form["grant_type"]],  # type: ignore[arg-type]
                sha256(
                    msgspec.json.encode([token_request.scope, token_request.audience, token_request.offline])
                ).digest(),
                (),
                token_request=token_request,
            )
            outcome = await self._mint(Submission(request, account.name))
            told = issuer.answer(outcome, exchanged=bool(token_request.subject or token_request.foreign))
        except MinterError as error:
            self._note(req, account, form, error)
            if form.get("grant_type") == EXCHANGE and isinstance(error, InvalidGrant | UnauthorizedClient):
                # RFC 8693 §2.2.2: a subject token that is invalid or may not be used is invalid_request.
                raise error.under("invalid_request") from None
            raise
        self._note(req, account, form, None)
        send(resp, told)

    async def _mint(self, submission: Submission) -> Outcome:
        """Mint by the same request_id until Postgres answers; raises Unavailable after HOLD_SECONDS."""
        deadline = time.monotonic() + HOLD_SECONDS
        while True:
            try:
                return await self._issuer.web.batcher.mint(submission)
            except Unavailable as error:
                if type(error) is not Unavailable or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(AGAIN_SECONDS)

    def _note(
        self, req: asgi.Request, account: Account, form: dict[str, str], error: MinterError | None
    ) -> None:
        req.context.noted = True
        logs.request_event(
            task=_KIND.get(form.get("grant_type", ""), ""),
            client=account.name,
            vo=self._issuer.vo,
            request_id=None,
            traceparent=req.get_header("traceparent"),
            outcome="refused" if error else "served",
            reason=error.reason if error else None,
        )


class _Introspect(_Endpoint):
    """`/introspect` (RFC 7662): tells a client of the VO whether a token of the VO is active."""

    async def on_post(self, req: asgi.Request, resp: asgi.Response) -> None:
        form, account = await self._read(req)
        send(resp, await self._issuer.web.batcher.call(self._state, _needed(form, "token"), account))

    def _state(self, token: str, account: Account) -> dict[str, Any]:
        issuer, service = self._issuer, self._issuer.web.service
        now = service.clock()
        refresh = issuer.read_refresh_token(token)
        with service.engine.store.recording() as tx:
            control, _ = tx.control()
            if refresh is not None:
                family = tx.families([refresh[0]]).get(refresh[0])
                return _family_state(issuer, family, refresh[1], account, now)
            try:
                jti, payload = issuer.read_access_token(token)
            except RequestError:
                return {"active": False}
            subject = tx.subjects([jti]).get(jti)
        holder = control.clients.get(subject.client) if subject else None
        active = (
            subject is not None
            and subject.payload == payload
            and subject.expires_at > now
            and not subject.ended
            and holder is not None
            and not holder.disabled
        )
        return (
            {"active": True, "token_type": "Bearer", **json.loads(payload)} if active else {"active": False}
        )


def _family_state(
    issuer: Issuer, family: Family | None, generation: int, account: Account, now: datetime
) -> dict[str, Any]:
    """Return the state of a refresh token; it is inactive for every client but its own."""
    good = (
        family is not None
        and family.client_id == account.client_id
        and family.revoked_at is None
        and family.ends_at > now
        and present(family, generation, now) is not None
    )
    if family is None or not good:
        return {"active": False}
    return {
        "active": True,
        "iss": issuer.iss,
        "sub": family.sub,
        "client_id": account.name,
        "scope": family.scope,
        "exp": int(family.ends_at.timestamp()),
    }


class _Revoke(_Endpoint):
    """`/revoke` (RFC 7009): ends a refresh token's family, or cancels an access token.

    Another client's token is refused (§2.1); an unknown, expired or revoked token counts as revoked (§2.2).
    """

    async def on_post(self, req: asgi.Request, resp: asgi.Response) -> None:
        form, account = await self._read(req)
        await self._issuer.web.batcher.call(self._revoke, _needed(form, "token"), account)
        send(resp, {})

    def _revoke(self, token: str, account: Account) -> None:
        issuer, service = self._issuer, self._issuer.web.service
        refresh = issuer.read_refresh_token(token)
        if refresh is not None:
            if not states.end_family(service.pool, account.name, refresh[0], service.clock()):
                raise InvalidGrant(NOT_ITS_OWN)
            return
        try:
            jti, _ = issuer.read_access_token(token)
        except RequestError:
            return  # RFC 7009 §2.2: an invalid token counts as revoked
        if not states.cancel_token(service.pool, account.client_id, jti, service.clock()):
            raise InvalidGrant(NOT_ITS_OWN)
