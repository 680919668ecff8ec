"""The distribution `gridminter` without extras is the client alone, and installs beside Rucio's pins."""

import subprocess
from pathlib import Path

import pytest

from tests.acceptance.conftest import environment
from tests.acceptance.served import Served
from tests.conftest import ROOT
from tests.lowest import lowest

pytestmark = pytest.mark.slow


def run(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, cwd="/")


def test_the_client_alone_needs_no_server(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", wheel)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    for engine in ("celery", "SQLAlchemy", "psycopg", "cryptography", "kombu", "typer"):
        assert engine.lower() not in listed.lower()
    done = run(
        python,
        "import minter.client as c; print(c.new_request_id().version, c.FileRequest(sources=('davs://a/b',)).sources)",
    )
    assert done.stdout.split() == ["7", "('davs://a/b',)"], done.stderr
    refused = run(python, "from minter.client import MinterClient; MinterClient('amqp://me@localhost//')")
    assert "pip install 'gridminter[amqp]'" in refused.stderr
    command = subprocess.run(
        [Path(python).parent / "minter", "--help"], capture_output=True, text=True, check=False
    )
    assert command.returncode == 2
    assert "pip install 'gridminter[server]'" in command.stderr


def test_the_client_works_with_its_lowest_versions(wheel: Path, tmp_path: Path, served: Served) -> None:
    python = environment(
        tmp_path / "env", f"{wheel}[amqp]", *(f"{n}=={v}" for n, v in lowest(("amqp",)).items())
    )
    code = (
        "import sys; from minter.client import FileRequest, MinterClient; import minter.client.amqp;"
        "client = MinterClient(sys.argv[1], 'rucio', sys.argv[2], ca=sys.argv[3]);"
        "url = 'davs://se01.boreas.example.org:443/atlas/atlasdatadisk/rucio/f';"
        "result = client.mint([FileRequest(sources=(url,))]); print(result.tokens[0].scope);"
        "print(len(client.trace(jti=result.tokens[0].jti)));"
        "other = client.mint([FileRequest(sources=('davs://nowhere.example.org/f',))]);"
        "print(other.refusals[0].error.reason)"
    )
    done = subprocess.run(
        [python, "-c", code, served.iss, served.secrets["rucio"], served.ca],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["storage.read:/atlas/atlasdatadisk/rucio/f", "1", "unknown_storage"]


def test_the_client_lives_beside_rucio(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "rucio==41.5.1", f"{wheel}[amqp]")
    done = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    code = "import minter.client, minter.client.amqp, rucio.common.constants, rucio; print(minter.client.MinterClient('amqp://me@localhost//'))"
    done = run(python, code)
    assert done.stdout.strip() == "<MinterClient me>", done.stderr


def test_the_engine_is_installed_with_its_workers_and_migrations(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", f"{wheel}[server]")
    code = (
        "import schemas, pathlib, workers.app, workers.fts_forwarder, minter.cli.__main__;"
        "print(len(list((pathlib.Path(schemas.__file__).parent / 'migrations/versions').glob('*.sql'))))"
    )
    done = run(python, code)
    here = list((ROOT / "schemas/migrations/versions").glob("*.sql"))
    assert done.stdout.strip() == str(len(here)), done.stderr
