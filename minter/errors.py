"""Every error that leaves Minter, in one tree.

    MinterError
    ├── RequestError                 the caller must change the request; final for this request_id
    │   ├── InvalidRequest           malformed, too large, against the schema, or an outdated request_id
    │   ├── InvalidPath              the path cannot be named in a scope without ambiguity
    │   ├── PathNotAllowed           the path is outside the storage's area or the client's prefixes
    │   ├── ScopeTooLarge            the scope or audience does not fit in one token
    │   ├── UnknownStorage           no storage of this VO has that endpoint
    │   ├── EndpointTakesNoToken     the endpoint has no TLS, is signed elsewhere, or takes X.509 only
    │   ├── OperationNotAllowed      no route, or the client's limits, allow the operation
    │   ├── LifetimeNotAllowed       the lifetime is beyond policy, or too short to be of use
    │   ├── UnknownVO                the VO is not one of this engine, or not the client's
    │   ├── UnknownClient            the authenticated user is not a registered, enabled client
    │   ├── ClientMismatch           the body names another client than the broker does
    │   ├── Banned                   an operator's ban covers the request or file
    │   ├── ReplyNotAllowed          the reply queue is not one of the caller's
    │   ├── NeighbourRefused         another file of the same all-or-nothing request was refused
    │   ├── Conflict                 this request_id was used with other content
    │   ├── UnknownRequest           no request of this client has this id, or its retention is over
    │   ├── Expired                  the recorded tokens no longer cover the need; renew them
    │   ├── InvalidClient            the caller over HTTP did not authenticate as a client
    │   ├── InvalidGrant             the subject or refresh token is invalid, or not for this client
    │   ├── InvalidScope             none of the requested scopes may be granted
    │   ├── InvalidTarget            the audience is missing, unknown, or not for this client
    │   ├── UnauthorizedClient       no exchange rule lets this client use that token
    │   ├── UnsupportedGrantType     the token endpoint does not support this grant_type
    │   ├── ProviderRefused          an external IAM refused this exchange or refresh for good
    │   │   └── Misconfigured        the IAM refuses us as its client: operators must act
    │   ├── ProviderTokenRejected    an external IAM's token did not match the request: destroyed
    │   ├── JobRefused               FTS will never take this job
    │   │   ├── JobBroken            FTS fails on it each time; it is set aside
    │   │   └── JobTooLate           its token for FTS has expired
    │   ├── RefreshTokenLost         a refresh token is spent, its answer lost, and no other way is left
    │   └── Undeliverable            the message stopped the worker at each delivery: dead-lettered
    ├── Unavailable                  nothing was recorded; the same request may be sent again
    │   ├── NoUsableKey              the issuer has no key that may sign now
    │   ├── ClockSkew                this process and Postgres disagree about the time
    │   ├── TooManyRequests          requests of one client, or of all, come faster than they are served
    │   ├── ProviderAway             an external IAM does not answer, or its answer cannot be used
    │   │   └── Lost                 it may have served a request whose answer never came
    │   └── FTSAway                  FTS does not answer, or cannot serve now
    │       └── FTSBlocked           it refuses every job until its operators act
    ├── TokenRejected                a finished token failed its check and never leaves the engine
    ├── UnknownKey                   no key has this kid, or the key is revoked
    ├── SettingsError                the settings file cannot be used
    └── ServerError                  any other failure; clients learn no details

`code` is the OAuth error code (RFC 6749 §5.2, RFC 8693 §2.2.2, RFC 6750 §3.1); `reason` is the
class's own name in snake case, one of a closed list, so it may label a metric. A message is lower
case, says what is wrong, what was expected and what to do, and never holds a secret.
"""

import re
from typing import Any, ClassVar, Self


class MinterError(Exception):
    """Root of the tree; `fields` are JSON values that a caller can act on."""

    code: str = "server_error"
    reason: ClassVar[str] = "minter_error"

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __init_subclass__(cls) -> None:
        cls.reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    def under(self, code: str) -> Self:
        """Return this error with another OAuth error code, where the endpoint's standard demands one."""
        self.code = code
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the error as it goes over the wire (schemas/error.json)."""
        return {
            "error": self.code,
            "reason": self.reason,
            "error_description": self.message,
            **self.fields,
        }


class RequestError(MinterError):
    """The caller must change something; repeating the request gives the same answer."""

    code = "invalid_request"


class InvalidRequest(RequestError):
    """The request is malformed, against the schema or too large, or its request_id is out of time."""


class InvalidPath(RequestError):
    """The path cannot be named in a scope without ambiguity (WLCG §2.2.1)."""

    code = "invalid_scope"


class PathNotAllowed(RequestError):
    """The path is outside the storage's area or outside the client's prefixes."""

    code = "invalid_scope"


class ScopeTooLarge(RequestError):
    """The scope or audience does not fit in one token."""

    code = "invalid_scope"


class UnknownStorage(RequestError):
    """No storage of this VO has that endpoint; the nearest known ones are named."""

    code = "invalid_target"


class EndpointTakesNoToken(RequestError):
    """The endpoint has no TLS, is signed elsewhere, or its storage has no token support."""

    code = "invalid_target"


class OperationNotAllowed(RequestError):
    """No route, or the client's own limits, allow the operation."""

    code = "access_denied"


class LifetimeNotAllowed(RequestError):
    """The lifetime is beyond policy, or too short to cover the transfer."""


class UnknownVO(RequestError):
    """The VO is not one of this engine's, or not the client's."""


class UnknownClient(RequestError):
    """The authenticated user is not a registered, enabled client."""

    code = "invalid_client"


class ClientMismatch(RequestError):
    """The body claims another client than the broker authenticated."""

    code = "invalid_client"


class Banned(RequestError):
    """An operator's ban covers this request or file."""

    code = "access_denied"


class ReplyNotAllowed(RequestError):
    """The reply address is not one of the caller's own queues."""

    code = "access_denied"


class NeighbourRefused(RequestError):
    """Another file of the same all-or-nothing request or chain was refused."""


class Conflict(RequestError):
    """The request_id was used before with other content."""


class UnknownRequest(RequestError):
    """No request of this client has that id."""


class Expired(RequestError):
    """The recorded tokens no longer cover the need, or were cancelled; a renewal gives new tokens."""


class InvalidClient(RequestError):
    """The caller did not authenticate (RFC 6749 §2.3); the error does not say which part was wrong."""

    code = "invalid_client"


class InvalidGrant(RequestError):
    """The subject or refresh token is malformed, expired, revoked, or not this client's to use."""

    code = "invalid_grant"


class InvalidScope(RequestError):
    """None of the requested scopes may be granted (RFC 6749 §3.3)."""

    code = "invalid_scope"


class InvalidTarget(RequestError):
    """The request names no audience, or one that the client may not have (RFC 8693 §2.2.2)."""

    code = "invalid_target"


class UnauthorizedClient(RequestError):
    """No exchange rule lets this client exchange or refresh this token."""

    code = "unauthorized_client"


class UnsupportedGrantType(RequestError):
    """The token endpoint has no such grant type."""

    code = "unsupported_grant_type"


class ProviderRefused(RequestError):
    """An external IAM refused this exchange or refresh, and would refuse a repetition (RFC 6749 §5.2)."""

    code = "invalid_grant"


class Misconfigured(ProviderRefused):
    """An external IAM refuses us as its client, or this grant type: operators must repair this."""


class ProviderTokenRejected(RequestError):
    """An external IAM's token is wider or shorter than requested, or otherwise wrong; it was destroyed."""

    code = "invalid_grant"


class RefreshTokenLost(RequestError):
    """A refresh token was spent, and the IAM's answer lost; the last access token works until it expires."""

    code = "invalid_grant"


class Undeliverable(RequestError):
    """The message stopped the worker at each delivery and was dead-lettered."""


class Unavailable(MinterError):
    """Nothing was recorded; the same request may be sent again later."""

    code = "temporarily_unavailable"


class NoUsableKey(Unavailable):
    """The issuer has no signing key that may sign now."""


class ClockSkew(Unavailable):
    """The clocks of this process and of Postgres differ by more than policy allows."""


class TooManyRequests(Unavailable):
    """Requests of one client, or of all, come faster than they are served; `retry_after` is in seconds."""


class ProviderAway(Unavailable):
    """An external IAM does not answer, or its answer cannot be used; `retry_after` is in seconds."""


class Lost(ProviderAway):
    """The request may have reached an external IAM, and its effect there is not known."""


class FTSAway(Unavailable):
    """FTS does not answer, or cannot serve the request now; the job is tried again."""


class FTSBlocked(FTSAway):
    """FTS refuses every job of this VO until its operators change something; the jobs wait."""


class JobRefused(RequestError):
    """FTS will never take this job as it is."""


class JobBroken(JobRefused):
    """FTS fails on this job each time, and does not have it. It is set aside, and its tokens stay."""


class JobTooLate(JobRefused):
    """The token for FTS has expired. An earlier try may have submitted the job, so nothing is undone."""


class TokenRejected(MinterError):
    """A finished token failed its check and was destroyed."""


class UnknownKey(MinterError):
    """No signing key has this kid, or the key is revoked."""

    code = "invalid_request"


class SettingsError(MinterError):
    """The settings file cannot be used; the message says where and why."""


class ServerError(MinterError):
    """An unexpected failure, opaque to clients; the log has its cause."""


def _tree(cls: type[MinterError]) -> dict[str, type[MinterError]]:
    found = {cls.reason: cls}
    for child in cls.__subclasses__():
        found |= _tree(child)
    return found


BY_REASON = _tree(MinterError)


def from_dict(answer: dict[str, Any]) -> MinterError:
    """Return the exception that `as_dict` described, a plain MinterError for an unknown reason."""
    fields = {k: v for k, v in answer.items() if k not in ("error", "reason", "error_description")}
    cls = BY_REASON.get(answer.get("reason", ""), MinterError)
    return cls(answer.get("error_description", "no description"), **fields)
