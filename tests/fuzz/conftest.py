"""The fixtures of the acceptance tests that fuzz tests use."""

from tests.acceptance.conftest import broker, database_dsn, running

__all__ = ["broker", "database_dsn", "running"]
