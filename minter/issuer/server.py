"""The program behind `minter serve`: `run` starts the processes, and each of them calls `create`."""

import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from granian import Granian
from granian.constants import HTTPModes, Interfaces, Loops, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels

from minter import alive, logs
from minter.errors import SettingsError
from minter.issuer import app as web
from minter.issuer import oauth, tasks
from minter.metrics import Metrics, serve_process
from minter.sections import HttpSettings
from minter.service import Service, load_settings, tune_gc
from minter.settings import Loaded

MAX_HEADER_BYTES = 64 * 1024
CONNECTIONS = 4_096


def create() -> Callable[..., Awaitable[None]]:
    """Return the application of one process, with the settings that MINTER_SETTINGS names.

    Falcon refuses HTTP/1.0, which HAProxy's health checks and `ab` speak; granian closes such connections.
    """
    logs.configure(logging.INFO)
    loaded = load_settings()
    metrics = Metrics()
    service = Service(loaded, metrics.observe)
    service.prepare()
    made = web.Web(service, metrics)
    made.look()
    app = web.application(made)
    tasks.add_routes(app, made)
    oauth.add_routes(app, made)
    tune_gc()
    serve_process(metrics.registry, loaded.settings.metrics, "serve")
    made.heartbeat.start()
    alive.ready()

    async def served(scope: dict[str, Any], receive: Any, sent: Any) -> None:
        if scope.get("http_version") in ("1", "1.0"):
            scope = {**scope, "http_version": "1.1"}
        await app(scope, receive, sent)

    return served


def _check_port(http: HttpSettings) -> None:
    """Raise SettingsError if another program has the port: with SO_REUSEPORT, it would get half the calls."""
    try:
        (family, kind, *_, address), *_ = socket.getaddrinfo(
            http.listen, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SettingsError(f"[http] cannot listen at {http.listen}:{http.port}: {error.strerror}") from None


def run(loaded: Loaded) -> None:
    """Serve until SIGTERM or SIGINT; a process that dies is replaced. Raises SettingsError."""
    http = loaded.settings.http
    _check_port(http)

    def file(name: str) -> Path | None:
        return loaded.folder / name if name else None

    Granian(
        "minter.issuer.server:create",
        address=http.listen,
        port=http.port,
        interface=Interfaces.ASGI,
        factory=True,
        workers=http.processes,
        loop=Loops.uvloop,
        http=HTTPModes.http1,
        websockets=False,
        http1_settings=HTTP1Settings(
            header_read_timeout=round(http.header_seconds * 1000), max_buffer_size=MAX_HEADER_BYTES
        ),
        backpressure=CONNECTIONS,
        ssl_cert=file(http.certificate),
        ssl_key=file(http.key),
        ssl_protocol_min=SSLProtocols.tls12,  # for davix and libcurl in the releases that sites use
        log_level=LogLevels.warning,
        log_access=False,
        respawn_failed_workers=True,
        workers_kill_timeout=10,
    ).serve()
