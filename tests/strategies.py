"""Hypothesis strategies: routes, storages, dialects and requests that often fit each other."""

import uuid
from string import ascii_lowercase
from typing import Any

from hypothesis import strategies as st

from minter.contract.messages import FileOperation, FileRequest, MintRequest
from minter.contract.operations import OPERATIONS
from minter.policy.clients import Client
from minter.policy.limits import HARD_MAX_SECONDS, PROFILE_MAX_SECONDS
from minter.policy.routes import Route
from minter.storages.dialects import DIALECTS
from minter.storages.directory import Endpoint, Storage

REQUEST_ID = uuid.UUID("01a20000-0000-7000-8000-000000000000")

_names = st.text(ascii_lowercase + " #?+=:ü", min_size=1, max_size=6).filter(lambda s: s.strip() == s)
_odd = st.sampled_from(["..", ".", "", "a%2fb", "back\\slash", "nul\x00"])
base_paths = st.sampled_from(["/", "/data", "/data/vo"])


@st.composite
def storages(draw: st.DrawFn) -> list[Storage]:
    """One to three storages, each on hosts of its own, with every dialect."""
    made = []
    for number in range(draw(st.integers(1, 3))):
        base = draw(base_paths)
        prefix = f"{base.rstrip('/')}/{draw(st.sampled_from(['disk', 'tape/pool']))}"
        made.append(
            Storage(
                vo="vo", name=f"SE{number}", endpoints=(Endpoint(f"se{number}.example.org", 443, prefix),),
                base_path=base, dialect=draw(st.sampled_from(sorted(DIALECTS))),
                matching=draw(st.sampled_from([None, "exact", "prefix"])), tape=draw(st.booleans()),
            )
        )  # fmt: skip
    return made


@st.composite
def routes(draw: st.DrawFn) -> list[Route]:
    """One narrow route that may fit or not, then one for everything."""
    long = draw(st.booleans())
    options: dict[str, Any] = {
        "max_lifetime_seconds": HARD_MAX_SECONDS if long else PROFILE_MAX_SECONDS,
        "mitigations": ("narrow_write", "narrow_read", "one_storage") if long else (),
        "risk_assessment": "a document" if long else "",
        "cleanup": draw(st.booleans()),
        "make_parents": draw(st.booleans()),
        "poll_area": draw(st.booleans()),
        "granularity": draw(st.sampled_from(["file", "file", "directory", "storage"])),
        "forbid": tuple(draw(st.sets(st.sampled_from(["stat-needs-read", "parent-needs-scope"])))),
    }
    first = Route(
        name="first", storages=(draw(st.sampled_from(["SE0", "SE1", "*"])),),
        operations=tuple(draw(st.sets(st.sampled_from(OPERATIONS), min_size=1))), **options,
    )  # fmt: skip
    return [first, Route(name="rest", operations=OPERATIONS, **{**options, "poll_area": False})]


@st.composite
def urls(draw: st.DrawFn, made: list[Storage]) -> str:
    storage = draw(st.sampled_from(made))
    door = storage.endpoints[0]
    segments = draw(st.lists(_names, min_size=1, max_size=3))
    if draw(st.integers(0, 19)) == 0:
        segments.insert(0, draw(_odd))
    return f"davs://{door.host}{door.prefix}/{'/'.join(segments)}"


@st.composite
def requests(draw: st.DrawFn, made: list[Storage]) -> MintRequest:
    files = []
    for _ in range(draw(st.integers(1, 3))):
        copies = draw(st.booleans())
        files.append(
            FileRequest(
                sources=tuple(draw(st.lists(urls(made), min_size=1, max_size=3))) if copies else (),
                destinations=(draw(urls(made)),) if copies else (),
                operations=tuple(
                    FileOperation(draw(st.sampled_from([*OPERATIONS, "download", "upload"])), draw(urls(made)))
                    for _ in range(draw(st.integers(0 if copies else 1, 2)))
                ),
                size=draw(st.none() | st.integers(0, 10**13)),
                overwrite=draw(st.booleans()), retry=draw(st.booleans()),
                wait_seconds=draw(st.none() | st.integers(0, 10**6)),
            )
        )  # fmt: skip
    return MintRequest(request_id=REQUEST_ID, files=tuple(files), all_or_nothing=draw(st.booleans()))


@st.composite
def clients(draw: st.DrawFn) -> Client:
    limited = draw(st.integers(0, 4)) == 0
    return Client(
        client_id=1, name="client", vo="vo", sub="sub",
        paths=("/disk",) if limited else (),
        operations=frozenset(draw(st.sets(st.sampled_from(OPERATIONS)))) if limited else frozenset(),
        max_lifetime_seconds=3600 if limited else None,
    )  # fmt: skip
