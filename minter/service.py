"""Wiring for entry points: makes the engine and its adapters from the settings."""

import gc
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from minter import sections, settings
from minter.contract.messages import instant_of
from minter.database import control_changes, counts, keyring, migrations, partitions, processes, recording
from minter.database.connection import open_pool, transaction
from minter.database.control import read_keys, read_private_key
from minter.errors import NoUsableKey, SettingsError
from minter.policy.clients import Client
from minter.providers.iam import IAM
from minter.refresher.discovery import SharedDocuments
from minter.storages.dialects import Algorithm
from minter.tokens import keys
from minter.tokens.clock import new_uuid7, now
from minter.tokens.keys import Key
from minter.tokens.keystore import Keystore, MasterKey, read_master_key
from minter.tokens.mint import Engine
from minter.tokens.outcomes import Observed

_GC_ALLOCATIONS = 20_000


def clock_of(drill: sections.DrillSettings) -> Callable[[], datetime]:
    """Return the clock of a process: the current time, or the faster time of a drill."""
    if drill.time_scale == 1:
        return now
    origin, scale = datetime.fromtimestamp(drill.origin, UTC), drill.time_scale
    return lambda: origin + scale * (now() - origin)


def tune_gc() -> None:
    """Keep objects that live as long as the process (settings, modules) out of garbage collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_ALLOCATIONS, 10, 5)


def load_settings() -> settings.Loaded:
    """Read the file that MINTER_SETTINGS names; raises SettingsError."""
    path = os.environ.get("MINTER_SETTINGS")
    if not path:
        raise SettingsError("MINTER_SETTINGS is not set; it names the settings file (TOML)")
    return settings.load(Path(path), os.environ)


class Service:
    """One process's engine and its adapters."""

    def __init__(
        self,
        loaded: settings.Loaded,
        observe: Callable[[Observed], None] = lambda _: None,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        if not loaded.dsn:
            raise SettingsError("no DSN: set MINTER_DSN or database.dsn")
        self.loaded = loaded
        self.clock = clock or clock_of(loaded.settings.drill)
        self.pool = open_pool(loaded.dsn, loaded.settings.database.pool_size)
        self.keystore = Keystore(_Masters(loaded), lambda key_id: read_private_key(self.pool, key_id))
        self.store = recording.PostgresStore(self.pool, clock or now, self.keystore.seal_token)
        self.engine = Engine(
            self.store,
            loaded.policy,
            self.keystore.unlock,
            new_uuid7,
            observe,
            open_token=self.keystore.open_token,
            rotation=loaded.settings.rotation,
            retention_seconds=loaded.settings.database.retention_days * 86400,
        )

    def prepare(self) -> None:
        """Write settings to the database and make partitions: at start, and from then on by beat.

        Raises Unavailable if the database has not the schema that this release needs.
        """
        migrations.check(self.pool)
        control_changes.sync_catalogue(self.pool, self.loaded.issuers, self.loaded.catalogue())
        control_changes.sync_providers(self.pool, [p.name for p in self.loaded.settings.providers])
        self.make_partitions()

    def iams(self) -> dict[str, IAM]:
        """Return a client of each provider; raises SettingsError for a secret that cannot be read."""
        made = {}
        for provider in self.loaded.settings.providers:
            known = SharedDocuments(self.pool, provider, self.clock)
            ca = str(self.loaded.folder / provider.ca) if provider.ca else None
            secret = self.loaded.secret(provider.secret_file)
            known.iam = made[provider.name] = IAM(provider, secret, known, self.clock, ca)
        return made

    def create_keys(self, vo: str, algorithms: Sequence[Algorithm], actor: str) -> list[Key]:
        """Make a signing key of each algorithm; they are active if the issuer had none, else standbys."""
        at_once = vo not in self.loaded.co_issuers  # verifiers keep the IAM's key set
        return keyring.create(self.pool, self.keystore, vo, algorithms, actor, at_once=at_once)

    def rotate_keys(self, vo: str, algorithms: Sequence[Algorithm], actor: str) -> list[Key]:
        """Let a standby of each algorithm sign, and make new standbys; return the keys that sign now.

        No algorithms mean those that sign, or all where none signs yet. Raises NoUsableKey.
        """
        with transaction(self.pool) as connection:
            ring = [k for k in read_keys(connection) if k.vo == vo]
        signing = {k.algorithm for k in ring if k.state == "active"} or {k.algorithm for k in ring}
        if not signing:
            raise NoUsableKey(
                f"issuer of VO {vo!r} has no active signing key; run: minter keys create --vo {vo}"
            )
        now, policy = self.clock(), self.engine.rotation
        made = [
            keyring.rotate(self.pool, vo, algorithm, now, policy, actor)
            for algorithm in algorithms or sorted(signing)
        ]
        self.maintain_keys(actor)
        return made

    def new_client(self, name: str, vo: str, **limits: Any) -> Client:
        """Return a new client with a `sub` of its own; raises UnknownClient for a wrong prefix."""
        prefix = self.engine.policy.prefixes.get(vo, "")
        client = Client(client_id=0, name=name, vo=vo, sub=f"{prefix}{new_uuid7()}", **limits)
        self.engine.policy.check_prefix(client)
        return client

    def ensure_standby(self, kid: str, actor: str) -> None:
        """Make a standby of the same issuer and algorithm for an active key that has none."""
        with transaction(self.pool) as connection:
            ring = read_keys(connection)
        active = next((k for k in ring if k.kid == kid and k.state == "active"), None)
        if active is None:
            return
        alike = [k for k in ring if (k.vo, k.algorithm) == (active.vo, active.algorithm)]
        if not any(k.state == "prepared" for k in alike):
            self.create_keys(active.vo, [active.algorithm], actor)

    def maintain(self, actor: str) -> list[str]:
        """Maintain partitions, redelivery counts, refresh families, managed tokens, processes and keys.

        Return what was done. Beat does this at its start and once an hour.
        """
        days, now = self.loaded.settings.database.retention_days, self.clock()
        done = [f"partition {name} made" for name in self.make_partitions()]
        if pruned := partitions.prune_suspects(self.pool):
            done.append(f"{pruned} redelivery counts removed")
        processes.forget(self.pool)
        counts.compact(self.pool)
        partitions.prune_ended(self.pool, days)
        partitions.prune_managed(self.pool, days, now)
        return done + [f"keys: {change}" for change in self.maintain_keys(actor)]

    def maintain_keys(self, actor: str) -> list[str]:
        """Make missing standbys, rotate due keys, destroy spent ones; return what was done (I6)."""
        done, now, policy = [], self.clock(), self.engine.rotation
        with transaction(self.pool) as connection:
            ring = read_keys(connection)
        for vo, issuer in self.loaded.settings.issuers.items():
            for change, algorithm in keys.due(ring, vo, issuer.algorithms, now, policy):
                try:
                    if change == "create":
                        (key,) = self.create_keys(vo, [algorithm], actor)
                        done.append(f"{vo}: {algorithm} key {key.kid} made, {key.state}")
                    else:
                        key = keyring.rotate(self.pool, vo, algorithm, now, policy, actor)
                        done.append(f"{vo}: {algorithm} key {key.kid} signs now")
                except NoUsableKey as error:  # one VO's or algorithm's trouble is not the others'
                    done.append(f"{vo}: failed, {error}")
        spent = keyring.destroy_spent(self.pool, now, policy, actor)
        return done + [f"private half of key {kid} destroyed" for kid in spent]

    def set_secret(self, client: Client, secret: str, actor: str, keep_old: timedelta = timedelta()) -> None:
        """Give a client a new secret; only its keyed hash is kept."""
        pepper = control_changes.secrets_key(self.pool, client.vo, self.keystore.seal_pepper(client.vo))
        hashed = self.keystore.hash_secret(client.vo, pepper, secret)
        control_changes.set_secret(self.pool, client.name, hashed, keep_old, actor)

    def make_partitions(self) -> list[str]:
        """Make the missing partitions; return their names."""
        return partitions.make_partitions(
            self.pool, self.clock().date(), self.loaded.settings.database.retention_days
        )

    def since(self, days: int | None = None, jti: UUID | None = None) -> datetime:
        """Return the start of the period that searches cover: `days` ago, by default the retention.

        A jti holds the time at which it was made, so a search by jti begins there if that is earlier.
        """
        start = self.clock() - timedelta(days=days or self.loaded.settings.database.retention_days)
        made = None if jti is None else instant_of(jti)
        return start if made is None else min(start, made - timedelta(seconds=1))


class _Masters(dict[str, MasterKey]):
    """Master keys by VO, read when a key of that VO is first opened."""

    def __init__(self, loaded: settings.Loaded) -> None:
        super().__init__()
        self._loaded = loaded

    def __contains__(self, vo: object) -> bool:
        return vo in self._loaded.settings.issuers

    def __missing__(self, vo: str) -> MasterKey:
        text, path = self._loaded.master_key_source(vo)
        master = self[vo] = read_master_key(vo, text=text, path=path)
        return master
