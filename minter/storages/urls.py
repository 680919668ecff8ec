"""URLs of files as grid software writes them: scheme, host, port and path, without percent-decoding."""

import re
from collections.abc import Mapping
from ipaddress import IPv6Address
from urllib.parse import quote, unquote, urlparse, urlsplit

from minter.errors import (
    EndpointTakesNoToken,
    InvalidPath,
    UnknownStorage,
)

DEFAULT_PORTS: Mapping[str, int] = {"davs": 443, "https": 443, "roots": 1094}
"""Schemes that carry a token, all over TLS, with the default port of each."""

_PLAINTEXT = frozenset({"http", "dav", "root", "xroot"})
_SIGNED_ELSEWHERE = frozenset({"s3", "s3s", "gcloud", "gclouds", "swift", "swifts", "srm", "gsiftp"})

_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://(\[[0-9A-Fa-f:.]+\]|[^/:@\s?#]+)(?::(\d{0,5}))?(/.*)?", re.DOTALL
)
_COPY_MODE = re.compile(r"\?copy_mode=(?:push|pull)\Z")
_CREDENTIALS = re.compile(
    r"[?&](?:authz|access_token|[\w-]*signature|[\w-]*credential)=", re.IGNORECASE
).search
_SLASHES = re.compile(r"/{2,}")

MAX_URL_CHARACTERS = 4_096


_HOST = re.compile(
    r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?", re.ASCII
).fullmatch


def host_key(host: str) -> str:
    """Return the one spelling in which hosts are compared: lower case, an IPv6 address in brackets.

    Addresses are compared as addresses (RFC 5952), names without a dot at the end. Raises ValueError for
    what is neither.
    """
    text = host.strip().lower()
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if ":" in bare and "%" not in bare:
        try:
            return f"[{IPv6Address(bare).compressed}]"
        except ValueError:
            raise ValueError(f"{host!r} is not a host name or address") from None
    if text != bare or not _HOST(text):
        raise ValueError(f"{host!r} is not a host name or address")
    return text.removesuffix(".")


def host_of(url: str) -> str:
    """Return a URL's host in the spelling of `host_key`, empty if it cannot be read."""
    try:
        return host_key(urlsplit(url).hostname or "")
    except ValueError:
        return ""


def squash(path: str) -> str:
    """Return `path` made absolute, without repeated slashes or a slash at the end (except `/` itself)."""
    squashed = _SLASHES.sub("/", "/" + path)
    return squashed if squashed == "/" else squashed.removesuffix("/")


def shown(url: str) -> str:
    """Return the part of a URL that an error may show: without user and query, which may hold credentials."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0][:200]


def readings(url: str) -> list[str]:
    """Return what a URL in a log may mean: itself, and itself percent-decoded if that is another one."""
    return list(dict.fromkeys((url, unquote(url))))


def split_url(url: str) -> tuple[str, int, str]:
    """Split an unencoded URL into lower-case host, port (the scheme's if missing or 0) and path.

    Runs of slashes in the path become one slash; a slash at the end stays, and is refused later.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise InvalidPath(
            f"URL of {len(url)} characters is too long, expected at most {MAX_URL_CHARACTERS}",
            url=shown(url),
        )
    match = _URL.fullmatch(url)
    if match is None:
        raise UnknownStorage(f"cannot read {shown(url)!r}, expected davs://host:port/path", url=shown(url))
    scheme, host, port, path = match.groups()
    try:
        key = host_key(host)
    except ValueError:
        raise UnknownStorage(f"cannot read the host of {shown(url)!r}", url=shown(url)) from None
    scheme = scheme.lower()
    if scheme not in DEFAULT_PORTS:
        why = (
            "has no TLS"
            if scheme in _PLAINTEXT
            else "is signed elsewhere"
            if scheme in _SIGNED_ELSEWHERE
            else "is not known"
        )
        raise EndpointTakesNoToken(
            f"scheme {scheme!r} of {shown(url)!r} {why}, expected one of {', '.join(DEFAULT_PORTS)}",
            url=shown(url),
        )
    if path is None:
        raise InvalidPath(f"URL {shown(url)!r} has no path, expected the path of a file", url=shown(url))
    if "?" in path:
        path = _COPY_MODE.sub("", path)
        if _CREDENTIALS(path):
            raise InvalidPath(f"URL {shown(url)!r} carries credentials in its query; leave them out")
    if "//" in path:
        path = _SLASHES.sub("/", path)
    return key, int(port or 0) or DEFAULT_PORTS[scheme], path


def _over_roots(url: str) -> bool:
    return url.lower().startswith("roots:")


def check_signable(url: str) -> None:
    """Raise InvalidPath for a roots URL that cannot carry a token: such URLs are not encoded."""
    if _over_roots(url) and re.search(r"[?\s]", url):
        raise InvalidPath(
            f"{shown(url)!r} has a ? or white space, which no roots URL with a token can have; use davs",
            url=shown(url),
        )


def signed_url(url: str, parameter: str, token: str) -> str:
    """Return an unencoded URL as an encoded one that carries a token in its query.

    A davs URL becomes an https one, which browsers read. Over roots the path is written raw, after two
    slashes, and every server reads the token as XRootD's clients send it.
    """
    host, port, path = split_url(url)
    if _over_roots(url):
        return f"roots://{host}:{port}/{path}?authz=Bearer%20{token}"
    where = host if port == DEFAULT_PORTS["https"] else f"{host}:{port}"
    return f"https://{where}{quote(path)}?{parameter}{token}"


def check_fts_url(url: str) -> None:
    """Raise InvalidPath for a URL that FTS would store as another one, or not at all.

    FTS's REST server strips white space at both ends, drops line breaks and tabs, an ending `?` and an ending
    `#`, and its database holds Latin-1 only: any other character is an error 500 for the whole job.
    """
    try:
        url.encode("latin-1")
    except UnicodeEncodeError as error:
        raise InvalidPath(
            f"{shown(url)!r} has the character {url[error.start]!r}, and FTS stores Latin-1 only; transfer "
            "the file without FTS, or rename it",
            url=shown(url),
        ) from None
    try:
        kept = urlparse(url.strip()).geturl()
    except ValueError:
        raise UnknownStorage(f"cannot read the host of {shown(url)!r}", url=shown(url)) from None
    if kept != _scheme_lower(url):
        raise InvalidPath(
            f"{shown(url)!r} is changed by FTS, which cuts white space at both ends, line breaks, tabs and "
            "an ending ? or #: the token would be for another file; correct the URL or rename the file",
            url=shown(url),
        )


def _scheme_lower(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme.lower()}{separator}{rest}"


def authority_key(authority: str) -> str:
    """Return the one spelling of the host and port of an https URL (RFC 9110 §4.2.3); empty for none."""
    try:
        parts = urlsplit(f"//{authority}")
        host, port = host_key(parts.hostname or ""), parts.port
    except ValueError:
        return ""
    return host if port in (None, DEFAULT_PORTS["https"]) else f"{host}:{port}"
