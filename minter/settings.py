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
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from minter.errors import SettingsError
from minter.policy.audiences import ANY, is_fts
from minter.policy.clients import fits
from minter.policy.exchanges import Exchange
from minter.policy.plans import SEVERAL_STORAGES
from minter.policy.routes import SHIPPED_ROUTES, FTSInstance, Route
from minter.policy.transfers import Policy
from minter.private_files import read_private_file
from minter.providers.dialects import Provider
from minter.storages.dialects import ALGORITHMS, Algorithm, AudienceForm
from minter.storages.directory import Directory, Storage
from minter.storages.from_rucio import RSERule, storages_from_export
from minter.storages.urls import authority_key
from minter.tokens.keys import RotationPolicy

Positive = Annotated[int, Meta(gt=0)]


class DatabaseSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`dsn` may hold a password, so it is better put into MINTER_DSN.

    `minter archive` moves tokens that expired `retention_days` ago to `archive_folder`. A request_id
    older than `retention_days` is refused.
    """

    dsn: str = ""
    pool_size: Positive = 2
    retention_days: Annotated[int, Meta(ge=1, le=400)] = 30
    archive_folder: str = ""


class BrokerSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`ca` is the file or directory of CAs that an amqps broker's certificate is verified with.

    `local_client` names the only client of a broker that does not authenticate senders. Such a broker
    delivers the messages of a dead worker again after `visibility_seconds`.
    """

    url: str = ""
    ca: str = ""
    local_client: str = ""
    visibility_seconds: Positive = 60


class MetricsSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where each process serves Prometheus: on a port of its role, counted from `first_port`; 0 is off.

    Beat has the first port, `minter events` the next, refreshers the 8 after it, processes of `minter serve`
    the 20 from 10 on, and workers `ports` ports from 30 on; each takes the first free one of its role.
    """

    listen: str = "127.0.0.1"
    first_port: Annotated[int, Meta(ge=0, le=65_000)] = 0
    ports: Annotated[int, Meta(ge=1, le=500)] = 70


class HttpSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The HTTP service (`minter serve`): where it listens, and what protects it from its callers.

    `certificate` and `key` are PEM files; without them the service speaks plain HTTP, for a proxy on the
    same machine. Each process allows a client `requests_per_second`, and a burst of the same number; every
    20 tokens that a request needs count as one request more. A quarter of `waiting_requests` is one client's.
    """

    listen: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8443
    processes: Positive = 2
    certificate: str = ""
    key: str = ""
    requests_per_second: Positive = 2000
    waiting_requests: Positive = 2000
    body_seconds: Annotated[float, Meta(gt=0, le=600)] = 10.0
    header_seconds: Annotated[float, Meta(gt=0, le=600)] = 10.0
    token_lifetime_seconds: Annotated[int, Meta(ge=900, le=21_600)] = 7200


class ConsoleSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The web console (`minter console`): where it listens, and who may sign in.

    `url` is its public URL, without a slash at its end. People sign in by OpenID Connect at `oidc_issuer`,
    where the console is the client `client_id`; `group_claim` of the ID token or of the userinfo has their
    groups. Members of a group that matches one of `operators` may act, those of `viewers` only look. Without
    `oidc_issuer`, the console prints a link that signs in once, and listens on this machine only.
    """

    listen: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8445
    url: Annotated[str, Meta(pattern="^(https?://[^/]+(/.*[^/])?)?$")] = ""
    oidc_issuer: str = ""
    oidc_scope: str = "openid profile email"
    client_id: str = ""
    client_secret_file: str = ""
    group_claim: str = "groups"
    operators: tuple[str, ...] = ()
    viewers: tuple[str, ...] = ()
    ca: str = ""


class FTSEventsSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """STOMP brokers, as `host:port`, that send FTS's monitoring messages to `minter events`.

    FTS sends each message to one of its brokers, so `brokers` must name all of them. `destinations` are
    queues for Minter alone, such as the consumer queues of an ActiveMQ virtual topic. `fts_vo` is the VO's
    name at FTS, by default the host of `iss`; `host` is the virtual host, by default the broker's name.
    With `tls`,
    brokers are verified with `ca`, and Minter authenticates with `certificate` and `key`, or with user and
    password.
    """

    vo: str
    brokers: Annotated[tuple[str, ...], Meta(min_length=1)]
    destinations: tuple[str, ...] = (
        "/queue/Consumer.minter.transfer.fts_monitoring_start",
        "/queue/Consumer.minter.transfer.fts_monitoring_complete",
        "/queue/Consumer.minter.transfer.fts_monitoring_state",
    )
    fts_vo: str = ""
    host: str = ""
    user: str = ""
    password_file: str = ""
    tls: bool = True
    ca: str = ""
    certificate: str = ""
    key: str = ""


class WorkerSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of a worker's batch: time, messages and bytes; the first that is reached ends the batch."""

    batch_seconds: Annotated[float, Meta(ge=0, le=1)] = 0.002
    batch_messages: Positive = 128
    batch_bytes: Positive = 64 * 1024
    prefetch: Positive = 256


class IssuerSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One VO's issuer; `iss` is its URL and ends in a slash."""

    iss: Annotated[str, Meta(pattern=r"^https://[A-Za-z0-9._:\[\]-]+/((?!\.{1,2}/)[A-Za-z0-9._~-]+/)*$")]
    algorithms: Annotated[tuple[Algorithm, ...], Meta(min_length=1)] = ALGORITHMS
    master_key_file: str = ""


class RucioSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Storages of one VO from a Rucio RSE export; `rses` are rules for facts that the export lacks."""

    vo: str
    export: str
    audience_form: AudienceForm = "host"
    rses: tuple[RSERule, ...] = ()


class DrillSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The clock of a drill; `minter drill` writes this part itself, and nobody else should set it.

    From `origin` (seconds since the epoch) on, time passes `time_scale` times as fast.
    """

    time_scale: Annotated[float, Meta(ge=1, le=1_000)] = 1.0
    origin: float = 0.0


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that a VO configures."""

    issuers: dict[str, IssuerSettings]
    database: DatabaseSettings = DatabaseSettings()
    broker: BrokerSettings = BrokerSettings()
    worker: WorkerSettings = WorkerSettings()
    http: HttpSettings = HttpSettings()
    console: ConsoleSettings = ConsoleSettings()
    metrics: MetricsSettings = MetricsSettings()
    rotation: RotationPolicy = RotationPolicy()
    storages: tuple[Storage, ...] = ()
    rucio: tuple[RucioSettings, ...] = ()
    routes: tuple[Route, ...] = SHIPPED_ROUTES
    fts: tuple[FTSInstance, ...] = ()
    providers: tuple[Provider, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    fts_events: tuple[FTSEventsSettings, ...] = ()
    drill: DrillSettings = DrillSettings()


class Loaded:
    """Settings in use: from the settings file, the files that it names, and the environment."""

    def __init__(self, settings: Settings, folder: Path, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.folder = folder
        self._environ = environ
        self.warnings: list[str] = []
        """What the imports of storages warned of; `minter.checks` has the rest."""
        self.dsn = environ.get("MINTER_DSN") or settings.database.dsn
        self.broker_url = environ.get("MINTER_BROKER_URL") or settings.broker.url
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
        )

    def _check(self) -> None:
        """Check fields against each other; raises SettingsError."""
        settings = self.settings
        parts = [urlsplit(i.iss) for i in settings.issuers.values()]
        if len({(authority_key(p.netloc), p.path) for p in parts}) < len(parts):
            raise SettingsError("two issuers have the same iss, expected one VO for each (§2.1)")
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


_KNOWN_KEYS = {
    name
    for part in (
        Settings,
        DatabaseSettings,
        BrokerSettings,
        HttpSettings,
        FTSEventsSettings,
        WorkerSettings,
        IssuerSettings,
        RucioSettings,
        RotationPolicy,
        Storage,
        Route,
        FTSInstance,
        Provider,
        Exchange,
        RSERule,
    )
    for name in part.__struct_fields__
}


def _suggest(message: str) -> str:
    unknown = re.search(r"unknown field `([^`]+)`", message)
    near = get_close_matches(unknown.group(1), _KNOWN_KEYS, 1) if unknown else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def _read_json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"RSE export {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"RSE export {path} is not a JSON object")
    return found
