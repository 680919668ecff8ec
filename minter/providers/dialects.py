"""External IAMs as data: how each software is asked, and what may be done after an answer was lost.

A provider is an IAM where the engine is a client. As with storages, code never asks which software it
talks to; each quirk says where it is from, and whether it was tried on the real software.
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

    `target` is the parameter for the audience (RFC 8693 §2.1, RFC 8707), `credentials_target` that for
    client credentials; several stand in one value, or `separate`. A refresh token is asked of an exchange
    by `refresh_type`, the `requested_token_type`, and by `offline_scope`, the scope `offline_access`.
    `reuse` says whether a refresh token works again when its answer was lost (`safe`), or is spent, and
    presenting it again ends all that descends from it. `extra_scopes` may come back without having been
    asked for. `lifetime_parameter`, if there is one, asks for a lifetime in seconds.
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
    """An external IAM, and what the engine may ask of it: all workers together.

    `secret_file` holds the client secret, or for `private_key_jwt` the PEM private key (ES256 or RS256). A
    token is refreshed when less than `outage_margin_seconds`, or a third of its life, is left. `reuse`
    corrects the dialect's for one installation. With an `audience_scope` such as `aud:` each audience is
    asked for by a scope of that prefix, too, as Keycloak can be set to take it. A foreign subject token
    must name us in `aud`: by our issuer, by `client_id` there, or by one of `subject_audiences`.
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
    subject_audiences: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise SettingsError for what cannot be used."""
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
        """Its dialect."""
        return PROVIDER_DIALECTS[self.dialect]

    @property
    def replays(self) -> bool:
        """Whether a refresh token may be sent again after its answer was lost."""
        return (self.reuse or self.how.reuse) == "safe"

    def serves(self, vo: str) -> bool:
        """Say whether it is an IAM of this VO."""
        return fits(vo, self.vos)


LEADS = (60, 120, 300, 600, 1_200, 1_800, 2_700, 3_600, 5_400, 8_100, 10_800, 14_400, 21_600, 43_200, 86_400)
"""How long before its end a token is refreshed, in seconds: few values, so that the ones due are found
by one index probe for each, soonest end first."""
RECOVERY_SECONDS = 900
"""Until an IAM that is back was noticed, and was asked for those that end first."""
PATIENCE_SECONDS = LEADS[3]
"""A token that is waited for comes before those that work longer than this, and after those that do not."""


def lead_of(life_seconds: int, outage_margin_seconds: int) -> int:
    """Return how long before its end a token is to be refreshed: one of LEADS.

    That is the margin and what it takes to come back from an outage as long, or a third of a long life,
    but never before a third of the life is over.
    """
    wanted = max(outage_margin_seconds + RECOVERY_SECONDS, life_seconds // 3)
    enough = next((lead for lead in LEADS if lead >= wanted), LEADS[-1])
    return max((lead for lead in LEADS if lead <= min(enough, 2 * life_seconds // 3)), default=LEADS[0])
