"""Find the storage of a URL, the VO-relative path on the storage, and the audience.

URLs are read as Rucio writes them, without percent-encoding: a `#`, `?` or space belongs to the
file's name, and only the storage's prefix divides the path. A run of slashes counts as one slash, as
in every storage's namespace (ADR 5); other irregularities after the base path are refused.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

from msgspec import Struct, structs

from minter.errors import (
    EndpointTakesNoToken,
    InvalidPath,
    PathNotAllowed,
    SettingsError,
    UnknownStorage,
)
from minter.scopes import check_path, path_contains
from minter.storages.dialects import DIALECTS, AudienceForm, Dialect, Matching, audience

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
MAX_AUDIENCE_CHARACTERS = 1_024


class Endpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """One endpoint of a storage: host, port, and the path prefix below which its files lie."""

    host: str
    port: int = 443
    prefix: str = "/"


class Storage(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A storage (RSE, storage element) as one VO sees it, as written in the settings.

    `base_path` is the area that the storage gives to the issuer; scopes are relative to this path (WLCG
    §2.2.1). `audience` replaces the audience that the dialect's form gives to each endpoint. `matching`
    is set when the site confirmed how its storage matches paths. With `tokens = false`, the storage takes
    X.509 only.
    """

    vo: str
    name: str
    endpoints: tuple[Endpoint, ...]
    dialect: str = "profile"
    base_path: str = "/"
    audience: tuple[str, ...] = ()
    audience_form: AudienceForm | None = None
    matching: Matching | None = None
    tape: bool = False
    tokens: bool = True


class Area(Struct, frozen=True, eq=False):
    """One endpoint of a storage, with everything that a decision needs except the file's path."""

    vo: str
    storage: str
    prefix: str
    base_path: str
    audience: tuple[str, ...]
    dialect: Dialect
    matching: Matching
    tape: bool
    tokens: bool
    nested: tuple[str, ...] = ()
    """VO-relative prefixes of other storages that lie inside this area and take its tokens."""

    def relative(self, path: str) -> str:
        """Return a path below the base path in the VO-relative form that scopes use."""
        return path if self.base_path == "/" else path[len(self.base_path) :] or "/"

    @property
    def root(self) -> str:
        """The VO-relative prefix of the area itself."""
        return self.relative(self.prefix)

    def holds_directory(self, directory: str) -> bool:
        """Say whether a VO-relative directory lies strictly below this area's own prefix."""
        return directory != self.root and path_contains(self.root, directory)


def squash(path: str) -> str:
    """Return `path` made absolute, without repeated slashes or a slash at the end (except `/` itself)."""
    squashed = _SLASHES.sub("/", "/" + path)
    return squashed if squashed == "/" else squashed.removesuffix("/")


def _areas(storage: Storage) -> Iterable[tuple[tuple[str, int], Area]]:
    if storage.dialect not in DIALECTS:
        near = get_close_matches(storage.dialect, DIALECTS, 1) or sorted(DIALECTS)
        raise SettingsError(
            f"storage {storage.name!r} has the unknown dialect {storage.dialect!r}, "
            f"expected one of those known, such as {near[0]!r}"
        )
    dialect = DIALECTS[storage.dialect]
    if len(" ".join(storage.audience)) > MAX_AUDIENCE_CHARACTERS:
        raise SettingsError(
            f"storage {storage.name!r} has audiences of more than {MAX_AUDIENCE_CHARACTERS} "
            "characters together, which FTS cannot store"
        )
    form = storage.audience_form or dialect.audience_form
    base_path = squash(storage.base_path)
    for endpoint in storage.endpoints:
        prefix = squash(endpoint.prefix)
        if not path_contains(base_path, prefix):
            raise SettingsError(
                f"storage {storage.name!r} has the prefix {prefix!r} outside its base_path "
                f"{base_path!r}; correct one of them"
            )
        host, port = endpoint.host.lower(), endpoint.port or 443
        yield (
            (host, port),
            Area(
                storage.vo,
                storage.name,
                prefix,
                base_path,
                storage.audience or (audience(form, host, port),),
                dialect,
                storage.matching or dialect.matching,
                storage.tape,
                storage.tokens,
            ),
        )


class Directory:
    """All storages of one VO, found by URL: longest prefix first, at component borders."""

    def __init__(self, storages: Iterable[Storage]) -> None:
        self.shared: list[tuple[str, str]] = []
        """Pairs of storages that share an endpoint and prefix; the first of a pair is used for both."""
        self._areas: dict[tuple[str, int], list[Area]] = {}
        # Tape first: where a tape storage and its staging buffer share a prefix, the URL does not say
        # which of them is meant, and only operations on tape need more than those on disk.
        for storage in sorted(storages, key=lambda s: (not s.tape, s.name)):
            for endpoint, area in _areas(storage):
                self._add(endpoint, area)
        for known in self._areas.values():
            known.sort(key=lambda area: -len(area.prefix))
        self._note_nested()

    def _note_nested(self) -> None:
        """Set `nested` of each area: a token for a whole area must not reach into storages inside it."""
        by_audience: dict[str, list[Area]] = {}
        self._by_audience: dict[str, list[list[Area]]] = {}
        self._by_form: dict[str, list[list[Area]]] = {}
        for (host, port), areas in self._areas.items():
            for area in areas:
                for name in area.audience:
                    by_audience.setdefault(name, []).append(area)
            for name in dict.fromkeys(name for area in areas for name in area.audience):
                self._by_audience.setdefault(name, []).append(areas)
            for name in (host, f"{host}:{port}", f"https://{host}", f"https://{host}:{port}"):
                self._by_form.setdefault(name, []).append(areas)
        for area in self.areas():
            inside = {
                area.relative(other.prefix)
                for name in area.audience
                for other in by_audience[name]
                if other.storage != area.storage and path_contains(area.prefix, other.prefix)
            }
            structs.force_setattr(area, "nested", tuple(sorted(inside)))

    def _add(self, endpoint: tuple[str, int], area: Area) -> None:
        for known in self._areas.setdefault(endpoint, []):
            if known.prefix != area.prefix:
                continue
            if (known.base_path, known.audience) != (area.base_path, area.audience):
                raise SettingsError(
                    f"storages {known.storage!r} and {area.storage!r} share "
                    f"{endpoint[0]}:{endpoint[1]}{area.prefix} but differ in base_path or audience"
                )
            if known.storage != area.storage:
                self.shared.append((known.storage, area.storage))
            return
        self._areas[endpoint].append(area)

    def areas(self) -> list[Area]:
        """Return every area, in no particular order."""
        return [area for areas in self._areas.values() for area in areas]

    def at(self, audience: str) -> list[list[Area]]:
        """Return the areas, longest prefix first, of each endpoint that an audience stands for.

        These are the endpoints with exactly this audience, or, if there are none, the endpoints at the host
        that the audience names in any form: Rucio names a bare host, DIRAC and the profile a URL.
        """
        return self._by_audience.get(audience) or self._by_form.get(audience, [])

    def endpoints(self) -> list[list[Area]]:
        """Return the areas, longest prefix first, of each endpoint."""
        return list(self._areas.values())

    def url(self, storage: str, path: str, audience: Collection[str]) -> str | None:
        """Return a URL of a VO-relative path at the endpoint of `storage` with this audience, or None."""
        for (host, port), areas in self._areas.items():
            for area in areas:
                full = squash(f"{area.base_path}/{path}")
                if (area.storage, set(area.audience)) == (storage, set(audience)) and path_contains(
                    area.prefix, full
                ):
                    # A wide poll token names the whole area; the URL of any file there stands for the area.
                    return f"davs://{host}:{port}{full}" + ("/any" if full == area.prefix else "")
        return None

    def locate(self, url: str) -> tuple[Area, str]:
        """Return the area that contains an unencoded URL, and the decoded, VO-relative path there.

        Raises EndpointTakesNoToken, UnknownStorage, PathNotAllowed or InvalidPath. A trailing
        `?copy_mode=push` or `?copy_mode=pull`, which Rucio adds to sources, is dropped.
        """
        host, port, path = split_url(url)
        areas = self._areas.get((host, port))
        if areas is None:
            raise self._unknown(host, port)
        for area in areas:
            if path_contains(area.prefix, path):
                break
        else:
            raise PathNotAllowed(
                f"path {path!r} is outside the area of storage {areas[0].storage!r}, "
                f"expected it below {areas[0].prefix!r}",
                path=path,
                storage=areas[0].storage,
            )
        if not area.tokens:
            raise EndpointTakesNoToken(
                f"storage {area.storage!r} takes no tokens (tokens = false); use X.509 there",
                storage=area.storage,
            )
        if path.removesuffix("/") == area.prefix.removesuffix("/"):
            raise InvalidPath(
                f"{shown(url)!r} names the whole of storage {area.storage!r}, expected a file below it",
                storage=area.storage,
            )
        return area, check_path(area.relative(path))

    def _unknown(self, host: str, port: int) -> UnknownStorage:
        known = [f"{h}:{p}" for h, p in self._areas]
        near = get_close_matches(f"{host}:{port}", known, 3, 0.5)
        return UnknownStorage(
            f"no storage of this VO has the endpoint {host}:{port}"
            + (f", the nearest known are {', '.join(near)}" if near else ", and none is near it")
            + "; add it to the settings or correct the URL",
            endpoint=f"{host}:{port}",
            nearest=near,
        )


def shown(url: str) -> str:
    """Return the part of a URL that an error may show: without user and query, which may hold credentials."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0][:200]


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
    return host.lower(), int(port or 0) or DEFAULT_PORTS[scheme], path
