"""Fragments that sites paste into a storage's configuration, so that it trusts an issuer's tokens.

The fragment for XRootD was run with the real software. Those for dCache, StoRM and EOS follow the
documentation of the software, and say so in their first line.
"""

from collections.abc import Callable, Mapping
from textwrap import wrap
from typing import NamedTuple

from minter.storages.dialects import Dialect
from minter.storages.directory import Area, Storage

_UNTRIED = "(from its documentation, not tried)"
_COLUMNS = 110


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
    Endpoints with base paths of their own get a fragment each. Comments say what the storage's version
    does with tokens, as its dialect has it.
    """
    by_base_path: dict[str, list[Area]] = {}
    for area in areas:
        by_base_path.setdefault(area.base_path, []).append(area)
    software = storage.dialect.partition("-")[0]
    fragments = []
    for base_path, alike in by_base_path.items():
        audiences = tuple(dict.fromkeys(a for area in alike for a in area.audience))
        site = Site(storage.name, storage.vo, issuer, audiences, base_path)
        if len(by_base_path) > 1:
            fragments.append(f"# ── for the servers with audience {' or '.join(audiences)}\n")
        fragments.append(_FORMS.get(software, _plain)(site))
    return "\n".join([*fragments, _facts(areas[0].dialect)])


def _facts(dialect: Dialect) -> str:
    """Return what the version does with tokens, as comments: signatures, departures, what it cannot do."""
    facts = [f"what {dialect.software} does with these tokens (dialect {dialect.name}):"]
    facts += [f"- verifies {' and '.join(sorted(dialect.algorithms))}"]
    facts += [f"- {quirk.name}: {quirk.meaning}" for quirk in dialect.quirks]
    facts += [f"- no {operation}: {why}" for operation, why in dialect.unable.items()]
    return "".join(f"# {line}\n" for fact in facts for line in wrap(fact, _COLUMNS, subsequent_indent="  "))


def _xrootd(site: Site) -> str:
    return f"""# {site.name}: XRootD trusts the tokens of VO {site.vo} (xrootd-scitokens)

# /etc/xrootd/scitokens.cfg
{_scitokens(site)}
# in the server's configuration
http.header2cgi Authorization authz
ofs.authorize
ofs.authlib libXrdAccSciTokens.so config=/etc/xrootd/scitokens.cfg
# Where other authorisations are in use (an authdb), keep them: write ofs.authlib ++ libXrdAcc…, and
# onmissing = passthrough. Without an authdb the server does not start with ++.
# XRootD 5.6.3 and later fetches the issuer's keys with the CAs of this file; name yours, if it has another
# name, and see that the CA of the issuer's web server is in it. Earlier releases use the system's CAs.
xrd.tlsca certfile /etc/pki/tls/certs/ca-bundle.crt
"""


def _scitokens(site: Site) -> str:
    quoted = ", ".join(f'"{audience}"' for audience in site.audiences)
    return f"""[Global]
audience_json = [{quoted}]
onmissing = deny

[Issuer {site.vo}]
issuer = {site.issuer}
base_path = {site.base_path}
"""


def _dcache(site: Site) -> str:
    return f"""# {site.name}: dCache 9.2 and later trusts the tokens of VO {site.vo} {_UNTRIED}

# in gplazma.conf, before other auth lines; map the issuer's tokens to the VO's account in your multimap
auth     optional     oidc

# in the layout file, in the domain of gplazma
gplazma.oidc.provider!{site.vo} = {site.issuer} -profile=wlcg -prefix={site.base_path}
gplazma.oidc.audience-targets = {" ".join(site.audiences)}
"""


def _storm(site: Site) -> str:
    audiences = "".join(f"\n        - {audience}" for audience in site.audiences)
    return f"""# {site.name}: StoRM WebDAV trusts the tokens of VO {site.vo} {_UNTRIED}

# /etc/storm/webdav/config/application.yml; without enforceAudienceChecks, tokens for other storages pass
oauth:
  issuers:
    - name: {site.vo}
      issuer: {site.issuer}
      enforceAudienceChecks: true
      audiences:{audiences}

# in the storage area's file in /etc/storm/webdav/sa.d, the area with accessPoints={site.base_path}
orgs={site.issuer}
wlcgScopeAuthzEnabled=true
"""


def _eos(site: Site) -> str:
    return f"""# {site.name}: EOS trusts the tokens of VO {site.vo} {_UNTRIED}

# in /etc/xrd.cf.mgm
mgmofs.macaroonslib libXrdMacaroons.so libXrdAccSciTokens.so

# /etc/xrootd/scitokens.cfg; percent-encoded scopes are decoded by libscitokens 1.4.1 and later
{_scitokens(site)}map_subject = false
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
