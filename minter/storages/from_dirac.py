"""Read storages from DIRAC's configuration, a CFG file with the options of its storage elements.

An endpoint is a subsection with a `Protocol` that carries tokens; `WLCGTokenBasePath` is the area that
the storage gives to the issuer. `BaseStorageElements` are read as DIRAC reads them: they give the options
that a storage element does not set itself.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diraccfg import CFG
from msgspec import structs

from minter.errors import SettingsError
from minter.scopes import path_contains
from minter.storages.dialects import AudienceForm
from minter.storages.directory import Endpoint, Storage
from minter.storages.from_rucio import RSERule, read_endpoint, rule_of
from minter.storages.urls import squash

TOKEN_PROTOCOLS = ("https", "davs")
YES = ("true", "yes", "y", "1")
"""Values that DIRAC reads as true."""


def storages_from_cfg(
    text: str, vo: str, rules: tuple[RSERule, ...] = (), audience_form: AudienceForm = "url_with_port"
) -> tuple[list[Storage], list[str]]:
    """Return the storages of a DIRAC configuration and the warnings that a person should read.

    Raises SettingsError if `text` is not a DIRAC configuration, or has no storage elements.
    """
    try:
        tree: dict[str, Any] = CFG().loadFromBuffer(text).getAsDict()
    except Exception as error:  # diraccfg raises whatever its parser trips over
        raise SettingsError(f"not a DIRAC configuration: {type(error).__name__}") from error
    resources = tree.get("Resources", tree)
    elements = resources.get("StorageElements")
    if not isinstance(elements, dict):
        raise SettingsError("not a DIRAC configuration: expected a section StorageElements")
    bases = {**(resources.get("StorageElementBases") or {}), **(resources.get("BaseStorageElements") or {})}
    warnings: list[str] = []
    found = []
    for name, options in elements.items():
        if not isinstance(options, dict):
            continue
        base = bases.get(options.get("BaseSE", "")) or elements.get(options.get("BaseSE", "")) or {}
        merged = _merged(base, options)
        if "Alias" in options:
            warnings.append(f"{name}: is another name of {options['Alias']!r}, left out")
            continue
        allowed = [v.strip() for v in str(merged.get("VO", "")).split(",") if v.strip()]
        if allowed and vo not in allowed:
            warnings.append(f"{name}: is for VO {', '.join(allowed)} only, left out")
            continue
        storage = _storage(name, merged, vo, rule_of(name, rules), audience_form, warnings)
        if storage is not None:
            found.append(storage)
    return found, warnings


def _merged(base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return an element's options merged over its base's, section by section; empty values do not count."""
    merged = dict(base)
    for name, value in options.items():
        below = merged.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[name] = _merged(below, value)
        elif value not in ("", None) or name not in merged:
            merged[name] = value
    return merged


def _storage(
    name: str,
    options: Mapping[str, Any],
    vo: str,
    rule: RSERule,
    audience_form: AudienceForm,
    warnings: list[str],
) -> Storage | None:
    raw_base = str(options.get("WLCGTokenBasePath", ""))
    base_path = squash(raw_base)
    endpoints = tuple(dict.fromkeys(_endpoints(name, options, vo, warnings)))
    if not endpoints:
        warnings.append(f"{name}: no usable protocol of {', '.join(TOKEN_PROTOCOLS)}, left out")
        return None
    if not raw_base:
        warnings.append(f"{name}: no WLCGTokenBasePath, so scopes are relative to /; ask the site")
    if outside := [e.prefix for e in endpoints if not path_contains(base_path, e.prefix)]:
        warnings.append(
            f"{name}: WLCGTokenBasePath {base_path!r} does not hold the path {outside[0]!r}; "
            "scopes are relative to / there until one of them is corrected"
        )
        endpoints = tuple(
            e if path_contains(base_path, e.prefix) else structs.replace(e, base_path="/") for e in endpoints
        )
    tokens = str(options.get("TokenSupport", "")).strip().lower() in YES
    if not tokens:
        warnings.append(f"{name}: takes no tokens (TokenSupport is not true): X.509 only")
    warnings += [
        f"{name}: {access} is {options[access]}; DIRAC does not use it, and Minter still gives tokens for it"
        for access in ("ReadAccess", "WriteAccess", "RemoveAccess")
        if str(options.get(access, "Active")).lower() in ("banned", "inactive")
    ]
    if rule.rse == "*":
        warnings.append(f"{name}: no dialect given, tokens are kept to 6 h")
    return Storage(
        vo=vo, name=name, endpoints=endpoints, dialect=rule.dialect,
        base_path="/" if all(e.base_path == "/" for e in endpoints) else base_path,
        audience_form=rule.audience_form or audience_form, matching=rule.matching,
        tape=str(options.get("SEType", "")).upper().startswith("T1"), tokens=tokens, logs_urls=rule.logs_urls,
    )  # fmt: skip


def _endpoints(name: str, options: Mapping[str, Any], vo: str, warnings: list[str]) -> Iterator[Endpoint]:
    """Yield the endpoints that carry tokens, with the VO's own path (VOPath) where there is one."""
    for section, value in options.items():
        if not isinstance(value, dict) or str(value.get("Protocol", "")).lower() not in TOKEN_PROTOCOLS:
            continue
        if str(value.get("Access", "remote")).lower() == "local":
            warnings.append(f"{name}: {section} is for local access only, left out")
            continue
        paths = value.get("VOPath")
        own = paths.get(vo) if isinstance(paths, dict) else None
        try:
            yield read_endpoint(value.get("Host"), value.get("Port"), str(own or value.get("Path") or "/"))
        except ValueError as error:
            warnings.append(f"{name}: {section}: {error}, left out")
