"""A client in another language: Node with amqplib, written from the schemas alone."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.acceptance.conftest import Running
from tests.acceptance.test_workers import OTHER, SE
from tests.conftest import ROOT
from tests.servers import lacking

pytestmark = [pytest.mark.slow, pytest.mark.rabbitmq]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        lacking("npm is not installed")
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(ROOT / "examples/amqp-node", folder, dirs_exist_ok=True)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)
    return folder


def run(example: Path, running: Running, *urls: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", "mint.js", *urls], cwd=example, env={**os.environ, "MINTER_BROKER_URL": running.url()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_node_gets_tokens(example: Path, running: Running) -> None:
    if not running.on_rabbitmq:
        pytest.skip("AMQP only")
    done = run(example, running, SE + "node", OTHER + "node")
    assert done.returncode == 0, done.stderr
    tokens = [json.loads(line) for line in done.stdout.splitlines()]
    assert [t["side"] for t in tokens] == ["source", "destination"]
    ((count,),) = running.rows("SELECT count(*) FROM tokens WHERE jti = ANY(%s)", [t["jti"] for t in tokens])
    assert count == 2


def test_node_gets_typed_refusals(example: Path, running: Running) -> None:
    if not running.on_rabbitmq:
        pytest.skip("AMQP only")
    done = run(example, running, "davs://nowhere.example.org/f", OTHER + "node")
    reasons = {json.loads(line)["refused"] for line in done.stdout.splitlines()}
    assert reasons == {"unknown_storage", "neighbour_refused"}
