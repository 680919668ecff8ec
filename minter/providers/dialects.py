"""External IAMs as data: how each software takes requests, and what may be done after a lost answer.

A provider is an IAM at which the engine is a client. As with storages, no code depends on the name of a
software; each dialect names the source of its facts, and whether they were tried on the real software.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple
from urllib.parse import urlsplit

from msgspec import Meta, Struct

from minter.errors import SettingsError
from minter.policy.clients import fits

Target = Literal["audience", "resource", "none"]
Reuse = Literal["safe", "spent"]
Authentication = Literal["client_secret_basic", "client_secret_post", "private_key_jwt"]
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ProviderDialect(NamedTuple):
    """One IAM software as a client sees it.

    `target` is the parameter for the audience in exchanges and refreshes (RFC 8693 §2.1, RFC 8707),
    `credentials_target` the parameter for client credentials. Several audiences are sent in one value, or,
    if `separate`, in one parameter each. An exchange requests a refresh token by `requested_token_type` if
    `refresh_type`, and by the scope `offline_access` if `offline_scope`. `reuse` is `safe` if a refresh
    token works again after its answer was lost; it is `spent` if using the refresh token again revokes all
    tokens that descend from it. `extra_scopes` may be returned although they were not requested.
    `lifetime_parameter`, if not empty, is the parameter for a lifetime in seconds.
    """

    name: str
    software: str
    target: Target
    credentials_target: Target
    separate: bool
    refresh_type: bool
    offline_scope: bool
    reuse: Reuse
    extra_scopes: frozenset[str]
    source: str
    tried: bool
    lifetime_parameter: str = ""


_OFFLINE = frozenset({"offline_access"})
_IDENTITY = _OFFLINE | {"openid", "profile", "email"}

PROVIDER_DIALECTS: Mapping[str, ProviderDialect] = {
    row.name: row
    for row in (
        ProviderDialect(
            "generic", "anything that follows RFC 6749, RFC 8693 and WLCG 1.x", "audience", "audience",
            separate=False, refresh_type=True, offline_scope=True, reuse="spent", extra_scopes=_OFFLINE,
            source="RFC 8693 §2.1, asked as FTS 3.14 does", tried=True,
        ),
        ProviderDialect(
            "resource", "servers with RFC 8707, such as npm oidc-provider", "resource", "resource",
            separate=True, refresh_type=True, offline_scope=True, reuse="spent", extra_scopes=_OFFLINE,
            source="oidc-provider 9.13.3; one resource a token", tried=True,
        ),
        ProviderDialect(
            "indigo-iam", "INDIGO IAM", "audience", "audience",
            separate=False, refresh_type=True, offline_scope=True, reuse="safe", extra_scopes=_IDENTITY,
            source="its documentation (refresh tokens are reused unless set otherwise), FTS 3.14",
            tried=False,
        ),
        ProviderDialect(
            "keycloak", "Keycloak 26.2 and later, EGI Check-in", "audience", "none",
            separate=True, refresh_type=True, offline_scope=False, reuse="spent", extra_scopes=_IDENTITY,
            source="26.7.3: `audience` only exchanges, offline_access never with one", tried=True,
        ),
    )
}  # fmt: skip


class Provider(Struct, frozen=True, eq=False, forbid_unknown_fields=True, kw_only=True):
    """An external IAM, with the limits of the engine's requests to it, for all workers together.

    `secret_file` holds the client secret, or for `private_key_jwt` the PEM private key (ES256 or RS256). A
    token is refreshed when the life left is less than `outage_margin_seconds` or a third of its life,
    whichever is longer. `reuse` overrides the dialect's `reuse` for one installation. With an
    `audience_scope` such as `aud:`, each audience is also requested by a scope with this prefix, which
    Keycloak can be configured to accept. A subject token of the provider must name Minter in `aud`: by the
    VO's issuer URL, by the `client_id`, or by one of `subject_audiences`. `hosts` lists patterns of further
    hosts at which its discovery document may place its endpoints and keys. `key_id` is the kid of our key in
    the key set that is registered there: with it, a new key can be registered beside the old one.
    `extra_audiences` may be in its tokens although they were not requested, such as Keycloak's `account`;
    none may be of a storage or FTS.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    issuer: Annotated[str, Meta(pattern=r"^https?://[^\s?#]+$")]
    client_id: Annotated[str, Meta(min_length=1)]
    dialect: str = "generic"
    vos: tuple[str, ...] = ("*",)
    authentication: Authentication = "client_secret_basic"
    secret_file: str = ""
    ca: str = ""
    requests_per_second: Annotated[float, Meta(gt=0, le=10_000)] = 20.0
    in_flight: Annotated[int, Meta(gt=0, le=1_000)] = 20
    timeout_seconds: Annotated[float, Meta(gt=0, le=120)] = 10.0
    outage_margin_seconds: Annotated[int, Meta(ge=60, le=86_400)] = 7_200
    reuse: Reuse | None = None
    audience_scope: str = ""
    hosts: tuple[str, ...] = ()
    key_id: str = ""
    subject_audiences: tuple[str, ...] = ()
    extra_audiences: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise SettingsError if the provider cannot be used with these settings."""
        if self.dialect not in PROVIDER_DIALECTS:
            raise SettingsError(
                f"provider {self.name!r}: unknown dialect {self.dialect!r}, expected one of "
                f"{', '.join(PROVIDER_DIALECTS)}"
            )
        if not self.secret_file:
            raise SettingsError(f"provider {self.name!r} has no secret_file")
        parts = urlsplit(self.issuer)
        if parts.username is not None or (parts.scheme != "https" and parts.hostname not in _LOOPBACK):
            raise SettingsError(f"provider {self.name!r}: plain http would show tokens to others")

    @property
    def how(self) -> ProviderDialect:
        """The dialect of this provider."""
        return PROVIDER_DIALECTS[self.dialect]

    @property
    def replays(self) -> bool:
        """Whether a refresh token may be sent again after its answer was lost."""
        return (self.reuse or self.how.reuse) == "safe"

    def serves(self, vo: str) -> bool:
        """Return whether this provider is an IAM of the VO."""
        return fits(vo, self.vos)


LEADS = (60, 120, 300, 600, 1_200, 1_800, 2_700, 3_600, 5_400, 8_100, 10_800, 14_400, 21_600, 43_200, 86_400)
"""Leads: how many seconds before its expiry a token may be refreshed. There are few, so that one index
probe for each lead finds the due tokens, those that expire first before others."""
RECOVERY_SECONDS = 900
"""Time after an outage until it is noticed that the IAM is back, and the most urgent tokens are refreshed."""
PATIENCE_SECONDS = LEADS[3]
"""A first access token is requested before the refresh of tokens that live longer than this, in seconds, and
after the refresh of those that do not."""


def lead_of(life_seconds: int, outage_margin_seconds: int) -> int:
    """Return how many seconds before its expiry a token is to be refreshed: one of LEADS.

    The lead covers the outage margin and RECOVERY_SECONDS, or a third of the life if that is longer, but is
    at most two thirds of the life, or the shortest lead.
    """
    wanted = max(outage_margin_seconds + RECOVERY_SECONDS, life_seconds // 3)
    enough = next((lead for lead in LEADS if lead >= wanted), LEADS[-1])
    return max((lead for lead in LEADS if lead <= min(enough, 2 * life_seconds // 3)), default=LEADS[0])
