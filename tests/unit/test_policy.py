"""Decisions: I1 over generated cases, and each rule of the policy alone."""

import uuid
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from minter.contract.messages import (
    MAX_NEEDS,
    FileOperation,
    FileRequest,
    FillRequest,
    MintRequest,
    URLsRequest,
)
from minter.contract.operations import OPERATIONS, Operation
from minter.errors import InvalidRequest, OperationNotAllowed, SettingsError
from minter.fts.jobs import from_fill
from minter.policy.clients import Ban, Bans, Client
from minter.policy.explain import asked_scopes, explain
from minter.policy.limits import PROFILE_MAX_SECONDS
from minter.policy.plans import MAX_DESCRIBED, Decision
from minter.policy.requests import BRIEF, MAX_DESCRIPTION_CHARACTERS, decode_urls, from_mint
from minter.policy.routes import SHIPPED_ROUTES, FTSInstance, Granularity, Route
from minter.policy.transfers import Policy
from minter.scopes import parent, path_contains
from minter.storages.dialects import DIALECTS
from minter.storages.directory import Directory, Endpoint, Storage
from minter.storages.needed import scopes_needed
from minter.tokens.clock import new_uuid7
from tests import strategies

NO_BANS = Bans()


# ── I1 ───────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=400)
@given(st.data())
def test_no_grant_is_wider_than_the_dialects_expansion_of_what_was_asked(data: st.DataObject) -> None:
    made = data.draw(strategies.storages())
    routes = data.draw(strategies.routes())
    client = data.draw(strategies.clients())
    request = from_mint(data.draw(strategies.requests(made)))
    decision = Policy({"vo": Directory(made)}, routes).decide(request, client, NO_BANS)

    for planned in decision.planned_tokens:
        route, area = planned.plan.route, planned.plan.area
        assert route is not None
        assert area.storage in {s.name for s in made}
        path = Directory([s for s in made if s.name == area.storage]).locate(planned.need.url)[1]
        operations = set(planned.need.operations)
        if planned.need.side == "destination":
            operations |= {"retry"} if route.cleanup else set()
            operations |= {"make_parents"} if route.make_parents else set()
        wide = area.prefix.removeprefix(area.base_path.rstrip("/"))
        allowed = set()
        if planned.shared:
            root = planned.shared == wide
            assert route.granularity == ("storage" if root else "directory")
            assert root or (planned.shared == parent(path) and path_contains(wide, planned.shared))
            assert path_contains(planned.shared, path)
            assert not any(path_contains(planned.shared, inner) for inner in area.nested)
            assert planned.lifetime.seconds <= planned.whole().lifetime.seconds == planned.plan.cap_seconds
        for needed in scopes_needed(area.dialect, operations):
            allowed.add((needed.scope, path if needed.where == "file" else parent(path)))
            if planned.shared:
                allowed.add((needed.scope, planned.shared))
            if route.poll_area and planned.need.operations == ("poll",):
                allowed.add((needed.scope, wide))
        for scope in asked_scopes(planned):
            assert (scope.name, scope.path) in allowed
            assert scope.path is not None
            assert not client.paths or any(path_contains(p, scope.path) for p in client.paths)
        assert not client.operations or client.operations >= set(planned.need.operations)
        longest = client.max_lifetime_seconds or route.max_lifetime_seconds
        assert 0 < planned.lifetime.seconds <= longest
        if area.matching == "prefix":
            assert planned.lifetime.seconds <= PROFILE_MAX_SECONDS
        extras = [n.quirk.name for n in planned.plan.needed if n.quirk]
        assert not set(extras) & set(route.forbid)
        shown = "\n".join(explain(decision))
        assert all(f"quirk {name}" in shown for name in extras)

    granted = {(g.need.file, g.need.side, g.need.index) for g in decision.planned_tokens}
    refused = {(r.need.file, r.need.side, r.need.index) for r in decision.refused if r.need}
    asked = {(n.file, n.side, n.index) for f in request.files for n in f.needs}
    assert granted | refused == asked  # each token has exactly one outcome (I3)
    assert not granted & refused


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_operation_is_granted_or_refused_with_the_version_that_can(
    dialect: str, operation: Operation
) -> None:
    directory = Directory([storage("ONE", dialect)])
    operations = (FileOperation(operation, "davs://one.example.org/data/d/f"),)
    request = from_mint(MintRequest(request_id=new_uuid7(), files=(FileRequest(operations=operations),)))
    decision = Policy({"vo": directory}).decide(request, client(), NO_BANS)
    if operation in DIALECTS[dialect].unable:
        (refused,) = decision.refused
        assert isinstance(refused.error, OperationNotAllowed)
        assert DIALECTS[dialect].unable[operation] in refused.error.message
    else:
        (planned,) = decision.planned_tokens
        wanted = {
            (n.scope, "/data/d/f" if n.where == "file" else "/data/d")
            for n in DIALECTS[dialect].scopes[operation]
        }
        got = {(s.name, s.path) for s in asked_scopes(planned)}
        assert got == wanted or (operation == "poll" and got == {("storage.poll", "/data")})


# ── one thing at a time ──────────────────────────────────────────────────────────────────────


def storage(name: str = "SE", dialect: str = "xrootd", **changes: Any) -> Storage:
    door = Endpoint(f"{name.lower()}.example.org", 443, "/data")
    return Storage(**{"vo": "vo", "name": name, "endpoints": (door,), "dialect": dialect, **changes})


def client(**limits: Any) -> Client:
    return Client(client_id=1, name="rucio", vo="vo", sub="s", **limits)


FTS_A = FTSInstance(name="fts", url="https://fts.example.org:8446")
ENGINE = Policy(
    {"vo": Directory([storage(), storage("OLD", "xrootd-5.5"), storage("TAPE", "dcache-11.2.4", tape=True)])},
    fts=[FTS_A],
)
SE, OLD, TAPE = (
    "davs://se.example.org/data/d/f",
    "davs://old.example.org/data/d/f",
    "davs://tape.example.org/data/d/f",
)


def mint(engine: Policy = ENGINE, client: Client = client(), bans: Bans = NO_BANS, **file: Any) -> Decision:  # noqa: B008
    options = {
        k: file.pop(k)
        for k in ("lifetime_seconds", "all_or_nothing", "vo", "activity", "on_behalf_of")
        if k in file
    }
    files = file.pop("files", None) or (FileRequest(**file),)
    return engine.decide(
        from_mint(MintRequest(request_id=uuid.uuid4(), files=files, **options)), client, bans
    )


def fill(
    sources: Iterable[str] = (SE,),
    destinations: Iterable[str] = (OLD,),
    engine: Policy = ENGINE,
    files: list[dict[str, Any]] | None = None,
    fts: str | None = None,
    **params: Any,
) -> Decision:
    files = files or [{"sources": list(sources), "destinations": list(destinations), "filesize": 10**9}]
    request = FillRequest(request_id=uuid.uuid4(), job={"files": files, "params": params}, fts=fts)
    return engine.decide(from_fill(request), client(), NO_BANS)


def scopes(decision: Decision, side: str) -> dict[int, str]:
    return {g.need.index: g.scope for g in decision.planned_tokens if g.need.side == side}


def reasons(decision: Decision) -> list[str]:
    return [r.error.reason for r in decision.refused]


def refusal(decision: Decision) -> str:
    assert decision.error is not None
    return decision.error.reason


def route_name(decision: Decision) -> str:
    route = decision.planned_tokens[0].plan.route
    assert route is not None
    return route.name


def test_the_ordinary_rucio_job_gets_modify_on_its_one_destination_file() -> None:
    decision = fill((SE + "0",), (SE,), overwrite=True, max_time_in_queue=168)
    assert scopes(decision, "source") == {0: "storage.read:/data/d/f0"}
    assert scopes(decision, "destination") == {0: "storage.modify:/data/d/f"}
    assert {g.lifetime.seconds // 3600 for g in decision.planned_tokens if g.need.side != "service"} == {168}
    assert [g.scope for g in decision.planned_tokens if g.need.side == "service"] == ["fts"]


def test_a_tape_destination_that_may_not_be_overwritten_gets_create_and_poll() -> None:
    decision = fill((SE,), (TAPE,), overwrite=False, archive_timeout="86400")
    assert scopes(decision, "destination") == {0: "storage.create:/data/d/f storage.poll:/data/d/f"}


@pytest.mark.parametrize(
    "params", [{"overwrite": True}, {"overwrite_when_only_on_disk": True, "archive_timeout": 9}]
)
def test_overwriting_a_tape_destination_when_asked(params: dict[str, Any]) -> None:
    got = scopes(fill((SE,), (TAPE,), **params), "destination")[0].removesuffix(" storage.poll:/data/d/f")
    assert got == "storage.modify:/data/d/f"


def test_overwrite_hop_means_every_hop_but_the_last() -> None:
    hops = [{"sources": [SE], "destinations": [TAPE]}, {"sources": [TAPE], "destinations": [TAPE + "2"]}]
    decision = fill(files=hops, overwrite=False, overwrite_hop=True, multihop=True)
    written = [g.scope for g in decision.planned_tokens if g.need.side == "destination"]
    assert written == ["storage.modify:/data/d/f", "storage.create:/data/d/f2"]


def test_a_multihop_job_is_refused_whole() -> None:
    hops = [
        {"sources": [SE], "destinations": [TAPE]},
        {"sources": [TAPE], "destinations": ["davs://unknown.example.org/f"]},
    ]
    decision = fill(files=hops, multihop=True)
    assert not decision.planned_tokens
    assert sorted(reasons(decision)) == ["neighbour_refused"] * 3 + ["unknown_storage"]


def test_staging_joins_reading_in_ftss_one_slot_and_stays_apart_in_a_native_request() -> None:
    assert scopes(fill((TAPE,), (SE,), bring_online=43200), "source") == {
        0: "storage.read:/data/d/f storage.stage:/data/d/f"
    }
    native = mint(sources=(TAPE,), operations=(FileOperation("stage", TAPE), FileOperation("poll", TAPE)))
    assert scopes(native, "source") == {0: "storage.read:/data/d/f"}
    assert scopes(native, "operation")[0] == "storage.stage:/data/d/f"


def test_a_poll_token_is_wide_and_long_by_its_route() -> None:
    (planned,) = mint(operations=(FileOperation("poll", TAPE),)).planned_tokens
    assert planned.plan.route is not None
    assert (planned.plan.route.name, planned.scope) == ("tape-poll", "storage.poll:/data")
    assert planned.lifetime.seconds > PROFILE_MAX_SECONDS


def test_a_stagein_job_gets_stage_on_both_of_its_equal_urls() -> None:
    decision = fill((TAPE,), (TAPE,), bring_online=43200)
    assert scopes(decision, "source") == scopes(decision, "destination") == {0: "storage.stage:/data/d/f"}


def test_a_file_keeps_its_other_sources_and_a_copy_without_any_is_refused_whole() -> None:
    kept = fill((SE + "0", "root://se.example.org//data/d/f", OLD), (SE,))
    assert sorted(scopes(kept, "source")) == [0, 2]
    assert reasons(kept) == ["endpoint_takes_no_token"]
    lost = fill(("http://se.example.org/data/d/f",), (SE,))
    assert not lost.planned_tokens
    assert sorted(reasons(lost)) == ["endpoint_takes_no_token", "neighbour_refused"]


def test_prefix_matching_storages_never_get_more_than_six_hours() -> None:
    decision = fill((OLD,), (SE,), max_time_in_queue=168)
    life = {g.plan.area.storage: g.lifetime for g in decision.planned_tokens}
    assert life["OLD"].seconds == PROFILE_MAX_SECONDS < life["OLD"].wanted
    assert life["SE"].seconds > 168 * 3600
    assert "clipped from" in "\n".join(explain(decision))


def test_a_lifetime_beyond_policy_is_refused_and_one_too_short_too() -> None:
    refused = mint(sources=(SE,), lifetime_seconds=7 * 3600).refused[0].error
    assert refused.message == "lifetime 25200 s exceeds 21600 s allowed by route direct; ask for less"
    short = mint(sources=(SE,), lifetime_seconds=60).refused[0].error
    assert short.reason == "lifetime_not_allowed"
    assert mint(sources=(SE,), lifetime_seconds=7200).planned_tokens[0].lifetime.seconds == 7200


def test_a_client_has_its_own_limits() -> None:
    assert reasons(mint(client=client(paths=("/data/e",)), sources=(SE,))) == ["path_not_allowed"]
    assert reasons(mint(client=client(paths=("/data/dd",)), sources=(SE,))) == ["path_not_allowed"]
    assert reasons(
        mint(client=client(operations=frozenset({"read"})), operations=(FileOperation("delete", SE),))
    ) == ["operation_not_allowed"]
    assert (
        mint(client=client(max_lifetime_seconds=1800), sources=(SE,)).planned_tokens[0].lifetime.seconds
        == 1800
    )


def test_no_route_no_token() -> None:
    only_read = Policy({"vo": Directory([storage()])}, [Route(name="r", operations=("read",))])
    assert reasons(mint(only_read, operations=(FileOperation("delete", SE),))) == ["operation_not_allowed"]


def test_the_first_matching_route_decides() -> None:
    routes = [
        Route(name="special", operations=("read",), activities=("T0*",), max_lifetime_seconds=1800),
        *SHIPPED_ROUTES,
    ]
    engine = Policy({"vo": Directory([storage()])}, routes)
    assert route_name(mint(engine, sources=(SE,), activity="T0 Export")) == "special"
    assert route_name(mint(engine, sources=(SE,), activity="Other")) == "direct"


@pytest.mark.parametrize(
    "ban",
    [Ban("client", "rucio"), Ban("vo", "vo"), Ban("activity", "T0", "vo"), Ban("on_behalf_of", "eve"),
     Ban("storage", "SE"), Ban("path", "/data/d"), Ban("path", "/data/d/f")],
)  # fmt: skip
def test_bans(ban: Ban) -> None:
    bans = Bans([ban])
    asked: dict[str, Any] = {"sources": (SE,), "activity": "T0", "on_behalf_of": "eve"}
    assert set(reasons(mint(bans=bans, **asked))) == {"banned"}
    assert mint(bans=Bans([ban._replace(vo="another")]), **asked).planned_tokens
    assert mint(bans=Bans([ban._replace(value="/data/dd")]), **asked).planned_tokens


def test_a_wide_grant_above_a_banned_path_is_refused_too() -> None:
    assert reasons(
        mint(bans=Bans([Ban("path", "/data/secret")]), operations=(FileOperation("poll", TAPE),))
    ) == ["banned"]


def test_one_bad_file_fails_alone_unless_all_or_nothing() -> None:
    files = (FileRequest(sources=(SE,)), FileRequest(sources=("davs://nowhere.example.org/f",)))
    assert [g.need.file for g in mint(files=files).planned_tokens] == [0]
    assert not mint(files=files, all_or_nothing=True).planned_tokens


def test_a_scope_too_long_for_fts_is_refused() -> None:
    assert reasons(mint(sources=(f"davs://se.example.org/data/{'é' * 400}",))) == ["scope_too_large"]


def test_another_vo_or_fts_is_refused_whole() -> None:
    assert refusal(mint(vo="other", sources=(SE,))) == "unknown_vo"
    assert refusal(fill(fts="https://evil.example.org:8446")) == "unknown_storage"
    assert fill(fts="https://FTS.example.org:8446").planned_tokens


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"max_lifetime_seconds": 193 * 3600}, "hard limit"),
        ({"max_lifetime_seconds": 7 * 3600}, "needs mitigations"),
        ({"min_rate_bytes": 0}, "min_rate_bytes"),
        ({"max_lifetime_seconds": 60}, "at least 900"),
    ],
)
def test_a_route_that_contradicts_the_profile_is_no_route(change: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        Policy({"vo": Directory([])}, [structs.replace(Route(name="r", operations=("read",)), **change)])


def test_a_mitigation_that_does_not_hold_keeps_the_token_to_six_hours() -> None:
    route = Route(name="long", operations=("read", "overwrite"), max_lifetime_seconds=24 * 3600, wait_seconds=10 * 3600,
                  mitigations=("no_modify",), risk_assessment="doc")  # fmt: skip
    engine = Policy({"vo": Directory([storage()])}, [route])
    read, modify = mint(engine, sources=(SE + "0",), destinations=(SE,), overwrite=True).planned_tokens
    assert read.lifetime.seconds > PROFILE_MAX_SECONDS
    assert modify.lifetime.seconds == PROFILE_MAX_SECONDS
    assert any("no_modify does not hold" in s.text for s in modify.plan.steps)


def test_raw_dialects_write_raw_paths_and_refuse_white_space() -> None:
    assert mint(sources=(OLD + "ü#",)).planned_tokens[0].scope == "storage.read:/data/d/fü#"
    assert reasons(mint(sources=(OLD + " x",))) == ["invalid_path"]
    assert mint(sources=(SE + "ü#",)).planned_tokens[0].scope == "storage.read:/data/d/f%C3%BC%23"


def test_a_later_hop_waits_for_the_ones_before_it() -> None:
    hops = [
        {"sources": [SE], "destinations": [SE + "2"], "filesize": 10**11},
        {"sources": [SE + "2"], "destinations": [SE + "3"], "filesize": 10**11},
    ]
    first, second = (
        next(g for g in fill(files=hops, multihop=True).planned_tokens if g.need.file == n) for n in (0, 1)
    )
    assert second.lifetime.wanted - first.lifetime.wanted == 20_000


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_the_shipped_routes_serve_the_ordinary_rucio_and_dirac_job_on_every_dialect(name: str) -> None:
    engine = Policy({"vo": Directory([storage("SE", name)])}, fts=[FTS_A])
    rucio = fill(
        ("davs://se.example.org/data/a",),
        ("davs://se.example.org/data/b",),
        engine,
        overwrite=True,
        max_time_in_queue=168,
    )
    assert not rucio.refused
    dirac = mint(
        engine,
        sources=("davs://se.example.org/data/a",),
        destinations=("davs://se.example.org/data/b",),
        overwrite=True,
    )
    assert not dirac.refused


def test_no_scope_is_ever_the_whole_storage_or_outside_its_prefix() -> None:
    engine = Policy(
        {"vo": Directory([storage("OLD", "xrootd-5.5", base_path="/data"), storage("CNAF", "storm-cnaf")])},
        fts=[FTS_A],
    )
    for url in ("davs://old.example.org/data/f", "davs://cnaf.example.org/data/f"):
        for planned in fill((url + "0",), (url,), engine, overwrite=True).planned_tokens:
            assert not [s for s in asked_scopes(planned) if s.path in ("/", "/data")]
    assert "storage.read:/data/d" in scopes(fill((SE,), ("davs://cnaf.example.org/data/d/f",), Policy(
        {"vo": Directory([storage(), storage("CNAF", "storm-cnaf")])}, fts=[FTS_A])), "destination")[0]  # fmt: skip


@pytest.mark.parametrize("granularity", ["directory", "storage"])
def test_a_shared_token_never_reaches_into_a_storage_inside_this_one(granularity: Granularity) -> None:
    route = Route(name="shared", operations=("read",), granularity=granularity)
    outer = storage(
        "OUTER",
        endpoints=(Endpoint("se.example.org", 443, "/data"),),
        base_path="/data",
        audience=("https://a",),
    )
    inner = storage(
        "INNER",
        endpoints=(Endpoint("other.example.org", 443, "/data/d/tape"),),
        base_path="/data",
        audience=("https://a",),
    )
    for storages, shared in (((outer,), True), ((outer, inner), False)):
        engine = Policy({"vo": Directory(storages)}, [route])
        decision = mint(engine, sources=("davs://se.example.org/data/d/f",))
        (planned,) = decision.planned_tokens
        assert bool(planned.shared) is shared
        assert (planned.scope == "storage.read:/d/f") is not shared


def test_a_directorys_scope_never_covers_a_banned_path() -> None:
    bans = Bans([Ban("path", "/data/d/secret")])
    decision = mint(bans=bans, operations=(FileOperation("make_parents", OLD),))
    assert not decision.planned_tokens
    assert reasons(decision) == ["operation_not_allowed"]


@pytest.mark.parametrize("url", ["https://[x", "http://a]b", "\x00", "fts.example.org"])
def test_an_fts_that_is_no_url_is_unknown(url: str) -> None:
    assert refusal(fill(fts=url)) == "unknown_storage"


def test_half_an_hour_of_queue_is_rounded_up_to_what_fts_can_say() -> None:
    planned_tokens = fill(max_time_in_queue="30m").planned_tokens
    assert all(
        g.lifetime.seconds - g.lifetime.fixed >= 3600 for g in planned_tokens if g.need.side != "service"
    )


# ── what a refusal says ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\\", "\U0001f642"])
def test_refusals_of_the_largest_request_are_bounded_in_bytes(letter: str) -> None:
    url = "davs://se01.boreas.example.org:443/elsewhere/" + letter * 4_000
    files = tuple(FileRequest(sources=(url,)) for _ in range(MAX_NEEDS))
    records = mint(files=files).records()
    assert [r["file"] for r in records] == list(range(MAX_NEEDS))
    assert len(msgspec.json.encode(records)) < 6 * 1024**2
    reasons = {r["error"]["reason"] for r in records}
    assert len(reasons) == 1
    assert all("path" not in r["error"] and "url" not in r["error"] for r in records)
    first, last = records[0]["error"]["error_description"], records[-1]["error"]["error_description"]
    assert len(first) <= MAX_DESCRIPTION_CHARACTERS
    assert first.endswith(mint(sources=(url,)).refused[0].error.message[-100:])
    assert last == BRIEF
    assert [r["error"]["error_description"] for r in records].index(BRIEF) == MAX_DESCRIBED


# ── URLs that anybody may hold ───────────────────────────────────────────────────────────────

SHARED = Route(name="open data", via="url", operations=("read",), max_lifetime_seconds=7200)


def url_decision(
    *routes: Route,
    lifetime_seconds: int = 3600,
    owner: Client = client(),  # noqa: B008
    **of_storage: Any,
) -> Decision:
    wire = URLsRequest(request_id=new_uuid7(), urls=(SE,), lifetime_seconds=lifetime_seconds)
    made = structs.replace(storage(), **{"dialect": "dcache"} | of_storage)
    request = decode_urls(msgspec.json.encode(wire))
    return Policy({"vo": Directory([made])}, routes).decide(request, owner, NO_BANS)


def test_a_url_gets_a_token_that_reads_one_file_by_a_route_for_urls_only() -> None:
    (planned,) = url_decision(*SHIPPED_ROUTES, SHARED).planned_tokens
    assert planned.scope == "storage.read:/data/d/f"
    assert planned.lifetime.seconds == 3600
    assert planned.plan.rule == "open data"
    (refused,) = url_decision(*SHIPPED_ROUTES).refused
    assert refused.error.message.startswith("no route allows URLs that read on storage")
    other = mint(Policy({"vo": Directory([storage()])}, []), operations=(FileOperation("read", SE),))
    assert other.refused[0].error.message.startswith("no route allows read on storage")
    assert mint(
        Policy({"vo": Directory([storage()])}, [SHARED]), operations=(FileOperation("read", SE),)
    ).refused


@pytest.mark.parametrize(
    ("of_storage", "why"),
    [
        ({"tape": True}, "is tape"),
        ({"logs_urls": True}, "logs the URLs"),
        ({"dialect": "profile"}, "no spelling"),
    ],
)
def test_where_no_url_is_signed(of_storage: dict[str, Any], why: str) -> None:
    (refused,) = url_decision(SHARED, **of_storage).refused
    assert refused.error.reason == "operation_not_allowed"
    assert why in refused.error.message


def test_a_url_may_live_for_minutes_and_a_name_must_fit_into_it() -> None:
    assert url_decision(SHARED, lifetime_seconds=120).planned_tokens
    for odd in ("a?b", "a b"):
        wire = URLsRequest(request_id=new_uuid7(), urls=("roots://se.example.org/data/" + odd,))
        engine = Policy({"vo": Directory([storage()])}, [SHARED])
        (refused,) = engine.decide(decode_urls(msgspec.json.encode(wire)), client(), NO_BANS).refused
        assert refused.error.reason == "invalid_path"


def test_a_url_lives_no_longer_than_route_client_and_profile_allow() -> None:
    assert url_decision(SHARED, lifetime_seconds=7200).planned_tokens
    for seconds, owner in ((7201, client()), (3600, client(max_lifetime_seconds=3000))):
        (refused,) = url_decision(SHARED, lifetime_seconds=seconds, owner=owner).refused
        assert refused.error.reason == "lifetime_not_allowed"
    wire = msgspec.json.encode({"request_id": str(new_uuid7()), "urls": [SE], "lifetime_seconds": 21_601})
    with pytest.raises(InvalidRequest, match="lifetime_seconds"):
        decode_urls(wire)


@pytest.mark.parametrize(
    "options",
    [
        {"operations": ("read", "write")},
        {"granularity": "directory"},
        {"mode": "client_credentials", "provider": "iam"},
        {"max_lifetime_seconds": 86_400, "mitigations": ("narrow_read",), "risk_assessment": "doc"},
    ],
)
def test_a_route_for_urls_reads_single_files_for_six_hours_at_most(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="url"):
        Policy({}, [Route(**{"name": "r", "via": "url", "operations": ("read",)} | options)])
