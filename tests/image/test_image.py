"""The container image is built, and issues a token: `make image` (root, debootstrap and buildah; some three minutes).

No registry of images is needed: the base is made by debootstrap. What Containerfile names by default was not tried.
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

from minter.local.servers import Postgres
from tests.conftest import ROOT
from tests.servers import free_ports

USER = 10001
SETTINGS = """
[issuers.vo]
iss = "https://tokens.example.org/vo/"
[http]
port = {port}
[[storages]]
vo = "vo"
name = "SE"
dialect = "dcache"
base_path = "/data"
endpoints = [{{ host = "se.example.org", prefix = "/data/vo" }}]
"""


class ReachablePostgres(Postgres):
    """Postgres on a port: another user may not enter the folder of the socket."""

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        super().__init__(folder, settings=["listen_addresses=127.0.0.1", f"port={self.port}"])

    @property
    def dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=minter dbname=postgres"


class Image:
    """The image, in a store of its own, and a container of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = folder / "settings.toml"
        self.settings.touch()
        self.container = ""
        root, run = str(folder / "root"), str(folder / "run")
        self.program = ["buildah", "--root", root, "--runroot", run, "--storage-driver", "vfs"]
        self.environ: dict[str, str] = {}

    def buildah(self, *words: str | Path) -> str:
        done = subprocess.run([*self.program, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def build(self) -> None:
        base = self.folder / "base"
        subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", base],
            check=True, capture_output=True,
        )  # fmt: skip
        subprocess.run(["tar", "-C", base, "-cf", self.folder / "base.tar", "."], check=True)
        (self.folder / "Base").write_text("FROM scratch\nADD base.tar /\n")
        self.buildah(
            "build", "--isolation", "chroot", "-q", "-t", "base", "-f", self.folder / "Base", self.folder
        )
        # How this machine reaches its package index.
        pip = [word for name in os.environ if name.startswith("PIP_") for word in ("--env", name)]
        mounts = ["-v", "/etc/ssl/certs:/etc/ssl/certs:ro"]
        if wheels := os.environ.get("PIP_FIND_LINKS", ""):
            mounts += ["-v", f"{wheels}:{wheels}:ro"]
        options = ["--build-arg", "BASE=localhost/base", *mounts, *pip, "--format", "docker"]
        build = ("build", "--isolation", "chroot", "-q", *options)
        self.buildah(*build, "-t", "minter", "-f", "deploy/container/Containerfile", ".")
        self.container = self.buildah("from", "localhost/minter")

    @property
    def mounted(self) -> Path:
        return Path(self.buildah("mount", self.container))

    def command(self, *words: str) -> list[str]:
        environ = [word for name, value in self.environ.items() for word in ("--env", f"{name}={value}")]
        mount = ["-v", f"{self.settings}:/etc/minter/settings.toml:ro"]
        run = [*self.program, "run", "--isolation", "chroot"]
        return [*run, *mount, *environ, self.container, "--", *words]

    def minter(self, *words: str) -> str:
        done = subprocess.run(self.command("minter", *words), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    for program in ("debootstrap", "buildah"):
        assert shutil.which(program), f"{program} is not installed"
    assert os.geteuid() == 0, "chroots need root"
    made = Image(tmp_path_factory.mktemp("image"))
    made.build()
    yield made
    made.buildah("rm", "--all")
    made.buildah("rmi", "--all", "--force")


def test_the_image_is_small_and_runs_as_a_user_without_rights(image: Image) -> None:
    told = json.loads(image.buildah("inspect", "--type", "image", "localhost/minter"))
    config: dict[str, Any] = told["Docker"]["config"]
    assert config["User"] == str(USER)
    assert config["Healthcheck"]["Test"][-1].endswith("timeout=4)")
    layer = image.mounted / "opt/minter"
    size = sum(f.lstat().st_size for f in layer.rglob("*") if f.is_file())
    assert size < 250 * 2**20
    assert not list(layer.rglob("pip/__init__.py"))
    who = subprocess.run(image.command("id", "-u"), capture_output=True, text=True, check=True)
    assert who.stdout.strip() == str(USER)


def test_a_container_issues_a_token(image: Image, tmp_path: Path) -> None:
    postgres = ReachablePostgres(tmp_path / "postgres")
    postgres.start()
    (port,) = free_ports(1)
    image.settings.write_text(SETTINGS.format(port=port))
    image.settings.chmod(0o644)
    image.environ = {
        "MINTER_DSN": postgres.dsn,
        "MINTER_MASTER_KEY_VO": image.minter("keys", "master").strip(),
    }
    image.minter("db", "upgrade")
    image.minter("keys", "create", "--vo", "vo")
    image.minter("clients", "add", "rucio", "--vo", "vo", "--secret-file", "/var/lib/minter/secret")
    secret = (image.mounted / "var/lib/minter/secret").read_text().strip()
    served = subprocess.Popen(image.command("minter", "serve"), start_new_session=True)
    try:
        wait(port, served)
        form = urllib.parse.urlencode({
            "grant_type": "client_credentials", "scope": "storage.read:/vo/a", "audience": "https://se.example.org",
        })  # fmt: skip
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/vo/token", form.encode())
        asked.add_header("Authorization", "Basic " + b64encode(f"rucio:{secret}".encode()).decode())
        with urllib.request.urlopen(asked, timeout=10) as answer:
            token = json.load(answer)["access_token"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/vo/jwks.json", timeout=10) as answer:
            keys = jwt.PyJWKSet.from_dict(json.load(answer))
        key = keys[jwt.get_unverified_header(token)["kid"]]
        assert jwt.decode(token, key, audience="https://se.example.org")["scope"] == "storage.read:/vo/a"
    finally:
        os.killpg(served.pid, signal.SIGTERM)
        served.wait(30)
        postgres.stop()


def wait(port: int, served: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert served.poll() is None
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
        finally:
            connection.close()
    raise AssertionError("the container is not ready")
