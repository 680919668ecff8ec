"""An IAM that fails on demand, only for `minter drill` and for tests.

It serves client credentials, exchange, refresh with rotation, introspection and revocation as a real IAM
does; the same tests run against Keycloak and oidc-provider. It logs each request with its time and keeps
its state in memory. `POST /faults` sets how it fails, and `POST /subject` returns a signed subject token.

    python -m minter.local.fake_iam PORT [LOGFILE]
"""

import base64
import json
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote_plus

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

Fault = Literal[
    "", "down", "slow", "error_500", "busy_429", "garbage", "html", "huge", "redirect", "wrong_key",
    "wrong_issuer", "wrong_audience", "wider_scope", "no_expiry", "long_life", "short_life", "future",
    "narrow_scope", "lost_answer", "invalid_client", "opaque", "trickle", "gateway_504",
    "odd_audience", "extra_audience", "fat", "echo", "trickle_head",
]  # fmt: skip
"""Ways to fail: no answer, a late answer, an error status, an invalid answer, or a token that differs from
the request. With `lost_answer` the request is served, but not answered."""

BEFORE: frozenset[str] = frozenset(
    {"down", "error_500", "busy_429", "garbage", "html", "huge", "redirect", "invalid_client"}
    | {"trickle", "trickle_head"}
)
"""Faults that come before the request is served."""


class Behaviour(Struct, kw_only=True):
    """The server's behaviour: `share` of the requests fail; refresh tokens rotate if `rotates` is set.

    Since `origin`, its clock runs `time_scale` times as fast as real time.
    """

    fault: Fault = ""
    share: float = 1.0
    slow_seconds: float = 5.0
    retry_after: int = 0
    life_seconds: int = 3600
    rotates: bool = True
    reuse: bool = False
    skew_seconds: int = 0
    time_scale: float = 1.0
    origin: float = 0.0
    refresh_tokens: bool = True


class OAuthRefusal(Exception):
    """An OAuth error to answer with."""

    def __init__(self, code: str, description: str, status: int = 400) -> None:
        super().__init__(description)
        self.code = code
        self.status = status


class FakeIAM(ThreadingHTTPServer):
    """The server; it accepts any client with the secret `<client_id>-secret`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, log: Path | None = None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.issuer = f"http://127.0.0.1:{self.server_address[1]}/"
        self.behaviour = Behaviour()
        self._key, self._kid = ec.generate_private_key(ec.SECP256R1()), "fake-1"
        self._other = ec.generate_private_key(ec.SECP256R1())
        self._families: dict[str, dict[str, Any]] = {}
        self._refresh: dict[str, str] = {}
        self._lock = threading.Lock()
        self._log = log.open("a", buffering=1) if log else None

    def now(self) -> float:
        """Return the time of the server's clock, which may run faster than real time or be wrong."""
        behaviour, real = self.behaviour, time.time()
        return real + (behaviour.time_scale - 1) * (real - behaviour.origin) + behaviour.skew_seconds

    def jwks(self) -> dict[str, Any]:
        """Return the public keys."""
        jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self._key.public_key()))
        return {"keys": [{**jwk, "kid": self._kid, "use": "sig", "alg": "ES256"}]}

    def note(self, what: Mapping[str, Any]) -> None:
        """Append one line to the log."""
        if self._log is not None:
            self._log.write(json.dumps({"t": time.time() * 1000, **what}) + "\n")

    # ── tokens ───────────────────────────────────────────────────────────────────────────────

    def sign(self, claims: dict[str, Any], fault: str = "") -> str:
        """Return a signed access token, altered as the fault says."""
        now, key = int(self.now()), self._key
        life = {"long_life": 10 * 86400, "short_life": 30}.get(fault, self.behaviour.life_seconds)
        claims = {"iss": self.issuer, "iat": now, "exp": now + life, "jti": secrets.token_hex(8), **claims}
        scope, audience = claims.get("scope", ""), claims.get("aud", [])
        audience = [audience] if isinstance(audience, str) else audience
        spoilt: dict[str, dict[str, Any]] = {
            "wrong_issuer": {"iss": "https://elsewhere.example.org/"},
            "wrong_audience": {"aud": "https://elsewhere.example.org"},
            "wider_scope": {"scope": f"{scope} storage.modify:/"},
            "narrow_scope": {"scope": scope.rpartition(" ")[0] or scope},
            "future": {"iat": now + 900, "nbf": now + 900, "exp": now + 4500},
            "odd_audience": {"aud": 5},
            "extra_audience": {"aud": [*audience, "account"]},
            "fat": {"groups": ["/alpen/" + "x" * 9_000]},
        }
        claims |= spoilt.get(fault, {})
        if fault == "wrong_key":
            key = self._other
        elif fault == "no_expiry":
            del claims["exp"]
        elif fault == "opaque":
            return secrets.token_urlsafe(32)
        return jwt.encode(claims, key, "ES256", headers={"kid": self._kid})

    def answer(self, client: str, form: Mapping[str, str], fault: str) -> dict[str, Any]:
        """Return the answer of the token endpoint; raises OAuthRefusal."""
        grant = form.get("grant_type", "").rpartition(":")[2]
        if grant == "client_credentials":
            return self._given(client, _scope(form), _audience(form), fault)
        if grant == "token-exchange":
            subject = self._subject(form.get("subject_token", ""), client)
            wants = form.get("requested_token_type", "").endswith(":refresh_token")
            told = self._given(subject["sub"], _scope(form), _audience(form), fault)
            if (wants or "offline_access" in form.get("scope", "")) and self.behaviour.refresh_tokens:
                told["refresh_token"] = self._family(client, subject["sub"], _scope(form), _audience(form))
            return told | {"issued_token_type": "urn:ietf:params:oauth:token-type:access_token"}
        if grant == "refresh_token":
            return self._refreshed(client, form, fault)
        raise OAuthRefusal("unsupported_grant_type", f"unknown grant_type {grant}")

    def _given(self, sub: str, scope: str, audience: list[str], fault: str) -> dict[str, Any]:
        if not scope:
            raise OAuthRefusal("invalid_scope", "no scope")
        if not audience:
            raise OAuthRefusal("invalid_target", "no audience")
        aud: Any = audience[0] if len(audience) == 1 else audience
        token = self.sign({"sub": sub, "aud": aud, "scope": scope, "wlcg.ver": "1.0"}, fault)
        return {
            "access_token": token, "token_type": "Bearer", "expires_in": self.behaviour.life_seconds,
            "scope": scope,
        }  # fmt: skip

    def _subject(self, token: str, client: str) -> dict[str, Any]:
        try:
            return dict(
                jwt.decode(token, self._key.public_key(), ["ES256"], audience=[client, self.issuer],
                           issuer=self.issuer, options={"verify_exp": False, "verify_iat": False})
            )  # fmt: skip
        except jwt.InvalidTokenError:
            raise OAuthRefusal("invalid_grant", "the subject token is not valid") from None

    def _family(self, client: str, sub: str, scope: str, audience: list[str]) -> str:
        name, first = secrets.token_hex(8), secrets.token_urlsafe(32)
        with self._lock:
            self._families[name] = {
                "client": client, "sub": sub, "scope": scope, "aud": audience, "newest": first
            }  # fmt: skip
            self._refresh[first] = name
        return first

    def _refreshed(self, client: str, form: Mapping[str, str], fault: str) -> dict[str, Any]:
        with self._lock:
            name = self._refresh.get(form.get("refresh_token", ""), "")
            family = self._families.get(name)
            if fault == "echo":
                raise OAuthRefusal("invalid_grant", f"Invalid refresh token: {form['refresh_token']}")
            if family is None or family["client"] != client:
                raise OAuthRefusal("invalid_grant", "no such refresh token")
            if form["refresh_token"] != family["newest"] and not self.behaviour.reuse:
                del self._families[name]
                raise OAuthRefusal("invalid_grant", "used before: the family ends")
            scope = _scope(form) or family["scope"]
            if not set(scope.split()) <= set(family["scope"].split()):
                raise OAuthRefusal("invalid_scope", "scope exceeds the granted scope")
            told = self._given(family["sub"], scope, _audience(form) or family["aud"], fault)
            if self.behaviour.rotates:
                family["newest"] = secrets.token_urlsafe(32)
                self._refresh[family["newest"]] = name
            return told | {"refresh_token": family["newest"]}

    def state(self, token: str) -> dict[str, Any]:
        """Return the introspection of a refresh or access token (RFC 7662)."""
        family = self._families.get(self._refresh.get(token, ""))
        if family is not None and family["newest"] == token:
            return {"active": True, "scope": family["scope"], "client_id": family["client"]}
        try:
            claims = jwt.decode(token, self._key.public_key(), ["ES256"], options={"verify_aud": False})
        except jwt.InvalidTokenError:
            return {"active": False}
        return {"active": True, **claims}

    def revoke(self, token: str) -> None:
        """End the family of a refresh token (RFC 7009)."""
        with self._lock:
            self._families.pop(self._refresh.get(token, ""), None)


def _scope(form: Mapping[str, str]) -> str:
    words = form.get("scope", "").split()
    return " ".join(w for w in words if w != "offline_access" and not w.startswith("unknown"))


def _audience(form: Mapping[str, str]) -> list[str]:
    return (form.get("audience") or form.get("resource") or "").split()


class _Handler(BaseHTTPRequestHandler):
    """The requests of one connection, which is kept open."""

    protocol_version = "HTTP/1.1"
    server: FakeIAM
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Write nothing: `FakeIAM.note` writes the log."""

    def do_GET(self) -> None:
        """Serve discovery and JWKS."""
        iss = self.server.issuer
        fault = self._fault()
        if fault != "invalid_client" and self._failed(fault):
            return
        if self.path.startswith("/.well-known/"):
            names = {"token_endpoint": "token", "jwks_uri": "jwks", "introspection_endpoint": "introspect",
                     "revocation_endpoint": "revoke"}  # fmt: skip
            self._send(200, {"issuer": iss} | {name: iss + path for name, path in names.items()})
        elif self.path == "/jwks":
            self._send(200, self.server.jwks())
        else:
            self._send(404, {"error": "not_found"})

    def do_POST(self) -> None:
        """Serve the other endpoints."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/faults":
            self.server.behaviour = msgspec.json.decode(body, type=Behaviour)
            self._send(200, {})
            return
        if self.path == "/subject":  # signs the given claims as a subject token
            self._send(200, {"access_token": self.server.sign(json.loads(body))})
            return
        form = {k: v[-1] for k, v in parse_qs(body.decode(), keep_blank_values=True).items()}
        grant, fault = form.get("grant_type", "").rpartition(":")[2], self._fault()
        started = time.time()
        status = self._serve(form, fault)
        self.server.note(
            {"path": self.path, "grant_type": grant, "status": status, "fault": fault, "at": started * 1000}
        )

    def _serve(self, form: dict[str, str], fault: str) -> int:
        if fault in BEFORE and self._failed(fault):
            return 0
        if fault == "slow":
            time.sleep(self.server.behaviour.slow_seconds)
        try:
            client = self._client(form)
            if self.path == "/introspect":
                told: dict[str, Any] = self.server.state(form.get("token", ""))
            elif self.path == "/revoke":
                self.server.revoke(form.get("token", ""))
                told = {}
            else:
                told = self.server.answer(client, form, fault)
        except OAuthRefusal as refusal:
            return self._send(refusal.status, {"error": refusal.code, "error_description": str(refusal)})
        if fault == "lost_answer":
            self.close_connection = True
            return 0
        if fault == "gateway_504":  # a proxy timed out, but the IAM served the request
            return self._send(504, {})
        return self._send(200, told)

    def _client(self, form: Mapping[str, str]) -> str:
        scheme, _, encoded = self.headers.get("Authorization", "").partition(" ")
        name, secret = form.get("client_id", ""), form.get("client_secret", "")
        if scheme == "Basic":
            name, _, secret = base64.b64decode(encoded).decode().partition(":")
        if not name or unquote_plus(secret) != f"{unquote_plus(name)}-secret":
            raise OAuthRefusal("invalid_client", "client authentication failed", 401)
        return unquote_plus(name)

    def _fault(self) -> str:
        behaviour = self.server.behaviour
        draw = secrets.randbelow(1_000_000) / 1_000_000
        return behaviour.fault if behaviour.fault and draw < behaviour.share else ""

    def _failed(self, fault: str) -> bool:
        """Answer with a fault of `BEFORE`; return False, without an answer, for any other fault."""
        behaviour = self.server.behaviour
        if fault == "down":
            self.close_connection = True
        elif fault == "error_500":
            self._send(500, {"error": "server_error"})
        elif fault == "busy_429":
            wait = {"Retry-After": str(behaviour.retry_after)} if behaviour.retry_after else {}
            self._send(429, {"error": "slow_down"}, wait)
        elif fault == "garbage":
            self._raw(b"\x00\xff{not json", "application/json")
        elif fault == "html":
            self._raw(b"<html><body>maintenance eyJhbGciOiJub25lIn0.e30.</body></html>", "text/html")
        elif fault == "huge":
            self._raw(b'{"access_token":"' + b"a" * 10_000_000 + b'"}', "application/json")
        elif fault == "redirect":
            self._send(302, {}, {"Location": f"{self.server.issuer}elsewhere"})
        elif fault == "invalid_client":
            self._send(401, {"error": "invalid_client", "error_description": "no"})
        elif fault.startswith("trickle"):
            self._trickle(head=fault == "trickle_head")
        else:
            return False
        return True

    def _trickle(self, *, head: bool = False) -> None:
        self.close_connection = True
        if not head:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "100000")
            self.end_headers()
        else:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        try:
            for _ in range(600):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            return  # the client has closed the connection

    def _send(self, status: int, told: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> int:
        self._raw(json.dumps(told).encode(), "application/json", status, headers or {})
        return status

    def _raw(
        self, body: bytes, kind: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        try:
            self.send_response(status)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True


def main() -> None:
    """Serve until SIGTERM."""
    server = FakeIAM(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)  # noqa: PLR2004
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
