"""A service with several addresses, one of which belongs to a machine that vanished."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from minter.client import FileRequest, MinterClient, new_request_id


class Answering(BaseHTTPRequestHandler):
    """Answers every request with an empty answer."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"request_id": str(REQUEST)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


REQUEST = new_request_id()


def test_an_address_that_does_not_answer_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    both = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with socket.socket() as silent, socket.socket() as waiting:
        silent.bind(("127.0.0.2", port))
        silent.listen(0)
        waiting.connect(("127.0.0.2", port))  # from now on the kernel answers no other
        with MinterClient(f"http://localhost:{port}/alpen/", "rucio", "secret", timeout_seconds=9) as client:
            assert not client.mint([FileRequest(sources=("davs://a/b",))], request_id=REQUEST).tokens
    server.shutdown()
    server.server_close()
