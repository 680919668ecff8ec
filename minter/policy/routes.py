"""Routes as written in the settings, the shipped routes, and the FTS instances.

A route decides lifetime, additional operations and risk rules of tokens. `Route.check` refuses a route
that contradicts the profile.
"""

from typing import Literal

from msgspec import Struct

from minter.contract.operations import Operation
from minter.errors import SettingsError
from minter.policy.limits import HARD_MAX_SECONDS, PROFILE_MAX_SECONDS, PROFILE_MIN_SECONDS

Mode = Literal["mint", "exchange", "client_credentials"]
Via = Literal["fts", "direct", "url"]
"""Where tokens go: into an FTS job, to the client, or into URLs that anybody may hold."""
Granularity = Literal["file", "directory", "storage"]
Mitigation = Literal["narrow_write", "narrow_read", "one_storage", "no_modify", "fts_only", "pull_mode"]


class Route(Struct, frozen=True, eq=False, forbid_unknown_fields=True, kw_only=True):
    """A rule that decides lifetime, additional operations and risk rules; the first match counts.

    Patterns are shell globs. `via` says whether the tokens go into an FTS job or, with `url`, into URLs that
    anybody may hold; `any` is for all but URLs. `cleanup` adds the right to remove a failed copy,
    `make_parents` the right to make the directory, `poll_area` widens a poll token to the storage's prefix,
    `forbid` names quirks that must not add scopes.
    `granularity` says what one token serves: one file; or every file of a directory, or of a storage's
    prefix, for which the same client requests the same operations while the token's lifetime is sufficient.
    `mode` says who signs: with `mint` Minter; otherwise `provider`, which exchanges a subject token
    (`exchange`) or gives a token for Minter's own credentials (`client_credentials`). A provider's token is
    kept fresh as long as the transfer lives. While the provider is not available, the first route named in
    `fallback` that matches and is available is used instead.
    With `monitoring`, filled FTS jobs tell in their metadata which tokens their transfers have.
    `plaintext_queue` allows unencrypted tokens on a durable queue of a client without a key. A
    `max_lifetime_seconds` above the profile's 6 h needs `mitigations` and a `risk_assessment`.
    """

    name: str
    vos: tuple[str, ...] = ("*",)
    clients: tuple[str, ...] = ("*",)
    activities: tuple[str, ...] = ("*",)
    storages: tuple[str, ...] = ("*",)
    operations: tuple[Operation, ...] = ()
    via: Via | Literal["any"] = "any"
    tape: bool | None = None
    mode: Mode = "mint"
    provider: str = ""
    fallback: tuple[str, ...] = ()
    granularity: Granularity = "file"
    max_lifetime_seconds: int = PROFILE_MAX_SECONDS
    wait_seconds: int = 3600
    transfer_seconds: int = 3600
    min_rate_bytes: int = 5_000_000
    retries: int = 0
    margin_seconds: int = 600
    cleanup: bool = False
    make_parents: bool = False
    poll_area: bool = False
    plaintext_queue: bool = False
    monitoring: bool = False
    forbid: tuple[str, ...] = ()
    mitigations: tuple[Mitigation, ...] = ()
    risk_assessment: str = ""

    def check(self) -> None:
        """Raise SettingsError if the route contradicts itself or the profile."""
        if self.max_lifetime_seconds > HARD_MAX_SECONDS:
            raise SettingsError(
                f"route {self.name!r}: max_lifetime_seconds {self.max_lifetime_seconds} exceeds "
                f"the hard limit {HARD_MAX_SECONDS}"
            )
        if (self.mode == "mint") != (not self.provider) or (self.fallback and self.mode == "mint"):
            raise SettingsError(
                f"route {self.name!r}: mode {self.mode} needs {'no' if self.mode == 'mint' else 'a'} provider"
                ", and only a provider has a fallback"
            )
        narrow = self.operations == ("read",) and self.mode == "mint" and self.granularity == "file"
        if self.via == "url" and not narrow:
            raise SettingsError(
                f"route {self.name!r}: with via = 'url' the operations must be ['read'], the mode mint and "
                "the granularity file, because anybody may hold such a URL"
            )
        long = self.max_lifetime_seconds > PROFILE_MAX_SECONDS
        if long and (self.via == "url" or not (self.mitigations and self.risk_assessment)):
            raise SettingsError(
                f"route {self.name!r}: a lifetime above {PROFILE_MAX_SECONDS} s needs mitigations "
                "and a risk_assessment (WLCG §4.3.1), and is not for via = 'url'"
            )
        if self.min_rate_bytes <= 0 or self.max_lifetime_seconds < PROFILE_MIN_SECONDS:
            raise SettingsError(
                f"route {self.name!r}: min_rate_bytes must be above 0 and max_lifetime_seconds "
                f"at least {PROFILE_MIN_SECONDS}"
            )


SHIPPED_RISK_ASSESSMENT = "docs/risk-assessment.md"
_TRANSFER: tuple[Operation, ...] = (
    "read", "write", "overwrite", "retry", "stat", "make_parents", "stage", "poll"
)  # fmt: skip

SHIPPED_ROUTES = (
    # A failed copy to tape is left to the operators: with `overwrite = false` no token of Minter
    # may remove a file that could be the custodial copy (ADR 6).
    Route(
        name="fts-tape",
        via="fts",
        tape=True,
        operations=_TRANSFER,
        max_lifetime_seconds=HARD_MAX_SECONDS,
        wait_seconds=24 * 3600,
        make_parents=True,
        mitigations=("narrow_write", "narrow_read", "one_storage", "fts_only"),
        risk_assessment=SHIPPED_RISK_ASSESSMENT,
    ),
    # FTS deletes the destination after a failed copy or a checksum mismatch (fts3 3.14.4).
    Route(
        name="fts-transfer",
        via="fts",
        operations=_TRANSFER,
        max_lifetime_seconds=HARD_MAX_SECONDS,
        wait_seconds=24 * 3600,
        cleanup=True,
        make_parents=True,
        mitigations=("narrow_write", "narrow_read", "one_storage", "fts_only"),
        risk_assessment=SHIPPED_RISK_ASSESSMENT,
    ),
    # WLCG §2.2.1: storage.poll is made for wide, long-lived tokens.
    Route(
        name="tape-poll",
        via="direct",
        operations=("poll",),
        max_lifetime_seconds=48 * 3600,
        wait_seconds=24 * 3600,
        poll_area=True,
        mitigations=("no_modify", "one_storage"),
        risk_assessment=SHIPPED_RISK_ASSESSMENT,
    ),
    Route(name="direct", via="direct", operations=(*_TRANSFER, "delete")),
)


class FTSInstance(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An FTS instance that jobs may be filled for, and the token to submit jobs there."""

    name: str
    url: str
    vos: tuple[str, ...] = ("*",)
    audience: str = ""
    lifetime_seconds: int = PROFILE_MAX_SECONDS
