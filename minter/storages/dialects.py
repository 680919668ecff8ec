"""Requirements of real storages on tokens, as data: one row for each dialect, a source for each quirk.

A dialect says which scopes each operation needs, how a path is written, how an audience looks, how
paths are matched and how large a token may be. No other code depends on a storage's software. Each
row names its source: the profile, runs against real XRootD, or documentation.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from minter.contract.operations import OPERATIONS, Operation

Where = Literal["file", "parent"]
AudienceForm = Literal["url", "url_with_port", "host", "host_with_port"]
Matching = Literal["exact", "prefix"]
Encoding = Literal["percent", "raw"]


class Quirk(NamedTuple):
    """One departure from the profile: its meaning, its source, and whether it was tried for Minter."""

    name: str
    meaning: str
    source: str
    tried: bool


class Needed(NamedTuple):
    """One scope that an operation needs, on the file or its parent; `quirk` tells why if not the profile."""

    scope: str
    where: Where = "file"
    quirk: Quirk | None = None


class Dialect(NamedTuple):
    """One storage software, or a range of its versions, with its requirements on tokens."""

    name: str
    software: str
    scopes: Mapping[Operation, tuple[Needed, ...]]
    encoding: Encoding
    matching: Matching
    audience_form: AudienceForm
    max_token_bytes: int
    source: str
    tried: bool
    quirks: tuple[Quirk, ...] = ()


_PROFILE: Mapping[Operation, tuple[Needed, ...]] = {
    "read": (Needed("storage.read"),),
    "write": (Needed("storage.create"),),
    "overwrite": (Needed("storage.modify"),),
    "retry": (Needed("storage.modify"),),
    "delete": (Needed("storage.modify"),),
    "stat": (Needed("storage.read"),),
    "make_parents": (Needed("storage.create"),),
    "stage": (Needed("storage.stage"),),
    "poll": (Needed("storage.poll"),),
}

DEFAULT_MAX_TOKEN_BYTES = 8_000
"""Default of the largest token: proxies in front of storages often refuse headers above about 8 KiB."""

HTTPS_PORT = 443

XROOTD_MAX_TOKEN_BYTES = 16_000
"""XrdHttp drops the connection at 16 384 buffered bytes without a line end (tried, 5.5 and 6.1)."""

STAT_NEEDS_READ = Quirk(
    "stat-needs-read",
    "create and modify do not include stat, which gfal2 and FTS do before and after a copy",
    "XRootD 5.5.3 with libscitokens 0.7.3; 'create/modify include stat' is in 5.6.9, not in 5.6.0",
    tried=True,
)
PARENT_NEEDS_SCOPE = Quirk(
    "parent-needs-scope",
    "gfal2 makes a missing parent directory only with read and create on the directory itself",
    "XRootD 5.5.3 with gfal2 2.21.3: MAKE_PARENT answers 403",
    tried=True,
)
PREFIX_MATCH = Quirk(
    "prefix-match",
    "a path opens every name that begins with it: no isolation of single files",
    "XRootD 5.5.3; component borders are checked from 5.6.9",
    tried=True,
)
RAW_PATHS = Quirk(
    "raw-paths",
    "scope paths are compared byte for byte, without decoding",
    "libscitokens 0.7.3; decoding came with 1.4.1",
    tried=True,
)
STORM_STAT = Quirk(
    "storm-stat-needs-read",
    "StoRM WebDAV wants storage.read to stat",
    "StoRM WebDAV documentation and WLCG token transition reports",
    tried=False,
)
CNAF_PARENT = Quirk(
    "cnaf-parent-needs-read",
    "the destination's parent directory must be readable",
    "INFN-CNAF site report to the WLCG token transition",
    tried=False,
)
MATCHING_UNKNOWN = Quirk(
    "matching-unknown",
    "how paths are matched was not tried, so prefix matching is assumed",
    "no EOS or CTA instance was at hand; set `matching` on the storage once the site confirms it",
    tried=False,
)


def _with(extra: Needed, *operations: Operation) -> dict[Operation, tuple[Needed, ...]]:
    return {operation: (*_PROFILE[operation], extra) for operation in operations}


_STAT_READ = Needed("storage.read", "file", STAT_NEEDS_READ)
_STORM_READ = Needed("storage.read", "file", STORM_STAT)

DIALECTS: Mapping[str, Dialect] = {
    row.name: row
    for row in (
        Dialect(
            "profile",
            "anything that follows the WLCG profile, version unknown",
            _PROFILE,
            "percent",
            "prefix",
            "url",
            DEFAULT_MAX_TOKEN_BYTES,
            "WLCG Common JWT Profile 1.3 §2.2.1; matching is assumed by prefix until confirmed",
            tried=False,
            quirks=(MATCHING_UNKNOWN,),
        ),
        Dialect(
            "xrootd-5.5",
            "XRootD before 5.6.9",
            {
                **_PROFILE,
                **_with(_STAT_READ, "write", "overwrite", "retry", "delete"),
                "make_parents": (
                    Needed("storage.create", "parent", PARENT_NEEDS_SCOPE),
                    Needed("storage.read", "parent", PARENT_NEEDS_SCOPE),
                ),
            },
            "raw",
            "prefix",
            "url_with_port",
            XROOTD_MAX_TOKEN_BYTES,
            "XRootD 5.5.3 with libscitokens 0.7.3, run",
            tried=True,
            quirks=(STAT_NEEDS_READ, PARENT_NEEDS_SCOPE, PREFIX_MATCH, RAW_PATHS),
        ),
        Dialect(
            "xrootd-5.6.9",
            "XRootD 5.6.9 and later with libscitokens before 1.4.1",
            _PROFILE,
            "raw",
            "exact",
            "url_with_port",
            XROOTD_MAX_TOKEN_BYTES,
            "XRootD release notes and source; read:/ is broken until 5.7.0",
            tried=False,
            quirks=(RAW_PATHS,),
        ),
        Dialect(
            "xrootd",
            "XRootD 5.7 and later with libscitokens 1.4.1 or later",
            _PROFILE,
            "percent",
            "exact",
            "url_with_port",
            XROOTD_MAX_TOKEN_BYTES,
            "XRootD 6.1.0 with libscitokens 1.4.1, run",
            tried=True,
        ),
        Dialect(
            "dcache",
            "dCache 9.2 and later",
            _PROFILE,
            "percent",
            "exact",
            "url_with_port",
            DEFAULT_MAX_TOKEN_BYTES,
            "dCache documentation (gplazma scitoken); tape REST wants stage, and poll since 2026-04",
            tried=False,
        ),
        Dialect(
            "storm",
            "StoRM WebDAV",
            {**_PROFILE, **_with(_STORM_READ, "write", "overwrite", "retry", "delete")},
            "percent",
            "exact",
            "url_with_port",
            DEFAULT_MAX_TOKEN_BYTES,
            "StoRM WebDAV documentation",
            tried=False,
            quirks=(STORM_STAT,),
        ),
        Dialect(
            "storm-cnaf",
            "StoRM WebDAV as INFN-CNAF runs it",
            {
                **_PROFILE,
                **{
                    operation: (
                        *_PROFILE[operation],
                        _STORM_READ,
                        Needed("storage.read", "parent", CNAF_PARENT),
                    )
                    for operation in ("write", "overwrite", "retry", "delete")
                },
            },
            "percent",
            "exact",
            "url_with_port",
            DEFAULT_MAX_TOKEN_BYTES,
            "StoRM WebDAV documentation and the site's report",
            tried=False,
            quirks=(STORM_STAT, CNAF_PARENT),
        ),
        Dialect(
            "eos",
            "EOS 5",
            _PROFILE,
            "percent",
            "prefix",
            "url_with_port",
            XROOTD_MAX_TOKEN_BYTES,
            "EOS documentation (built on XRootD); matching not tried",
            tried=False,
            quirks=(MATCHING_UNKNOWN,),
        ),
        Dialect(
            "cta",
            "CTA, through its EOS front end",
            _PROFILE,
            "percent",
            "prefix",
            "url_with_port",
            XROOTD_MAX_TOKEN_BYTES,
            "CTA documentation; matching not tried",
            tried=False,
            quirks=(MATCHING_UNKNOWN,),
        ),
    )
}


def audience(form: AudienceForm, host: str, port: int) -> str:
    """Return a storage's audience: host lower case, no default port, no trailing slash."""
    netloc = host if port == HTTPS_PORT or form in ("url", "host") else f"{host}:{port}"
    return f"https://{netloc}" if form.startswith("url") else netloc


def scopes_needed(
    dialect: Dialect, operations: Iterable[Operation], forbidden: frozenset[str] = frozenset()
) -> tuple[Needed, ...]:
    """Return the scopes that several operations need in one token, without scopes that others imply.

    A scope that only a quirk named in `forbidden` needs is left out. The order is that of OPERATIONS,
    so equal arguments give equal claims.
    """
    wanted: dict[tuple[str, Where], Needed] = {}
    for operation in OPERATIONS:
        if operation not in operations:
            continue
        for needed in dialect.scopes[operation]:
            if needed.quirk is not None and needed.quirk.name in forbidden:
                continue
            known = wanted.get((needed.scope, needed.where))
            if known is None or known.quirk is not None:
                wanted[needed.scope, needed.where] = needed
    for wide, narrow in (("storage.modify", "storage.create"), ("storage.stage", "storage.poll")):
        for where in ("file", "parent"):
            if (wide, where) in wanted:
                wanted.pop((narrow, where), None)
    return tuple(wanted.values())
