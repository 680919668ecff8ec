import json

import pytest

from minter.contract.operations import OPERATIONS, Operation
from minter.errors import (
    EndpointTakesNoToken,
    InvalidPath,
    MinterError,
    PathNotAllowed,
    SettingsError,
    UnknownStorage,
)
from minter.scopes import parse_scopes, path_contains
from minter.storages.dialects import DIALECTS, AudienceForm, Dialect, audience
from minter.storages.directory import Directory, Endpoint, Storage
from minter.storages.from_rucio import RSERule, storages_from_export
from minter.storages.needed import scopes_needed
from minter.storages.urls import check_fts_url, signed_url, split_url
from tests.conftest import EXAMPLES

DISK = Storage(vo="vo", name="DISK", base_path="/eos/vo",
               endpoints=(Endpoint("Door.example.org", 443, "/eos/vo/disk/"), Endpoint("door.example.org", 443, "/eos/vo/disk/group")))  # fmt: skip
DIRECTORY = Directory([DISK])
PREFIX = "davs://door.example.org/eos/vo/disk"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        (f"{PREFIX}/f", "/disk/f"),
        ("davs://DOOR.example.ORG:443/eos/vo/disk/f", "/disk/f"),
        ("https://door.example.org:0/eos/vo/disk/f", "/disk/f"),
        ("davs://door.example.org:/eos/vo/disk/f", "/disk/f"),
        ("davs://door.example.org//eos/vo//disk///f", "/disk/f"),
        (f"{PREFIX}/run#17/q?x=1&y=2.h5", "/disk/run#17/q?x=1&y=2.h5"),
        (f"{PREFIX}/run 17/det A.h5", "/disk/run 17/det A.h5"),
        (f"{PREFIX}/Müller/日本", "/disk/Müller/日本"),
        (f"{PREFIX}/f?copy_mode=push", "/disk/f"),
        (f"{PREFIX}/f?copy_mode=other", "/disk/f?copy_mode=other"),
        (f"{PREFIX}/ends with ", "/disk/ends with "),
    ],
)
def test_rucios_urls_as_they_are(url: str, path: str) -> None:
    assert DIRECTORY.locate(url)[1] == path


@pytest.mark.parametrize(
    ("url", "error", "why"),
    [
        (f"{PREFIX}/../../../etc/passwd", InvalidPath, "'.' or '..' segment"),
        (f"{PREFIX}/..", InvalidPath, "'.' or '..' segment"),
        (f"{PREFIX}/a/%2e%2e/b", InvalidPath, "'%'"),
        (f"{PREFIX}/a/%252e%252e/b", InvalidPath, "'%'"),
        (f"{PREFIX}/a/..%2fb", InvalidPath, "'%'"),
        (f"{PREFIX}/a\\..\\b", InvalidPath, "'\\\\\\\\'"),
        (f"{PREFIX}/a/", InvalidPath, "segment"),
        (PREFIX, InvalidPath, "names the whole of storage 'DISK'"),
        (f"{PREFIX}/", InvalidPath, "names the whole of storage 'DISK'"),
        (f"{PREFIX}//", InvalidPath, "names the whole of storage 'DISK'"),
        (f"{PREFIX}/f?authz=Bearer%20secret", InvalidPath, "carries credentials"),
        (f"{PREFIX}2/f", PathNotAllowed, "outside the area of storage 'DISK'"),
        ("davs://door.example.org/etc/passwd", PathNotAllowed, "outside the area"),
        ("davs://door.example.org", InvalidPath, "has no path"),
        ("davs://doors.example.org/eos/vo/disk/f", UnknownStorage, "nearest known are door.example.org:443"),
        ("davs://door.example.org:8443/eos/vo/disk/f", UnknownStorage, "door.example.org:443"),
        ("davs://user@door.example.org/eos/vo/disk/f", UnknownStorage, "cannot read"),
        ("http://door.example.org/eos/vo/disk/f", EndpointTakesNoToken, "has no TLS"),
        ("root://door.example.org//eos/vo/disk/f", EndpointTakesNoToken, "has no TLS"),
        ("s3s://door.example.org/eos/vo/disk/f", EndpointTakesNoToken, "is signed elsewhere"),
        ("ftp://door.example.org/eos/vo/disk/f", EndpointTakesNoToken, "is not known"),
        ("/eos/vo/disk/f", UnknownStorage, "cannot read"),
        (f"{PREFIX}/{'x' * 4096}", InvalidPath, "too long"),
    ],
)
def test_what_is_odd_or_unknown_is_refused_with_a_reason(
    url: str, error: type[MinterError], why: str
) -> None:
    with pytest.raises(error) as caught:
        DIRECTORY.locate(url)
    assert why.replace("\\\\\\\\", "\\\\") in caught.value.message
    assert "secret" not in str(caught.value) + str(caught.value.fields)


def test_the_longest_prefix_wins_and_two_claims_on_one_must_agree() -> None:
    inner = Storage(
        vo="vo",
        name="INNER",
        base_path="/",
        endpoints=(Endpoint("door.example.org", 443, "/eos/vo/disk/group/g"),),
    )
    assert Directory([DISK, inner]).locate(f"{PREFIX}/group/g/f")[0].storage == "INNER"
    assert Directory([DISK, inner]).locate(f"{PREFIX}/group/gg")[0].storage == "DISK"
    other = Storage(vo="vo", name="OTHER", base_path="/eos", endpoints=DISK.endpoints)
    with pytest.raises(SettingsError, match="share"):
        Directory([DISK, other])


def test_a_storage_without_token_support_is_known_but_refused() -> None:
    x509 = Storage(vo="vo", name="OLD", tokens=False, endpoints=(Endpoint("old.example.org"),))
    with pytest.raises(EndpointTakesNoToken, match="takes no tokens"):
        Directory([x509]).locate("davs://old.example.org/f")


@pytest.mark.parametrize(
    ("form", "port", "expected"),
    [
        ("url", 8443, "https://h"), ("url_with_port", 8443, "https://h:8443"), ("url_with_port", 443, "https://h"),
        ("host", 8443, "h"), ("host_with_port", 8443, "h:8443"), ("host_with_port", 443, "h"),
    ],
)  # fmt: skip
def test_audience_forms(form: AudienceForm, port: int, expected: str) -> None:
    assert audience(form, "h", port) == expected


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda d: d.name)
def test_every_dialect_answers_every_operation_and_names_its_sources(dialect: Dialect) -> None:
    assert set(dialect.scopes) == set(OPERATIONS)
    assert dialect.source
    for needed in (n for group in dialect.scopes.values() for n in group):
        assert needed.quirk is None or needed.quirk in dialect.quirks
    assert all(q.source and q.meaning for q in dialect.quirks)
    assert dialect.max_token_bytes <= 16_000


def _scopes(dialect: str, *operations: Operation) -> set[tuple[str, str]]:
    return {(n.scope, n.where) for n in scopes_needed(DIALECTS[dialect], operations)}


def test_the_dialect_table_says_what_was_tried() -> None:
    assert _scopes("xrootd", "write") == {("storage.create", "file")}
    assert _scopes("xrootd", "overwrite", "retry", "make_parents") == {("storage.modify", "file")}
    assert _scopes("xrootd-5.5", "write") == {("storage.create", "file"), ("storage.read", "file")}
    assert _scopes("xrootd-5.5", "delete") == {("storage.modify", "file"), ("storage.read", "file")}
    assert _scopes("xrootd-5.5", "write", "make_parents") == {
        ("storage.create", "file"), ("storage.read", "file"), ("storage.create", "parent"), ("storage.read", "parent"),
    }  # fmt: skip
    assert _scopes("storm-cnaf", "overwrite") == {
        ("storage.modify", "file"), ("storage.read", "file"), ("storage.read", "parent"),
    }  # fmt: skip
    assert _scopes("dcache", "stage", "poll") == {("storage.stage", "file")}
    assert _scopes("dcache", "stage", "read") == {("storage.stage", "file"), ("storage.read", "file")}


# ── Rucio's own words ────────────────────────────────────────────────────────────────────────

EXPORT = json.loads((EXAMPLES / "rucio-41.5/rses-export.json").read_text())
PAIRS = {p["rse"]: p for p in json.loads((EXAMPLES / "rucio-41.5/pairs.json").read_text())}
STORAGES, WARNINGS = storages_from_export(EXPORT, "vo", (RSERule("*"),))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
def test_ours_is_inside_what_rucio_asks_for(storage: Storage) -> None:
    pair = PAIRS[storage.name]
    directory = Directory([storage])
    asked = pair["transfer_destination"]
    hosts = asked["audience"].split()
    if not storage.tokens:
        assert not pair["oidc_support"] or storage.name == "KELP-T3_OBJECTSTORE"
        return
    if "//" in asked["scope"]:  # Rucio does not shorten //eos by /eos, so its scope matches no file
        assert storage.name == "ISOLA-T0_CTATAPE"
        return
    rse_wide = {s.path for s in parse_scopes(_repaired(asked["scope"])) if s.path}
    for door in storage.endpoints:
        area, path = directory.locate(f"davs://{door.host}:{door.port}{door.prefix}/scope/name")
        assert area.audience[0] in hosts
        assert any(path_contains(wide, path) for wide in rse_wide)


def _repaired(scope: str) -> str:
    """Rucio's string prefixes lose the leading slash or the whole path; Rucio means a path below /."""
    words = (w.partition(":") for w in scope.split())
    return " ".join(f"{n}:/{p.lstrip('/')}" for n, c, p in words if c)


def test_every_surprise_of_the_export_is_said() -> None:
    said = "\n".join(WARNINGS)
    for fragment in ("CEDRO-T2_DATADISK: oidc_base_path '/atlas/' ends in /", "begins with //", "prefix equals oidc_base_path",
                     "JURA-T3_LOCALGROUPDISK: takes no tokens", "KELP-T3_OBJECTSTORE: takes no tokens"):  # fmt: skip
        assert fragment in said


def test_an_export_keyed_by_id_gives_the_same_storages() -> None:
    import gzip

    core = json.loads(gzip.decompress((EXAMPLES / "rucio-41.5/rses-export-core.json.gz").read_bytes()))
    assert set(core["rses"]) != set(EXPORT["rses"])
    assert sorted(storages_from_export(core, "vo", (RSERule("*"),))[0], key=str) == sorted(STORAGES, key=str)


def test_a_base_path_that_only_looks_like_a_prefix_is_not_cut() -> None:
    rse = {"protocols": [{"scheme": "davs", "hostname": "h", "port": 443, "prefix": "/a/data2/"}],
           "attributes": {"oidc_base_path": "/a/data", "oidc_support": True}}  # fmt: skip
    (storage,), warnings = storages_from_export({"rses": {"X": rse}}, "vo")
    assert storage.base_path == "/"
    assert Directory([storage]).locate("davs://h/a/data2/f")[1] == "/a/data2/f"
    assert any("does not hold the prefix" in w for w in warnings)


def test_port_zero_means_none() -> None:
    assert split_url("davs://h:0/f") == ("h", 443, "/f")
    rse = {
        "protocols": [{"scheme": "davs", "hostname": "H", "port": 0, "prefix": ""}],
        "attributes": {"oidc_support": True},
    }
    (storage,), _ = storages_from_export({"rses": {"X": rse}}, "vo")
    assert storage.endpoints == (Endpoint("h", 443, "/"),)


@pytest.mark.parametrize("url", ["https://[::1", "davs://[x]/a", "davs://se.example.org]/a", "davs://a[b/c"])
def test_a_url_that_ftss_parser_cannot_read_is_refused(url: str) -> None:
    with pytest.raises(UnknownStorage, match="cannot read the host"):
        check_fts_url(url)


def test_a_site_that_logs_urls_is_named_by_a_rule() -> None:
    found, _ = storages_from_export(EXPORT, "vo", (RSERule("*", logs_urls=True),))
    assert found
    assert all(storage.logs_urls for storage in found)
    assert not any(storage.logs_urls for storage in STORAGES)


@pytest.mark.parametrize(
    ("url", "signed"),
    [
        (
            "davs://se.example.org:443/data/a b%20#?",
            "https://se.example.org/data/a%20b%2520%23%3F?authz=T.O.K",
        ),
        ("https://[2001:DB8::1]:8443//data//é", "https://[2001:db8::1]:8443/data/%C3%A9?authz=T.O.K"),
        ("davs://se.example.org/data/a?copy_mode=push", "https://se.example.org/data/a?authz=T.O.K"),
        ("roots://se.example.org/data/a", "roots://se.example.org:1094//data/a?authz=Bearer%20T.O.K"),
    ],
)
def test_a_signed_url_is_encoded_once(url: str, signed: str) -> None:
    assert signed_url(url, "authz=", "T.O.K") == signed
