"""What `minter diagnose` predicts: each misconfiguration is named, and a sound token is allowed."""

from typing import Any

import pytest

from minter.contract.operations import Operation
from minter.policy.diagnose import storage_verdicts
from minter.storages.dialects import Algorithm
from minter.storages.directory import Directory, Endpoint, Storage

ISSUER = "https://tokens.example.org/vo/"
AUDIENCE = "https://se.example.org:1094"


def refused(
    dialect: str = "xrootd",
    operation: Operation = "read",
    path: str = "/dir/file1",
    algorithm: Algorithm = "ES256",
    **claims: object,
) -> list[tuple[str, str]]:
    """Return the checks that a storage of this dialect refuses a token for."""
    storage = Storage(
        vo="vo", name="SE", endpoints=(Endpoint("se.example.org", 1094, "/data/vo"),), dialect=dialect, base_path="/data"
    )  # fmt: skip
    (area,) = Directory([storage]).areas()
    sound = {"iss": ISSUER, "aud": AUDIENCE, "wlcg.ver": "1.0", "scope": "storage.read:/dir/file1"}
    found = storage_verdicts(sound | claims, algorithm, area, path, operation, ISSUER)
    return [(v.check, v.text) for v in found if not v.passes]


@pytest.mark.parametrize(
    "sound",
    [
        {},
        {"aud": ["https://other.example.org", AUDIENCE]},
        {"scope": "storage.read:/dir"},
        {"scope": "storage.read:/"},
        {"operation": "write", "scope": "storage.create:/dir"},
        {"operation": "write", "scope": "storage.modify:/dir/file1"},
        {"dialect": "dcache", "algorithm": "RS256", "scope": "storage.stage:/dir/file1"},
        {"dialect": "xrootd-6", "operation": "poll", "scope": "storage.stage:/dir"},
        {"dialect": "xrootd-5.5", "path": "/dir/file10"},
        {"path": "/dir/a b", "scope": "storage.read:/dir/a%20b"},
    ],
    ids=str,
)
def test_a_sound_token_is_allowed(sound: dict[str, Any]) -> None:
    assert refused(**sound) == []


@pytest.mark.parametrize(
    ("wrong", "check", "said"),
    [
        ({"iss": ISSUER.removesuffix("/")}, "issuer", "must trust exactly"),
        ({"aud": "https://se.example.org"}, "audience", AUDIENCE),
        ({"aud": []}, "audience", AUDIENCE),
        ({"wlcg.ver": "2.0"}, "profile", "expected '1.0'"),
        ({"dialect": "storm"}, "algorithm", "verifies RS256; the token has ES256"),
        ({"dialect": "dcache"}, "algorithm", "dCache 9.2 to 11.1"),
        ({"path": "/dir/file2"}, "scope", "read needs storage.read:/dir/file2"),
        ({"path": "/dir/file10"}, "scope", "storage.read:/dir/file10"),
        ({"path": "/data/dir/file1"}, "scope", "relative to base path /data"),
        ({"scope": "storage.create:/dir/file1"}, "scope", "read needs storage.read"),
        ({"scope": "openid"}, "scope", "read needs storage.read"),
        ({"operation": "overwrite", "scope": "storage.create:/dir/file1"}, "scope", "needs storage.modify"),
        ({"operation": "delete"}, "scope", "delete needs storage.modify"),
        ({"operation": "write", "dialect": "xrootd-5.5", "scope": "storage.create:/dir/file1"}, "scope", "stat-needs-read"),
        ({"operation": "make_parents", "dialect": "storm", "algorithm": "RS256", "scope": "storage.create:/dir/file1"},
         "scope", "storm-parent-needs-read"),
        ({"operation": "stage", "scope": "storage.stage:/dir/file1"}, "operation", "6.0.0"),
        ({"operation": "poll", "dialect": "dcache-11.2", "scope": "storage.poll:/dir"}, "scope", "poll-needs-read"),
    ],
    ids=str,
)  # fmt: skip
def test_each_misconfiguration_is_named(wrong: dict[str, Any], check: str, said: str) -> None:
    found = refused(**wrong)
    assert any(c == check and said in text for c, text in found), found
    assert {c for c, _ in found} == {check}
