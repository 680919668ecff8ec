"""Issuers told apart by host and path: every VO may have a host of its own, with the issuer at the root.

Each issuer's routes stand below `/@{host}`. The Host header of a request chooses among the hosts, and where
it names none of them, the path does, if it is the path of one host's issuers only: proxies rewrite Host.
"""

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from minter.issuer import well_known
from minter.storages.urls import authority_key


def mounted(issuer: str) -> str:
    """Return the path below which an issuer's endpoints are mounted, which ends in a slash."""
    return f"/@{well_known.issuer_host(issuer)}{urlsplit(issuer).path}"


def endpoint(template: str | None) -> str:
    """Return the path template of a mounted endpoint without its host."""
    return re.sub("^/@[^/]*", "", template or "")


class Hosts:
    """Finds the issuer that a request means."""

    def __init__(self, issuers: Iterable[str]) -> None:
        issuers = tuple(issuers)
        self._prefixes = [(urlsplit(issuer).path, well_known.issuer_host(issuer)) for issuer in issuers]
        self._prefixes += [(f"/{path}", host) for host, path in well_known.places(issuers)]
        self._known = {authority for _, authority in self._prefixes}

    def place(self, host: str | None, path: str) -> str:
        """Return the path under which a request's endpoint is mounted, or the path itself if none is."""
        authority = authority_key(host or "")
        if authority not in self._known:
            authority = self._only(path)
        return f"/@{authority}{path}" if authority else path

    def _only(self, path: str) -> str:
        fitting = [(prefix, authority) for prefix, authority in self._prefixes if path.startswith(prefix)]
        longest = max((len(prefix) for prefix, _ in fitting), default=0)
        hosts = {authority for prefix, authority in fitting if len(prefix) == longest}
        return hosts.pop() if len(hosts) == 1 else ""
