"""The program behind `minter console`: one process, behind a proxy that ends TLS."""

import ipaddress
import logging
import os
from pathlib import Path
from typing import Any

from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels

from minter import alive, logs
from minter.console.app import application
from minter.console.pages import Pages
from minter.console.signin import SignIn
from minter.database.connection import open_pool
from minter.errors import SettingsError
from minter.heartbeats import Heartbeat
from minter.private_files import write_private_file
from minter.sections import ConsoleSettings
from minter.service import Service, load_settings
from minter.settings import Loaded

logger = logging.getLogger(__name__)

LINK = "MINTER_CONSOLE_LINK"
"""Variable that names a file for the one-time link, which is printed otherwise."""
THREADS = 4
CONNECT_SECONDS, PATIENCE_SECONDS = 2, 5.0
"""A page waits so long for Postgres at most: each wait holds one of the threads."""
HEADER_MILLISECONDS = 10_000


def base_of(console: ConsoleSettings) -> str:
    """Return the console's public URL."""
    host = f"[{console.listen}]" if ":" in console.listen else console.listen
    return console.url or f"http://{host}:{console.port}"


def check(console: ConsoleSettings) -> None:
    """Raise SettingsError if strangers could reach a console without OpenID Connect, or it is incomplete."""
    try:
        local = ipaddress.ip_address(console.listen).is_loopback
    except ValueError:
        local = console.listen == "localhost"
    if not console.oidc_issuer and not local:
        raise SettingsError(
            f"[console] listens at {console.listen} without oidc_issuer; sign-in by link is for loopback only"
        )
    if console.oidc_issuer and not (console.url and console.client_id and console.client_secret_file):
        raise SettingsError("[console] oidc_issuer needs url, client_id and client_secret_file, too")


def create() -> Any:
    """Return the application, with the settings that MINTER_SETTINGS names."""
    logs.configure(logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.WARNING)  # its lines have URLs with codes
    loaded = load_settings()
    console = loaded.settings.console
    secret = loaded.secret(console.client_secret_file) if console.client_secret_file else ""
    service = Service(loaded)
    service.pool = open_pool(loaded.dsn, THREADS, CONNECT_SECONDS, PATIENCE_SECONDS)
    pages, sign_in = Pages(service), SignIn(console, secret, loaded.folder)
    pages.overview.start()
    Heartbeat("console", pages.service).start()
    if sign_in.iam is None:
        _tell(sign_in.link(base_of(console)))
    alive.ready()
    return application(pages, sign_in, base_of(console))


def _tell(link: str) -> None:
    """Write the link to the file that LINK names, else to standard output, for the person at the terminal."""
    path = os.environ.get(LINK)
    if path:
        Path(path).unlink(missing_ok=True)  # of an earlier start
        write_private_file(Path(path), link)
    else:
        print(f"The console, once: {link}", flush=True)  # noqa: T201 - for the person who started it


def run(loaded: Loaded) -> None:
    """Serve until SIGTERM or SIGINT. Raises SettingsError."""
    console = loaded.settings.console
    check(console)
    Granian(
        "minter.console.server:create",
        address=console.listen,
        port=console.port,
        interface=Interfaces.WSGI,
        factory=True,
        workers=1,  # sessions are in its memory
        blocking_threads=THREADS,
        http=HTTPModes.http1,
        websockets=False,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_MILLISECONDS),
        log_level=LogLevels.warning,
        log_access=False,
        respawn_failed_workers=True,
        workers_kill_timeout=10,
    ).serve()
