"""The configuration for sites, and storages from DIRAC's configuration."""

import tomllib
from typing import Any

import msgspec
import pytest

from minter.cli.storages import settings_text
from minter.errors import SettingsError
from minter.storages.dialects import DIALECTS
from minter.storages.directory import Directory, Endpoint, Storage
from minter.storages.from_dirac import storages_from_cfg
from minter.storages.from_rucio import RSERule
from minter.storages.site_config import site_config

ISSUER = "https://tokens.example.org/vo/"
CFG = """
Resources
{
  StorageElementBases
  {
    CERN-EOS
    {
      BackendType = EOS
      WLCGTokenBasePath = /eos/lhcb
      GFAL2_HTTPS
      {
        Host = eoslhcb.cern.ch
        Port = 8443
        Protocol = https
        Path = /eos/lhcb/grid/prod
      }
    }
  }
  StorageElements
  {
    CERN-DST
    {
      BaseSE = CERN-EOS
      TokenSupport = yes
      GFAL2_HTTPS
      {
        Path = /eos/lhcb/grid/prod/dst
      }
    }
    CERN-TAPE
    {
      SEType = T1D0
      HTTPS.1
      {
        Host = ctalhcb.cern.ch
        Port = 0
        Protocol = davs
        Path = /eos/ctalhcb
      }
    }
    OLD-SE
    {
      SRM
      {
        Host = srm.example.org
        Port = 8446
        Protocol = srm
        Path = /old
      }
    }
    ODD-SE
    {
      WLCGTokenBasePath = /elsewhere/
      X
      {
        Host = odd.example.org
        Port = many
        Protocol = https
        Path = /odd
      }
      Y
      {
        Host = odd.example.org
        Port = 443
        Protocol = https
        Path = /odd
      }
    }
  }
}
"""


def test_diracs_storage_elements_become_storages() -> None:
    found, warnings = storages_from_cfg(
        CFG, "lhcb", (RSERule("CERN-DST", "eos", logs_urls=True), RSERule("CERN-*", "cta"))
    )
    by_name = {s.name: s for s in found}
    assert by_name["CERN-DST"] == Storage(
        vo="lhcb", name="CERN-DST", endpoints=(Endpoint("eoslhcb.cern.ch", 8443, "/eos/lhcb/grid/prod/dst"),),
        dialect="eos", base_path="/eos/lhcb", audience_form="url_with_port", logs_urls=True,
    )  # fmt: skip
    assert by_name["CERN-TAPE"].tape
    assert by_name["CERN-TAPE"].endpoints[0].port == 443
    assert by_name["ODD-SE"].base_path == "/"
    assert "OLD-SE" not in by_name
    text = "\n".join(warnings)
    for said in ("OLD-SE: no usable protocol", "CERN-TAPE: no WLCGTokenBasePath", "ODD-SE: X: port 'many' is not a number",
                 "ODD-SE: WLCGTokenBasePath '/elsewhere' does not hold", "ODD-SE: no dialect given"):  # fmt: skip
        assert said in text
    area, path = Directory(found).locate("https://eoslhcb.cern.ch:8443/eos/lhcb/grid/prod/dst/a")
    assert (area.storage, path) == ("CERN-DST", "/grid/prod/dst/a")


@pytest.mark.parametrize("text", ["", "StorageElements = 1", "{{{", "Resources\n{\n"])
def test_what_is_no_dirac_configuration_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="not a DIRAC configuration"):
        storages_from_cfg(text, "lhcb")


def test_imported_storages_are_settings() -> None:
    found, _ = storages_from_cfg(CFG, "lhcb")
    read = tomllib.loads(settings_text(found))["storages"]
    assert msgspec.convert(read, list[Storage]) == found


def fragment(dialect: str, **more: Any) -> str:
    storage = Storage(
        vo="vo", name="SE", endpoints=(Endpoint("se.example.org", 1094, "/data/vo"),), dialect=dialect, base_path="/data", **more
    )  # fmt: skip
    return site_config(storage, Directory([storage]).areas(), ISSUER)


@pytest.mark.parametrize(
    ("dialect", "lines"),
    [
        (
            "xrootd",
            ['audience_json = ["https://se.example.org:1094"]', f"issuer = {ISSUER}", "base_path = /data"],
        ),
        (
            "xrootd-5.5",
            [
                "ofs.authlib libXrdAccSciTokens.so config=/etc/xrootd/scitokens.cfg",
                "xrd.tlsca certfile /etc/pki/tls/certs/ca-bundle.crt",
            ],
        ),
        ("dcache", [f"gplazma.oidc.provider!vo = {ISSUER} -profile=wlcg -prefix=/data"]),
        (
            "storm",
            [
                f"orgs={ISSUER}",
                "wlcgScopeAuthzEnabled=true",
                f"      issuer: {ISSUER}",
                "      enforceAudienceChecks: true",
            ],
        ),
        ("eos", [f"issuer = {ISSUER}", "base_path = /data", "default_user = vo"]),
        ("profile", [f"# issuer:    {ISSUER}"]),
    ],
)
def test_a_fragment_says_issuer_audience_and_base_path(dialect: str, lines: list[str]) -> None:
    text = fragment(dialect)
    assert set(lines) <= set(text.splitlines())
    assert "se.example.org" in text
    tried = dialect.startswith("xrootd")
    assert ("not tried" in text.splitlines()[0]) == (not tried and dialect != "profile")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_fragment_says_what_the_dialect_says(dialect: str) -> None:
    text = " ".join(line.removeprefix("#").strip() for line in fragment(dialect).splitlines())
    row = DIALECTS[dialect]
    told = [row.software, *row.algorithms, *(q.meaning for q in row.quirks), *row.unable.values()]
    assert [words for words in told if words not in text] == []


def test_endpoints_with_base_paths_of_their_own_get_a_fragment_each() -> None:
    storage = Storage(
        vo="vo", name="SE", dialect="xrootd", base_path="/data",
        endpoints=(Endpoint("a.example.org", 1094, "/data/vo"), Endpoint("b.example.org", 1094, "/pool/vo", "/pool")),
    )  # fmt: skip
    text = site_config(storage, Directory([storage]).areas(), ISSUER)
    first, second = text.split("# ── for the servers with audience https://b.example.org:1094")
    assert 'audience_json = ["https://a.example.org:1094"]' in first
    assert "base_path = /data\n" in first
    assert 'audience_json = ["https://b.example.org:1094"]' in second
    assert "base_path = /pool\n" in second
