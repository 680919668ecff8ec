"""Each limit at its limit, and each condition of a decision alone: what mutation tests found unheld."""

import math
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec import structs

from minter.contract.messages import FileOperation, FileRequest, FillRequest, MintRequest
from minter.errors import Banned, ClockSkew, InvalidScope, LifetimeNotAllowed, TokenRejected
from minter.fts.jobs import from_fill
from minter.policy import limits, token_endpoint
from minter.policy.clients import Ban, Bans, Client
from minter.policy.lifetimes import cap_of
from minter.policy.plans import Decision, PlannedToken
from minter.policy.requests import Request, from_mint
from minter.policy.routes import Granularity, Mitigation, Route, Via
from minter.policy.token_requests import TokenRequest
from minter.policy.transfers import Policy
from minter.providers import iam
from minter.storages.dialects import Needed
from minter.storages.directory import Directory, Endpoint, Storage
from minter.tokens.claims import build_claims, check_token
from minter.tokens.clock import check_clock, new_uuid7
from minter.tokens.keys import Signer
from tests.unit.test_policy import ENGINE, OLD, SE

NOW = datetime(2026, 11, 28, tzinfo=UTC)
FILE = "davs://se.example.org/data/d/f"
NO_BANS = Bans()


def storage(name: str = "SE", prefix: str = "/data", **changes: Any) -> Storage:
    made = {"vo": "vo", "dialect": "xrootd", "endpoints": (Endpoint("se.example.org", 443, prefix),)}
    return Storage(name=name, **{**made, **changes})


def client(**changes: Any) -> Client:
    return Client(client_id=1, name="rucio", vo="vo", sub="s", **changes)


def route(**changes: Any) -> Route:
    made = {"name": "r", "operations": ("read", "write", "overwrite", "delete", "upload", "poll")}
    return Route(**{**made, **changes})


def policy(*routes: Route, storages: tuple[Storage, ...] = (storage(),), **options: Any) -> Policy:
    return Policy({"vo": Directory(list(storages))}, list(routes) or [route()], **options)


def mint(
    engine: Policy,
    *,
    operation: Any = "read",
    bans: Bans = NO_BANS,
    who: Client | None = None,
    **request: Any,
) -> Decision:
    file: dict[str, Any] = {"operations": (FileOperation(operation, FILE),), **request.pop("file", {})}
    made = MintRequest(request_id=new_uuid7(), files=(FileRequest(**file),), **request)
    return engine.decide(from_mint(made), who or client(), bans)


def only(decision: Decision) -> PlannedToken:
    assert not decision.refused, decision.refused[0].error.message
    (planned,) = decision.planned_tokens
    return planned


def asked(engine: Policy, scope: str, *, bans: Bans = NO_BANS, audience: str = "se.example.org") -> Decision:
    token_request = TokenRequest(scope=tuple(scope.split()), audience=(audience,))
    request = Request(uuid.uuid4(), "token", b"", (), token_request=token_request)
    return token_endpoint.decide(engine, request, client(), {}, bans, NOW, {}, {}).decision


# ── numbers of others' standards and services ────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("number", "source"),
    [
        (limits.HARD_MAX_SECONDS == 192 * 3600, "Rucio's FTS queue of 168 h, and a day for the transfer"),
        (timedelta(days=9) == limits.LAST_EXPIRY, "the hard limit and a day"),
        (limits.PROFILE_MIN_SECONDS == 900, "WLCG §4.3.1"),
        (limits.PROFILE_MAX_SECONDS == 21_600, "WLCG §4.3.1"),
        (limits.BACKDATE_SECONDS == 60, "WLCG §4.3.1"),
        (limits.FTS_QUEUE_SECONDS == 3600, "FTS counts hours"),
        (limits.FTS_DEFAULT_STAGING_SECONDS == 604_800, "FTS 3.14.4, DefaultBringOnlineTimeout"),
        (limits.FTS_ARCHIVING_SLACK_SECONDS == 800, "FTS 3.14.4"),
        (limits.MAX_CLAIM_CHARACTERS == 1024, "FTS's columns"),
        (timedelta(days=1) == limits.GRACE, "docs/reference/client.md: a refresh answer may be lost"),
        (timedelta(seconds=60) == limits.EXCHANGE_REPEAT, "docs/issuance.md"),
        (limits.MAX_ACT_DEPTH == 2, "docs/standards.md"),
        (limits.ANY_SECONDS == 3600, "docs/standards.md"),
        (limits.MIN_LEFT_SECONDS == 60, "a shorter token is of no use"),
        (limits.MAX_AHEAD_SECONDS == 300, "docs/reference/errors.md"),
        (limits.COVER_SECONDS == 300, "FTS's shortest use of a token"),
        (
            int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()) == limits.MAX_DATE,
            "Python, Postgres",
        ),
        (iam.LEEWAY_SECONDS == 60, "docs/providers.md"),
    ],
)
def test_a_limit_is_what_its_source_says(number: bool, source: str) -> None:
    assert number, source


@pytest.mark.parametrize("skew", [5.0, -5.0, 0.0])
def test_clocks_may_differ_by_five_seconds(skew: float) -> None:
    check_clock(skew)


@pytest.mark.parametrize("skew", [5.001, -5.001])
def test_clocks_may_not_differ_by_more(skew: float) -> None:
    with pytest.raises(ClockSkew):
        check_clock(skew)


# ── bans of one VO ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("path", "/data/d"),
        ("path", "/data/d/f"),
        ("storage", "SE"),
        ("activity", "Debug"),
        ("client", "rucio"),
    ],
)
@pytest.mark.parametrize(("vo", "binds"), [("vo", True), (None, True), ("other", False)])
def test_a_ban_binds_in_its_own_vo_only(kind: str, value: str, vo: str | None, binds: bool) -> None:
    bans = Bans([Ban(kind, value, vo)])
    decision = mint(policy(), bans=bans, activity="Debug")
    assert [type(r.error) for r in decision.refused] == ([Banned] if binds else [])


@pytest.mark.parametrize(("vo", "banned"), [("vo", {1}), (None, {1}), ("other", set())])
def test_a_ban_of_an_activity_binds_the_files_that_have_it(vo: str | None, banned: set[int]) -> None:
    file = {"sources": [SE], "destinations": [OLD], "filesize": 1}
    job = {"files": [file, {**file, "sources": [SE + "2"], "activity": "Debug"}]}
    request = from_fill(FillRequest(request_id=new_uuid7(), job=job))
    decision = ENGINE.decide(request, client(), Bans([Ban("activity", "Debug", vo)]))
    assert {r.need.file for r in decision.refused if r.need} == banned


@pytest.mark.parametrize(("kind", "value"), [("path", "/data/d"), ("storage", "SE")])
@pytest.mark.parametrize(("vo", "binds"), [("vo", True), (None, True), ("other", False)])
def test_a_ban_binds_the_token_endpoint_in_its_own_vo_only(
    kind: str, value: str, vo: str | None, binds: bool
) -> None:
    decision = asked(policy(), "storage.read:/data/d/f", bans=Bans([Ban(kind, value, vo)]))
    assert [type(r.error) for r in decision.refused] == ([Banned] if binds else [])


@pytest.mark.parametrize(("vo", "shared"), [("vo", ""), (None, ""), ("other", "/data/d")])
def test_a_shared_token_covers_nothing_that_is_banned(vo: str | None, shared: str) -> None:
    engine = policy(route(granularity="directory"))
    planned = only(mint(engine, bans=Bans([Ban("path", "/data/d/secret", vo)])))
    assert planned.shared == shared


@pytest.mark.parametrize(("vo", "left"), [("vo", False), (None, False), ("other", True)])
def test_a_scope_on_the_directory_is_left_out_beside_what_is_banned(vo: str | None, left: bool) -> None:
    engine = policy(route(make_parents=True, cleanup=True), storages=(storage(dialect="xrootd-5.5"),))
    file = {"operations": (), "destinations": (FILE,), "overwrite": True, "size": 1}
    planned = only(mint(engine, bans=Bans([Ban("path", "/data/d/secret", vo)]), file=file))
    on_directory = {w.partition(":")[0] for w in planned.scope.split() if w.endswith(":/data/d")}
    assert bool(on_directory) is left, planned.scope


# ── lifetimes ────────────────────────────────────────────────────────────────────────────────


def test_a_lifetime_is_every_try_the_margin_and_the_wait() -> None:
    engine = policy(route(retries=2, margin_seconds=700, wait_seconds=1000, min_rate_bytes=10))
    file = {"size": 4_001}
    assert only(mint(engine, file=file)).lifetime.seconds == 60 + math.ceil(4_001 / 10) * 3 + 700 + 1000
    assert (
        only(mint(policy(route(retries=0, transfer_seconds=500)))).lifetime.seconds == 60 + 500 + 600 + 3600
    )


@pytest.mark.parametrize(("seconds", "granted"), [(7200, True), (7201, False), (660, True), (659, False)])
def test_a_requested_lifetime_is_granted_from_the_margin_to_the_cap(seconds: int, granted: bool) -> None:
    decision = mint(policy(route(max_lifetime_seconds=7200, margin_seconds=600)), lifetime_seconds=seconds)
    if granted:
        assert only(decision).lifetime.seconds == seconds
    else:
        assert isinstance(decision.refused[0].error, LifetimeNotAllowed)


def test_a_lifetime_beyond_the_cap_is_clipped_and_its_wait_with_it() -> None:
    planned = only(mint(policy(route(max_lifetime_seconds=3000, transfer_seconds=1000))))
    assert planned.lifetime.seconds == 3000
    assert planned.lifetime.fixed == 60 + 1000 + 600


_SCOPES = {
    "read": Needed("storage.read"),
    "create": Needed("storage.create"),
    "modify": Needed("storage.modify"),
    "modify the directory": Needed("storage.modify", "parent"),
    "read the directory": Needed("storage.read", "parent"),
}


@pytest.mark.parametrize(
    ("mitigation", "needed", "granularity", "via_fts", "holds"),
    [
        ("narrow_write", "create", "file", True, True),
        ("narrow_write", "modify", "file", True, True),
        ("narrow_write", "modify the directory", "file", True, False),
        ("narrow_write", "create", "directory", True, False),
        ("narrow_write", "read the directory", "directory", True, True),
        ("narrow_read", "read", "file", True, True),
        ("narrow_read", "read the directory", "file", True, False),
        ("narrow_read", "read", "directory", True, False),
        ("narrow_read", "create", "directory", True, True),
        ("no_modify", "create", "file", True, True),
        ("no_modify", "modify", "file", True, False),
        ("fts_only", "read", "file", True, True),
        ("fts_only", "read", "file", False, False),
        ("pull_mode", "read", "file", False, True),
        ("one_storage", "read", "file", True, True),
    ],
)
def test_a_mitigation_holds_or_the_profiles_six_hours_do(
    mitigation: Mitigation, needed: str, granularity: Granularity, via_fts: bool, holds: bool
) -> None:
    long = route(max_lifetime_seconds=86_400, mitigations=(mitigation,), risk_assessment="doc")
    via: Via = "fts" if via_fts else "direct"
    (area,) = Directory([storage()]).areas()
    cap, _, why = cap_of(long, client(), via, area, [_SCOPES[needed]], granularity)
    assert cap == (86_400 if holds else 21_600), why
    everywhere = structs.replace(area, audience=("https://wlcg.cern.ch/jwt/v1/any",))
    cap, _, _ = cap_of(long, client(), via, everywhere, [_SCOPES[needed]], granularity)
    assert cap == (86_400 if holds and mitigation != "one_storage" else 21_600)
    as_strings = structs.replace(area, matching="prefix")
    assert cap_of(long, client(), via, as_strings, [_SCOPES[needed]], granularity)[0] == 21_600


# ── string matching ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("dialect", "shared"), [("xrootd-5.5", ""), ("xrootd", "/data")])
def test_a_token_for_a_whole_storage_does_not_open_the_one_beside_it(dialect: str, shared: str) -> None:
    storages = (storage(dialect=dialect), storage("BESIDE", "/data2", dialect=dialect))
    planned = only(mint(policy(route(granularity="storage"), storages=storages)))
    assert planned.shared == shared


# ── the token endpoint ───────────────────────────────────────────────────────────────────────


def test_the_token_endpoint_uses_no_route_of_fts() -> None:
    by_fts = asked(policy(route(via="fts")), "storage.read:/data/d")
    assert isinstance(by_fts.refused[0].error, InvalidScope)
    assert only(asked(policy(route(via="direct")), "storage.read:/data/d"))


def test_the_token_endpoint_keeps_to_the_cap_of_the_route() -> None:
    engine = policy(route(max_lifetime_seconds=1800))
    assert only(asked(engine, "storage.read:/data/d")).lifetime.seconds == 1800
    long = route(max_lifetime_seconds=86_400, mitigations=("fts_only",), risk_assessment="doc")
    engine = policy(long, token_lifetime_seconds=30_000)
    assert only(asked(engine, "storage.read:/data/d")).lifetime.seconds == 21_600


def test_the_token_endpoint_leaves_out_names_that_the_storage_reads_otherwise() -> None:
    engine = policy(storages=(storage(dialect="storm"),))
    planned = only(asked(engine, "storage.read:/data/d storage.read:/data/d.*"))
    assert planned.scope == "storage.read:/data/d"
    assert "storage.read:/data/d.*" in only(asked(policy(), "storage.read:/data/d.*")).scope


# ── the check of finished tokens ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scope", ["storage.read", "storage.read:", "storage.read:d/f", "offline_access"])
def test_no_token_leaves_with_a_scope_that_means_more(es256: Signer, scope: str) -> None:
    planned = structs.replace(only(mint(policy())), scope=f"storage.read:/data/d/f {scope}")
    with pytest.raises(TokenRejected, match=r"path|offline_access"):
        finished(planned, es256)


@pytest.mark.parametrize(("seconds", "passes"), [(1, True), (21_600, True), (21_601, False), (0, False)])
def test_no_token_leaves_with_a_lifetime_beyond_its_plan(es256: Signer, seconds: int, passes: bool) -> None:
    planned = only(mint(policy()))
    assert planned.plan.cap_seconds == 21_600
    planned = structs.replace(planned, lifetime=structs.replace(planned.lifetime, seconds=seconds))
    if passes:
        finished(planned, es256)
    else:
        with pytest.raises(TokenRejected, match="beyond policy"):
            finished(planned, es256)


def finished(planned: PlannedToken, signer: Signer) -> None:
    at, jti = int(NOW.timestamp()), str(new_uuid7())
    token = signer.sign(build_claims(planned, "https://t.example.org/vo/", "s", "rucio", at, jti))
    check_token(
        token, planned, "https://t.example.org/vo/", "s", "rucio", at, jti, signer.kid, signer.algorithm
    )
