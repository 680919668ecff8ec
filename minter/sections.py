"""The tables of the settings file, as frozen structures; `minter.settings` reads and checks the file."""

from typing import Annotated

from msgspec import Meta, Struct

from minter.policy.exchanges import Exchange
from minter.policy.routes import SHIPPED_ROUTES, FTSInstance, Route
from minter.providers.dialects import Provider
from minter.storages.dialects import ALGORITHMS, Algorithm, AudienceForm
from minter.storages.directory import Storage
from minter.storages.from_rucio import RSERule
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
    """`url` names the broker, or each node of a cluster, joined by semicolons.

    `ca` is the file or directory of CAs that an amqps broker's certificate is verified with.

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


class CoIssuerSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Minter signs under the issuer of the VO's IAM, whose `iss` this is (docs/co-issuer.md).

    `keys` is the URL of the IAM's own key set, behind the proxy; `path` that of the address which the IAM's
    discovery document names, where the proxy serves what `minter publish` writes. `url` is where Minter's own
    endpoints are. Names and `sub` of Minter's clients begin with `prefix`, and no name at the IAM does.
    """

    keys: Annotated[str, Meta(pattern="^https?://[^/]+/")]
    path: Annotated[str, Meta(pattern=r"^(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+$")]
    url: Annotated[str, Meta(pattern="^https://[^/]+/(.*/)?$")]
    prefix: Annotated[str, Meta(pattern="^[A-Za-z0-9._-]{2,32}$")]
    ca: str = ""


class IssuerSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One VO's issuer. `iss` is its URL and ends in a slash; if the IAM signs, too, as that spells it."""

    iss: Annotated[str, Meta(pattern=r"^https://[A-Za-z0-9._:\[\]-]+(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)*/?$")]
    algorithms: Annotated[tuple[Algorithm, ...], Meta(min_length=1)] = ALGORITHMS
    master_key_file: str = ""
    co_issuer: CoIssuerSettings | None = None


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
