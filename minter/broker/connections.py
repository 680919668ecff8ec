"""Connections to the broker, which may be several nodes of one cluster.

A broker URL names a node; a cluster's URLs are joined by semicolons. A connection goes to the first node that
answers; after its loss, that node is tried first.
"""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import kombu
from amqp.exceptions import AMQPError

from minter.errors import SettingsError, Unavailable
from minter.keepalive import TCP_OPTIONS

WRITE_SECONDS = 10
"""A write to the broker fails if it makes no progress for so long: a blocked RabbitMQ reads nothing."""
END_SECONDS = 1.0
"""How long the broker's goodbye is waited for."""
TRANSPORT_OPTIONS: dict[str, Any] = {"write_timeout": WRITE_SECONDS, "socket_settings": TCP_OPTIONS}
"""Options of every connection to RabbitMQ. py-amqp by itself takes a bad line of one second for a loss."""


class Connection(kombu.Connection):  # type: ignore[misc] # kombu has no types
    """A connection that verifies each node of a cluster by the name in that node's URL."""

    ssl: Any
    alt: list[str]

    def switch(self, conn_str: str) -> None:
        """Take the next node for the next attempt to connect."""
        super().switch(conn_str)
        if isinstance(self.ssl, dict):
            self.ssl = {**self.ssl, "server_hostname": self.hostname}

    def _ensure_connection(self, *arguments: Any, **named: Any) -> Any:
        """Connect; where kombu tries twice whatever the number of nodes, try each node once."""
        if named.get("max_retries") == 1:
            named["max_retries"] = max(0, len(self.alt) - 1)
        return super()._ensure_connection(*arguments, **named)


def nodes(broker_url: str) -> list[str]:
    """Return the URL of each node; raises SettingsError if they differ in more than host and port."""
    urls = [url.strip() for url in broker_url.split(";") if url.strip()]
    same = {(p.scheme, p.username, p.password, p.path, p.query) for p in map(urlsplit, urls)}
    if len(same) > 1:
        raise SettingsError(
            "the broker's URLs differ in more than host and port, expected the nodes of one cluster"
        )
    return urls


def _first(broker_url: str) -> SplitResult:
    """Return the parts of the first node's URL, which all nodes share but for host and port."""
    return urlsplit(next(iter(nodes(broker_url)), ""))


def user(broker_url: str) -> str:
    """Return the AMQP user of a broker URL, empty if it names none."""
    return unquote(_first(broker_url).username or "")


def vhost(broker_url: str) -> str:
    """Return the virtual host of a broker URL."""
    return unquote(_first(broker_url).path[1:]) or "/"


def trust(ca: str | None) -> dict[str, Any]:
    """Return the CAs for `ssl.create_default_context`: a file, a hashed directory, or the system's."""
    return {} if not ca else {"capath": ca} if Path(ca).is_dir() else {"cafile": ca}


def tls(broker_url: str, ca: str | None = None) -> dict[str, Any] | bool:
    """Return kombu's `ssl` option; the certificate of an amqps broker is always verified.

    By default kombu accepts any certificate. `ca` is a file or a hashed directory; None means the
    system's CAs.
    """
    first = _first(broker_url)
    if first.scheme != "amqps":
        return False
    return {"context": {**trust(ca), "check_hostname": True}, "server_hostname": first.hostname or ""}


def connect(broker_url: str, ca: str | None = None, seconds: float = 5.0) -> kombu.Connection:
    """Return a connection to the broker, which opens at first use, within `seconds` for each node."""
    return Connection(
        ";".join(nodes(broker_url)),
        ssl=tls(broker_url, ca),
        connect_timeout=seconds,
        transport_options=TRANSPORT_OPTIONS,
    )


_REFUSALS = {403, 404, 405, 406, 530}
"""Reply codes (AMQP 0-9-1 §1.2) with which RabbitMQ refuses what was asked; 320 is its goodbye."""


@contextmanager
def opened(connection: kombu.Connection) -> Iterator[kombu.Connection]:
    """Open a connection, which ends with the block; raises Unavailable with why the broker cannot be used.

    A refused login or virtual host is told apart from a broker that cannot be reached.
    """
    try:
        connection.connect()
        yield connection
    except (AMQPError, *connection.connection_errors, *connection.channel_errors) as error:
        raise Unavailable(cause(error)) from error
    finally:
        end(connection)


def cause(error: Exception) -> str:
    """Say why the broker cannot be used, in its own words where it gave some."""
    if isinstance(error, AMQPError) and error.method_sig and error.reply_code in _REFUSALS:
        return f"the broker refuses: {error.reply_text}"[:300]
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not accepted: {error.verify_message}"
    return f"the broker cannot be reached: {error or type(error).__name__}"[:300]


def end(connection: kombu.Connection) -> None:
    """Close a connection; a blocked RabbitMQ says no goodbye, which is not waited for."""
    if connection.connected:
        transport = getattr(connection.connection, "transport", None)  # AMQP's only
        if transport is not None:
            transport.sock.settimeout(END_SECONDS)
    connection.release()
