"""Storages as Rucio and DIRAC describe them: odd ones are left out or told, the others are imported."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from minter.policy.clients import Bans, Client
from minter.policy.requests import Request
from minter.policy.token_endpoint import decide
from minter.policy.token_requests import TokenRequest
from minter.policy.transfers import Policy
from minter.scopes import Scope
from minter.storages.directory import Directory, Endpoint, Storage
from minter.storages.from_dirac import storages_from_cfg
from minter.storages.from_rucio import storages_from_export
from minter.storages.urls import host_key
from minter.tokens.clock import new_uuid7, now

CASES = Path(__file__).parents[1] / "vectors" / "fts-cases"


def rucio(name: str) -> tuple[dict[str, Storage], str]:
    found, warnings = storages_from_export(json.loads((CASES / name).read_text()), "norvo")
    return {s.name: s for s in found}, "\n".join(warnings)


def export(protocols: object, **attributes: object) -> tuple[dict[str, Storage], str]:
    rse = {"rse": "ONE", "attributes": {"oidc_support": True, **attributes}, "protocols": protocols}
    nice = {
        "rse": "NICE",
        "attributes": {"oidc_support": True},
        "protocols": [{"scheme": "davs", "hostname": "n", "prefix": "/n"}],
    }
    found, warnings = storages_from_export({"rses": {"1": rse, "2": nice}}, "norvo")
    assert "NICE" in {s.name for s in found}
    return {s.name: s for s in found}, "\n".join(w for w in warnings if not w.startswith("NICE"))


@pytest.mark.parametrize("name", ["missing", "null", "empty", "with-port", "with-scheme"])
def test_an_odd_hostname_leaves_out_its_own_protocol_only(name: str) -> None:
    found, warnings = rucio(f"16-import-odd-hostname/{name}.json")
    assert set(found) == {"NICE_DISK"}
    assert "ODD_DISK: protocol 0 (davs)" in warnings


@pytest.mark.parametrize(
    "odd",
    [
        {"hostname": 5}, {"hostname": "h.example/"}, {"hostname": "u@h"}, {"port": "x"}, {"port": -1}, {"port": 99999},
        {"prefix": 5}, {"prefix": "/a%20b"}, {"prefix": "/a/../b"}, {"prefix": "/a\\b"}, {"hostname": "2001:db8::zz"},
    ],
)  # fmt: skip
def test_an_odd_protocol_is_left_out_and_named(odd: dict[str, Any]) -> None:
    good = {"scheme": "davs", "hostname": "good.example", "port": 443, "prefix": "/g"}
    found, warnings = export([good, {"scheme": "davs", "hostname": "odd.example", "prefix": "/o", **odd}])
    assert [e.host for e in found["ONE"].endpoints] == ["good.example"]
    assert "ONE: protocol 1 (davs)" in warnings
    assert "left out" in warnings


@pytest.mark.parametrize("protocols", [None, {}, [None], "x", [{"scheme": None}]])
def test_what_is_no_protocol_at_all_leaves_the_rse_out(protocols: object) -> None:
    found, warnings = export(protocols)
    assert "ONE" not in found
    assert "no usable davs protocol" in warnings


@pytest.mark.parametrize("attributes", [[], "x", None])
def test_what_are_no_attributes_make_an_rse_without_tokens(attributes: object) -> None:
    rse = {"attributes": attributes, "protocols": [{"scheme": "davs", "hostname": "h", "prefix": "/p"}]}
    (storage,), _ = storages_from_export({"rses": {"X": rse}}, "norvo")
    assert not storage.tokens


def test_each_endpoint_has_its_own_base_path() -> None:
    protocols = [
        {"scheme": "davs", "hostname": "a", "prefix": "/pnfs/vo/data"},
        {"scheme": "davs", "hostname": "b", "prefix": "/other"},
    ]
    found, warnings = export(protocols, oidc_base_path="/pnfs/vo")
    directory = Directory([found["ONE"]])
    assert directory.locate("davs://a/pnfs/vo/data/f")[1] == "/data/f"
    assert directory.locate("davs://b/other/f")[1] == "/other/f"
    assert "does not hold the prefix '/other'" in warnings


def test_a_prefix_without_its_slash_is_read_and_told() -> None:
    found, warnings = rucio("18-prefix-without-slash/export.json")
    assert "/tapemc" in {e.prefix for s in found.values() for e in s.endpoints}
    assert "Rucio's own scopes" in warnings


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("2001:db8::17", "[2001:db8::17]"), ("[2001:DB8:0:0::17]", "[2001:db8::17]"),
        ("[2001:0db8:0000:0000:0000:0000:0000:0017]", "[2001:DB8::17]"), ("SE.Example.ORG", "se.example.org."),
    ],
)  # fmt: skip
def test_hosts_are_compared_as_hosts(written: str, asked: str) -> None:
    assert host_key(written) == host_key(asked)
    found, _ = export([{"scheme": "davs", "hostname": written, "port": 443, "prefix": "/p"}])
    assert Directory([found["ONE"]]).locate(f"davs://{asked}:443/p/f")[1] == "/p/f"


@pytest.mark.parametrize("text", ["h:443", "https://h", "h/p", "a b", "", "-h", "[::1", "::1%eth0"])
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        host_key(text)


def at_token(storages: Iterable[Storage], scope: tuple[str, ...], audience: tuple[str, ...]) -> str:
    policy = Policy({"norvo": Directory(storages)})
    client = Client(client_id=1, name="rucio", vo="norvo", sub="s")
    request = Request(
        new_uuid7(), "token", b"", (), token_request=TokenRequest(scope=scope, audience=audience)
    )
    decision = decide(policy, request, client, {}, Bans(), now(), {}, {}).decision
    return decision.error.reason if decision.error else decision.planned_tokens[0].scope


def test_rucio_gets_one_token_for_the_doors_of_one_rse() -> None:
    found, warnings = rucio("15-rse-with-two-doors/export.json")
    assert "different prefixes" in warnings
    hosts = ("door1.westmark.example", "door2.westmark.example")
    both = ("storage.read:/pnfs/westmark/norvo/", "storage.read:/gate/norvo/")
    assert at_token(found.values(), ("offline_access", *both), hosts) == " ".join(("offline_access", *both))
    assert at_token(found.values(), both[:1], hosts[:1]) == both[0]
    assert at_token(found.values(), ("storage.read:/elsewhere",), hosts) == "invalid_scope"


def test_two_ports_of_one_host_are_doors_too() -> None:
    found, _ = rucio("15-rse-with-two-doors/export-ports.json")
    (storage,) = found.values()
    prefixes = sorted({e.prefix for e in storage.endpoints})
    host = storage.endpoints[0].host
    assert at_token([storage], (f"storage.read:{prefixes[0]}",), (host,)) == f"storage.read:{prefixes[0]}"
    both = tuple(f"storage.read:{p}" for p in prefixes)
    assert at_token([storage], both, (host.upper(),)) == " ".join(both)


def test_a_door_does_not_open_another_storage_that_is_there() -> None:
    found, _ = rucio("15-rse-with-two-doors/export.json")
    other, _ = export(
        [{"scheme": "davs", "hostname": "door2.westmark.example", "prefix": "/pnfs/westmark/norvo/x"}]
    )
    hosts = ("door1.westmark.example", "door2.westmark.example")
    got = at_token([*found.values(), other["ONE"]], ("storage.read:/pnfs/westmark/norvo",), hosts)
    assert got == "storage.read:/pnfs/westmark/norvo/x"  # what both endpoints have
    closed = {**{s.name: s for s in found.values()}}
    import msgspec

    shut = msgspec.structs.replace(other["ONE"], tokens=False)
    assert (
        at_token([*closed.values(), shut], ("storage.read:/pnfs/westmark/norvo",), hosts) == "invalid_scope"
    )


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("storage.read://disk/", "storage.read:/disk"), ("storage.read:/a//b", "storage.read:/a/b"),
        ("storage.read:///", "storage.read:/"), ("storage.modify:/%2Fdisk", "storage.modify:/disk"),
    ],
)  # fmt: skip
def test_repeated_slashes_in_a_scope_are_one(text: str, scope: str) -> None:
    assert str(Scope.parse(text)) == scope


# ── DIRAC ────────────────────────────────────────────────────────────────────────────────────


def dirac(text: str, vo: str = "glimmer") -> tuple[dict[str, Storage], str]:
    found, warnings = storages_from_cfg(text, vo)
    return {s.name: s for s in found}, "\n".join(warnings)


def test_a_vos_own_path_is_taken() -> None:
    text = (CASES / "01-dirac-vopath" / "dirac.cfg").read_text()
    found, warnings = dirac(text)
    (storage,) = found.values()
    assert storage.endpoints == (Endpoint("dav.kueste.example", 8443, "/pool/glimmer/data"),)
    assert storage.base_path == "/pool/glimmer"
    assert "does not hold" not in warnings
    found, warnings = dirac(text, "otter")
    assert next(iter(found.values())).endpoints[0].prefix == "/pool/otter/data"
    assert "does not hold" in warnings
    found, _ = dirac(text, "neither")
    assert next(iter(found.values())).endpoints[0].prefix == "/pool/common"


def test_tokens_only_where_the_element_says_so() -> None:
    found, warnings = dirac((CASES / "02-dirac-tokensupport" / "dirac.cfg").read_text())
    assert {name: s.tokens for name, s in found.items()} == {
        "HAFEN-disk": True, "MOLE-disk": False, "PIER-disk": False,
    }  # fmt: skip
    assert "MOLE-disk: takes no tokens" in warnings
    assert "PIER-disk: takes no tokens" in warnings


ELEMENT = """
Resources
{
  StorageElements
  {
    X
    {
      %s
      HTTPS
      {
        %s
        Protocol = https
        Host = h.example
        Port = 443
        Path = /p
      }
    }
  }
}
"""


@pytest.mark.parametrize("value", ["True", "true", "yes", "Yes", "y", "1"])
def test_spellings_of_yes(value: str) -> None:
    assert dirac(ELEMENT % (f"TokenSupport = {value}", ""))[0]["X"].tokens


@pytest.mark.parametrize("value", ["False", "no", "0", "maybe"])
def test_anything_else_is_no(value: str) -> None:
    assert not dirac(ELEMENT % (f"TokenSupport = {value}", ""))[0]["X"].tokens


@pytest.mark.parametrize(
    ("element", "section", "said"),
    [
        ("VO = otter", "", "for VO otter only"), ("Alias = Y", "", "another name of"),
        ("", "Access = local", "local access only"), ("", "Host = https://h", "not a host"),
    ],
)  # fmt: skip
def test_who_may_use_an_element_and_how(element: str, section: str, said: str) -> None:
    text = ELEMENT % (element, section)
    if section.startswith("Host"):
        text = text.replace("        Host = h.example\n", "")
    found, warnings = dirac(text)
    assert "X" not in found
    assert said in warnings


def test_an_element_for_several_vos_is_ours_too() -> None:
    assert "X" in dirac(ELEMENT % ("VO = otter, glimmer", ""))[0]
