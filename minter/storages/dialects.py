"""What real storages want of a token, as data: one row for each behaviour, each claim with its source.

A dialect says which scopes each operation needs, which operations no token can do, how a path is written
and matched, which names no token can hold, which signatures the software verifies, how an audience looks,
and how large a token may be. Code never asks which software it talks to. A row or quirk is *tried* where real
software answered so (tests/vectors/verifiers, tests/acceptance/test_xrootd.py); else it rests on its source.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from minter.contract.operations import Operation

Where = Literal["file", "parent"]
AudienceForm = Literal["url", "url_with_port", "host", "host_with_port"]
Matching = Literal["exact", "prefix", "pattern"]
"""How a verifier compares a path with a scope's: at component borders, as a string prefix, or as a prefix
that is a regular expression, in which a dot stands for any character."""
Encoding = Literal["percent", "raw"]
Algorithm = Literal["ES256", "RS256"]
ALGORITHMS: tuple[Algorithm, ...] = ("ES256", "RS256")
"""JWS algorithms that an issuer may sign with, the fastest first."""
BOTH, RSA_ONLY = frozenset[Algorithm](ALGORITHMS), frozenset[Algorithm]({"RS256"})


class Quirk(NamedTuple):
    """One departure from the profile: what it is, who says so, and whether real software showed it."""

    name: str
    meaning: str
    source: str
    tried: bool


class Needed(NamedTuple):
    """One scope that an operation needs, on the file or on its parent; `quirk` if not by profile."""

    scope: str
    where: Where = "file"
    quirk: Quirk | None = None


class Dialect(NamedTuple):
    """One storage software, or one range of its versions, as tokens see it.

    `unable` says of operations that no token can do there why, and which version can. `refused` matches
    characters of names that no token can hold there without opening more or nothing.
    """

    name: str
    software: str
    scopes: Mapping[Operation, tuple[Needed, ...]]
    encoding: Encoding
    matching: Matching
    audience_form: AudienceForm
    max_token_bytes: int
    algorithms: frozenset[Algorithm]
    source: str
    tried: bool
    quirks: tuple[Quirk, ...] = ()
    unable: Mapping[Operation, str] = {}
    refused: re.Pattern[str] | None = None
    url_parameter: str = ""
    """The query before a token in a URL, empty if no version is known to read one there."""


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

_AUTHZ_BEARER, _AUTHZ, _ACCESS_TOKEN = "authz=Bearer%20", "authz=", "access_token="
"""XRootD 5.5.3 and 6.1.0, run, as EOS has it; dCache's and StoRM's sources (RFC 6750 §2.3)."""
DEFAULT_MAX_TOKEN_BYTES = 8_000
"""Proxies in front of storages often stop near 8 KiB of header."""
HTTPS_PORT = 443
XROOTD_MAX_TOKEN_BYTES = 16_000
"""XrdHttp drops the connection at 16 384 buffered bytes without a line end (tried, 5.5 and 6.1)."""

_NO_QUERY = re.compile(r"\?")
_NO_PATTERN = re.compile(r"[?+()$*\[\]{}|^]|(?:^|/)\.{3,}(?:/|$)")

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
QUERY_NAMES = Quirk(
    "no-question-mark",
    "a name with ? cannot be reached over HTTP: the server takes what follows for a query",
    "XRootD 5.5.3 and 6.1.0",
    tried=True,
)
NO_TAPE_API = "XRootD before 6.0.0 has no tape REST API; 6.0.0 and later have (dialect xrootd-6)"
STORM_STAT = Quirk(
    "storm-stat-needs-read",
    "a client that writes also stats, which takes storage.read",
    "StoRM WebDAV documentation; every verdict on writing was asked with read beside create or modify",
    tried=False,
)
STORM_PARENT = Quirk(
    "storm-parent-needs-read",
    "gfal2 asks for the parent directory before it makes one, which takes read on that directory",
    "StoRM WebDAV 1.9.0-rc3: PROPFIND of the parent is refused without it",
    tried=True,
)
STORM_PATTERN = Quirk(
    "path-is-a-pattern",
    "the path is read as a regular expression that any text may follow: it opens every name that begins with "
    "it, a dot stands for any character, and names with other special characters are refused",
    "StoRM WebDAV 1.9.0-rc3 (StructuredPathScopeMatcher)",
    tried=True,
)
STORM_POLL = Quirk(
    "storm-poll-needs-read",
    "no version of StoRM WebDAV knows storage.poll, which gives no right there: asking where a file is takes "
    "storage.read",
    "StoRM WebDAV 1.9.0-rc3: GET and PROPFIND are refused with storage.poll, allowed with storage.read",
    tried=True,
)
STORM_RAW = Quirk(
    "raw-paths-storm",
    "scope paths are compared without decoding",
    "StoRM WebDAV 1.9.0-rc3",
    tried=True,
)
STAGE_READS = Quirk(
    "stage-reads",
    "a token with storage.stage may also read the file",
    "StoRM WebDAV 1.9.0-rc3, dCache 9.2.47, 11.2.3 and of July 2026",
    tried=True,
)
POLL_NEEDS_READ = Quirk(
    "poll-needs-read",
    "storage.poll is not known before 11.2.4: asking where a file is takes storage.read",
    "dCache 9.2.47 and 11.2.3",
    tried=True,
)
ONE_SUBJECT = Quirk(
    "one-subject",
    "calls on a stage request are answered only for the account that made it: stage, poll and release of a "
    "request need tokens of one issuer with one sub",
    "EOS source",
    tried=False,
)
MATCHING_UNKNOWN = Quirk(
    "matching-unknown",
    "how paths are matched is not known, so prefix matching is assumed",
    "the version of the software is not named; set `matching` on the storage once the site confirms it",
    tried=False,
)
_NO_EOS_TAPE: Mapping[Operation, str] = dict.fromkeys(
    ("stage", "poll"), "EOS before 5.4.11 takes no token on its tape REST API; 5.4.11 and later do"
)
_NO_XROOTD_TAPE: Mapping[Operation, str] = {"stage": NO_TAPE_API, "poll": NO_TAPE_API}


def _with(*extra: Needed) -> dict[Operation, tuple[Needed, ...]]:
    writing: tuple[Operation, ...] = ("write", "overwrite", "retry", "delete")
    return {operation: (*_PROFILE[operation], *extra) for operation in writing}


_STORM_PARENT = Needed("storage.read", "parent", STORM_PARENT)
_POLL_BY_READ: Mapping[Operation, tuple[Needed, ...]] = {
    **_PROFILE,
    "poll": (Needed("storage.read", "file", POLL_NEEDS_READ),),
}

_EOS_VERSIONS: tuple[tuple[str, str, Matching, tuple[Quirk, ...], Mapping[Operation, str], str], ...] = (
    ("", ", version unknown", "prefix", (MATCHING_UNKNOWN,), {}, "EOS source; prefix matching before 5.2.19"),
    ("-5.2.19", ", 5.2.19 to 5.4.10", "exact", (), _NO_EOS_TAPE, "EOS source: component borders from 5.2.19"),
    ("-5.4.11", ", 5.4.11 and later", "exact", (), {}, "EOS source: storage.stage and storage.poll"),
)

_ROWS = (
    Dialect(
        "profile",
        "anything that follows the WLCG profile, version unknown",
        _PROFILE,
        "percent",
        "prefix",
        "url",
        DEFAULT_MAX_TOKEN_BYTES,
        RSA_ONLY,
        "WLCG Common JWT Profile 1.3 §2.2.1; matching by prefix and RS256 are assumed until confirmed",
        tried=False,
        quirks=(MATCHING_UNKNOWN,),
    ),
    Dialect(
        "xrootd-5.5",
        "XRootD before 5.6.9",
        {
            **_PROFILE,
            **_with(Needed("storage.read", "file", STAT_NEEDS_READ)),
            "make_parents": (
                Needed("storage.create", "parent", PARENT_NEEDS_SCOPE),
                Needed("storage.read", "parent", PARENT_NEEDS_SCOPE),
            ),
        },
        "raw",
        "prefix",
        "url_with_port",
        XROOTD_MAX_TOKEN_BYTES,
        BOTH,
        "XRootD 5.5.3 with libscitokens 0.7.3, run",
        tried=True,
        quirks=(STAT_NEEDS_READ, PARENT_NEEDS_SCOPE, PREFIX_MATCH, RAW_PATHS, QUERY_NAMES),
        unable=_NO_XROOTD_TAPE,
        refused=_NO_QUERY,
        url_parameter=_AUTHZ_BEARER,
    ),
    Dialect(
        "xrootd-5.6.9",
        "XRootD 5.6.9 and later with libscitokens before 1.4.1",
        _PROFILE,
        "raw",
        "exact",
        "url_with_port",
        XROOTD_MAX_TOKEN_BYTES,
        BOTH,
        "XRootD 5.6.9, run; a scope on / does not read before 5.7.0",
        tried=True,
        quirks=(RAW_PATHS, QUERY_NAMES),
        unable=_NO_XROOTD_TAPE,
        refused=_NO_QUERY,
        url_parameter=_AUTHZ_BEARER,
    ),
    Dialect(
        "xrootd",
        "XRootD 5.7 to 5.9 with libscitokens 1.4.1 or later",
        _PROFILE,
        "percent",
        "exact",
        "url_with_port",
        XROOTD_MAX_TOKEN_BYTES,
        BOTH,
        "XRootD 5.8.4 and 6.1.0 with libscitokens 1.4.1, run",
        tried=True,
        quirks=(QUERY_NAMES,),
        unable=_NO_XROOTD_TAPE,
        refused=_NO_QUERY,
        url_parameter=_AUTHZ_BEARER,
    ),
    Dialect(
        "xrootd-6",
        "XRootD 6.0 and later with libscitokens 1.4.1 or later",
        _PROFILE,
        "percent",
        "exact",
        "url_with_port",
        XROOTD_MAX_TOKEN_BYTES,
        BOTH,
        "XRootD 6.1.0 with libscitokens 1.4.1, run; its tape REST API from its source",
        tried=True,
        quirks=(QUERY_NAMES,),
        refused=_NO_QUERY,
        url_parameter=_AUTHZ_BEARER,
    ),
    Dialect(
        "dcache",
        "dCache 9.2 to 11.1, or of unknown version",
        _POLL_BY_READ,
        "percent",
        "exact",
        "url_with_port",
        DEFAULT_MAX_TOKEN_BYTES,
        RSA_ONLY,
        "dCache 9.2.47, run",
        tried=True,
        quirks=(POLL_NEEDS_READ, STAGE_READS),
        unable={"make_parents": "dCache 9.2 refuses MKCOL to a token for a file; a write makes its parents"},
        url_parameter=_AUTHZ,
    ),
    Dialect(
        "dcache-11.2",
        "dCache 11.2.0 to 11.2.3",
        _POLL_BY_READ,
        "percent",
        "exact",
        "url_with_port",
        DEFAULT_MAX_TOKEN_BYTES,
        BOTH,
        "dCache 11.2.3, run",
        tried=True,
        quirks=(POLL_NEEDS_READ, STAGE_READS),
        url_parameter=_AUTHZ,
    ),
    Dialect(
        "dcache-11.2.4",
        "dCache 11.2.4 and later, 12.0 and later",
        _PROFILE,
        "percent",
        "exact",
        "url_with_port",
        DEFAULT_MAX_TOKEN_BYTES,
        BOTH,
        "dCache of July 2026, run",
        tried=True,
        quirks=(STAGE_READS,),
        url_parameter=_AUTHZ,
    ),
    Dialect(
        "storm",
        "StoRM WebDAV 1.4 and later",
        {
            **_PROFILE,
            **_with(Needed("storage.read", "file", STORM_STAT), _STORM_PARENT),
            "make_parents": (Needed("storage.create"), _STORM_PARENT),
            "poll": (Needed("storage.read", "file", STORM_POLL),),
        },
        "raw",
        "pattern",
        "url_with_port",
        DEFAULT_MAX_TOKEN_BYTES,
        RSA_ONLY,
        "StoRM WebDAV 1.9.0-rc3, run; the algorithm on 1.4.1 to 1.9.0-rc3",
        tried=True,
        quirks=(STORM_STAT, STORM_PARENT, STORM_PATTERN, STORM_RAW, STORM_POLL, STAGE_READS),
        refused=_NO_PATTERN,
        url_parameter=_ACCESS_TOKEN,
    ),
    *(
        Dialect(
            name + version,
            software + range_,
            _PROFILE,
            "percent",
            matching,
            "url_with_port",
            XROOTD_MAX_TOKEN_BYTES,
            BOTH,
            source,
            tried=False,
            quirks=(*quirks, QUERY_NAMES, *((ONE_SUBJECT,) if not unable else ())),
            unable=unable,
            refused=_NO_QUERY,
            url_parameter=_AUTHZ_BEARER,
        )
        for name, software in (("eos", "EOS 5"), ("cta", "CTA behind EOS 5"))
        for version, range_, matching, quirks, unable, source in _EOS_VERSIONS
    ),
)

DIALECTS: Mapping[str, Dialect] = {row.name: row for row in _ROWS} | {
    "storm-cnaf": next(row for row in _ROWS if row.name == "storm")  # a name of earlier releases
}

FTS_REST = Dialect(
    "fts",
    "FTS's REST server 3.13 and later, as the audience of a service token",
    {},
    "percent",
    "exact",
    "url",
    DEFAULT_MAX_TOKEN_BYTES,
    BOTH,
    "FTS REST a8b49830c, run",
    tried=True,
)
"""Not a storage: the verifier of the token with which jobs are submitted."""


def audience(form: AudienceForm, host: str, port: int) -> str:
    """Return a storage's audience: host lower case, no default port, no trailing slash."""
    netloc = host if port == HTTPS_PORT or form in ("url", "host") else f"{host}:{port}"
    return f"https://{netloc}" if form.startswith("url") else netloc
