"""Decisions of the token endpoint: I1 over generated token requests, and the life of refresh families."""

import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from minter.policy import token_endpoint
from minter.policy.audiences import ANY
from minter.policy.clients import Bans, Client
from minter.policy.limits import ANY_SECONDS, GRACE
from minter.policy.requests import Request
from minter.policy.routes import Route
from minter.policy.token_requests import Family, TokenRequest, act_depth, present
from minter.policy.transfers import Policy
from minter.scopes import Scope, contains, parse_scopes, path_contains
from minter.storages.directory import Area, Directory, Endpoint, Storage
from tests import strategies

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
SEEN: Counter[str] = Counter()
NAMES = ("storage.read", "storage.create", "storage.modify", "storage.stage", "storage.poll")


@st.composite
def token_requests(draw: st.DrawFn, made: list[Storage]) -> TokenRequest:
    audiences = []
    for storage in draw(st.lists(st.sampled_from(made), min_size=1, max_size=2)):
        door = storage.endpoints[0]
        audiences.append(
            draw(
                st.sampled_from(
                    [door.host, f"https://{door.host}", f"https://{door.host}:{door.port or 443}"]
                )
            )
        )
    if draw(st.integers(0, 9)) == 0:
        audiences = list(ANY)
    paths = st.sampled_from(
        ["/", "/data", "/data/a", "/a", "/a/b", "/b", "/atlas", "/atlas/disk", "/elsewhere"]
    )
    tops = [area.root for area in Directory(made).areas()]
    words = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(
            st.one_of(
                paths, st.sampled_from(tops), st.sampled_from(tops).map(lambda t: t.rstrip("/") + "/x/y")
            )
        )
        words.append(
            f"{draw(st.sampled_from(NAMES))}:{path}"
            + draw(st.sampled_from(["", "/"] if path != "/" else [""]))
        )
    words += draw(st.lists(st.sampled_from(["offline_access", "fts", "openid", "wlcg.groups"]), max_size=1))
    return TokenRequest(scope=tuple(words), audience=tuple(audiences))


@settings(max_examples=400)
@given(st.data())
def nothing_is_granted_beyond_what_was_asked(data: st.DataObject) -> None:
    made = data.draw(strategies.storages())
    if data.draw(st.booleans()):  # one storage inside another, at the same endpoint
        outer = made[0]
        door = outer.endpoints[0]
        inner = structs.replace(door, prefix=f"{door.prefix}/inner")
        made.append(
            structs.replace(
                outer, name="INNER", endpoints=(inner,), tape=True, tokens=data.draw(st.booleans())
            )
        )
    client = structs.replace(data.draw(strategies.clients()), audiences=ANY, groups=("/g",))
    token_request = data.draw(token_requests(made))
    policy = Policy({"vo": Directory(made)}, data.draw(strategies.routes()))
    request = Request(uuid.uuid4(), "token", b"", (), token_request=token_request)
    decision = token_endpoint.decide(policy, request, client, {}, Bans(), NOW, {}, {}).decision
    SEEN["granted" if decision.planned_tokens else "refused"] += 1
    for planned in decision.planned_tokens:
        asked = [Scope.parse(w) for w in token_request.scope]
        directory = policy.directories["vo"]
        storage_scopes = [s for s in parse_scopes(planned.scope) if s.path is not None]
        for scope in storage_scopes:
            assert scope.path is not None
            assert contains(asked, [scope])
            assert not client.paths or any(path_contains(p, scope.path) for p in client.paths)
            for audience in planned.audience:
                if audience in ANY:
                    assert any(path_contains(a.root, scope.path) for a in directory.areas())
                    continue
                for areas in directory.at(audience):
                    around = next(a for a in areas if path_contains(a.root, scope.path))
                    inside = [a for a in areas if path_contains(scope.path, a.root)]
                    for area in (around, *inside):
                        assert area.tokens
                        assert may(policy, client, area, scope.name)
        assert set(planned.audience) <= set(token_request.audience)
        if storage_scopes:
            assert planned.extra is not None
            assert not planned.extra.groups
            assert set(planned.audience).isdisjoint(ANY) or planned.lifetime.seconds <= ANY_SECONDS
        assert planned.lifetime.seconds <= 6 * 3600
        assert not client.max_lifetime_seconds or planned.lifetime.seconds <= client.max_lifetime_seconds


def may(policy: Policy, client: Client, area: Area, name: str) -> bool:
    """Say, independently of the engine, whether client and routes allow a scope on an area."""
    for operation in token_endpoint._OPERATIONS[name]:
        if client.operations and operation not in client.operations:
            continue
        for route in policy.routes:
            if (
                operation in route.operations
                and route.storages in (("*",), (area.storage,))
                and route.tape in (None, area.tape)
            ):
                return True
    return False


def test_nothing_is_granted_beyond_what_was_asked_the_areas_of_every_audience_and_the_client() -> None:
    nothing_is_granted_beyond_what_was_asked()
    assert SEEN["granted"] > 50
    assert SEEN["refused"] > 50


def test_areas_of_different_base_paths_at_one_door_must_all_allow_it() -> None:
    scratch = Storage(
        vo="vo", name="SCRATCH", base_path="/scratch", endpoints=(Endpoint("h.org", 443, "/scratch"),)
    )
    whole = Storage(vo="vo", name="WHOLE", base_path="/", endpoints=(Endpoint("h.org", 443, "/"),))
    routes = [
        Route(name="rw", storages=("SCRATCH",), operations=("read", "overwrite")),
        Route(name="ro", storages=("WHOLE",), operations=("read",)),
    ]
    client = Client(client_id=1, name="c", vo="vo", sub="s")
    token_request = TokenRequest(scope=("storage.modify:/x", "storage.read:/x"), audience=("h.org",))
    request = Request(uuid.uuid4(), "token", b"", (), token_request=token_request)
    policy = Policy({"vo": Directory([scratch, whole])}, routes)
    (planned,) = token_endpoint.decide(
        policy, request, client, {}, Bans(), NOW, {}, {}
    ).decision.planned_tokens
    assert planned.scope == "storage.read:/x"


# ── families ─────────────────────────────────────────────────────────────────────────────────

FAMILY = Family(
    family_id=uuid.uuid4(), client_id=1, subject_jti=uuid.uuid4(), subject_client="rucio", on_behalf_of="", activity="", sub="s",
    act=None, scope="storage.read:/a", audience=("a",), rule="r", ends_at=NOW + timedelta(days=7), generation=3,
    rotated_at=NOW,
)  # fmt: skip


@pytest.mark.parametrize(
    ("generation", "after", "expected"),
    [
        (3, timedelta(), 4),
        (3, timedelta(days=6), 4),
        (2, timedelta(), 3),
        (2, GRACE - timedelta(seconds=1), 3),
        (2, GRACE, None),
        (1, timedelta(), None),
        (4, timedelta(), 5),
    ],
)
def test_which_refresh_tokens_of_a_family_work(
    generation: int, after: timedelta, expected: int | None
) -> None:
    made = present(FAMILY, generation, NOW + after)
    assert (made and made.generation) == expected
    if expected == 3:
        assert made == FAMILY  # the same bytes again


def test_actors_are_counted() -> None:
    assert [act_depth(a) for a in (None, {"sub": "a"}, {"sub": "a", "act": {"sub": "b"}})] == [0, 1, 2]
