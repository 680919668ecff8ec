"""Find the storage of a URL, the VO-relative path on the storage, and the audience.

URLs are read as Rucio writes them, without percent-encoding: a `#`, `?` or space belongs to the
file's name, and only the storage's prefix divides the path. A run of slashes counts as one slash, as
in every storage's namespace (ADR 5); other irregularities after the base path are refused.
"""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches

from msgspec import Struct, structs
from rapidfuzz import process

from minter.errors import (
    EndpointTakesNoToken,
    InvalidPath,
    PathNotAllowed,
    SettingsError,
    UnknownStorage,
)
from minter.scopes import check_path, path_contains
from minter.storages.dialects import DIALECTS, HTTPS_PORT, AudienceForm, Dialect, Matching, audience
from minter.storages.matching import opens
from minter.storages.urls import host_key, shown, split_url, squash

MAX_AUDIENCE_CHARACTERS = 1_024
NEAR_SCORE = 50
"""Least likeness, of 100, of an endpoint that an error suggests."""
NEAR_KNOWN = 1_000
"""Unknown endpoints whose suggestions are kept, at most."""
LOOSEST_FIRST: tuple[Matching, ...] = ("pattern", "prefix", "exact")


class Endpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """One endpoint of a storage: host, port, and the path prefix below which its files lie."""

    host: str
    port: int = 443
    prefix: str = "/"
    base_path: str = ""
    """Base path of this endpoint, if it differs from the storage's."""


class Storage(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A storage (RSE, storage element) as one VO sees it, as written in the settings.

    `base_path` is the area that the storage gives to the issuer; scopes are relative to this path (WLCG
    §2.2.1). `audience` replaces the audience that the dialect's form gives to each endpoint. `matching`
    is set when the site confirmed how its storage matches paths. With `tokens = false`, the storage takes
    X.509 only. With `logs_urls` no token is put into its URLs.
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
    logs_urls: bool = False


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
    logs_urls: bool = False
    nested: tuple[str, ...] = ()
    """VO-relative prefixes of other storages in reach of this area's tokens, which no such token may open."""

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

    def opened_neighbour(self, path: str) -> str | None:
        """Return the prefix of another storage that a scope on `path` would open, None if there is none."""
        return next((prefix for prefix in self.nested if opens(self.matching, path, prefix)), None)


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
    for endpoint in storage.endpoints:
        prefix, base_path = squash(endpoint.prefix), squash(endpoint.base_path or storage.base_path)
        if not path_contains(base_path, prefix):
            raise SettingsError(
                f"storage {storage.name!r} has the prefix {prefix!r} outside its base_path "
                f"{base_path!r}; correct one of them"
            )
        try:
            host, port = host_key(endpoint.host), endpoint.port or HTTPS_PORT
        except ValueError as error:
            raise SettingsError(
                f"storage {storage.name!r}: {error}; give the host without scheme, port and path"
            ) from None
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
                storage.logs_urls,
            ),
        )


def _neighbours(area: Area, others: Iterable[Area]) -> set[str]:
    """Return the prefixes, relative to `area`, of other storages that lie below or beside its own prefix."""
    return {
        area.relative(other.prefix)
        for other in others
        if other.storage != area.storage
        and other.prefix != area.prefix
        and path_contains(area.base_path, other.prefix)
        and (area.matching != "exact" or path_contains(area.prefix, other.prefix))
        and not path_contains(other.prefix, area.prefix)
    }


class Directory:
    """All storages of one VO, found by URL: longest prefix first, at component borders."""

    def __init__(self, storages: Iterable[Storage]) -> None:
        self.shared: list[tuple[str, str]] = []
        """Pairs of storages that share an endpoint and prefix; the first of a pair is used for both."""
        self._areas: dict[tuple[str, int], list[Area]] = {}
        self._near: dict[str, list[str]] = {}
        # Tape first: where a tape storage and its staging buffer share a prefix, the URL does not say
        # which of them is meant, and only operations on tape need more than those on disk.
        for storage in sorted(storages, key=lambda s: (not s.tape, s.name)):
            for endpoint, area in _areas(storage):
                self._add(endpoint, area)
        for known in self._areas.values():
            known.sort(key=lambda area: -len(area.prefix))
        self._note_nested()

    def _note_nested(self) -> None:
        """Index the areas by audience, and tell each area of its neighbours that a token could reach.

        A token reaches whatever takes its audience or stands at the same endpoint. Where paths match as
        strings, it may also reach a neighbour whose prefix merely begins with the path of the scope.
        """
        within_reach: dict[object, list[Area]] = {}
        self._by_storage: dict[str, list[tuple[tuple[str, int], Area]]] = {}
        self._by_audience: dict[str, list[list[Area]]] = {}
        self._by_form: dict[str, list[list[Area]]] = {}
        for (host, port), areas in self._areas.items():
            for area in areas:
                self._by_storage.setdefault(area.storage, []).append(((host, port), area))
                for key in ((host, port), *area.audience):
                    within_reach.setdefault(key, []).append(area)
            for name in dict.fromkeys(name for area in areas for name in area.audience):
                self._by_audience.setdefault(name, []).append(areas)
            for name in (host, f"{host}:{port}", f"https://{host}", f"https://{host}:{port}"):
                self._by_form.setdefault(name, []).append(areas)
        for endpoint, areas in self._areas.items():
            for area in areas:
                others = [other for key in (endpoint, *area.audience) for other in within_reach[key]]
                structs.force_setattr(area, "nested", tuple(sorted(_neighbours(area, others))))

    def siblings(self) -> Iterable[tuple[str, str, str]]:
        """Yield pairs of storages, and their endpoint, where tokens of the first may open the second.

        Paths match as strings there, and the prefix of the second begins with that of the first.
        """
        for (host, port), areas in self._areas.items():
            for area in areas:
                for other in areas:
                    if (
                        area.matching != "exact"
                        and other.storage != area.storage
                        and other.prefix.startswith(area.prefix)
                        and not path_contains(area.prefix, other.prefix)
                    ):
                        yield area.storage, other.storage, f"{host}:{port}"

    def matching_of(self, storage: str) -> Matching:
        """Return how the paths of a storage are matched, in the loosest way of its endpoints."""
        found = {area.matching for area in self.areas() if area.storage == storage}
        return next((m for m in LOOSEST_FIRST if m in found), "prefix")

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
        that the audience names in any form and case: Rucio names a bare host, DIRAC and the profile a URL.
        """
        return self._by_audience.get(audience) or self._by_form.get(_audience_key(audience), [])

    def endpoints(self) -> list[list[Area]]:
        """Return the areas, longest prefix first, of each endpoint."""
        return list(self._areas.values())

    def url(self, storage: str, path: str, audience: Collection[str]) -> str | None:
        """Return a URL of a VO-relative path at the endpoint of `storage` with this audience, or None."""
        for (host, port), area in self._by_storage.get(storage, ()):
            full = squash(f"{area.base_path}/{path}")
            if set(area.audience) == set(audience) and path_contains(area.prefix, full):
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
        asked = f"{host}:{port}"
        near = self._near.get(asked)
        if near is None:
            known = [f"{h}:{p}" for h, p in self._areas]
            near = [name for name, *_ in process.extract(asked, known, limit=3, score_cutoff=NEAR_SCORE)]
            if len(self._near) < NEAR_KNOWN:
                self._near[asked] = near
        return UnknownStorage(
            f"no storage of this VO has the endpoint {asked}"
            + (f", the nearest known are {', '.join(near)}" if near else ", and none is near it")
            + "; add it to the settings or correct the URL",
            endpoint=asked,
            nearest=near,
        )


def _audience_key(audience: str) -> str:
    """Return an audience in the spelling in which hosts are compared, itself if it names no host."""
    scheme, separator, netloc = audience.rpartition("://")
    host, colon, port = netloc.rpartition(":") if re.search(r":\d+\Z", netloc) else (netloc, "", "")
    try:
        return f"{scheme.lower()}{separator}{host_key(host)}{colon}{port}"
    except ValueError:
        return audience
