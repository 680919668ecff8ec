"""Fragments that sites paste into a storage's configuration, so that it trusts an issuer's tokens.

The fragment for XRootD was run with the real software; those for dCache, StoRM and EOS follow the
documentation of the software, and say so in their first line.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from minter.storages.directory import Area, Storage

_UNTRIED = "(from its documentation, not tried)"


class Site(NamedTuple):
    """Values that a fragment needs."""

    name: str
    vo: str
    issuer: str
    audiences: tuple[str, ...]
    base_path: str


def site_config(storage: Storage, areas: list[Area], issuer: str) -> str:
    """Return the configuration fragment for one storage, in the format of its software.

    `areas` are the storage's areas in the directory; its tokens have exactly the audiences of these areas.
    """
    audiences = tuple(dict.fromkeys(a for area in areas for a in area.audience))
    site = Site(storage.name, storage.vo, issuer, audiences, areas[0].base_path)
    software = storage.dialect.partition("-")[0]
    return _FORMS.get(software, _plain)(site)


def _xrootd(site: Site) -> str:
    quoted = ", ".join(f'"{audience}"' for audience in site.audiences)
    return f"""# {site.name}: XRootD trusts the tokens of VO {site.vo} (xrootd-scitokens)

# /etc/xrootd/scitokens.cfg
[Global]
audience_json = [{quoted}]
onmissing = deny

[Issuer {site.vo}]
issuer = {site.issuer}
base_path = {site.base_path}

# in the server's configuration
http.header2cgi Authorization authz
ofs.authorize
ofs.authlib libXrdAccSciTokens.so config=/etc/xrootd/scitokens.cfg
# Where other authorisations are in use (an authdb), keep them: write ofs.authlib ++ libXrdAcc…, and
# onmissing = passthrough. Without an authdb the server does not start with ++.
"""


def _dcache(site: Site) -> str:
    return f"""# {site.name}: dCache 8 and later trusts the tokens of VO {site.vo} {_UNTRIED}

# in gplazma.conf, before other auth lines; map the issuer's tokens to the VO's account in your multimap
auth     optional     oidc

# in the layout file, in the domain of gplazma
gplazma.oidc.provider!{site.vo} = {site.issuer} -profile=wlcg -prefix={site.base_path}
gplazma.oidc.audience-targets = {" ".join(site.audiences)}
"""


def _storm(site: Site) -> str:
    audiences = "".join(f"\n        - {audience}" for audience in site.audiences)
    return f"""# {site.name}: StoRM WebDAV trusts the tokens of VO {site.vo} {_UNTRIED}

# /etc/storm/webdav/config/application.yml
oauth:
  issuers:
    - name: {site.vo}
      issuer: {site.issuer}
      audiences:{audiences}

# in the storage area's file in /etc/storm/webdav/sa.d, the area with accessPoints={site.base_path}
orgs={site.issuer}
wlcgScopeAuthzEnabled=true
"""


def _eos(site: Site) -> str:
    return f"""# {site.name}: EOS trusts the tokens of VO {site.vo} {_UNTRIED}

# in /etc/xrd.cf.mgm
mgmofs.macaroonslib libXrdMacaroons.so libXrdAccSciTokens.so

{_xrootd(site).partition(chr(10) * 2)[2].partition("# in the server")[0].rstrip()}
map_subject = false
default_user = {site.vo}
"""


def _plain(site: Site) -> str:
    return f"""# {site.name}: any software that follows the WLCG profile
# issuer:    {site.issuer}
# audience:  {" or ".join(site.audiences)}
# base path: {site.base_path} (the paths of scopes are relative to it)
# Keys: {site.issuer}.well-known/openid-configuration names the JWKS.
"""


_FORMS: Mapping[str, Callable[[Site], str]] = {
    "xrootd": _xrootd,
    "dcache": _dcache,
    "storm": _storm,
    "eos": _eos,
    "cta": _eos,
}
