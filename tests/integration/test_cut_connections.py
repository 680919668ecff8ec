"""The connection to Postgres is cut at any byte of a batch: by a failover, by PgBouncer, by HAProxy."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from minter.database.connection import open_pool, transaction
from minter.errors import Unavailable
from minter.service import Service
from tests.conftest import load_settings
from tests.integration.test_mint import mint, submission, tokens

FATAL = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
CRASHED = b"SFATAL\0VFATAL\0C08P01\0Mserver conn crashed?\0\0"
"""PgBouncer hands over the server's last word, and adds this one: psycopg takes them for two results."""
STEPS = 24


class Cutter:
    """A relay before Postgres, which ends the connection when the client has sent a number of bytes."""

    def __init__(self, folder: Path, target: str) -> None:
        self.target = target
        self.most = -1
        self.goodbyes: tuple[bytes, ...] = ()
        self.sent = 0
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / ".s.PGSQL.5432"))
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.target)
            self.sent = 0
            threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        back = threading.Thread(target=self._back, args=(server, client), daemon=True)
        back.start()
        with client, server:
            self._there(client, server)
            for end in (server, client):
                with suppress(OSError):  # the other side was faster
                    end.shutdown(socket.SHUT_RDWR)
            back.join()

    def _there(self, client: socket.socket, server: socket.socket) -> None:
        while data := client.recv(65536):
            left = self.most - self.sent if self.most >= 0 else len(data)
            server.sendall(data[:left])
            self.sent += len(data[:left])
            if 0 <= self.most <= self.sent:
                client.sendall(b"".join(b"E" + struct.pack("!i", 4 + len(g)) + g for g in self.goodbyes))
                return

    @staticmethod
    def _back(server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):  # the relay cut it
            while data := server.recv(65536):
                client.sendall(data)


@pytest.fixture
def cutter(dsn: str, tmp_path: Path) -> Iterator[tuple[Cutter, Service]]:
    info = psycopg.conninfo.conninfo_to_dict(dsn)
    made = Cutter(tmp_path, f"{info['host']}/.s.PGSQL.{info.get('port', 5432)}")
    service = Service(load_settings(psycopg.conninfo.make_conninfo(dsn, host=str(tmp_path), port=5432)))
    yield made, service
    service.pool.dispose()
    made.listener.close()


def test_a_cut_of_the_first_connection_is_a_temporary_failure(cutter: tuple[Cutter, Service]) -> None:
    relay, service = cutter
    relay.goodbyes = (FATAL,)
    for most in range(80, 1400, 60):
        fresh = open_pool(service.loaded.dsn)
        relay.most = most
        try:
            with transaction(fresh) as connection:
                connection.execute("SELECT 1")
        except Unavailable:
            continue
        finally:
            relay.most = -1
            fresh.dispose()
        break
    else:
        raise AssertionError("no connection had its first answer")
    assert most > 80


@pytest.mark.parametrize("goodbyes", [(), (FATAL,), (FATAL, CRASHED)], ids=["silent", "one word", "two"])
def test_a_cut_at_any_byte_is_a_temporary_failure(
    cutter: tuple[Cutter, Service], goodbyes: tuple[bytes, ...]
) -> None:
    relay, service = cutter
    mint(service, submission("warm"))
    before = relay.sent
    mint(service, submission("measured"))
    length = relay.sent - before
    failed = 0
    for step in range(STEPS):
        asked = submission(f"cut-{step}")
        service.pool.dispose()
        relay.most = -1
        mint(service, submission(f"fresh-{step}"))  # a new connection
        relay.goodbyes, relay.most = goodbyes, relay.sent + 1 + step * length // STEPS
        try:
            cut = tokens(mint(service, asked)[0])
        except Unavailable:
            failed += 1
            cut = None
        relay.most = -1
        again = tokens(mint(service, asked)[0])
        assert cut in (None, again)
        assert again
    assert failed > STEPS // 2
