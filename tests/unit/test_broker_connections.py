"""Broker URLs of one node and of a cluster."""

import socket

import kombu
import pytest
import redis
from amqp import exceptions

from minter.broker.connections import connect, nodes, user, vhost
from minter.broker.publisher import Publisher
from minter.errors import SettingsError
from tests.conftest import load_settings
from workers import app

CLUSTER = "amqps://minter:pw@a.example.org:5671/vo%2Falpen; amqps://minter:pw@b.example.org:5672/vo%2Falpen"


def test_a_cluster_has_one_user_and_one_virtual_host() -> None:
    assert len(nodes(CLUSTER)) == 2
    assert (user(CLUSTER), vhost(CLUSTER)) == ("minter", "vo/alpen")
    assert (user(""), vhost("")) == ("", "/")


@pytest.mark.parametrize(
    "other",
    [
        "amqp://minter:pw@b/vo",
        "amqps://dirac:pw@b/vo",
        "amqps://minter:other@b/vo",
        "amqps://minter:pw@b/other",
    ],
)
def test_nodes_of_two_clusters_are_refused_without_showing_a_password(other: str) -> None:
    with pytest.raises(SettingsError, match="one cluster") as caught:
        connect(f"amqps://minter:pw@a/vo;{other}")
    assert "pw" not in str(caught.value)


def test_each_node_is_verified_by_its_own_name() -> None:
    with connect(CLUSTER, "/ca.pem") as connection:
        assert connection.ssl["server_hostname"] == "a.example.org"
        for name in ("b.example.org", "a.example.org"):
            connection.maybe_switch_next()
            assert connection.ssl["server_hostname"] == connection.hostname == name
            assert connection.ssl["context"] == {"cafile": "/ca.pem", "check_hostname": True}
        with connection.clone() as copy:
            copy.maybe_switch_next()
            assert copy.ssl["server_hostname"] == copy.hostname == "b.example.org"


def test_workers_and_beat_get_the_nodes_as_they_are_meant() -> None:
    """Celery reads the URL by itself: a space in it must not become a host named by a password."""
    made = app.create_app(load_settings("", MINTER_BROKER_URL=CLUSTER + "; "))
    with made.connection_for_write() as connection:
        assert len(connection.alt) == 2
        for name in ("b.example.org", "a.example.org"):
            connection.maybe_switch_next()
            assert (connection.hostname, connection.userid) == (name, "minter")
            assert connection.virtual_host == "vo/alpen"


@pytest.mark.parametrize(
    ("url", "error", "away"),
    [
        ("amqp://", ConnectionResetError(), True),
        ("amqp://", exceptions.ConnectionForced(), True),
        ("amqp://", exceptions.InternalError(), True),
        ("amqp://", exceptions.FrameSyntaxError(), False),
        ("amqp://", exceptions.PreconditionFailed(), False),
        ("redis://", redis.ConnectionError(), True),
        ("redis://", redis.TimeoutError(), True),
        ("redis://", redis.ResponseError(), False),
        ("redis://", KeyError(), False),
    ],
)
def test_a_broker_that_is_away_is_told_from_one_that_refuses(url: str, error: Exception, away: bool) -> None:
    publisher = Publisher(kombu.Connection(url))
    assert isinstance(error, publisher.errors)
    assert publisher.is_away(error) == away


def test_dead_nodes_are_passed_over() -> None:
    with socket.socket() as dead, socket.socket() as dead_too, socket.socket() as other:
        for one in (dead, dead_too, other):
            one.bind(("127.0.0.1", 0))
        other.listen()
        other.settimeout(5)
        ports = [s.getsockname()[1] for s in (dead, dead_too, other)]
        url = ";".join(f"amqp://minter:pw@127.0.0.1:{port}//" for port in ports)
        with connect(url, seconds=0.5) as connection, pytest.raises(OSError, match=r"."):
            connection.connect()  # nobody answers there in AMQP
        accepted, _ = other.accept()
        accepted.close()
