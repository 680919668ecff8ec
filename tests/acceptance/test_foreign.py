"""Unmodified third-party software from packages, run against the HTTP service."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from joserfc import jwk

from tests.acceptance.conftest import environment
from tests.acceptance.served import Served
from tests.acceptance.test_token import EXCHANGES
from tests.servers import lacking
from tests.simulators import FakeFTS

pytestmark = pytest.mark.slow
CAPTURE = '[[fts]]\nname = "capture"\nurl = "https://127.0.0.1:8446"\n'
FOREIGN = Path(__file__).parent / "foreign"


@pytest.fixture(scope="module")
def served(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("foreign"), postgres_dsn, EXCHANGES + CAPTURE)
    for name in ("rucio", "fts"):
        made.add_client(name)
    made.add_client("dirac", default_audience=["se01.boreas.example.org"], groups=["/alpen/prod"])
    yield made
    made.close()


def run(served: Served, python: Path, script: str, *arguments: object, **environ: str) -> Any:
    done = subprocess.run(
        [python, FOREIGN / script, served.iss, json.dumps(served.secrets), *map(str, arguments)],
        env={
            **os.environ, "REQUESTS_CA_BUNDLE": str(served.ca), "SSL_CERT_FILE": str(served.ca),
            "XDG_CACHE_HOME": str(served.folder), "HOME": str(served.folder), **environ,
        },
        capture_output=True, text=True, check=False, cwd=served.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]

    return json.loads(done.stdout.splitlines()[-1])


def test_authlib_requests_oauthlib_and_scitokens(served: Served, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "authlib", "requests-oauthlib", "scitokens", "requests")
    key = jwk.RSAKey.generate_key(2048)
    served.add_client("signer", auth_key={**key.as_dict(private=False), "alg": "RS256"})
    pem = tmp_path / "signer.pem"
    pem.write_bytes(key.as_pem(private=True))
    assert run(served, python, "oauth.py", pem) == [
        "authlib client_credentials",
        "authlib exchange and refresh",
        "authlib introspect and revoke",
        "requests-oauthlib client_credentials",
        "authlib error",
        "authlib private_key_jwt",
        "authlib discovery",
        "scitokens Enforcer",
    ]


@pytest.fixture(scope="module")
def rucio(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """Rucio 41.5 and two VOs' policy packages from pip, with the client of this source tree."""
    packages = ("atlas-rucio-policy-package", "ctao-bdms-rucio-policy")
    return environment(tmp_path_factory.mktemp("rucio") / "env", "rucio==41.5.1", *packages, wheel)


BOTH = "BOREAS-T2_DATADISK,FJORD-T1_DATADISK"


@pytest.mark.parametrize(
    ("tool", "wrapped", "switched"),
    [
        ("own", "", ""),
        ("minter", "", BOTH),
        ("minter", "atlas_rucio_policy_package", BOTH),
        ("minter", "bdms_rucio_policy", BOTH),
        ("minter", "", "BOREAS-T2_DATADISK"),
        ("minter", "", ""),
    ],
)
def test_rucios_daemons_get_their_tokens(
    served: Served, rucio: Path, fts: FakeFTS, tmp_path: Path, tool: str, wrapped: str, switched: str
) -> None:
    """Unmodified Rucio gets RSE-wide tokens. With the policy package, files of switched RSEs get their own."""
    told = run(served, rucio, "rucio_submit.py", fts.url, tmp_path, served.ca, tool, wrapped, switched, "")
    assert told["states"] == ["SUBMITTED"] * 3
    files = [file for job in fts.jobs.values() for file in job["files"]]
    assert len(files) == 3
    scopes = {
        side: [claims_of(t)["scope"] for f in files for t in f[f"{side}_tokens"]]
        for side in ("source", "destination")
    }
    if switched == BOTH:
        assert len(set(scopes["source"])) == len(set(scopes["destination"])) == 3
        assert all(re.search(r"/file\d( |$)", s) for s in scopes["source"] + scopes["destination"])
        # Rucio's own transfertool sends its token over https only.
        assert {claims_of(b.removeprefix("Bearer "))["scope"] for b in fts.bearers if b} == {"fts"}
    else:
        root = "storage.read:/atlas/atlasdatadisk/rucio"
        assert set(scopes["source"]) == {f"offline_access {root}"}
    deleted = {url: claims_of(token)["scope"] for url, token in told["deleted"]}
    assert len(deleted) == 2
    for url, scope in deleted.items():
        own = url.rpartition("/")[2]
        assert (own in scope) == ("BOREAS" in switched), (url, scope)


@pytest.mark.parametrize("away", ["wait", "rucio", "x509"])
def test_rucio_goes_on_without_minter_as_its_settings_say(
    served: Served, rucio: Path, fts: FakeFTS, tmp_path: Path, away: str
) -> None:
    told = run(served, rucio, "rucio_submit.py", fts.url, tmp_path, served.ca, "minter", "", BOTH, away)
    files = [file for job in fts.jobs.values() for file in job["files"]]
    if away == "wait":
        assert "SUBMITTED" not in told["states"]
        assert not files
        assert not told["deleted"]
        return
    assert told["states"] == ["SUBMITTED"] * 3
    assert len(files) == 3
    assert {"source_tokens" in file for file in files} == {away == "rucio"}
    assert [token == "None" for _, token in told["deleted"]] == [away == "x509"] * 2


def claims_of(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


@pytest.fixture(scope="module")
def dirac(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """DIRAC 9.1 from pip, without gfal2-python, which no longer compiles."""
    if shutil.which("swig") is None:
        lacking("swig is not installed, which M2Crypto needs (apt-get install swig libssl-dev)")
    folder = tmp_path_factory.mktemp("dirac")
    python = environment(folder / "env", "--no-deps", "DIRAC==9.1.22")
    listed = (
        "from importlib.metadata import requires; "
        "print(*[r for r in requires('DIRAC') if 'extra ==' not in r and 'gfal2' not in r], sep='\\n')"
    )
    needed = subprocess.run([python, "-c", listed], capture_output=True, text=True, check=True).stdout
    (folder / "needed.txt").write_text(needed)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-r", folder / "needed.txt", "tornado==5.1.1", wheel],
        check=True,
    )
    return python


def test_diracs_identity_provider_and_token_manager(served: Served, dirac: Path) -> None:
    assert run(served, dirac, "dirac_tokens.py") == [
        "fetchToken and verifyToken",
        "getIdProviderFromToken",
        "exchangeToken, refreshToken, revokeToken",
        "TokenManager and its cache",
    ]


def dirac_transfer(
    served: Served, dirac: Path, fts: FakeFTS, path: str, options: str = "", switched: str = "", **case: Any
) -> tuple[dict[str, Any], list[Any], list[str]]:
    """Let DIRAC's FTS3Agent submit one job; return what it told, FTS's files, and their tokens' scopes."""
    fts.lenient = True  # DIRAC sets unmanaged_tokens without tokens, too
    told = {
        "path": path.split("-"),
        "switched": (switched or path).split("-"),
        "files": ["prod/file0", "prod/file1"],
    }
    report = run(served, dirac, "dirac_fts3agent.py", fts.url, served.ca, options, json.dumps(told | case))
    files = [file for job in fts.jobs.values() for file in job["files"]]
    tokens = [
        t for f in files for side in ("source", "destination") for t in f.get(f"{side}_tokens") or () if t
    ]
    return report, files, [claims_of(t)["scope"] if t.count(".") == 2 else t for t in tokens]


def test_diracs_fts3agent_carries_per_file_tokens_by_options_of_the_cs(
    served: Served, dirac: Path, fts: FakeFTS
) -> None:
    told, files, scopes = dirac_transfer(served, dirac, fts, "A-B")
    assert told == {"jobs": 1, "asked": [], "states": ["Submitted"] * 2}
    assert len(files) == 2
    assert len(set(scopes)) == 4
    assert all(re.search(r"/file\d( |$)", scope) for scope in scopes)
    bearers = {b.removeprefix("Bearer ") for b in fts.bearers} - {"an-X509-proxy"}
    assert {claims_of(b)["scope"] for b in bearers} == {"fts"}


def test_diracs_hops_all_have_tokens_or_none(served: Served, dirac: Path, fts: FakeFTS) -> None:
    _, files, scopes = dirac_transfer(served, dirac, fts, "A-B-C", files=["prod/file0"])
    assert (len(files), len(scopes)) == (2, 4)
    fts.jobs.clear()
    told, files, scopes = dirac_transfer(served, dirac, fts, "A-B-C", switched="A-C", files=["prod/file0"])
    assert (told["jobs"], len(files), scopes) == (1, 2, [])  # one SE is not switched: with X.509, as before
    fts.jobs.clear()
    told, files, _ = dirac_transfer(served, dirac, fts, "TAPE-B", files=["prod/file0"])
    assert (told["jobs"], files) == (0, [])  # DIRAC stages by root://, which takes no token
    assert told["states"] == ["New"]


@pytest.mark.parametrize(
    ("away", "jobs", "asked"),
    [("wait", 0, set()), ("x509", 1, set()), ("dirac", 1, {"IdProvider", "TokenManager"})],
)
def test_dirac_goes_on_without_minter_as_its_options_say(
    served: Served, dirac: Path, fts: FakeFTS, away: str, jobs: int, asked: set[str]
) -> None:
    options = f"Away = {away}\nalpen\n{{\nURL = https://localhost:1/alpen/\n}}"
    told, files, scopes = dirac_transfer(served, dirac, fts, "A-B", options)
    assert (told["jobs"], set(told["asked"])) == (jobs, asked)
    assert len(files) == 2 * jobs
    assert set(scopes) == ({"of-DIRACs-IdProvider"} if away == "dirac" else set())
    bearers = {b.removeprefix("Bearer ") for b in fts.bearers}
    assert bearers == {"an-X509-proxy"} | ({"of-DIRACs-TokenManager"} if away == "dirac" else set())


def test_schemathesis_on_the_openapi_document(served: Served, tmp_path: Path) -> None:
    """Every answer follows the OpenAPI document, and requests that violate the document are refused."""
    environment(tmp_path / "env", "schemathesis>=4.32")
    done = subprocess.run(
        [
            tmp_path / "env/bin/schemathesis", "run", f"{served.iss}openapi.json", "--tls-verify", str(served.ca),
            "--auth", f"rucio:{served.secrets['rucio']}", "--max-examples", "60", "--checks", "all",
            "--seed", "1",  # the same examples each time, so that only a change of code changes the result
            # A schema has no rules between fields; requests that break such a rule get a typed error.
            "--exclude-checks", "positive_data_acceptance",
        ],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " Tested: 11" in done.stdout
