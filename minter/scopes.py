"""Scopes of the WLCG profile: parse, normalise, encode, contain, intersect (WLCG 1.3 §2.2.1).

A path inside Minter is always *decoded*, absolute and normalised: the file's name in the VO's area
of a storage. A path is encoded once, when a claim is written. Names that real verifiers read in
different ways (docs/dialects.md) are refused.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple, Self
from urllib.parse import quote, unquote

from minter.errors import InvalidPath

STORAGE_SCOPES = frozenset(
    {"storage.read", "storage.create", "storage.modify", "storage.stage", "storage.poll"}
)
"""The scopes that must name a path (WLCG §2.2.1)."""

IMPLIED = {"storage.modify": ("storage.create",), "storage.stage": ("storage.poll",)}
"""Scopes that a scope includes on the same path; stage does not include read (WLCG 1.2 and later)."""

# Characters of RFC 3986 §3.3 pchar stay raw, all others become the %XX of their UTF-8. This is the
# only spelling that both XRootD 5.5 and 6.1 accepted, tried character by character.
_PCHAR = "/-._~!$&'()*+,;=:@"
_PLAIN = re.compile(r"[A-Za-z0-9/\-._~!$&'()*+,;=:@]*").fullmatch

# Control characters (Cc), lone surrogates, % and backslash: no token can name such a file for
# libscitokens 1.4, which decodes repeatedly and then refuses the whole token.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f%\\\ud800-\udfff]").search
_SLASHES = re.compile(r"/{2,}")
_DOT_OR_EMPTY = re.compile(r"/(?:\.{0,2})(?:/|$)").search


def check_path(path: str) -> str:
    """Return `path`, decoded and absolute, if a scope can name it; `/` is the whole area.

    Raises InvalidPath for a relative or missing path, `%`, backslash, control characters, lone
    surrogates, and for dot or empty segments; a trailing `/` counts as an empty segment.
    """
    if not path.startswith("/"):
        raise InvalidPath(f"path {path!r} is not absolute, expected it to begin with /", path=path)
    if bad := _FORBIDDEN(path):
        raise InvalidPath(
            f"path {path!r} contains {bad.group()!r}, which storages read in different ways; "
            "rename the file, and send paths unencoded",
            path=path,
        )
    if path != "/" and _DOT_OR_EMPTY(path):
        raise InvalidPath(
            f"path {path!r} has an empty, '.' or '..' segment, expected a normalised path",
            path=path,
        )
    return path


def encode_path(path: str) -> str:
    """Return a checked path as a scope writes it (RFC 3986 pchar raw, else percent-encoded)."""
    return path if _PLAIN(path) else quote(path, safe=_PCHAR)


def raw_path(path: str) -> str:
    """Return a checked path for verifiers that compare bytes without decoding.

    Raises InvalidPath for white space, which would split the scope claim.
    """
    if any(c.isspace() for c in path):
        raise InvalidPath(
            f"path {path!r} contains white space, which this storage's verifier cannot match; "
            "rename the file or upgrade the storage",
            path=path,
        )
    return path


def parent(path: str) -> str:
    """Return the directory that holds `path`; the parent of `/` is `/`."""
    return path.rpartition("/")[0] or "/"


def path_contains(outer: str, inner: str) -> bool:
    """Say whether `inner` is `outer` or below it, at component borders only."""
    return outer in ("/", inner) or inner.startswith(outer + "/")


class Scope(NamedTuple):
    """One scope: a name and, for storage scopes, a decoded path."""

    name: str
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one scope as a token or a client writes it.

        Repeated slashes count as one, and one trailing `/` of a directory is dropped, so normalising twice is
        once. Raises InvalidPath for a storage scope without a path and for all that `check_path` refuses.
        """
        name, colon, encoded = text.partition(":")
        if not colon:
            if name in STORAGE_SCOPES:
                raise InvalidPath(f"scope {text!r} has no path, expected {name}:/path", scope=text)
            return cls(text)
        if name not in STORAGE_SCOPES:
            return cls(text)
        try:
            path = unquote(encoded, errors="strict")
        except UnicodeDecodeError as error:
            raise InvalidPath(f"scope {text!r} is not UTF-8 after decoding", scope=text) from error
        # Rucio writes // where the prefix of an RSE begins so; storages read it as one slash (ADR 5).
        path = _SLASHES.sub("/", path)
        if len(path) > 1:
            path = path.removesuffix("/")
        return cls(name, check_path(path))

    def __str__(self) -> str:
        """Return the scope as the profile writes it."""
        return self.name if self.path is None else f"{self.name}:{encode_path(self.path)}"

    def contains(self, other: "Scope") -> bool:
        """Say whether this scope grants everything that `other` grants."""
        if other.name != self.name and other.name not in IMPLIED.get(self.name, ()):
            return False
        if self.path is None or other.path is None:
            return self.path == other.path
        return path_contains(self.path, other.path)


def parse_scopes(claim: str) -> frozenset[Scope]:
    """Read a `scope` claim: scopes separated by single spaces (RFC 6749 §3.3)."""
    return frozenset(Scope.parse(word) for word in claim.split(" ") if word)


def contains(outer: Iterable[Scope], inner: Iterable[Scope]) -> bool:
    """Say whether each scope of `inner` is contained in a scope of `outer`."""
    outer = tuple(outer)
    return all(any(o.contains(i) for o in outer) for i in inner)


def intersect(left: Iterable[Scope], right: Iterable[Scope]) -> frozenset[Scope]:
    """Return the largest set of scopes that both sides contain, without redundant scopes."""
    right = tuple(right)
    found = {meet for a in left for b in right if (meet := _meet(a, b)) is not None}
    return frozenset(s for s in found if not any(o != s and o.contains(s) for o in found))


def _meet(a: Scope, b: Scope) -> Scope | None:
    name = _narrower(a.name, b.name)
    if name is None:
        return None
    if a.path is None or b.path is None:
        return Scope(name) if a.path == b.path else None
    if path_contains(a.path, b.path):
        return Scope(name, b.path)
    return Scope(name, a.path) if path_contains(b.path, a.path) else None


def _narrower(a: str, b: str) -> str | None:
    if a == b or b in IMPLIED.get(a, ()):
        return b
    return a if a in IMPLIED.get(b, ()) else None
