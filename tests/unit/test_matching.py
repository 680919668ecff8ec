"""Paths that match as strings: limits, bans and neighbours are compared as the storage compares them."""

from collections.abc import Iterable

import pytest

from minter.contract.messages import FileOperation, FileRequest, MintRequest
from minter.errors import Banned, InvalidPath, MinterError, PathNotAllowed
from minter.policy.clients import Ban, Bans, Client
from minter.policy.requests import from_mint
from minter.policy.transfers import Policy
from minter.storages.dialects import DIALECTS, Matching
from minter.storages.directory import Directory, Endpoint, Storage
from minter.storages.matching import opens, touches, write_path
from minter.tokens.clock import new_uuid7


@pytest.mark.parametrize(
    ("matching", "granted", "path", "expected"),
    [
        ("exact", "/vo/bob", "/vo/bob", True),
        ("exact", "/vo/bob", "/vo/bob/x", True),
        ("exact", "/vo/bob", "/vo/bobby", False),
        ("exact", "/", "/vo", True),
        ("prefix", "/vo/bob", "/vo/bobby", True),
        ("prefix", "/vo/bob", "/vo/bo", False),
        ("prefix", "/vo/b.b", "/vo/bob", False),
        ("pattern", "/vo/b.b", "/vo/bob/x", True),
        ("pattern", "/vo/bob", "/vo/b.b", False),
        ("pattern", "/vo/bob", "/vo/bobby", True),
    ],
)
def test_what_a_scope_opens(matching: Matching, granted: str, path: str, expected: bool) -> None:
    assert opens(matching, granted, path) is expected


@pytest.mark.parametrize(
    ("matching", "granted", "area", "expected"),
    [
        ("exact", "/vo", "/vo/bob", True),
        ("exact", "/vo/bo", "/vo/bob", False),
        ("exact", "/vo/bobby", "/vo/bob", False),
        ("prefix", "/vo/bo", "/vo/bob", True),
        ("prefix", "/vo/bobby", "/vo/bob", False),
        ("prefix", "/vo/bob/x", "/vo/bob", True),
        ("pattern", "/vo/b.b", "/vo/bob", True),
        ("pattern", "/vo/b.b/x", "/vo/bob", True),
        ("pattern", "/vo/b.bby/x", "/vo/bob", False),
    ],
)
def test_what_a_scope_touches_of_an_area(matching: Matching, granted: str, area: str, expected: bool) -> None:
    assert touches(matching, granted, area) is expected


STRINGS = ["xrootd-5.5", "storm", "profile", "eos"]


def decide(
    dialect: str,
    path: str,
    *,
    client: Client | None = None,
    bans: Iterable[Ban] = (),
    more: Iterable[Storage] = (),
) -> MinterError | None:
    made = Storage(vo="vo", name="SE", endpoints=(Endpoint("se.example.org", 443, "/vo"),), dialect=dialect)
    request = from_mint(
        MintRequest(
            request_id=new_uuid7(),
            files=(FileRequest(operations=(FileOperation("read", f"davs://se.example.org{path}"),)),),
        )
    )
    client = client or Client(client_id=1, name="me", vo="vo", sub="s")
    decision = Policy({"vo": Directory([made, *more])}).decide(request, client, Bans(bans))
    return decision.refused[0].error if decision.refused else None


def limited(*paths: str) -> Client:
    return Client(client_id=1, name="me", vo="vo", sub="s", paths=paths)


@pytest.mark.parametrize("dialect", STRINGS)
def test_a_client_limited_to_a_directory_gets_what_lies_strictly_below_it(dialect: str) -> None:
    mine = limited("/vo/user/bob")
    assert decide(dialect, "/vo/user/bob/f", client=mine) is None
    refused = decide(dialect, "/vo/user/bob", client=mine)
    assert isinstance(refused, PathNotAllowed)
    assert "strictly below" in refused.message
    assert decide("xrootd", "/vo/user/bob", client=mine) is None  # exact: no neighbour is opened


@pytest.mark.parametrize("dialect", STRINGS)
def test_a_ban_covers_the_names_that_open_what_is_banned(dialect: str) -> None:
    bans = [Ban("path", "/vo/bob")]
    assert isinstance(decide(dialect, "/vo/bo", bans=bans), Banned)
    assert isinstance(decide(dialect, "/vo/bob/f", bans=bans), Banned)
    assert decide(dialect, "/vo/bobby", bans=bans) is None
    assert decide("xrootd", "/vo/bo", bans=bans) is None


@pytest.mark.parametrize("dialect", STRINGS)
@pytest.mark.parametrize("audience", [(), ("https://other.example.org",)])
def test_no_token_opens_the_storage_beside_it(dialect: str, audience: tuple[str, ...]) -> None:
    beside = Storage(
        vo="vo", name="BESIDE", dialect=dialect, audience=audience,
        endpoints=(Endpoint("se.example.org", 443, "/vo/data2"),),
    )  # fmt: skip
    refused = decide(dialect, "/vo/data", more=[beside])
    assert isinstance(refused, PathNotAllowed)
    assert "/vo/data2" in refused.message
    assert decide(dialect, "/vo/data2/f", more=[beside]) is None
    assert decide(dialect, "/vo/data3", more=[beside]) is None


def test_storages_whose_prefixes_begin_with_each_other_are_told() -> None:
    def one(name: str, prefix: str, dialect: str = "xrootd-5.5") -> Storage:
        return Storage(vo="vo", name=name, dialect=dialect, endpoints=(Endpoint("h", 443, prefix),))

    found = list(Directory([one("A", "/vo/data"), one("B", "/vo/data2"), one("C", "/vo/x")]).siblings())
    assert found == [("A", "B", "h:443")]
    assert not list(Directory([one("A", "/vo/data", "xrootd"), one("B", "/vo/data2", "xrootd")]).siblings())


@pytest.mark.parametrize(
    "name", ["a+b", "(1)", "star*", "d$", "[1]", "{b}", "a|b", "a^b", "a?b", "...", ".*", "a b"]
)
def test_a_pattern_matching_storage_gets_no_token_for_names_with_a_second_meaning(name: str) -> None:
    with pytest.raises(InvalidPath):
        write_path(DIALECTS["storm"], f"/vo/{name}")


@pytest.mark.parametrize("name", ["file.root", "a=b,c~d@e", "semi;colon:x", "-_!'&"])
def test_a_pattern_matching_storage_takes_plain_names_as_they_are(name: str) -> None:
    assert write_path(DIALECTS["storm"], f"/vo/{name}") == f"/vo/{name}"


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d.startswith(("xrootd", "eos", "cta"))])
def test_names_with_a_question_mark_are_refused_where_http_would_cut_them(dialect: str) -> None:
    with pytest.raises(InvalidPath, match=r"contains '\?'"):
        write_path(DIALECTS[dialect], "/vo/a?b")
