"""Settings: one TOML file, checked as a whole and read into one frozen structure.

The environment gives only the file's path (MINTER_SETTINGS), the DSN (MINTER_DSN), the broker's
URL (MINTER_BROKER_URL) and master keys (MINTER_MASTER_KEY_<VO>). Relative paths are relative to
the file. Unknown keys are refused with a suggestion.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from minter.broker.connections import nodes
from minter.errors import SettingsError
from minter.policy.audiences import ANY, is_fts
from minter.policy.clients import fits
from minter.policy.plans import SEVERAL_STORAGES
from minter.policy.routes import Route
from minter.policy.transfers import Policy
from minter.private_files import read_private_file
from minter.sections import CoIssuerSettings, Settings
from minter.storages.directory import Directory
from minter.storages.from_rucio import storages_from_export
from minter.storages.urls import authority_key


class Loaded:
    """Settings in use: from the settings file, the files that it names, and the environment."""

    def __init__(self, settings: Settings, folder: Path, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.folder = folder
        self._environ = environ
        self.warnings: list[str] = []
        """What the imports of storages warned of; `minter.checks` has the rest."""
        self.dsn = environ.get("MINTER_DSN") or settings.database.dsn
        self.broker_url = ";".join(nodes(environ.get("MINTER_BROKER_URL") or settings.broker.url))
        self.storages = list(settings.storages)
        for source in settings.rucio:
            found, warnings = storages_from_export(
                _read_json(folder / source.export), source.vo, source.rses, source.audience_form
            )
            self.storages += found
            self.warnings += warnings
        self.policy = self._policy()
        self._check()

    def __repr__(self) -> str:
        """Name the folder only: a DSN may hold a password."""
        return f"Loaded({self.folder})"

    @property
    def issuers(self) -> dict[str, str]:
        """Issuer URL by VO."""
        return {vo: issuer.iss for vo, issuer in self.settings.issuers.items()}

    @property
    def co_issuers(self) -> dict[str, CoIssuerSettings]:
        """Settings of the VOs whose issuer is their IAM's, too."""
        found = {vo: issuer.co_issuer for vo, issuer in self.settings.issuers.items()}
        return {vo: co_issuer for vo, co_issuer in found.items() if co_issuer is not None}

    @property
    def own_issuers(self) -> dict[str, str]:
        """URL of each issuer that is Minter's alone, by VO."""
        return {vo: iss for vo, iss in self.issuers.items() if vo not in self.co_issuers}

    @property
    def endpoints(self) -> dict[str, str]:
        """URL below which each VO's endpoints are: its issuer, unless that is the IAM's."""
        return self.issuers | {vo: co_issuer.url for vo, co_issuer in self.co_issuers.items()}

    def master_key_source(self, vo: str) -> tuple[str | None, Path | None]:
        """Return the sources of one VO's master key: text of the environment, and a file; None if not set."""
        file = self.settings.issuers[vo].master_key_file
        return self._environ.get(master_key_variable(vo)), self.folder / file if file else None

    @property
    def broker_ca(self) -> str | None:
        """CA file or directory that an amqps broker is verified with; None means the system's CAs."""
        ca = self.settings.broker.ca
        return str(self.folder / ca) if ca else None

    @property
    def archive_folder(self) -> Path | None:
        """Folder for the archives of past days; None if the settings name none."""
        folder = self.settings.database.archive_folder
        return self.folder / folder if folder else None

    def catalogue(self) -> dict[tuple[str, str], object]:
        """Return the description of each storage and FTS that the database records, by (VO, name)."""
        named: dict[tuple[str, str], object] = {
            (s.vo, s.name): msgspec.json.decode(msgspec.json.encode(s)) for s in self.storages
        }
        for vo, services in self.policy.fts.items():
            for plan in services.values():
                if (vo, plan.area.storage) in named:
                    raise SettingsError(f"{plan.area.storage!r} names a storage and an FTS")
                named[vo, plan.area.storage] = {"fts": list(plan.area.audience)}
        return named | {(vo, SEVERAL_STORAGES): {} for vo in self.settings.issuers}

    def _policy(self) -> Policy:
        for storage in self.storages:
            if storage.vo not in self.settings.issuers:
                raise SettingsError(
                    f"storage {storage.name!r} is of VO {storage.vo!r}, which has no [issuers.*]"
                )
        names = [(s.vo, s.name) for s in self.storages]
        if twice := {name for name in names if names.count(name) > 1}:
            raise SettingsError(f"storages named twice: {sorted(twice)}")
        directories = {vo: Directory(s for s in self.storages if s.vo == vo) for vo in self.settings.issuers}
        return Policy(
            directories,
            self.settings.routes,
            self.settings.fts,
            self.settings.exchanges,
            self.settings.http.token_lifetime_seconds,
            {vo: co_issuer.prefix for vo, co_issuer in self.co_issuers.items()},
        )

    def _check(self) -> None:
        """Check fields against each other; raises SettingsError."""
        settings = self.settings
        parts = [urlsplit(i.iss) for i in settings.issuers.values()]
        if len({(authority_key(p.netloc), p.path) for p in parts}) < len(parts):
            raise SettingsError("two issuers have the same iss, expected one VO for each (§2.1)")
        for vo, issuer in settings.issuers.items():
            if issuer.co_issuer is None and not issuer.iss.endswith("/"):
                raise SettingsError(f"issuers.{vo}.iss {issuer.iss!r} must end in a slash")
        urls = [urlsplit(url) for url in self.endpoints.values()]
        if len({(authority_key(p.netloc), p.path) for p in urls}) < len(urls):
            raise SettingsError("two VOs have their endpoints at one URL: see iss and co_issuer.url")
        paths = [c.path for c in self.co_issuers.values()]
        if len(paths) != len(set(paths)):
            raise SettingsError("two VOs have one co_issuer.path, expected one file for each")
        self._check_providers()
        longest = max(r.max_lifetime_seconds for r in settings.routes)
        if settings.rotation.lifetime_seconds <= longest:
            raise SettingsError(
                f"rotation.lifetime_seconds {settings.rotation.lifetime_seconds} is shorter than "
                f"the longest token, {longest} s"
            )

    def _check_providers(self) -> None:
        for provider in self.settings.providers:
            provider.check()
            for audience in provider.extra_audiences:
                known = (
                    d.at(audience) or is_fts(self.policy, vo, audience)
                    for vo, d in self.policy.directories.items()
                )
                if audience in ANY or any(known):
                    raise SettingsError(
                        f"provider {provider.name!r}: extra audience {audience!r} is of a storage or FTS, "
                        "and would widen tokens"
                    )
        names = [p.name for p in self.settings.providers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise SettingsError(f"providers named twice: {', '.join(sorted(twice))}")
        routes = {r.name for r in self.settings.routes}
        for route in self.settings.routes:
            if route.provider and route.provider not in names:
                raise SettingsError(
                    f"route {route.name!r}: provider {route.provider!r} is none of [[providers]], expected "
                    f"one of {', '.join(names) or 'none'}"
                )
            if unknown := [name for name in route.fallback if name not in routes]:
                raise SettingsError(f"route {route.name!r}: fallback {unknown[0]!r} is not a route")
            if same := [
                r.name
                for r in self.settings.routes
                if r.name in route.fallback and r.provider == route.provider
            ]:
                raise SettingsError(f"route {route.name!r}: fallback {same[0]!r} asks the same provider")
            self._check_served(route)

    def _check_served(self, route: Route) -> None:
        """Raise SettingsError if a route for a VO uses a provider that does not serve this VO."""
        for provider in self.settings.providers:
            if provider.name != route.provider:
                continue
            for vo in self.settings.issuers:
                if fits(vo, route.vos) and not provider.serves(vo):
                    raise SettingsError(
                        f"route {route.name!r} is for VO {vo!r}, and provider {provider.name!r} is not"
                    )

    def secret(self, file: str) -> str:
        """Return the secret or key in a file that only its owner may read; raises SettingsError."""
        return read_private_file("secret file", self.folder / file).strip()


def master_key_variable(vo: str) -> str:
    """Return the name of the environment variable that holds a VO's master key."""
    return "MINTER_MASTER_KEY_" + re.sub(r"[^A-Z0-9]", "_", vo.upper())


def load(path: Path, environ: Mapping[str, str]) -> Loaded:
    """Read and check the settings file; raises SettingsError with the place of the fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"settings file {path} cannot be read: {error.strerror}") from error
    try:
        return Loaded(msgspec.convert(tomllib.loads(text), Settings), path.resolve().parent, environ)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"settings file {path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise SettingsError(f"settings file {path}: {error}{_suggest(str(error))}") from error


def _keys(part: object) -> set[str]:
    """Return the keys of a structure's table, and of every table in it."""
    if isinstance(part, msgspec.inspect.StructType):
        return {f.encode_name for f in part.fields}.union(*(_keys(f.type) for f in part.fields))
    inner = [getattr(part, name, None) for name in ("item_type", "value_type", "types")]
    parts = [p for one in inner if one is not None for p in (one if isinstance(one, tuple) else (one,))]
    return set[str]().union(*map(_keys, parts))


def _suggest(message: str) -> str:
    unknown = re.search(r"unknown field `([^`]+)`", message)
    near = (
        get_close_matches(unknown.group(1), _keys(msgspec.inspect.type_info(Settings)), 1) if unknown else []
    )
    return f" (did you mean {near[0]!r}?)" if near else ""


def _read_json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"RSE export {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"RSE export {path} is not a JSON object")
    return found
