"""Audiences of the token endpoint: the storages that a token is for, and what all of them verify."""

from minter.errors import InvalidTarget
from minter.policy.clients import Client, fits
from minter.policy.subject_tokens import SubjectAuthority
from minter.policy.transfers import Policy
from minter.storages.dialects import BOTH, RSA_ONLY, Matching
from minter.storages.directory import LOOSEST_FIRST, Area
from minter.storages.urls import host_of

ANY = ("https://wlcg.cern.ch/jwt/v1/any",)
"""The audience that every storage of a VO takes (WLCG §4.2)."""


def is_fts(policy: Policy, vo: str, name: str) -> bool:
    """Say whether an audience is that of an FTS of a VO."""
    services = policy.fts[vo]
    host = host_of(name if "//" in name else f"//{name}")
    return host in services or any(name in plan.area.audience for plan in services.values())


class Audience:
    """The audiences of one token, `names`, with the areas of each of their `endpoints`.

    Raises InvalidTarget for an audience that is neither of a storage or FTS, nor listed for the client, and
    for one that the subject token does not have.
    """

    def __init__(
        self, policy: Policy, client: Client, authority: SubjectAuthority | None, asked: tuple[str, ...]
    ) -> None:
        self._policy = policy
        self._client = client
        self._exchanged = authority is not None and authority.ours
        self.names = self._names(authority, asked)
        self.is_any = any(name in ANY for name in self.names)
        self.all_at_storages = True
        """Whether each audience is that of a storage."""
        self.algorithms = BOTH
        """JWS algorithms that every verifier of the audiences takes."""
        self.endpoints = self._endpoints()
        matchings = {area.matching for areas in self.endpoints for area in areas}
        self.matching: Matching = next((m for m in LOOSEST_FIRST if m in matchings), "exact")

    def is_fts(self, name: str) -> bool:
        """Say whether an audience is that of an FTS of the client's VO."""
        return is_fts(self._policy, self._client.vo, name)

    def _names(self, authority: SubjectAuthority | None, asked: tuple[str, ...]) -> tuple[str, ...]:
        if authority is not None and authority.ours:
            if outside := [a for a in asked if a not in authority.audience]:
                raise InvalidTarget(f"audience {outside[0][:200]!r} is not the subject token's")
            return asked or authority.audience
        names = asked or self._client.default_audience
        if not names:
            raise InvalidTarget(
                f"no audience: name one, or set a default for client {self._client.name!r} with: "
                "minter clients change --default-audience"
            )
        return names

    def _endpoints(self) -> list[list[Area]]:
        """Return the endpoints of all audiences, each once."""
        directory = self._policy.directories[self._client.vo]
        found: dict[int, list[Area]] = {}
        for name in self.names:
            if name in ANY:
                endpoints = directory.endpoints()
                known = name in self._client.audiences  # never by an accidental pattern match
            else:
                endpoints = directory.at(name)
                known = bool(endpoints) or self.is_fts(name) or fits(name, self._client.audiences)
            if not (known or self._exchanged):
                raise InvalidTarget(
                    f"audience {name[:200]!r} is of no storage or FTS here, and not listed for client "
                    f"{self._client.name!r}"
                )
            self.all_at_storages &= bool(endpoints)
            if not endpoints and not self.is_fts(name):
                self.algorithms &= RSA_ONLY  # nobody knows what it verifies
            for areas in endpoints:
                found[id(areas)] = areas
                self.algorithms &= frozenset.intersection(*(a.dialect.algorithms for a in areas))
        return list(found.values())
