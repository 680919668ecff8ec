"""Read storages from a Rucio RSE export; warnings tell operators of everything unusual in it.

Both forms of an export are read: `GET /export/` (keyed by RSE name) and `export_data()` (keyed by RSE id).
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from msgspec import Struct, structs

from minter.errors import SettingsError
from minter.scopes import path_contains
from minter.storages.dialects import AudienceForm, Matching
from minter.storages.directory import Endpoint, Storage
from minter.storages.urls import squash

TOKEN_SCHEMES = ("davs", "https")


class RSERule(Struct, frozen=True, forbid_unknown_fields=True):
    """Facts that an export lacks, for RSEs with names that match `rse`; the first matching rule counts."""

    rse: str
    dialect: str = "profile"
    matching: Matching | None = None
    audience_form: AudienceForm | None = None


_ANY = RSERule("*")


def rule_of(name: str, rules: Sequence[RSERule]) -> RSERule:
    """Return the first rule with a pattern that the name matches, else a rule with defaults only."""
    return next((r for r in rules if fnmatchcase(name, r.rse)), _ANY)


def storages_from_export(
    export: Mapping[str, Any],
    vo: str,
    rules: tuple[RSERule, ...] = (),
    audience_form: AudienceForm = "host",
) -> tuple[list[Storage], list[str]]:
    """Return the storages of an export and the warnings that a person should read.

    Audiences default to bare host names: Rucio requests them today, so sites accept them.
    """
    if not isinstance(export.get("rses"), dict):
        raise SettingsError("not a Rucio export: expected an object with the member 'rses'")
    storages: list[Storage] = []
    warnings: list[str] = []
    for key, rse in export["rses"].items():
        name = rse.get("rse") or key
        rule = rule_of(name, rules)
        storage = _storage(name, vo, rse, rule, audience_form, warnings)
        if storage is not None:
            storages.append(storage)
    return storages, warnings


def _storage(
    name: str,
    vo: str,
    rse: Mapping[str, Any],
    rule: RSERule,
    audience_form: AudienceForm,
    warnings: list[str],
) -> Storage | None:
    attributes = rse.get("attributes") or {}
    endpoints = [p for p in rse.get("protocols") or () if p.get("scheme") in TOKEN_SCHEMES]
    if not endpoints:
        warnings.append(f"{name}: no davs protocol, left out")
        return None
    prefixes = [squash(p.get("prefix") or "/") for p in endpoints]
    base_path = squash(attributes.get("oidc_base_path") or "/")
    raw_base = attributes.get("oidc_base_path") or ""
    if raw_base.endswith("/") and raw_base != "/":
        warnings.append(f"{name}: oidc_base_path {raw_base!r} ends in /, read as {base_path!r}")
    if outside := [p for p in prefixes if not path_contains(base_path, p)]:
        warnings.append(
            f"{name}: oidc_base_path {base_path!r} does not hold the prefix {outside[0]!r}; "
            "scopes are relative to / until one of them is corrected"
        )
        base_path = "/"
    elif base_path in prefixes and base_path != "/":
        warnings.append(f"{name}: prefix equals oidc_base_path: scopes begin at the name itself")
    warnings += [
        f"{name}: prefix {p['prefix']!r} begins with //, read as one /"
        for p in endpoints
        if (p.get("prefix") or "").startswith("//")
    ]
    tokens = attributes.get("oidc_support") in (True, "True", "true", "1", 1)
    if attributes.get("sign_url"):
        tokens = False
    if not tokens:
        warnings.append(f"{name}: takes no tokens (no oidc_support, or URLs are signed): X.509 only")
    if rule is _ANY:
        warnings.append(f"{name}: no dialect given, tokens are kept to 6 h")
    storage = Storage(
        vo=vo,
        name=name,
        endpoints=tuple(
            Endpoint(p["hostname"].lower(), int(p.get("port") or 0) or 443, prefix)
            for p, prefix in zip(endpoints, prefixes, strict=True)
        ),
        dialect=rule.dialect,
        base_path=base_path,
        audience_form=rule.audience_form or audience_form,
        matching=rule.matching,
        tape=rse.get("rse_type") == "TAPE" or bool(attributes.get("staging_required")),
        tokens=tokens,
    )
    return structs.replace(storage, endpoints=tuple(dict.fromkeys(storage.endpoints)))
