"""Minter on the cluster of docs/cluster.md: what dies is replaced, and nothing is lost. `make cluster` does more."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.__main__ import Campaign
from tests.cluster.cluster import Cluster
from tests.cluster.faults import Faults, start_load
from tests.cluster.machines import missing, need_machines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_machines(missing())
    # The servers' users pass this folder, and pytest's are its own user's only.
    folder = Path(tempfile.mkdtemp(prefix="minter-cluster-", dir="/var/tmp"))
    with Cluster(folder) as made:
        yield made
    shutil.rmtree(folder)


@pytest.mark.timeout(600)
def test_what_dies_is_replaced_and_nothing_is_lost(cluster: Cluster) -> None:
    book = cluster.folder / "book"
    campaign = Campaign(cluster, Faults(cluster, seed=1), book)
    start_load(cluster, book, seed=1)
    for kind in ("primary's Postgres killed", "broker node killed", "process of Minter killed", "switchover"):
        campaign.strike(kind)
    counted = campaign.audit()
    assert counted["tokens"] > 100
    assert counted["repeats"] > 0


def test_status_names_what_is_down(cluster: Cluster) -> None:
    whole = cluster.minter("status", "--json", check=False).stdout
    assert "all 3 nodes answer" in whole
    assert "one of them acts" in whole
    cluster.machines["db2"].kill("rabbitmq")
    assert (
        "1 of 3 nodes do not answer: db2.example.org"
        in cluster.minter("status", "--json", check=False).stdout
    )
    cluster.machines["db2"].restart_dead()
    cluster.wait("three nodes", cluster.whole)
