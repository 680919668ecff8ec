from pathlib import Path

import pytest

from minter import checks, settings
from minter.errors import SettingsError
from minter.settings import Loaded
from minter.tokens.keystore import MASTER_KEY_BYTES, MasterKey, new_master_key, read_master_key
from tests.conftest import EXAMPLES

BASE = '[issuers.vo]\niss = "https://t.example.org/vo/"\n'


def load(tmp_path: Path, text: str, **environ: str) -> settings.Loaded:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return settings.load(path, environ)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "issuers"),
        ("[[", "is not TOML"),
        (BASE + "[databse]\n", "did you mean 'database'"),
        (BASE + "[database]\nretention = 3\n", "did you mean 'retention_days'"),
        (BASE + "[console]\noperator = ['x']\n", "did you mean 'operators'"),
        (BASE + "[metrics]\nfirst_prot = 3\n", "did you mean 'first_port'"),
        (BASE + "[drill]\nscale = 3\n", "time_scale"),
        ('[issuers.vo]\niss = "https://t.example.org/vo"\n', "issuers"),
        ('[issuers.vo]\niss = "http://t.example.org/vo/"\n', "issuers"),
        (BASE + '[issuers.two]\niss = "https://t.example.org/vo/"\n', "same iss"),
        (BASE + '[issuers.two]\niss = "https://T.example.org:443/vo/"\n', "same iss"),
        *(
            (f'[issuers.vo]\niss = "https://t.example.org/{path}/"\n', "issuers")
            for path in ("/a", "a//b", "..", "a/./b", "a/../b", "a%41", "a b", "a@b", "{vo}")
        ),
        ('[issuers.vo]\niss = "https://user@t.example.org/vo/"\n', "issuers"),
        (BASE + '[[storages]]\nvo = "other"\nname = "S"\nendpoints = []\n', "has no [issuers.*]"),
        (BASE + '[[storages]]\nvo = "vo"\nname = "S"\nendpoints = [{host = "h"}]\ndialect = "xrotd"\n', "such as 'xrootd"),
        (BASE + '[[storages]]\nvo = "vo"\nname = "S"\nendpoints = [{host = "h", prefix = "/a2"}]\nbase_path = "/a"\n', "outside its base_path"),
        (BASE + '[[storages]]\nvo = "vo"\nname = "S"\nendpoints = []\n' * 2, "named twice"),
        (BASE + f'[[storages]]\nvo = "vo"\nname = "S"\naudience = ["{"x" * 1025}"]\nendpoints = [{{host = "h"}}]\n', "FTS cannot store"),
        (BASE + "[rotation]\nlifetime_seconds = 3600\n", "shorter than the longest token"),
        (BASE + '[[routes]]\nname = "r"\noperations = ["read"]\nmax_lifetime_seconds = 90000\n', "needs mitigations"),
        (BASE + '[[rucio]]\nvo = "vo"\nexport = "missing.json"\n', "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert why in caught.value.message


def test_the_examples_are_right_and_warn_of_what_is_doubtful(loaded: Loaded) -> None:
    assert len(loaded.storages) == 22
    said = "\n".join([*loaded.warnings, *checks.doubts(loaded)])
    for fragment in ("not tried", "share an endpoint", "risk assessment", "X.509 only"):
        assert fragment in said


def test_a_route_whose_tokens_can_hardly_be_shared_is_doubtful(tmp_path: Path) -> None:
    route = '[[routes]]\nname = "r"\noperations = ["read"]\ngranularity = "directory"\nwait_seconds = {}\n'
    assert "few files will share" in "\n".join(checks.doubts(load(tmp_path, BASE + route.format(7200))))
    assert "few files will share" not in "\n".join(checks.doubts(load(tmp_path, BASE + route.format(600))))


def test_the_environment_wins_and_is_not_shown(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        BASE + '[database]\ndsn = "a"\n',
        MINTER_DSN="host=db password=hunter2",
        MINTER_BROKER_URL="amqp://u:hunter2@b/",
    )
    assert loaded.dsn == "host=db password=hunter2"
    assert "hunter2" not in repr(loaded)


def test_a_master_key_is_read_from_a_private_file_or_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(new_master_key() + "\n")
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="open to others"):
        read_master_key("vo", text=None, path=path)
    path.chmod(0o600)
    assert repr(read_master_key("vo", text=None, path=path)) == "MasterKey(vo)"
    for text in ("", "short", "*" * 43):
        with pytest.raises(SettingsError, match="master key of VO 'vo'"):
            read_master_key("vo", text=text, path=None)
    with pytest.raises(SettingsError, match="has no master key"):
        read_master_key("vo", text=None, path=None)


def test_a_ciphertext_opens_only_for_its_row_purpose_and_vo() -> None:
    from minter.errors import NoUsableKey

    material = bytes(range(MASTER_KEY_BYTES))
    key = MasterKey("vo", material)
    sealed = key.encrypt("signing_key", "kid1", b"secret")
    assert key.decrypt("signing_key", "kid1", sealed) == b"secret"
    assert b"secret" not in sealed
    assert key.encrypt("signing_key", "kid1", b"secret") != sealed
    for other, purpose, row in (
        (key, "signing_key", "kid2"),
        (key, "refresh_token", "kid1"),
        (MasterKey("other", material), "signing_key", "kid1"),
    ):
        with pytest.raises(NoUsableKey, match="does not open"):
            other.decrypt(purpose, row, sealed)
    with pytest.raises(NoUsableKey):
        key.decrypt("signing_key", "kid1", sealed[:-1] + bytes([sealed[-1] ^ 1]))


def test_the_examples_are_what_production_would_use() -> None:
    text = (EXAMPLES / "settings.toml").read_text()
    assert "dsn" not in text.lower().replace("minter_dsn", "").replace("the dsn", "")


def test_a_listener_that_is_not_behind_a_web_server_is_doubted(tmp_path: Path) -> None:
    assert not any("http.listen" in d for d in checks.doubts(load(tmp_path, BASE)))
    told = list(checks.doubts(load(tmp_path, BASE + '\n[http]\nlisten = "0.0.0.0"\n')))
    assert any("http.listen is 0.0.0.0" in d for d in told)


def test_an_exchange_of_a_clients_own_token_that_a_rule_names_fails_the_check(tmp_path: Path) -> None:
    """Such a rule loads, and would never allow an exchange for refresh tokens."""
    text = (
        BASE
        + """
[[exchanges]]
name = "own"
clients = ["dirac", "fts*"]
subject_clients = ["rucio", "dirac", "fts*"]
offline_access = true
"""
    )
    (failed,) = checks.failures(load(tmp_path, text))
    assert failed.startswith("exchange rule own: client dirac gets no refresh tokens for its own tokens")
    assert not list(checks.failures(load(tmp_path, text.replace("true", "false"))))
    assert not list(checks.failures(load(tmp_path, text.replace('"rucio", "dirac"', '"rucio"'))))


def test_a_storage_that_verifies_no_key_of_its_issuer_fails_the_check(tmp_path: Path) -> None:
    text = (
        BASE.replace("[issuers.vo]\n", '[issuers.vo]\nalgorithms = ["ES256"]\n')
        + """
[[storages]]
vo = "vo"
name = "OLD"
dialect = "storm"
endpoints = [{ host = "old.example.org" }]
"""
    )
    (failed,) = checks.failures(load(tmp_path, text))
    assert failed.startswith("OLD: dialect storm verifies RS256 only")
    assert not list(checks.failures(load(tmp_path, text.replace('["ES256"]', '["ES256", "RS256"]'))))
