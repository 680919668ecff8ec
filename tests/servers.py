"""Real servers for tests and benchmarks: Debian's RabbitMQ and XRootD, run on free ports."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import kombu
import pytest

from minter.local.servers import Server

PROGRAMS = Path("/usr/lib/rabbitmq/bin")


def installed() -> bool:
    return (PROGRAMS / "rabbitmq-server").exists()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def lacking(reason: str) -> NoReturn:
    """Skip the test, for something that is not installed; in CI, where all of it is, the test fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def certificates(folder: Path, names: Sequence[str] = ("localhost",)) -> Path:
    """Make a CA and a certificate for these names (host.pem, host.key); return the CA's file."""
    extension = folder / "extension"
    extension.write_text(f"subjectAltName={','.join(f'DNS:{name}' for name in names)}\n")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for command in (
        ["req", "-x509", *new, "-days", "2", "-subj", "/CN=test CA", "-keyout", "ca.key", "-out", "ca.pem"],
        ["req", *new, "-subj", "/CN=localhost", "-keyout", "host.key", "-out", "host.csr"],
        ["x509", "-req", "-in", "host.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
         "-extfile", "extension", "-out", "host.pem"],
    ):  # fmt: skip
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
    return folder / "ca.pem"


class RabbitMQ(Server):
    """One node with its own epmd; `ctl` is a rabbitmqctl for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self._dist, self._epmd = free_ports(3)
        self.tls_port, self.stomp_port = free_ports(2)
        self.ca = certificates(folder)
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nlisteners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
            f"ssl_options.cacertfile = {self.ca}\nssl_options.certfile = {folder}/host.pem\n"
            f"ssl_options.keyfile = {folder}/host.key\nvm_memory_high_watermark.absolute = 2GB\n"
            "disk_free_limit.absolute = 50MB\nlog.file.level = warning\n"
        )
        with (folder / "rabbitmq.conf").open("a") as conf:
            conf.write(f"stomp.listeners.tcp.1 = 127.0.0.1:{self.stomp_port}\n")
        (folder / "plugins").write_text("[rabbitmq_stomp].")
        self.environ = {
            **os.environ,
            "HOME": str(folder),
            "RABBITMQ_NODENAME": f"minter{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} -setcookie minter",
            "RABBITMQ_SERVER_ERL_ARGS": "+S 2:2 +sbwt none",
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        self.ctl = folder / "rabbitmqctl"
        exports = "\n".join(
            f"export {k}={shlex.quote(v)}"
            for k, v in self.environ.items()
            if k.startswith(("RABBIT", "ERL", "HOME"))
        )
        self.ctl.write_text(
            f'#!/bin/sh\n{exports}\nexec {PROGRAMS}/rabbitmqctl --erlang-cookie minter "$@"\n'
        )
        self.ctl.chmod(0o755)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAMS / "rabbitmq-server"], cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip
        self.wait()

    def ready(self) -> bool:
        try:
            with kombu.Connection(self.url, connect_timeout=1) as connection:
                connection.connect()
                return True
        except OSError:
            return False

    def kill(self) -> None:
        """kill -9 of the node (the script's exec makes it our child's group)."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        time.sleep(0.1)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        subprocess.run(
            ["epmd", "-port", str(self._epmd), "-kill"], env=self.environ, capture_output=True, check=False
        )
        shutil.rmtree(self.sockets, ignore_errors=True)


class XRootD(Server):
    """Debian's XRootD over HTTPS with the output of `site-config`, and with third-party copies enabled.

    XRootD refuses to run as root, and its key must belong to its user. libscitokens reads only the system's
    CA file, so the test's CA is mounted over that file where only this process sees it.
    """

    def __init__(self, folder: Path, port: int, ca: Path) -> None:
        super().__init__(folder)
        self.port = port
        self.ca = ca
        self.files = folder / "data"

    @staticmethod
    def need() -> None:
        """Skip the test where XRootD is not installed; in CI it fails."""
        if shutil.which("xrootd") is None:
            lacking("XRootD is not installed (apt-get install xrootd-server xrootd-scitokens-plugins)")

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def configure(self, fragment: str) -> None:
        """Write the configuration: the parts that any server needs, and the fragment for the site."""
        for name in ("run", "data", "cache"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        head, _, rest = fragment.partition("# /etc/xrootd/scitokens.cfg\n")
        tokens, _, server = rest.partition("# in the server's configuration")
        assert head
        assert server
        (self.folder / "scitokens.cfg").write_text(tokens)
        lines = server.partition("\n")[2].replace("/etc/xrootd/scitokens.cfg", f"{self.folder}/scitokens.cfg")
        lines = lines.replace("/etc/pki/tls/certs/ca-bundle.crt", str(self.ca))
        assert f"xrd.tlsca certfile {self.ca}\n" in lines
        pki = self.ca.parent
        for name in ("host.pem", "host.key"):
            (self.folder / name).write_bytes((pki / name).read_bytes())
        (self.folder / "bundle.pem").write_bytes(
            Path("/etc/ssl/certs/ca-certificates.crt").read_bytes() + self.ca.read_bytes()
        )
        (self.folder / "xrootd.cfg").write_text(
            f"all.adminpath {self.folder}/run\nall.pidpath {self.folder}/run\nall.export /\n"
            f"oss.localroot {self.files}\nxrd.port {self.port}\n"
            f"xrd.tls {self.folder}/host.pem {self.folder}/host.key\n"
            f"xrd.protocol http:{self.port} libXrdHttp.so\nhttp.exthandler xrdtpc libXrdHttpTPC.so\n"
            f"http.desthttps yes\ntpc.allow local\nxrootd.chksum max 2 adler32 md5\nscitokens.trace all\n{lines}"
        )

    def start(self) -> None:
        for parent in (self.folder, *self.folder.parents):
            if parent.owner() == "root" and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(0o755)  # the server reads its files as another user
        subprocess.run(["chown", "-R", "xrootd:", self.folder], check=True)
        (self.folder / "host.key").chmod(0o400)
        script = (
            'mount --bind "$1/bundle.pem" /etc/ssl/certs/ca-certificates.crt && exec env XDG_CACHE_HOME="$1/cache" '
            'setpriv --reuid xrootd --regid xrootd --clear-groups xrootd -c "$1/xrootd.cfg" -l "$1/xrootd.log"'
        )
        self.spawn(["unshare", "--mount", "sh", "-c", script, "sh", self.folder])
        self.wait()

    def ready(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class Nginx(Server):
    """nginx over TLS with a configuration of the test's own, as an unprivileged process in its folder."""

    def __init__(self, folder: Path, port: int, pki: Path, locations: str) -> None:
        super().__init__(folder)
        self.port = port
        for name in ("logs", "temp"):
            (folder / name).mkdir(parents=True)
        temporary = "".join(
            f"{name}_temp_path {folder}/temp;"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; pid {folder}/nginx.pid; error_log {folder}/logs/error.log; events {{}}\n"
            f"http {{ {temporary} access_log off;\n"
            f"server {{ listen 127.0.0.1:{port} ssl; listen [::1]:{port} ssl; server_name localhost;\n"
            f"ssl_certificate {pki}/host.pem; ssl_certificate_key {pki}/host.key;\n{locations}\n}} }}\n"
        )

    @staticmethod
    def need() -> None:
        """Skip the test where nginx is not installed; in CI it fails."""
        if shutil.which("nginx") is None:
            lacking("nginx is not installed (apt-get install nginx-light)")

    def start(self) -> None:
        self.spawn(["nginx", "-p", self.folder, "-c", self.folder / "nginx.conf", "-g", "user root;"])
        self.wait()

    def ready(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
