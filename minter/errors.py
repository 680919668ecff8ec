"""Every error that leaves Minter, in one tree.

    MinterError
    ├── RequestError                 the caller must change something; final for its request_id
    │   ├── InvalidRequest           malformed, off the schema, too large, an id out of time
    │   ├── InvalidPath              the path cannot be named in a scope without ambiguity
    │   ├── PathNotAllowed           outside the storage's area or the client's prefixes
    │   ├── ScopeTooLarge            no token can carry it
    │   ├── UnknownStorage           no storage of this VO has that endpoint
    │   ├── EndpointTakesNoToken     no TLS, signed elsewhere, or X.509 only: no token goes there
    │   ├── OperationNotAllowed      no route, or the client's limits, allow it
    │   ├── LifetimeNotAllowed       longer than policy, or too short to be of use
    │   ├── UnknownVO                not a VO of this engine, or not the client's
    │   ├── UnknownClient            the broker's user is not registered or is disabled
    │   ├── ClientMismatch           the body names another client than the broker does
    │   ├── Banned                   an operator's ban covers it
    │   ├── ReplyNotAllowed          the answer would go to a queue that is not the caller's
    │   ├── NeighbourRefused         refused because another file of an all-or-nothing request was
    │   ├── Conflict                 this request_id was used with other content
    │   ├── UnknownRequest           no request of this client has that id, or its retention is over
    │   ├── Expired                  its tokens no longer cover the need: renew them
    │   ├── InvalidClient            who asks over HTTP did not prove to be a client
    │   ├── InvalidGrant             a subject or refresh token is not, or no longer, good for this
    │   ├── InvalidScope             nothing that was asked for may be granted
    │   ├── InvalidTarget            no audience, or one that nobody here has
    │   ├── UnauthorizedClient       no rule lets this client exchange that token
    │   ├── UnsupportedGrantType     the token endpoint has no such grant
    │   ├── ProviderRefused          an external IAM refused this exchange or refresh for good
    │   ├── ProviderTokenRejected    what it gave was not what was asked for, and was destroyed
    │   ├── RefreshTokenLost         its answer was lost on the way, and nothing is left to go on with
    │   └── Undeliverable            it stopped the worker each time; kept on the dead-letter queue
    ├── Unavailable                  nothing was recorded; the same request may be sent again
    │   ├── NoUsableKey              the issuer has no key that may sign now
    │   ├── ClockSkew                this process and Postgres disagree about the time
    │   ├── TooManyRequests          this client, or all together, ask faster than is served
    │   └── ProviderAway             an external IAM does not answer, or with nothing that can be used
    ├── TokenRejected                a finished token failed its check: it never leaves the engine
    ├── UnknownKey                   no key has that kid, or it is revoked
    ├── SettingsError                the settings file cannot be used
    └── ServerError                  anything else, seen from a client: opaque

`code` is the OAuth error code (RFC 6749 §5.2, RFC 8693 §2.2.2, RFC 6750 §3.1); `reason` is the
class's own name in snake case, one of a closed list, so it may label a metric. A message is lower
case, says what is wrong, what was expected and what to do, and never holds a secret.
"""

import re
from typing import Any, ClassVar


class MinterError(Exception):
    """Root of the tree; `fields` are what a caller can act on (JSON values)."""

    code: ClassVar[str] = "server_error"
    reason: ClassVar[str] = "minter_error"

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __init_subclass__(cls) -> None:
        cls.reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

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
    """Malformed, off the schema, too large, or an id out of its time."""


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
    """Refused because another file of an all-or-nothing request or chain was."""


class Conflict(RequestError):
    """The request_id was used before with other content."""


class UnknownRequest(RequestError):
    """No request of this client has that id."""


class Expired(RequestError):
    """The recorded tokens no longer cover the need, or were cancelled; a renewal gives new ones."""


class InvalidClient(RequestError):
    """The caller did not prove who it is (RFC 6749 §2.3); nothing says which part was wrong."""

    code = "invalid_client"


class InvalidGrant(RequestError):
    """The subject or refresh token is malformed, expired, revoked, or not this client's to use."""

    code = "invalid_grant"


class InvalidScope(RequestError):
    """Nothing that was asked for may be granted (RFC 6749 §3.3)."""

    code = "invalid_scope"


class InvalidTarget(RequestError):
    """No audience was asked for, or one that the client may not have (RFC 8693 §2.2.2)."""

    code = "invalid_target"


class UnauthorizedClient(RequestError):
    """No rule lets this client use this grant, or exchange that token."""

    code = "unauthorized_client"


class UnsupportedGrantType(RequestError):
    """The token endpoint has no such grant type."""

    code = "unsupported_grant_type"


class ProviderRefused(RequestError):
    """An external IAM refused this exchange or refresh, and will again (RFC 6749 §5.2)."""

    code = "invalid_grant"


class ProviderTokenRejected(RequestError):
    """What an external IAM gave is wider, shorter or otherwise not what was asked for; it was destroyed."""

    code = "invalid_grant"


class RefreshTokenLost(RequestError):
    """A refresh token was spent and its answer never came; the last access token works until it expires."""

    code = "invalid_grant"


class Undeliverable(RequestError):
    """The message stopped the worker at each delivery and lies on the dead-letter queue."""


class Unavailable(MinterError):
    """Nothing was recorded; the same request may be sent again later."""

    code = "temporarily_unavailable"


class NoUsableKey(Unavailable):
    """The issuer has no signing key that may sign now."""


class ClockSkew(Unavailable):
    """The clocks of this process and of Postgres differ by more than policy allows."""


class TooManyRequests(Unavailable):
    """The client, or all clients together, ask faster than is served; `retry_after` is in seconds."""


class ProviderAway(Unavailable):
    """An external IAM does not answer, or with nothing that can be used; `retry_after` is in seconds."""


class TokenRejected(MinterError):
    """A finished token failed its check and was destroyed."""


class UnknownKey(MinterError):
    """No signing key has that kid, or nothing more can be done with it."""

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
    """Return the exception that `as_dict` described; an unknown reason gives its root class."""
    fields = {k: v for k, v in answer.items() if k not in ("error", "reason", "error_description")}
    cls = BY_REASON.get(answer.get("reason", ""), MinterError)
    return cls(answer.get("error_description", "no description"), **fields)
