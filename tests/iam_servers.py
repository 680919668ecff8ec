"""Third-party authorization servers for the tests: Keycloak and npm oidc-provider.

The tests start both on free ports and stop them by process id. Tests of a server that cannot be installed are
skipped, and pytest counts them.
"""

import os
import shutil
import subprocess
import threading
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from minter.local.fake_iam import FakeIAM
from minter.local.servers import Server
from tests.conftest import ROOT
from tests.servers import free_ports

KEYCLOAK = "26.7.3"
_ARTIFACT = f"org/keycloak/keycloak-quarkus-dist/{KEYCLOAK}/keycloak-quarkus-dist-{KEYCLOAK}.zip"
_JAVA = ["-Xms64m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
_FACTORY = "io.quarkus.bootstrap.forkjoin.QuarkusForkJoinWorkerThreadFactory"
_KEYS = "org.keycloak.keys.KeyProvider"
_OFF = "identity-brokering-api,twitter-broker,workflows,organization,kerberos,ciba,device-flow,impersonation"


class Fake:
    """The fake IAM with the interface of the other servers; `server.behaviour` says how it fails."""

    dialect = "generic"

    def __init__(self, _folder: Path | None = None) -> None:
        self.server = FakeIAM(0)
        self.issuer = self.server.issuer

    def start(self) -> None:
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def subject(self, scope: str, client: str = "minter") -> str:
        """Return a token of Rucio's that names the client that may act with it."""
        claims = {"sub": "rucio", "client_id": "rucio", "aud": client, "scope": scope}
        return self.server.sign(claims)


class OidcProvider(Server):
    """npm oidc-provider with tests/providers/oidc-provider/server.js; `requests` is the server's log."""

    dialect = "generic"  # its server.js accepts `audience`, too, and names that are not URIs

    def __init__(self, folder: Path, **environ: str) -> None:
        super().__init__(folder)
        self.environ = {**os.environ, **environ}
        (self.port,) = free_ports(1)
        self.issuer = f"http://127.0.0.1:{self.port}"
        self.requests = folder / "requests.jsonl"

    def start(self) -> None:
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed, so oidc-provider cannot be had")
        program = self.folder / "program"
        shutil.copytree(ROOT / "tests/providers/oidc-provider", program, dirs_exist_ok=True)
        quiet = ["--silent", "--no-audit", "--no-fund"]
        subprocess.run(["npm", "ci", *quiet], cwd=program, check=True, capture_output=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["node", "server.js", str(self.port), str(self.requests)],
                cwd=program, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.wait()

    def ready(self) -> bool:
        return _answers(f"{self.issuer}/jwks")

    def subject(self, scope: str, client: str = "minter") -> str:
        """Return a token of Rucio's that names the client that may act with it."""
        form = {"grant_type": "client_credentials", "scope": scope, "audience": client}
        answer = httpx.post(f"{self.issuer}/token", data=form, auth=("rucio", "rucio-secret"))
        token: str = answer.json()["access_token"]
        return token


class Keycloak(Server):
    """Keycloak with the realm of tests/providers/keycloak, on an H2 database in its folder."""

    start_seconds = 90.0

    def __init__(self, folder: Path, public: str = "") -> None:
        super().__init__(folder)
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}/realms/vo"
        self.public = public or f"http://127.0.0.1:{self.port}"
        self.issuer = f"{self.public}/realms/vo"
        self.home = _keycloak()

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.home / "template/db.mv.db", self.folder / "db.mv.db")
        opens = [
            f"--add-opens=java.base/java.{name}=ALL-UNNAMED"
            for name in ("util", "util.concurrent", "security", "lang")
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    "java", *_JAVA, "-Djava.security.egd=file:/dev/urandom", *opens,
                    f"-Djava.util.concurrent.ForkJoinPool.common.threadFactory={_FACTORY}",
                    "-Djava.util.logging.manager=org.jboss.logmanager.LogManager",
                    f"-Dkc.home.dir={self.home}", f"-Djboss.server.config.dir={self.home}/conf",
                    "-Dpicocli.disable.closures=true", "-cp", f"{self.home}/lib/quarkus-run.jar",
                    "io.quarkus.bootstrap.runner.QuarkusEntryPoint", "start", "--optimized", "--http-enabled=true",
                    "--http-host=127.0.0.1", f"--http-port={self.port}", f"--hostname={self.public}",
                    "--cache=local", f"--db-url=jdbc:h2:file:{self.folder}/db;NON_KEYWORDS=VALUE",
                ],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.wait()

    def ready(self) -> bool:
        return _answers(f"{self.url}/.well-known/openid-configuration")

    def subject(self, scope: str, _client: str = "minter") -> str:
        """Return a token of Rucio's that names the clients that may act with it."""
        return self.token("rucio", scope)

    def token(self, client: str, scope: str = "") -> str:
        """Return a token of a client's own."""
        form = {"grant_type": "client_credentials", **({"scope": scope} if scope else {})}
        url = f"{self.url}/protocol/openid-connect/token"
        token: str = httpx.post(url, data=form, auth=(client, f"{client}-secret")).json()["access_token"]
        return token

    def rotate(self, priority: int) -> None:
        """Let a new key sign, the one with the highest priority."""
        config = {"priority": [str(priority)], "enabled": ["true"], "active": ["true"],
                  "ecdsaEllipticCurveKey": ["P-256"]}  # fmt: skip
        made = {
            "name": f"es256-{priority}", "providerId": "ecdsa-generated", "providerType": _KEYS, "config": config
        }  # fmt: skip
        self._admin("POST", "components", json=made)

    def kids(self) -> set[str]:
        """Return the kids of the key set that Keycloak itself answers with."""
        found = httpx.get(f"{self.url}/protocol/openid-connect/certs").json()["keys"]
        return {key["kid"] for key in found}

    def retire(self) -> None:
        """Withdraw the key with the lowest priority."""
        found = self._admin("GET", "components", params={"type": _KEYS}).json()
        oldest = min(found, key=lambda one: int(one["config"]["priority"][0]))
        self._admin("DELETE", f"components/{oldest['id']}")

    def _admin(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token('rotator')}"}
        url = f"http://127.0.0.1:{self.port}/admin/realms/vo/{path}"
        answer = httpx.request(method, url, headers=headers, **options)
        answer.raise_for_status()
        return answer


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _keycloak() -> Path:
    """Return a built Keycloak with the realm in a template database, made once in the user's cache folder."""
    if shutil.which("java") is None:
        pytest.skip("Java is not installed, so Keycloak cannot be had")
    cache = Path(os.environ.get("MINTER_TEST_CACHE", Path.home() / ".cache/minter-tests"))
    home = cache / f"keycloak-{KEYCLOAK}"
    realm = ROOT / "tests/providers/keycloak/realm.json"
    made = home / "template/realm.json"
    if made.exists() and made.read_bytes() == realm.read_bytes():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    if not home.exists():
        archive = cache / "keycloak.zip"
        try:
            urllib.request.urlretrieve(f"https://repo1.maven.org/maven2/{_ARTIFACT}", archive)
        except OSError as error:
            pytest.skip(f"Maven Central cannot be reached, so Keycloak cannot be had: {error}")
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(cache)
        archive.unlink()
    environ = {**os.environ, "JAVA_OPTS": " ".join(_JAVA)}
    program = ["sh", str(home / "bin/kc.sh")]
    features = ["--features=parameterized-scopes,resource-indicators", f"--features-disabled={_OFF}"]
    build = ["build", "--db=dev-file", *features, "--health-enabled=false", "--metrics-enabled=false"]
    _run([*program, *build], environ)
    shutil.rmtree(home / "template", ignore_errors=True)
    (home / "template").mkdir()
    url = f"--db-url=jdbc:h2:file:{home}/template/db;NON_KEYWORDS=VALUE"
    _run([*program, "import", "--optimized", url, "--file", str(realm)], environ)
    shutil.copy(realm, made)
    return home


def _run(command: list[str], environ: dict[str, str]) -> None:
    started = time.monotonic()
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"{command[2]} after {time.monotonic() - started:.0f} s: {done.stdout[-2000:]}"
    )
