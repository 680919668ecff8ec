"""Exchange rules: which client may act with tokens of which other client. Without a rule, none may."""

from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

from minter.policy.clients import fits

Patterns = tuple[str, ...]


class Exchange(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lets `clients` exchange tokens of `subject_clients` (RFC 8693); the first matching rule decides.

    A rule with `providers` is for tokens of these external IAMs that name Minter in `aud`, not for Minter's
    own; its `subject_clients` are client names of the IAM, and its exchanges give no refresh tokens.

    Patterns are shell globs; those in `scopes` match scope names without paths. With `offline_access`,
    `clients` get refresh tokens; the family of these ends after `max_refresh_seconds`, or earlier, with the
    subject token, if a transfer's token was exchanged.
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
    """Return the rule that allows an exchange of a token of Minter or of a provider; None if no rule does.

    A client never gets refresh tokens for its own tokens, since it can request new ones, nor for a
    provider's.
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
