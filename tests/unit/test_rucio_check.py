"""`minter rucio check`: what rucio.cfg lacks, and what happens to the files of each RSE."""

import configparser
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minter.cli.__main__ import app
from minter.cli.rucio import config_problems
from tests.conftest import EXAMPLES, MASTER_KEY

URL = "https://tokens.vo-alpen.example.org/alpen/"
GOOD = {
    ("policy", "package"): "minter.rucio",
    ("minter", "url"): URL,
    ("minter", "client"): "rucio-alpen",
    ("minter", "secret_file"): "secret",
    ("minter", "policy_package"): "email",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, mode in (("secret", 0o600), ("open", 0o644)):
        (tmp_path / name).write_text("s")
        (tmp_path / name).chmod(mode)
    return tmp_path


def written(options: dict[tuple[str, str], str]) -> configparser.ConfigParser:
    cfg = configparser.ConfigParser()
    for (section, name), value in options.items():
        if not cfg.has_section(section):
            cfg.add_section(section)
        cfg.set(section, name, value)
    return cfg


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, []),
        ({("policy", "package"): ""}, ["not set, expected minter.rucio"]),
        (
            {("policy", "package"): "atlas", ("minter", "policy_package"): ""},
            ["is atlas, expected", "set [minter] policy_package = atlas"],
        ),
        ({("minter", "url"): ""}, ["[minter] url is not set"]),
        ({("minter", "url"): "https://elsewhere/"}, [f"expected {URL}"]),
        ({("minter", "client"): ""}, ["[minter] client is not set"]),
        ({("minter", "secret_file"): "gone"}, ["cannot be read: No such file"]),
        ({("minter", "secret_file"): "open"}, ["open to others; chmod 600"]),
        ({("minter", "away"): "panic"}, ["expected one of wait, rucio, x509"]),
        ({("minter", "policy_package"): "no_such_package"}, ["cannot be imported here"]),
    ],
)
def test_problems_of_the_configuration(
    folder: Path, change: dict[tuple[str, str], str], why: list[str]
) -> None:
    found = list(config_problems(written({**GOOD, **change}), folder, URL))
    assert len(found) == len(why)
    assert all(part in told for part, told in zip(why, found, strict=True))


def test_a_vo_of_a_multi_vo_rucio_has_options_of_its_own(folder: Path) -> None:
    cfg = written({**GOOD, ("minter", "url"): "https://other/", ("minter", "url-alp"): URL})
    assert list(config_problems(cfg, folder, URL, "alp")) == []


def test_each_rse_is_told_what_happens_to_its_files(folder: Path) -> None:
    export = json.loads((EXAMPLES / "rucio-41.5/rses-export.json").read_text())
    names = sorted(rse.get("rse") or key for key, rse in export["rses"].items())
    switched, foreign = names[0], {"rse": "NEW_DISK", "attributes": {"minter": "True"}, "protocols": []}
    for key, rse in export["rses"].items():
        if (rse.get("rse") or key) == switched:
            rse["attributes"] = {**rse["attributes"], "minter": True}
    export["rses"]["NEW_DISK"] = foreign
    (folder / "export.json").write_text(json.dumps(export))
    with (folder / "rucio.cfg").open("w") as file:
        written(GOOD).write(file)
    environ = {"MINTER_SETTINGS": str(EXAMPLES / "settings.toml"), "MINTER_MASTER_KEY_ALPEN": MASTER_KEY}
    asked = [
        "rucio",
        "check",
        str(folder / "rucio.cfg"),
        str(folder / "export.json"),
        "--vo",
        "alpen",
        "--json",
    ]
    done = CliRunner().invoke(app, asked, env=environ)
    told = json.loads(done.stdout)
    fates = {row["rse"]: row["files"] for row in told["rses"]}
    assert (done.exit_code, told["problems"]) == (1, [])
    assert fates.pop("NEW_DISK") == "refused"
    assert fates.pop(switched) == "tokens of Minter"
    assert set(fates.values()) == {"as before"}
