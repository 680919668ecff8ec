"""The command line: `up` runs the servers for the other commands; exit codes, and --json for scripts."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minter.local.stack import QUICK_DEATH_SECONDS
from tests.conftest import EXAMPLES, ROOT
from tests.servers import free_ports

JOB = EXAMPLES / "rucio-41.5/jobs/multihop-1.json"


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Run `minter up` on a new state folder; the other commands use the environment that it prints."""
    state = tmp_path_factory.mktemp("up") / "state"
    settings = state.parent / "settings.toml"
    text = (EXAMPLES / "settings.toml").read_text().replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
    (port,) = free_ports(1)
    settings.write_text(f"{text}\n[http]\nport = {port}\nprocesses = 1\n")
    base = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "minter.cli", "up", "--settings", settings, "--state", state, "--workers", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=base, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    exports = {"UP_STDERR": str(process.stderr.fileno())}
    for line in process.stdout:
        if found := re.match(r"export (\w+)='(.*)'", line):
            exports[found[1]] = found[2]
        if found := re.match("A token: (curl .*)", line):
            exports["CURL"] = found[1]
        if "Ctrl-C" in line:
            break
    yield {**base, **exports, "MINTER_MASTER_KEY_ALPEN": (state / "master-alpen.key").read_text()}
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    process.stdout.close()
    process.stderr.close()
    left = subprocess.run(["pgrep", "-f", str(state)], capture_output=True, text=True, check=False).stdout
    assert not left, "up left processes behind"


def minter(
    environ: dict[str, str], *arguments: object, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minter.cli", *map(str, arguments)], env=environ, capture_output=True, text=True,
        input=stdin, check=False, cwd=ROOT,
    )  # fmt: skip


def test_the_curl_line_of_up_gives_a_token(environ: dict[str, str]) -> None:
    done = subprocess.run(["bash", "-c", environ["CURL"]], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["access_token"]


@pytest.mark.parametrize(
    ("role", "name", "told"),
    [("worker", "worker-0", "see /"), ("console", "console", "the console, once: http")],
)
def test_up_starts_again_what_dies_and_says_so(
    environ: dict[str, str], role: str, name: str, told: str
) -> None:
    time.sleep(QUICK_DEATH_SECONDS)  # a process that dies at its start would die again
    state = Path(environ["CURL"].split("$(cat ")[1].split("/client-secret")[0])
    before = pids(state, role)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not pids(state, role) - before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    said = os.read(int(environ["UP_STDERR"]), 10_000).decode()
    assert f"{name} ended with code -9, and was started again; {told}" in said


def pids(state: Path, role: str) -> set[int]:
    """Return the processes of a role that use this state folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes()
        except OSError:
            continue
        if (
            b"minter.cli" in command
            and role.encode() in command
            and str(state.parent).encode() in environment
        ):
            found.add(int(path.name))
    return found


def test_mint_explain_verify_trace(environ: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "filled.json"
    done = minter(environ, "mint", "--job", JOB, "--output", out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["files"], facts["refused"]) == (2, [])
    assert out.stat().st_mode & 0o777 == 0o600
    token = json.loads(out.read_text())["files"][0]["destination_tokens"][0]
    assert token.split(".")[2] not in done.stdout + done.stderr

    second = tmp_path / "again.json"
    repeat = ("mint", "--job", JOB, "--request-id", facts["request_id"], "--json", "--output")
    again = json.loads(minter(environ, *repeat, second).stdout)
    assert again["request_id"] == facts["request_id"]
    assert json.loads(second.read_text())["files"][0]["destination_tokens"][0] == token
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "target.json")
    for taken in (out, link):
        assert "name a new file" in minter(environ, *repeat, taken).stderr
    assert not (tmp_path / "target.json").exists()

    verified = json.loads(minter(environ, "verify", "-", "--json", stdin=token).stdout)
    assert verified["valid"] is True
    jti = verified["claims"]["jti"]
    assert minter(environ, "verify", "-", stdin=token[:-4] + "AAAA").returncode == 1
    assert "not a token" in minter(environ, "verify", stdin=token + "==").stderr
    shown = minter(environ, "verify", token)
    assert "arguments" in shown.stderr
    assert token not in shown.stderr
    file = tmp_path / "token"
    file.write_text(token + "\n")
    assert minter(environ, "verify", file).returncode == 0
    ours, theirs = pty.openpty()  # at a terminal the user's bearer token is found
    for at_hand, code in ((token, 0), ("", 1)):
        at_terminal = subprocess.run(
            [sys.executable, "-m", "minter.cli", "verify"], stdin=theirs, capture_output=True, text=True, check=False,
            env={**environ, "BEARER_TOKEN": at_hand, "BEARER_TOKEN_FILE": "", "XDG_RUNTIME_DIR": str(tmp_path)}, cwd=ROOT,
        )  # fmt: skip
        assert at_terminal.returncode == code
        assert ("none where WLCG tools leave one" in at_terminal.stderr) == bool(code)
    os.close(ours)
    os.close(theirs)

    url = json.loads(out.read_text())["files"][0]["destinations"][0]
    assert "is not known" in minter(environ, "trace", "--path", "x://h/f").stderr
    for option, value in (
        ("--jti", jti),
        ("--request", facts["request_id"]),
        ("--path", verified["claims"]["scope"].split(":")[1]),
        ("--path", url),
        ("--path", url.replace("rucio", "%72ucio")),
    ):
        found = json.loads(minter(environ, "trace", option, value, "--json").stdout)["tokens"]
        assert jti in [f["jti"] for f in found]
    fts_id = found[0]["fts_token_id"]
    assert minter(environ, "trace", "--fts-token-id", fts_id).returncode == 0
    assert minter(environ, "trace", "--jti", "01a20118-9ddb-7538-9909-000000000000").returncode == 1
    assert minter(environ, "trace").returncode == 1

    explained = minter(environ, "explain", "--job", JOB)
    assert "route: fts-transfer: overwrite" in explained.stdout
    for spelling in (url, url.replace("davs", "https"), url.replace("rucio", "%72ucio")):
        told = minter(environ, "explain", "--url", spelling, "--operation", "delete")
        assert "file 0 operation[0]: granted" in told.stdout
        assert "  scope: storage.modify:" in told.stdout
    assert minter(environ, "explain", "--url", "https://elsewhere.example.org/x").returncode == 1
    for wrong in (("--url", url, "--operation", "paint"), ("--url", url, "--job", JOB), ()):
        refused = minter(environ, "explain", *wrong, "--json")
        assert (refused.returncode, json.loads(refused.stderr)["reason"]) == (1, "invalid_request")


def test_a_job_with_refusals_exits_with_1_and_says_why(environ: dict[str, str]) -> None:
    done = minter(environ, "mint", "--job", EXAMPLES / "rucio-41.5/jobs/odd-names.json")
    assert done.returncode == 1
    assert "'%'" in done.stdout
    broken = minter(environ, "mint", "--job", "-", "--json", stdin="{")
    assert (broken.returncode, json.loads(broken.stderr)["reason"]) == (1, "invalid_request")


def test_clients_keys_and_check(environ: dict[str, str]) -> None:
    assert (
        minter(
            environ,
            "clients",
            "add",
            "dirac",
            "--vo",
            "alpen",
            "--operation",
            "read",
            "--path",
            "/atlas",
            "--max-lifetime",
            "3600",
        ).returncode
        == 0
    )
    listed = json.loads(minter(environ, "clients", "list", "--json").stdout)
    assert {c["name"] for c in listed} == {"dirac", "rucio-alpen"}
    for bad in (
        ["dirac", "--vo", "alpen"],
        ["a:b", "--vo", "alpen"],
        ["x", "--vo", "nowhere"],
        ["x", "--vo", "alpen", "--operation", "fly"],
        ["x", "--vo", "alpen", "--path", "a"],
    ):
        assert minter(environ, "clients", "add", *bad).returncode == 1
    made = json.loads(minter(environ, "keys", "create", "--vo", "alpen", "--json").stdout)
    assert [(k["algorithm"], k["state"]) for k in made] == [("ES256", "prepared"), ("RS256", "prepared")]
    listed = json.loads(minter(environ, "keys", "list", "--json").stdout)
    assert Counter((k["algorithm"], k["state"]) for k in listed) == {  # beat made the first standbys
        ("ES256", "active"): 1, ("ES256", "prepared"): 2, ("RS256", "active"): 1, ("RS256", "prepared"): 2,
    }  # fmt: skip
    assert minter(environ, "keys", "create", "--vo", "nowhere").returncode == 2
    checked = json.loads(minter(environ, "check", "--json").stdout)
    assert checked["storages"] == 22
    assert any("synchronous standby" in w for w in checked["warnings"])
    assert minter(environ, "db", "upgrade").returncode == 0
    assert minter(environ, "broker", "setup").returncode == 0


def test_exit_codes_for_settings_and_outages(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[databse]\n")
    bad = minter(environ, "check", "--settings", tmp_path / "bad.toml")
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
    away = minter({**environ, "MINTER_DSN": "host=/nowhere dbname=x"}, "clients", "list")
    assert away.returncode == 3
    assert "Traceback" not in away.stderr
    gone = minter(
        {**environ, "MINTER_BROKER_URL": "redis+socket:///nowhere/broker"},
        "mint",
        "--job",
        JOB,
        "--timeout",
        "2",
    )
    assert gone.returncode == 3
    assert "Traceback" not in gone.stderr


# ── control at run time ──────────────────────────────────────────────────────────────────────


def ask(environ: dict[str, str], *arguments: object, code: int = 0) -> Any:
    done = minter(environ, *arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout if code == 0 or done.stdout else done.stderr)


def test_clients_are_added_changed_rotated_and_disabled(environ: dict[str, str], tmp_path: Path) -> None:
    secret, key = tmp_path / "secret", tmp_path / "key.json"
    ask(environ, "clients", "add", "fts-alpen", "--vo", "alpen", "--path", "/atlasdatadisk", "--reply-queue", "fts-alpen.jobs",
        "--new-jwe-key", key, "--secret-file", secret)  # fmt: skip
    private = json.loads(key.read_text())
    assert key.stat().st_mode & 0o777 == secret.stat().st_mode & 0o777 == 0o600
    assert "d" in private
    (made,) = [c for c in ask(environ, "clients", "list") if c["name"] == "fts-alpen"]
    assert made["jwe_key"] == {k: v for k, v in private.items() if k != "d"}
    ask(environ, "clients", "change", "fts-alpen", "--operation", "read", "--max-lifetime", "3600")
    ask(environ, "clients", "change", "fts-alpen", "--unlimited", "paths")
    (made,) = [c for c in ask(environ, "clients", "list") if c["name"] == "fts-alpen"]
    assert (made["operations"], made["paths"], made["max_lifetime_seconds"]) == (["read"], [], 3600)
    again = minter(environ, "clients", "rotate", "fts-alpen", "--secret-file", secret)
    assert (again.returncode, "exists already" in again.stderr) == (1, True)
    ask(environ, "clients", "rotate", "fts-alpen", "--secret-file", tmp_path / "new")
    assert (tmp_path / "new").read_text() != secret.read_text()
    assert ask(environ, "clients", "disable", "fts-alpen")["alive"] == []
    (made,) = [c for c in ask(environ, "clients", "list") if c["name"] == "fts-alpen"]
    assert made["disabled"]
    ask(environ, "clients", "enable", "fts-alpen")
    assert ask(environ, "clients", "change", "fts-alpen", code=1)["reason"] == "invalid_request"
    assert (
        ask(environ, "clients", "rotate", "nobody", "--secret-file", tmp_path / "x", code=1)["reason"]
        == "unknown_client"
    )
    assert not (tmp_path / "x").exists()


def test_a_ban_lists_what_works_and_can_be_lifted(environ: dict[str, str], tmp_path: Path) -> None:
    ask(environ, "mint", "--job", JOB, "--output", tmp_path / "filled.json")
    found = ask(environ, "ban", "path", "/", "--reason", "test")
    assert found["alive"]
    assert sum(found["storages"].values()) == len(found["alive"])
    refused = minter(environ, "mint", "--job", JOB, "--json")
    assert refused.returncode == 1
    assert "banned" in refused.stdout + refused.stderr
    assert [b["value"] for b in ask(environ, "bans")] == ["/"]
    assert len(ask(environ, "bans", "--kind", "path", "--value", "/")["alive"]) == len(found["alive"])
    ask(environ, "unban", "path", "/")
    assert ask(environ, "bans") == []
    ask(environ, "mint", "--job", JOB)
    shown = minter(environ, "bans", "--kind", "client", "--value", "rucio-alpen")
    assert "tell the sites" in " ".join(shown.stdout.split())


def test_keys_are_rotated_and_revoked_only_when_safe(environ: dict[str, str]) -> None:
    (active,) = [
        k["kid"] for k in ask(environ, "keys", "list") if (k["state"], k["algorithm"]) == ("active", "RS256")
    ]
    if len(ask(environ, "keys", "list")) == 2:
        ask(environ, "keys", "create", "--vo", "alpen")
    early = minter(environ, "keys", "rotate", "--vo", "alpen", "--json")
    assert early.returncode == 3
    assert json.loads(early.stderr)["reason"] == "no_usable_key"
    warned = minter(environ, "keys", "revoke", active, "--reason", "leaked")
    assert warned.returncode == 1
    assert "repeat with --yes" in " ".join(warned.stdout.split())
    assert "XRootD 10 min" in " ".join(warned.stdout.split())
    assert (
        ask(environ, "keys", "revoke", active, "--reason", "leaked", "--yes", code=3)["reason"]
        == "no_usable_key"
    )
    killed = ask(environ, "keys", "revoke", active, "--reason", "leaked", "--yes", "--force")
    assert killed["alive"]
    states = {k["kid"]: k["state"] for k in ask(environ, "keys", "list")}
    assert states[active] == "revoked"
    assert Counter(states.values()) == {"active": 2, "prepared": 3, "revoked": 1}
    ask(environ, "mint", "--job", JOB)
    assert ask(environ, "keys", "rewrap", "--vo", "alpen")["secrets"] >= 2


# ── storages ─────────────────────────────────────────────────────────────────────────────────


def test_storages_are_imported_listed_and_told_to_sites(environ: dict[str, str], tmp_path: Path) -> None:
    export = EXAMPLES / "rucio-41.5/rses-export.json"
    made = ask(
        environ,
        "storages",
        "import-rucio",
        export,
        "--vo",
        "alpen",
        "--dialect",
        "ALPEN-*=dcache",
        "--output",
        tmp_path / "s.toml",
    )
    assert len(made["storages"]) == 22
    assert any("ends in /" in w for w in made["warnings"])
    settings = tmp_path / "settings.toml"
    settings.write_text(
        '[issuers.alpen]\niss = "https://tokens.example.org/alpen/"\n' + (tmp_path / "s.toml").read_text()
    )
    own = {**environ, "MINTER_SETTINGS": str(settings)}
    listed = ask(own, "storages", "list")
    assert {row["storage"] for row in listed} <= {s["name"] for s in made["storages"]}
    told = ask(own, "storages", "site-config", "--storage", "ALPEN-T1_DATADISK")["config"]
    assert "gplazma.oidc.provider!alpen = https://tokens.example.org/alpen/" in told
    assert ask(own, "storages", "site-config", "--storage", "NOWHERE", code=1)["reason"] == "invalid_request"
    bad = ask(
        environ, "storages", "import-rucio", export, "--vo", "alpen", "--dialect", "ALPEN-*=floppy", code=1
    )
    assert "PATTERN=DIALECT" in bad["error_description"]
    cfg = tmp_path / "dirac.cfg"
    cfg.write_text(
        "StorageElements\n{\n  A\n  {\n    D\n    {\n      Protocol = https\n      Host = a.example.org\n      Path = /a\n    }\n  }\n}\n"
    )
    assert [
        s["name"] for s in ask(environ, "storages", "import-dirac", cfg, "--vo", "alpen")["storages"]
    ] == ["A"]
    assert (
        ask(environ, "storages", "import-dirac", export, "--vo", "alpen", code=2)["reason"]
        == "settings_error"
    )


def test_trace_tells_the_story_by_every_name(environ: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "filled.json"
    facts = ask(environ, "mint", "--job", JOB, "--output", out)
    found = ask(environ, "trace", "--request", facts["request_id"])["tokens"]
    one = next(t for t in found if t["side"] == "destination")
    for option, value in (("jti", one["jti"]), ("fts-token-id", one["fts_token_id"]), ("client", one["client"]),
                          ("storage", one["storage"]), ("key", one["kid"]), ("external-id", one["external_id"])):  # fmt: skip
        tokens = ask(environ, "trace", f"--{option}", value)["tokens"]
        assert one in tokens, option
    assert one["route"]
    assert one["operations"]
    assert one["steps"]
    shown = minter({**environ, "COLUMNS": "240"}, "trace", "--jti", one["jti"]).stdout
    for said in (one["client"], one["storage"], one["route"], "issued"):
        assert said in shown
    assert minter(environ, "trace", "--jti", one["jti"], "--client", "x").returncode == 1
    assert ask(environ, "archive", code=2)["reason"] == "settings_error"
    assert ask(environ, "archive", "--archive", tmp_path / "archive") == []
