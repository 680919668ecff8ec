"""Exchange rules: which client may act with whose tokens. Without a rule nobody may."""

from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

from minter.policy.clients import fits

Patterns = tuple[str, ...]


class Exchange(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lets `clients` exchange the tokens of `subject_clients` (RFC 8693); the first that fits decides.

    With `providers`, it is for tokens of these external IAMs, which name us in `aud`, instead of our own;
    their `subject_clients` are their own names, and no refresh tokens are given for them.

    Patterns are shell globs; `scopes` are of scope names, without paths. With `offline_access` they get
    refresh tokens, whose family ends with the subject token of a transfer, or after `max_refresh_seconds`.
    """

    name: str
    clients: Patterns
    subject_clients: Patterns
    vos: Patterns = ("*",)
    providers: Patterns = ()
    scopes: Patterns = ("storage.*",)
    offline_access: bool = False
    max_refresh_seconds: Annotated[int, Meta(ge=3600, le=400 * 86400)] = 7 * 86400


def find(
    rules: Iterable[Exchange], vo: str, client: str, subject_client: str, *, offline: bool, provider: str = ""
) -> Exchange | None:
    """Return the rule that allows an exchange, of a token of ours or of a provider; None if none does.

    A client never gets refresh tokens for its own tokens: it can ask for new ones.
    """
    if offline and (client == subject_client or provider):
        return None
    return next(
        (
            rule
            for rule in rules
            if fits(vo, rule.vos)
            and fits(client, rule.clients)
            and fits(subject_client, rule.subject_clients)
            and (fits(provider, rule.providers) if provider else not rule.providers)
            and (rule.offline_access or not offline)
        ),
        None,
    )


def allows(rule: Exchange, scope_name: str) -> bool:
    """Say whether a rule lets a scope of this name through."""
    return fits(scope_name, rule.scopes)
