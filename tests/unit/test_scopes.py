import pytest
from hypothesis import given
from hypothesis import strategies as st

from minter.errors import InvalidPath
from minter.scopes import (
    STORAGE_SCOPES,
    Scope,
    check_path,
    contains,
    encode_path,
    intersect,
    parent,
    parse_scopes,
    path_contains,
    raw_path,
)

segments = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/%\\"), min_size=1, max_size=8
).filter(lambda s: s not in (".", ".."))
paths = st.lists(segments, max_size=4).map(lambda s: "/" + "/".join(s))
# Few names, so that scopes often relate to each other.
near_paths = st.lists(st.sampled_from(["a", "b", "ab"]), max_size=3).map(lambda s: "/" + "/".join(s))
scopes = st.builds(Scope, st.sampled_from(sorted(STORAGE_SCOPES)), near_paths)
scope_sets = st.frozensets(scopes, max_size=4)

ODD = [
    ("data/f", "is not absolute"),
    ("", "is not absolute"),
    ("/a/../b", "has an empty, '.' or '..' segment"),
    ("/a/./b", "has an empty, '.' or '..' segment"),
    ("/a//b", "has an empty, '.' or '..' segment"),
    ("/a/", "has an empty, '.' or '..' segment"),
    ("/..", "has an empty, '.' or '..' segment"),
    ("/a%2fb", "contains '%'"),
    ("/a\\b", "contains '\\\\'"),
    ("/a\nb", "contains '\\n'"),
    ("/a\x00b", "contains '\\x00'"),
    ("/a\x85b", "contains '\\x85'"),
    ("/a\ud800b", "contains '\\ud800'"),
]


@pytest.mark.parametrize(("path", "why"), ODD)
def test_odd_paths_are_refused(path: str, why: str) -> None:
    with pytest.raises(InvalidPath, match="path ") as error:
        check_path(path)
    assert why in error.value.message


@pytest.mark.parametrize(
    "text",
    ["storage.read", "storage.read:", "storage.read:a", "storage.read:/a%2e%2e%2f..", "storage.read:/a/%2e%2e/b",
     "storage.read:/a%2fb/%2e./c", "storage.read:/a%252fb", "storage.read:/%5c", "storage.read:/%ff",
     "storage.modify:/a%00"],
)  # fmt: skip
def test_odd_scopes_are_refused(text: str) -> None:
    with pytest.raises(InvalidPath):
        Scope.parse(text)


def test_a_decoded_slash_is_a_border() -> None:
    # %2f decodes to /: the scope means the path that verifiers will see.
    assert Scope.parse("storage.read:/a%2fb") == Scope("storage.read", "/a/b")


@given(paths)
def test_encoding_is_undone_by_parsing(path: str) -> None:
    encoded = f"storage.read:{encode_path(path)}"
    assert Scope.parse(encoded) == Scope("storage.read", path)
    assert " " not in encoded
    assert encoded.isascii()


@given(scopes)
def test_normalising_twice_is_once(scope: Scope) -> None:
    once = Scope.parse(str(scope))
    assert Scope.parse(str(once)) == once == scope


def test_a_trailing_slash_of_a_directory_is_dropped() -> None:
    assert Scope.parse("storage.read:/a/b/") == Scope.parse("storage.read:/a/b")
    assert Scope.parse("storage.read:/").path == "/"


@pytest.mark.parametrize("kept", list("!$&'()*+,;=:@-._~"))
def test_pchar_stays_raw(kept: str) -> None:
    assert encode_path(f"/a{kept}b") == f"/a{kept}b"


@pytest.mark.parametrize(
    ("character", "encoded"),
    [(" ", "%20"), ("#", "%23"), ("?", "%3F"), ('"', "%22"), ("ü", "%C3%BC"), ("^", "%5E")],
)
def test_all_else_is_percent_encoded(character: str, encoded: str) -> None:
    assert encode_path(f"/a{character}b") == f"/a{encoded}b"


@pytest.mark.parametrize("space", [" ", "\u00a0", "\u2028", "\u3000"])
def test_raw_paths_hold_no_white_space(space: str) -> None:
    with pytest.raises(InvalidPath, match="white space"):
        raw_path(f"/a{space}b")


def test_the_prefix_of_a_name_is_not_its_parent() -> None:
    assert not path_contains("/foo", "/foobar")
    assert not path_contains("/foo/bar", "/foo/bargain")
    assert path_contains("/foo", "/foo/bar")
    assert path_contains("/", "/foo")
    assert parent("/foo") == "/"


@given(paths, segments)
def test_a_path_never_holds_a_longer_name(path: str, tail: str) -> None:
    if path != "/":
        assert not path_contains(path, path + tail)


def test_modify_holds_create_and_stage_holds_poll_but_never_read() -> None:
    assert Scope("storage.modify", "/a").contains(Scope("storage.create", "/a/b"))
    assert not Scope("storage.create", "/a").contains(Scope("storage.modify", "/a"))
    assert Scope("storage.stage", "/a").contains(Scope("storage.poll", "/a"))
    for name in ("storage.stage", "storage.modify", "storage.create", "storage.poll"):
        assert not Scope(name, "/a").contains(Scope("storage.read", "/a"))


@given(scopes, scopes, scopes)
def test_containment_is_a_partial_order(a: Scope, b: Scope, c: Scope) -> None:
    assert a.contains(a)
    if a.contains(b) and b.contains(a):
        assert a == b
    if a.contains(b) and b.contains(c):
        assert a.contains(c)


@given(scope_sets, scope_sets)
def test_an_intersection_is_inside_both(left: frozenset[Scope], right: frozenset[Scope]) -> None:
    both = intersect(left, right)
    assert contains(left, both)
    assert contains(right, both)
    assert both == intersect(right, left)


@given(scopes, scope_sets, scope_sets)
def test_an_intersection_is_the_largest(
    scope: Scope, left: frozenset[Scope], right: frozenset[Scope]
) -> None:
    if contains(left, [scope]) and contains(right, [scope]):
        assert contains(intersect(left, right), [scope])


def test_scopes_without_a_path_are_kept_as_they_are() -> None:
    assert parse_scopes("fts offline_access compute.read") == {
        Scope("fts"), Scope("offline_access"), Scope("compute.read"),
    }  # fmt: skip
    assert intersect({Scope("fts")}, {Scope("fts"), Scope("storage.read", "/")}) == {Scope("fts")}
