"""Read storages from a Rucio RSE export; warnings tell operators of everything unusual in it.

Both forms of an export are read: `GET /export/` (keyed by RSE name) and `export_data()` (keyed by RSE id).
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from msgspec import Struct, structs

from minter.errors import InvalidPath, SettingsError
from minter.scopes import check_path, path_contains
from minter.storages.dialects import HTTPS_PORT, AudienceForm, Matching
from minter.storages.directory import Endpoint, Storage
from minter.storages.urls import host_key, squash

TOKEN_SCHEMES = ("davs", "https")
MAX_PORT = 65_535


class RSERule(Struct, frozen=True, forbid_unknown_fields=True):
    """Facts that an export lacks, for RSEs with names that match `rse`; the first matching rule counts."""

    rse: str
    dialect: str = "profile"
    matching: Matching | None = None
    audience_form: AudienceForm | None = None
    logs_urls: bool = False


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
    storages: list[Storage] = []
    warnings: list[str] = []
    for name, rse in rses_of(export):
        if not isinstance(rse, dict):
            warnings.append(f"{name}: is not described by an object, left out")
            continue
        storage = _storage(name, vo, rse, rule_of(name, rules), audience_form, warnings)
        if storage is not None:
            storages.append(storage)
    return storages, warnings


def rses_of(export: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return name and description of each RSE of an export; raises SettingsError for anything else."""
    if not isinstance(export.get("rses"), dict):
        raise SettingsError("not a Rucio export: expected an object with the member 'rses'")
    return [
        (str((isinstance(rse, dict) and rse.get("rse")) or key), rse) for key, rse in export["rses"].items()
    ]


def _storage(
    name: str,
    vo: str,
    rse: Mapping[str, Any],
    rule: RSERule,
    audience_form: AudienceForm,
    warnings: list[str],
) -> Storage | None:
    given = rse.get("attributes")
    attributes: dict[str, Any] = given if isinstance(given, dict) else {}
    if given and not isinstance(given, dict):
        warnings.append(f"{name}: its attributes are not an object, read as none")
    raw_base = attributes.get("oidc_base_path")
    base_path = _base_path(name, raw_base, warnings)
    endpoints = dict.fromkeys(_endpoints(name, rse.get("protocols"), base_path, warnings))
    if not endpoints:
        warnings.append(f"{name}: no usable davs protocol, left out")
        return None
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
        endpoints=tuple(endpoints),
        dialect=rule.dialect,
        base_path=base_path,
        audience_form=rule.audience_form or audience_form,
        matching=rule.matching,
        tape=rse.get("rse_type") == "TAPE" or bool(attributes.get("staging_required")),
        tokens=tokens,
        logs_urls=rule.logs_urls,
    )
    if all(endpoint.base_path == "/" for endpoint in endpoints) and base_path != "/":
        storage = structs.replace(storage, base_path="/")
    if len({e.prefix for e in endpoints}) > 1:
        warnings.append(
            f"{name}: its protocols have different prefixes; Rucio asks for one token with all scopes, "
            "which holds at each endpoint what that endpoint has"
        )
    return storage


def _base_path(name: str, raw: object, warnings: list[str]) -> str:
    if raw is None or raw == "":
        return "/"
    if not isinstance(raw, str):
        warnings.append(f"{name}: oidc_base_path {raw!r} is not a path, read as '/'")
        return "/"
    base_path = squash(raw)
    if raw.endswith("/") and raw != "/":
        warnings.append(f"{name}: oidc_base_path {raw!r} ends in /, read as {base_path!r}")
    if not raw.startswith("/"):
        warnings.append(
            f"{name}: oidc_base_path {raw!r} has no leading /, read as {base_path!r}; Rucio keeps it"
        )
    return base_path


def _endpoints(name: str, protocols: object, base_path: str, warnings: list[str]) -> Iterator[Endpoint]:
    """Yield the endpoints of the protocols that carry tokens; one that is odd is left out with a warning."""
    for number, protocol in enumerate(protocols if isinstance(protocols, list | tuple) else ()):
        if not isinstance(protocol, dict) or str(protocol.get("scheme")).lower() not in TOKEN_SCHEMES:
            continue
        host, port, raw = protocol.get("hostname"), protocol.get("port"), protocol.get("prefix")
        where = f"{name}: protocol {number} ({protocol.get('scheme')})"
        try:
            endpoint = read_endpoint(host, port, raw)
        except ValueError as error:
            warnings.append(f"{where}: {error}, left out")
            continue
        prefix = endpoint.prefix
        if isinstance(raw, str) and raw.startswith("//"):
            warnings.append(f"{where}: prefix {raw!r} begins with //, read as one /")
        elif isinstance(raw, str) and raw and not raw.startswith("/"):
            warnings.append(
                f"{where}: prefix {raw!r} has no leading /, read as {prefix!r}: Rucio's own scopes for it "
                "are invalid, so Rucio gets no token there"
            )
        if prefix == "/":
            warnings.append(f"{where}: prefix is the whole host")
        if not path_contains(base_path, prefix):
            warnings.append(
                f"{where}: oidc_base_path {base_path!r} does not hold the prefix {prefix!r}; scopes are "
                "relative to / there until one of them is corrected"
            )
            endpoint = structs.replace(endpoint, base_path="/")
        elif base_path == prefix != "/":
            warnings.append(f"{where}: prefix equals oidc_base_path: scopes begin at the name itself")
        yield endpoint


def read_endpoint(host: object, port: object, prefix: object) -> Endpoint:
    """Return an endpoint as a catalogue of storages describes it; raises ValueError for what is odd."""
    if not isinstance(host, str) or not host:
        raise ValueError(f"has no hostname ({host!r})")
    key = host_key(host)
    try:
        number = int(str(port)) if port not in (None, "") else 0
    except ValueError:
        raise ValueError(f"port {port!r} is not a number") from None
    if not 0 <= number <= MAX_PORT:
        raise ValueError(f"port {number} does not exist")
    if prefix is not None and not isinstance(prefix, str):
        raise ValueError(f"prefix {prefix!r} is not a path")
    path = squash(prefix or "/")
    try:
        check_path(path)
    except InvalidPath as error:
        raise ValueError(f"its {error.message}") from None
    return Endpoint(key, number or HTTPS_PORT, path)
