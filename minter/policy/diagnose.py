"""Predict how a storage answers a token: each check of a verifier, in its order."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from minter.contract.operations import Operation
from minter.scopes import IMPLIED, encode_path, parent, parse_scopes
from minter.storages.dialects import STAGE_READS, Needed
from minter.storages.directory import Area
from minter.storages.matching import opens
from minter.storages.needed import scopes_needed


class Verdict(NamedTuple):
    """One check: whether the storage passes it, what it is about, and what to correct if not."""

    passes: bool
    check: str
    text: str


def storage_verdicts(
    claims: Mapping[str, Any], algorithm: str, area: Area, path: str, operation: Operation, issuer: str
) -> list[Verdict]:
    """Return the verdicts of a storage on a token for an operation on a VO-relative path of an area.

    Signature, key and times are not looked at: they do not depend on the storage.
    """
    dialect = area.dialect
    version, named = claims.get("wlcg.ver"), claims.get("aud", [])
    audience = {named} if isinstance(named, str) else {str(one) for one in named}
    wanted = set(area.audience)
    found = [
        Verdict(
            claims.get("iss") == issuer, "issuer",
            f"the token's issuer is {claims.get('iss')!r}; the site must trust exactly {issuer!r}",
        ),
        Verdict(
            algorithm in dialect.algorithms, "algorithm",
            f"{dialect.software} verifies {', '.join(sorted(dialect.algorithms))}; the token has {algorithm}",
        ),
        Verdict(
            version == "1.0", "profile", f"wlcg.ver is {version!r}, expected '1.0'"
        ),
        Verdict(
            bool(audience & wanted), "audience",
            f"it is for {', '.join(sorted(audience))}; {area.storage} takes {', '.join(area.audience)}",
        ),
    ]  # fmt: skip
    if operation in dialect.unable:
        found.append(Verdict(False, "operation", dialect.unable[operation]))
    scopes = parse_scopes(str(claims.get("scope", "")))
    for needed in scopes_needed(dialect, [operation]):
        place = path if needed.where == "file" else parent(path)
        has = [s for s in scopes if s.path is not None and _grants(area, s.name, needed)]
        because = f" ({needed.quirk.name}: {needed.quirk.meaning})" if needed.quirk else ""
        found.append(
            Verdict(
                any(opens(area.matching, s.path or "/", place) for s in has), "scope",
                f"{operation} needs {needed.scope}:{encode_path(place)}{because}; the token has "
                f"{claims.get('scope', '')!r}, relative to base path {area.base_path} of {area.storage}",
            )
        )  # fmt: skip
    return found


def _grants(area: Area, name: str, needed: Needed) -> bool:
    """Say whether a scope of this name gives what is needed, at this software."""
    if name == needed.scope or needed.scope in IMPLIED.get(name, ()):
        return True
    return name == "storage.stage" and needed.scope == "storage.read" and STAGE_READS in area.dialect.quirks
