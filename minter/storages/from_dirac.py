"""Read storages from DIRAC's configuration, a CFG file with the options of its storage elements.

An endpoint is a subsection with a `Protocol` that carries tokens; `WLCGTokenBasePath` is the area that
the storage gives to the issuer. `BaseStorageElements` are read as DIRAC reads them: they give the options
that a storage element does not set itself.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diraccfg import CFG

from minter.errors import SettingsError
from minter.scopes import path_contains
from minter.storages.dialects import AudienceForm
from minter.storages.directory import Endpoint, Storage
from minter.storages.from_rucio import RSERule, rule_of
from minter.storages.urls import squash

TOKEN_PROTOCOLS = ("https", "davs")


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
        base = bases.get(options.get("BaseSE", ""), {})
        storage = _storage(name, _merged(base, options), vo, rule_of(name, rules), audience_form, warnings)
        if storage is not None:
            found.append(storage)
    return found, warnings


def _merged(base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return an element's options merged over those of its base, endpoint by endpoint."""
    merged = {**base, **options}
    for name, value in base.items():
        if isinstance(value, dict) and isinstance(options.get(name), dict):
            merged[name] = {**value, **options[name]}
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
    endpoints = tuple(dict.fromkeys(_endpoints(name, options, warnings)))
    if not endpoints:
        warnings.append(f"{name}: no protocol of {', '.join(TOKEN_PROTOCOLS)}, left out")
        return None
    if not raw_base:
        warnings.append(f"{name}: no WLCGTokenBasePath, so scopes are relative to /; ask the site")
    if outside := [e.prefix for e in endpoints if not path_contains(base_path, e.prefix)]:
        warnings.append(
            f"{name}: WLCGTokenBasePath {base_path!r} does not hold the path {outside[0]!r}; "
            "scopes are relative to / until one of them is corrected"
        )
        base_path = "/"
    if rule.rse == "*":
        warnings.append(f"{name}: no dialect given, tokens are kept to 6 h")
    return Storage(
        vo=vo, name=name, endpoints=endpoints, dialect=rule.dialect, base_path=base_path,
        audience_form=rule.audience_form or audience_form, matching=rule.matching,
        tape=str(options.get("SEType", "")).startswith("T1"),
    )  # fmt: skip


def _endpoints(name: str, options: Mapping[str, Any], warnings: list[str]) -> Iterator[Endpoint]:
    for door, value in options.items():
        if not isinstance(value, dict) or str(value.get("Protocol", "")).lower() not in TOKEN_PROTOCOLS:
            continue
        host, port = str(value.get("Host", "")).lower(), str(value.get("Port", "")) or "0"
        if not host or not port.isdecimal():
            warnings.append(f"{name}: {door} has no usable Host and Port ({host!r}, {port!r}), left out")
            continue
        yield Endpoint(host, int(port) or 443, squash(str(value.get("Path", "/"))))
