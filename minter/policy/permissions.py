"""What a request may do beyond its storages: reply queues, plaintext on them, exchanges of subject tokens."""

from collections.abc import Sequence

from minter.errors import InvalidGrant, InvalidScope, ReplyNotAllowed
from minter.policy.clients import Client
from minter.policy.plans import PlannedToken
from minter.policy.requests import Request
from minter.policy.routes import Route
from minter.scopes import Scope, contains, parse_scopes


def _words(scopes: Sequence[Scope]) -> str:
    return " ".join(map(str, sorted(scopes)))[:200]


def check_subject(route: Route, request: Request, client: Client, scope: str) -> None:
    """Raise InvalidGrant or InvalidScope unless a token of the route's provider may be exchanged."""
    subject = request.subject
    provider = subject.provider if subject is not None else client.subject_provider
    if provider == route.provider:
        held = parse_scopes(subject.scope if subject is not None else client.subject_scope)
        on_storage = [s for s in held if s.path is not None]
        # A subject token with storage scopes is never exchanged for more than these.
        if on_storage and not contains(on_storage, parse_scopes(scope)):
            raise InvalidScope(f"the subject token does not hold {scope[:200]!r}, only {_words(on_storage)}")
        return
    what = f"the subject token is of provider {provider!r}" if provider else "there is no valid subject token"
    raise InvalidGrant(
        f"{what}, and route {route.name!r} exchanges one of provider {route.provider!r}; send one with the "
        "request, or store the client's with: minter clients subject-token"
    )


def check_reply_queue(queue: str | None, client: Client) -> None:
    """Raise ReplyNotAllowed unless the client may receive answers on this durable queue."""
    if queue is not None and queue not in client.reply_queues:
        raise ReplyNotAllowed(
            f"queue {queue!r} is not listed for client {client.name!r}; register it with the client"
        )


def check_plaintext(request: Request, client: Client, planned_tokens: Sequence[PlannedToken]) -> None:
    """Raise ReplyNotAllowed for tokens that would lie unencrypted on a durable queue (I5)."""
    if request.reply_queue is None:
        return
    if request.job is not None and any(g.managed for g in planned_tokens):
        raise ReplyNotAllowed(
            "a job with tokens of a provider may be filled only later, so it cannot go to a durable "
            "queue; send the same request without reply_queue until the job is filled"
        )
    if client.jwe_key is not None:
        return
    if not all(g.plan.route is None or g.plan.route.plaintext_queue for g in planned_tokens):
        raise ReplyNotAllowed(
            f"client {client.name!r} has no key to encrypt to, and tokens lie on a durable queue only "
            "encrypted; register a public JWK with the client"
        )
