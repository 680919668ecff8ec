"""Find out why a storage refuses a token that it should take, by asking with what else it takes one."""

from collections.abc import Iterator, Sequence

from msgspec import structs

from minter.contract.operations import Operation
from minter.policy.audiences import ANY
from minter.policy.diagnose import Verdict
from minter.probe.asking import Asker, StorageAnswer
from minter.storages.dialects import HTTPS_PORT, AudienceForm, audience
from minter.storages.site_config import site_config
from minter.storages.urls import host_key, squash

FORMS: Sequence[AudienceForm] = ("url_with_port", "url", "host_with_port", "host")
MAX_SKEW_SECONDS = 30
"""Largest difference between a storage's clock and ours that is called right: XRootD has no leeway."""
_CONFLICT = 409


def cause_of(asker: Asker, told: StorageAnswer, path: str, operation: Operation) -> Verdict:
    """Return the first cause that is found of an answer to a right token for an operation on a path.

    The path should be one that nobody can guess: tokens for any audience, or relative to other base paths,
    are tried on it.
    """
    return next(_causes(asker, told, path, operation))


def _causes(asker: Asker, told: StorageAnswer, path: str, operation: Operation) -> Iterator[Verdict]:
    if not told.refused:
        why = f"{operation} of {path} answered {told}, which says nothing of tokens; is the path right?"
        yield Verdict(False, "path" if told.missing or told.status == _CONFLICT else "server", why)
    if (clock := clock_of(asker)) is not None and not clock.passes:
        yield clock
    token = asker.token("read", path)
    if operation != "read" and asker.takes(path, token):
        yield fault(asker, "rights", f"the token is taken, but it may not {operation} {path} ({told})")
    if asker.takes(path, token, in_url=True):
        yield fault(asker, "header", "a token is read in a URL, but not in the header Authorization")
    yield from _other_settings(asker, path)
    why = (
        f"it refuses every token ({told}): it trusts another issuer, or cannot fetch the issuer's keys (see "
        "its log), or keeps the issuer to other paths, or several settings are wrong at once"
    )
    yield fault(asker, "trust", why)


def clock_of(asker: Asker) -> Verdict | None:
    """Return the verdict on the storage's clock, None if it does not tell its time."""
    if asker.skew is None:
        return None
    text = f"the storage's clock is {asker.skew:+.0f} s from ours, at most {MAX_SKEW_SECONDS} s are right"
    return Verdict(abs(asker.skew) <= MAX_SKEW_SECONDS, "clock", text)


def _other_settings(asker: Asker, path: str) -> Iterator[Verdict]:
    """Yield the settings under which a token to read a file would be taken."""
    area = asker.area
    ours = " or ".join(area.audience)
    for named in _audiences(asker):
        if asker.reads(path, audience=(named,)):
            yield fault(asker, "audience", f"it takes tokens for {named}, the settings say {ours}")
    if asker.reads(path, audience=ANY):
        yield fault(asker, "audience", f"it takes tokens for any audience, but not for {ours}")
    alone = (structs.replace(asker.endpoint, base_path=""),)
    for base_path in _base_paths(asker):
        if asker.reads(path, base_path=base_path, endpoints=alone, audience=area.audience):
            why = f"its base path is {base_path}, the settings say {area.base_path}"
            yield fault(asker, "base path", why)
    ours_too = asker.service.loaded.settings.issuers[area.vo].algorithms
    if len(area.dialect.algorithms.intersection(ours_too)) > 1 and asker.reads(
        path, dialect="profile", audience=area.audience, matching=area.matching
    ):
        why = f"it verifies RS256 only, and its dialect {area.dialect.name} says both"
        yield fault(asker, "algorithm", why)


def _audiences(asker: Asker) -> Iterator[str]:
    """Yield the audiences that the endpoint would have in other forms."""
    for form in FORMS:
        named = audience(form, host_key(asker.endpoint.host), asker.endpoint.port or HTTPS_PORT)
        if named not in asker.area.audience:
            yield named


def _base_paths(asker: Asker) -> Iterator[str]:
    """Yield what else may be the base path: the paths from the root to the endpoint's prefix."""
    parts = squash(asker.endpoint.prefix).split("/")[1:]
    for path in dict.fromkeys(["/", *(f"/{'/'.join(parts[: n + 1])}" for n in range(len(parts)))]):
        if path != asker.area.base_path:
            yield path


def fault(asker: Asker, check: str, text: str) -> Verdict:
    """Return the failed verdict of a check, with what to change."""
    return Verdict(False, check, f"{text}; {_cure(asker, check)}")


def _cure(asker: Asker, check: str) -> str:
    """Return the lines of the site's configuration that decide a check, or other advice."""
    area, issuer = asker.area, asker.service.loaded.issuers[asker.area.vo]
    words = {
        "audience": (*area.audience, "enforceAudienceChecks"),
        "trust": ("issuer =", "issuer:", f"= {issuer}", "orgs="),
        "base path": tuple(name + area.base_path for name in ("base_path = ", "-prefix=", "accessPoints=")),
        "anonymous": ("onmissing =", "ofs.authorize", "ofs.authlib libXrd"),
        "header": ("http.header2cgi",),
    }.get(check, ())
    config = site_config(asker.storage, [area], issuer).splitlines()
    lines = [line.strip() for line in config if any(word in line for word in words)]
    if lines:
        return f"the site's configuration must say: {' | '.join(lines)}"
    return {
        "dialect": f"does the site run {area.dialect.software}? Set the dialect of its version",
        "algorithm": 'set a dialect that verifies RS256 only, such as "profile"',
    }.get(check, "see the rights of the account that tokens are mapped to, and other authorisations there")
