"""docs/install.md is followed line by line on machines that boot under systemd, to the first token by curl."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest

from tests.booted import Booted, Machines, make_base, missing, why_not
from tests.cluster.machines import need_machines, run
from tests.conftest import ROOT
from tests.servers import certificates

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = ("db1", "db2", "minter1")
ISSUER = "tokens.vo-alpen.example.org"
PACKAGES = (
    "postgresql", "rabbitmq-server", "python3-venv", "nginx-light", "curl", "adduser",
    "openssh-server", "openssh-client",
)  # fmt: skip
BLOCK = re.compile(r"^On (\*\*[^:]+):\n\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COPY = """#!/bin/bash
# scp -r FILE… root@HOST:FOLDER, to machines whose files are here
target=${@: -1}; host=${target#root@}; folder=${host#*:}; host=${host%%.*}
cp -r "${@:2:$#-2}" "$MACHINES/$host/root$folder"
"""


def blocks() -> list[tuple[str, str]]:
    """Return the page's blocks as pairs of machine and commands."""
    page = (ROOT / "docs/install.md").read_text()
    found = [
        (name, text) for where, text in BLOCK.findall(page) for name in re.findall(r"\*\*(.+?)\*\*", where)
    ]
    assert len(BLOCK.findall(page)) == page.count("```bash")
    return found


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    need_machines(missing())
    with tempfile.TemporaryDirectory(prefix="minter-install-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        base = make_base(folder, PACKAGES)
        if refused := why_not(base):
            pytest.skip(f"this machine boots no others: {refused}")
        _prepare(folder, base)
        with Machines(folder, base, NAMES, {ISSUER: "minter1"}) as made:
            yield made


def _prepare(folder: Path, base: Path) -> None:
    """What the page takes for granted: certificates, and root's way from one machine to the next by ssh."""
    names = [ISSUER, *(f"{name}.example.org" for name in NAMES)]
    certificates(folder, names)
    tls = base / "etc/ssl/minter"
    tls.mkdir()
    for file in ("ca.pem", "host.pem", "host.key"):
        shutil.copy(folder / file, tls / file)
    ssh = base / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    run("ssh-keygen", "-q", "-N", "", "-f", ssh / "id_ed25519")
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    (base / "etc/ssh/ssh_config.d/new.conf").write_text("StrictHostKeyChecking accept-new\n")


def _on_our_machine(script: str, machines: Machines) -> None:
    """Run commands in the repository; scp copies into the machines' files."""
    folder = machines.network.folder
    program = folder / "bin/scp"
    program.parent.mkdir(exist_ok=True)
    program.write_text(COPY)
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "MACHINES": str(folder)}
    subprocess.run(["bash", "-e"], input=script, text=True, check=True, cwd=ROOT, env=environ)
    # The machines have no way to the package index: they get what `make dist` has just installed.
    found = run(ROOT / ".venv/release/bin/pip", "freeze", "--exclude", "gridminter").stdout
    (folder / "needed").write_text(found)
    wheels = machines["minter1"].root / "root/wheels"
    run(ROOT / ".venv/bin/pip", "download", "-q", "--no-deps", "-d", wheels, "-r", folder / "needed")


def _run(machine: Booted, script: str) -> str:
    code, output = machine.shell(script, PIP_NO_INDEX="1", PIP_FIND_LINKS="/root/wheels")
    assert code == 0, (
        f"on {machine.name}:\n{script}\n{output}\n{machine.shell('journalctl -n 100 --no-pager')[1]}"
    )
    return output


def test_the_page_leads_to_the_first_token(machines: Machines) -> None:
    printed = {}
    for name, script in blocks():
        if name == "your machine":
            _on_our_machine(script, machines)
        else:
            printed[script] = _run(machines[name], script)
    (first,) = [text for script, text in printed.items() if "curl" in script and "minter status" in script]
    token = re.search(r'"access_token":"([^"]+)"', first)
    assert token, first
    keys = jwt.PyJWKSet.from_dict(
        json.loads(_run(machines["minter1"], f"curl -s https://{ISSUER}/alpen/jwks.json"))
    )
    key = keys[jwt.get_unverified_header(token[1])["kid"]]
    claims = jwt.decode(token[1], key, audience="https://se01.boreas.example.org")
    assert claims["scope"] == "storage.read:/atlas/atlasdatadisk/rucio/user/alice/file.root"
    assert re.search(r"^ok +standby +db2 streaming quorum$", first, re.MULTILINE)
    assert not re.search("^(warning|failed)", first, re.MULTILINE)
    assert "dirac" in _run(machines["db1"], "rabbitmqctl list_users")


def test_systemd_starts_again_what_dies(machines: Machines) -> None:
    minter = machines["minter1"]
    _run(
        minter,
        "systemctl kill --signal=KILL minter-worker@1 && sleep 4 && systemctl is-active minter-worker@1",
    )
    _run(minter, "systemctl restart minter.target && systemctl is-active minter-http minter-worker@{1..2}")
    assert _run(minter, "systemctl list-units --state=failed --no-legend 'minter*'") == ""
    assert "ready" in _run(minter, "curl -s http://127.0.0.1:8443/ready")


def test_a_start_that_fails_is_told_by_systemctl(machines: Machines) -> None:
    minter = machines["minter1"]
    _run(
        minter,
        "cp -p /etc/minter/environment /root/right; sed -i 's|minter:[0-9a-f]*@|minter:wrong@|' /etc/minter/environment",
    )
    code, output = minter.shell("systemctl restart minter-worker@1")
    assert code == 1, output
    assert "the broker refuses: ACCESS_REFUSED" in _run(
        minter, "journalctl --unit minter-worker@1 --no-pager"
    )
    _run(minter, "cp -p /root/right /etc/minter/environment && systemctl restart minter-worker@1")


def test_without_the_standby_nothing_is_issued_and_ready_says_why(machines: Machines) -> None:
    _run(machines["db2"], "systemctl stop postgresql@15-main")
    code, output = machines["minter1"].shell("sleep 3; curl -s http://127.0.0.1:8443/ready; minter status")
    assert code == 1, output
    assert "standby" in output
    _run(machines["db2"], "systemctl start postgresql@15-main")
    _run(
        machines["minter1"],
        "for try in {1..30}; do sleep 1; curl -sf http://127.0.0.1:8443/ready && exit; done; exit 1",
    )
