"""Scopes that FTS sends unescaped in a form: they are found among those of the token that it presents."""

from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minter.policy.token_requests import as_held

READ, MODIFY = "storage.read:/atlas/", "storage.modify:/atlas/"


def arrived(scope: str) -> list[str]:
    """What a form holds of a scope that its sender did not escape."""
    return dict(parse_qsl(f"scope={scope.replace(' ', '%20')}", keep_blank_values=True))["scope"].split()


@pytest.mark.parametrize(
    "held",
    [
        READ + "a+b", READ + "a%20b", READ + "a%2520b", READ + "a%2Bb", READ + "%C3%A9", READ + "a&b",
        READ + "plain", f"{READ}a+b {MODIFY}a+b", f"{READ}a%20b {MODIFY}a%20b offline_access",
        f"{READ}a {READ}a&b", f"{READ}a {READ}a+b", READ + "a%3Fb;c=d",
    ],
)  # fmt: skip
def test_a_held_scope_is_found_as_it_arrives(held: str) -> None:
    found = as_held(arrived(held), held)
    assert set(found) <= set(held.split())
    if "&" not in held:  # what follows & is lost
        assert found == tuple(held.split())


def test_other_scopes_stay_as_they_are() -> None:
    assert as_held((READ + "x", "offline_access"), READ + "a+b") == (READ + "x", "offline_access")
    assert as_held((READ + "a", "b"), "") == (READ + "a", "b")
    assert as_held((), READ + "a") == ()


@given(st.lists(st.text("ab+%20&/é ", max_size=8)), st.lists(st.text("ab+%20&/é", min_size=1, max_size=8)))
def test_only_held_scopes_are_put_in(asked: list[str], held: list[str]) -> None:
    asked = [word for text in asked for word in text.split()]
    assert set(as_held(asked, " ".join(held))) <= {*asked, *held}
