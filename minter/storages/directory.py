"""From an endpoint URL to a storage, the VO-relative path on it, and its audience.

URLs are taken as Rucio writes them: not percent-encoded, so a `#`, `?` or space belongs to the
name, and only the storage's own prefix can split them. Slashes that stand together are one, as in
every storage's namespace; all else that is odd in the part after the base path is refused.
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
"""The schemes that carry a token, all over TLS, with the port that an URL need not name."""

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
    """One door of a storage: host, port, and the path prefix below which its files lie."""

    host: str
    port: int = 443
    prefix: str = "/"


class Storage(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A storage (RSE, storage element) as one VO sees it, as written in the settings.

    `base_path` is the area that the storage gives to the issuer: scopes are relative to it (WLCG
    §2.2.1). `audience` overrides what the dialect's form makes of each endpoint. `matching` says
    that the site confirmed how paths are matched. `tokens = false`: X.509 only.
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
    """One endpoint of a storage, ready to decide with: everything but the file's path."""

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
    """VO-relative prefixes of other storages that lie inside this one and take its tokens."""

    def relative(self, path: str) -> str:
        """Return a path below the base path as the VO's scopes write it."""
        return path if self.base_path == "/" else path[len(self.base_path) :] or "/"

    @property
    def root(self) -> str:
        """The prefix of the area itself, VO-relative."""
        return self.relative(self.prefix)

    def holds_directory(self, directory: str) -> bool:
        """Say whether a VO-relative directory lies strictly below this area's own prefix."""
        return directory != self.root and path_contains(self.root, directory)


def squash(path: str) -> str:
    """Return `path` absolute, with runs of slashes as one and none at the end (but `/` itself)."""
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
        """Pairs of storages that share an endpoint and prefix; the first one answers for both."""
        self._areas: dict[tuple[str, int], list[Area]] = {}
        # Tape first: where a tape storage and its staging buffer share a prefix, the URL says
        # nothing about which was meant, and only the tape's operations need more than the disk's.
        for storage in sorted(storages, key=lambda s: (not s.tape, s.name)):
            for endpoint, area in _areas(storage):
                self._add(endpoint, area)
        for known in self._areas.values():
            known.sort(key=lambda area: -len(area.prefix))
        self._note_nested()

    def _note_nested(self) -> None:
        """Tell each area of the storages inside it: no token for all of it may reach into them."""
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

        Those whose own audience it is; if there are none, those whose host it names, in any form: Rucio
        names a bare host, DIRAC and the profile an URL.
        """
        return self._by_audience.get(audience) or self._by_form.get(audience, [])

    def endpoints(self) -> list[list[Area]]:
        """Return the areas, longest prefix first, of each endpoint."""
        return list(self._areas.values())

    def url(self, storage: str, path: str, audience: Collection[str]) -> str | None:
        """Return an URL of a VO-relative path at the door of `storage` that has this audience, if any."""
        for (host, port), areas in self._areas.items():
            for area in areas:
                full = squash(f"{area.base_path}/{path}")
                if (area.storage, set(area.audience)) == (storage, set(audience)) and path_contains(
                    area.prefix, full
                ):
                    # A wide poll token names the whole area: any file there means it again.
                    return f"davs://{host}:{port}{full}" + ("/any" if full == area.prefix else "")
        return None

    def locate(self, url: str) -> tuple[Area, str]:
        """Return the area that an unencoded URL lies in, and the decoded, VO-relative path there.

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
    """Return as much of an URL as an error may show: no user, no query, where credentials travel."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0][:200]


def split_url(url: str) -> tuple[str, int, str]:
    """Split an unencoded URL into lower-case host, port (0 and none mean the scheme's) and path.

    The path has runs of slashes as one; a single one at its end stays, and is refused later.
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
