"""Fixtures of the integration tests."""

import threading
from collections.abc import Iterator

import pytest

from minter.local.fake_iam import FakeIAM
from minter.service import Service
from minter.tasks.lifecycle import Lifecycle


@pytest.fixture
def iam() -> Iterator[FakeIAM]:
    server = FakeIAM(0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def lifecycle(service: Service) -> Lifecycle:
    return Lifecycle(service.engine, service.store)
