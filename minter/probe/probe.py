"""What a probe tries on a storage: what its dialect promises, allowed and refused alike."""

from collections.abc import Iterator
from datetime import timedelta

from msgspec import structs

from minter.contract.operations import Operation
from minter.errors import PathNotAllowed
from minter.policy.diagnose import Verdict
from minter.probe.asking import CONTENT, Asker, Method, place_of
from minter.probe.causes import cause_of, clock_of, fault
from minter.scopes import check_path, path_contains
from minter.service import Service
from minter.storages.directory import Storage
from minter.storages.urls import squash
from minter.tokens.clock import new_uuid7

EXPIRED = timedelta(minutes=4)
"""How long ago the token was minted that must have expired: three minutes more than it lived."""
PROBED = "storage.probed"
"""Action under which the audit has each probe, with the names of what failed; its subject is VO/storage."""
NOBODY = "https://minter-probe.invalid"


def askers(service: Service, storage: Storage, path: str, client: str, ca: str | None) -> dict[str, Asker]:
    """Return what asks each endpoint of a storage below which a VO-relative path lies, by host and port.

    `ca` is a file or folder of the CAs that signed the storage's certificate, None for the system's. Raises
    InvalidPath for a path that no scope can hold, and PathNotAllowed if it is in no area of the storage.
    """
    check_path(path)
    found = {}
    for endpoint in storage.endpoints:
        place, full = place_of(endpoint), squash(f"{endpoint.base_path or storage.base_path}/{path}")
        if path_contains(squash(endpoint.prefix), full):
            area, _ = service.loaded.policy.directories[storage.vo].locate(f"davs://{place}{full}/any")
            if area.storage == storage.name:
                found[place] = Asker(service, storage, endpoint, area, client, ca)
    if not found:
        raise PathNotAllowed(
            f"path {path!r} is in no area of storage {storage.name!r}; give it as scopes have it, relative "
            f"to the base path {storage.base_path}, below {' or '.join(e.prefix for e in storage.endpoints)}",
            path=path,
            storage=storage.name,
        )
    return found


def write_and_read(asker: Asker, folder: str) -> Iterator[Verdict]:
    """Yield the verdicts on files of the probe's own in a VO-relative folder; they are removed at the end."""
    stem = f"{folder.removesuffix('/')}/minter-probe-{new_uuid7().hex}"
    file, longer, other = stem, f"{stem}0", f"{stem}-other"
    asker.token("delete", file)  # a client that may not remove files must not write them here
    written: list[str] = []
    try:
        for name in (file, longer, other):
            told = asker.ask("PUT", name, asker.token("write", name))
            if told.sent and not told.refused:
                written.append(name)
            if not told.done:
                yield _unanswered(asker, told.why) if told.why else cause_of(asker, told, name, "write")
                break
        else:
            yield Verdict(True, "write", "a token to write a file writes it")
            yield from _writing(asker, file, other)
            yield from _reading(asker, file, other, (file, longer), CONTENT)
    finally:
        stayed = [name for name in written if not _removed(asker, name, "delete")]
        left = [name for name in stayed if not _removed(asker, name, "delete", "read")]
    meaning = "a token to delete a file removes it"
    if left:
        yield fault(asker, "delete", f"{meaning}, but these may be left: {', '.join(left)}")
    elif stayed:
        yield fault(asker, "dialect", f"{meaning}, but here only if the token may read it, too")
    elif written:
        yield Verdict(True, "delete", meaning)


def _removed(asker: Asker, path: str, *operations: Operation) -> bool:
    """Remove a file with a token for these operations; say whether it is gone."""
    told = asker.ask("DELETE", path, asker.token(operations, path))
    return told.done or told.missing


def read_only(asker: Asker, file: str) -> Iterator[Verdict]:
    """Yield the verdicts on a VO-relative file that exists; nothing is written or removed."""
    folder, _, name = file.rpartition("/")
    other = f"{folder}/minter-probe-{new_uuid7().hex}"
    told = asker.ask("GET", file, asker.token("read", file))
    if told.why:
        yield _unanswered(asker, told.why)
    elif not told.done:
        yield cause_of(asker, told, other, "read")
    else:
        alike = (file[:-1], file) if len(name) > 1 else None
        yield from _reading(asker, file, other, alike)


def _unanswered(asker: Asker, why: str) -> Verdict:
    return Verdict(False, "endpoint", f"{place_of(asker.endpoint)} gives no answer: {why}")


def _writing(asker: Asker, file: str, other: str) -> Iterator[Verdict]:
    """Yield the verdicts on tokens that write a file, or only read it, where it and another one exist."""
    write = asker.token("write", file)
    yield _allowed(asker, "dialect", "PROPFIND", file, write, "a token to write a file may look at it")
    yield _refused(asker, "create", "PUT", file, write, "a token to write a new file must not replace one")
    yield _refused(asker, "isolation", "PUT", other, write, "a token to write a file must not write another")
    read = asker.token("read", file)
    yield _refused(asker, "read only", "PUT", file, read, "a token to read a file must not write it")
    yield _refused(asker, "read only", "DELETE", file, read, "a token to read a file must not remove it")
    over = asker.token("overwrite", file)
    yield _allowed(asker, "overwrite", "PUT", file, over, "a token to overwrite a file replaces it")


def _reading(
    asker: Asker, file: str, other: str, alike: tuple[str, str] | None, content: bytes = b""
) -> Iterator[Verdict]:
    """Yield the verdicts on reading a file; the second name of `alike` begins with the first."""
    good = asker.token("read", file)
    head, payload, signature = good.split(".")
    told = asker.ask("GET", file, good)
    meaning = "a token to read a file reads it"
    if told.done and content and told.content != content:
        yield Verdict(False, "server", f"{meaning}, but GET answered with other content than was written")
    elif told.done:
        yield Verdict(True, "read", meaning)
    else:
        yield fault(asker, "read", f"{meaning}, but GET answered {told}")
    yield _allowed(asker, "dialect", "PROPFIND", file, good, "a token to read a file may look at it")
    if alike:
        yield _matching(asker, *alike)
    elsewhere = asker.token("read", other)
    yield _refused(asker, "isolation", "GET", file, elsewhere, "a token for another file must not read it")
    yield _refused(asker, "anonymous", "GET", file, None, "nobody may read without a token")
    nobody = asker.token("read", file, structs.replace(asker.storage, audience=(NOBODY,)))
    yield _refused(asker, "audience", "GET", file, nobody, "a token for another audience must be refused")
    forged = f"{head}.{payload}.{signature[:-8]}{'A' if signature[-8] != 'A' else 'B'}{signature[-7:]}"
    yield _refused(asker, "signature", "GET", file, forged, "a token with a wrong signature must be refused")
    old = asker.token("read", file, at=asker.service.clock() - EXPIRED)
    yield _refused(asker, "expiry", "GET", file, old, "a token that has expired must be refused")
    if (clock := clock_of(asker)) is not None:
        yield clock


def _matching(asker: Asker, shorter: str, longer: str) -> Verdict:
    opens = asker.ask("GET", longer, asker.token("read", shorter)).done
    exact = asker.area.matching == "exact"
    if opens:
        otherwise = 'set matching = "prefix" on the storage' if exact else "which its dialect knows"
        text = f"a token for a file opens files whose names begin with its name; {otherwise}"
    else:
        otherwise = "" if exact else '; once the site confirms it, set matching = "exact"'
        text = f"a token for a file opens no file whose name begins with its name{otherwise}"
    return Verdict(not (opens and exact), "matching", text)


def _allowed(asker: Asker, check: str, method: Method, path: str, token: str, meaning: str) -> Verdict:
    told = asker.ask(method, path, token)
    if told.done:
        return Verdict(True, check, meaning)
    return fault(asker, check, f"{meaning}, but {method} answered {told}")


def _refused(asker: Asker, check: str, method: Method, path: str, token: str | None, meaning: str) -> Verdict:
    told = asker.ask(method, path, token)
    if told.done:
        return fault(asker, check, f"{meaning}, but {method} answered {told}")
    if told.why:
        return Verdict(False, check, f"{meaning}: not known, {told.why}")
    return Verdict(True, check, meaning if told.refused else f"{meaning} (answered {told})")
