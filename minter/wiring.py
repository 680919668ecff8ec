"""Entry points wire here: settings in, the engine with its adapters out."""

import gc
import os
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import uuid_utils

from minter import catalogue, database, housekeeping, settings
from minter.errors import SettingsError
from minter.keystore import Keystore, MasterKey, read_master_key
from minter.mint import Engine, Observed

_GC_ALLOCATIONS = 20_000


def now() -> datetime:
    """Return the time: the one clock of all entry points."""
    return datetime.now(UTC)


def new_uuid7() -> uuid.UUID:
    """Return a fresh UUIDv7 (RFC 9562 §5.7)."""
    return uuid.UUID(int=uuid_utils.uuid7().int)


def calm_collector() -> None:
    """Keep the garbage collector from walking what lives as long as the process: settings, modules."""
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
        clock: Callable[[], datetime] = now,
    ) -> None:
        if not loaded.dsn:
            raise SettingsError("no DSN: set MINTER_DSN or database.dsn")
        self.loaded = loaded
        self.clock = clock
        self.pool = database.pool(loaded.dsn, loaded.settings.database.pool_size)
        self.keystore = Keystore(
            _Masters(loaded), lambda key_id: database.read_private_key(self.pool, key_id)
        )
        self.engine = Engine(
            database.Store(self.pool, clock),
            loaded.policy,
            self.keystore.unlock,
            new_uuid7,
            observe,
            rotation=loaded.settings.rotation,
            retention_seconds=loaded.settings.database.retention_days * 86400,
        )

    def prepare(self) -> None:
        """Bring settings into rows and make partitions: at start, and by beat ever after."""
        catalogue.sync_catalogue(self.pool, self.loaded.issuers, self.loaded.catalogue())
        self.make_partitions()

    def make_partitions(self) -> list[str]:
        """Make the missing partitions; return their names."""
        return housekeeping.make_partitions(
            self.pool, self.clock().date(), self.loaded.settings.database.retention_days
        )

    def since(self, days: int | None = None) -> datetime:
        """Return the start of the time that searches look at: the retention by default."""
        return self.clock() - timedelta(days=days or self.loaded.settings.database.retention_days)


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
