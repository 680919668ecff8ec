"""The console: who may see and change what, and that it shows no token."""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from falcon.testing import Result, TestClient
from msgspec import structs

from minter import search
from minter.console import charts, server
from minter.console.app import application
from minter.console.pages import Pages
from minter.console.signin import MOST, SESSION_SECONDS, Person, Sessions, SignIn
from minter.contract.followups import JobReport
from minter.contract.messages import FileRequest, MintRequest
from minter.database import audit, control_changes, counts, states
from minter.database.connection import floor, one, open_pool, transaction
from minter.errors import SettingsError
from minter.heartbeats import Heartbeat
from minter.lines import Line
from minter.metrics import Metrics
from minter.policy.requests import from_mint
from minter.probe.probe import PROBED
from minter.sections import ConsoleSettings
from minter.service import Service
from minter.tasks import bans
from minter.tokens import clock
from minter.tokens.keys import RotationPolicy
from minter.tokens.outcomes import Submission
from tests.conftest import load_settings
from tests.integration.test_mint import SE, mint, submission

BASE = "http://127.0.0.1:8445"
PAGES = ["/", "/search", "/storages", "/clients", "/bans", "/keys", "/providers", "/audit"]
MARKUP = "<script>alert(1)</script>"


class Console:
    """The console on a real database, and a browser that is signed in."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.pages = Pages(service)
        self.sign_in = SignIn(ConsoleSettings(), "")
        self.http = TestClient(application(self.pages, self.sign_in, BASE))
        self.session = ""

    def enter(self, role: str) -> None:
        self.session = self.sign_in.open(f"a {role}", "operator" if role == "operator" else "viewer")

    def get(self, path: str, **params: str) -> Result:
        return self.http.simulate_get(path, params=params, cookies={"minter-session": self.session})

    def post(self, path: str, **form: str) -> Result:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        if origin := form.pop("origin", ""):
            headers["Origin"] = origin
        return self.http.simulate_post(
            path, params=form, params_csv=False, headers=headers, cookies={"minter-session": self.session},
            body="&".join(f"{name}={value}" for name, value in form.items()),
        )  # fmt: skip

    @property
    def form_key(self) -> str:
        person = self.sign_in.sessions.find(self.session)
        assert person is not None
        return person.form_key


@pytest.fixture
def console(dsn: str) -> Iterator[Console]:
    metrics = Metrics()
    service = Service(load_settings(dsn), metrics.observe)
    yield Console(service)
    service.pool.dispose()


def minted(service: Service, external_id: str = "") -> tuple[MintRequest, list[str]]:
    """Mint a token with its own request; return the request and the tokens."""
    file = FileRequest(sources=(f"{SE}console/a",), external_id=external_id)
    request = MintRequest(request_id=clock.new_uuid7(), files=(file,))
    (outcome,) = service.engine.mint_many([Submission(from_mint(request), "rucio-alpen")], service.clock())
    return request, [issued.token.decode() for issued in outcome.issued]


def test_nobody_sees_a_page_without_signing_in(console: Console) -> None:
    for path in [*PAGES, "/dead", "/chart/tokens/hour.svg", "/nothing"]:
        answer = console.get(path)
        assert answer.status_code == 401, path
        assert "Parts" not in answer.text
    for path in ("/style.css", "/health"):
        assert console.get(path).status_code == 200
    assert console.get("/enter", key="wrong").status_code == 401
    assert console.get("/callback", state="x", code="y").status_code == 401
    assert console.post("/bans/add", kind="vo", value="alpen", reason="x").status_code == 401


def test_the_link_signs_in_once(console: Console) -> None:
    key = console.sign_in.link(BASE).split("key=")[1]
    answer = console.get("/enter", key=key)
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    console.session = answer.cookies["minter-session"].value
    assert console.get("/").status_code == 200
    assert console.get("/enter", key=key).status_code == 401
    assert console.get("/enter", key="").status_code == 401
    assert console.post("/sign-out").status_code == 200
    assert console.get("/").status_code == 401


@pytest.mark.parametrize("path", PAGES)
def test_pages_hold_no_script_and_no_token(console: Console, path: str) -> None:
    console.enter("viewer")
    _, (token,) = minted(console.service, MARKUP)
    answer = console.get(path, **({"q": MARKUP} if path == "/search" else {}))
    assert answer.status_code == 200
    assert "<script" not in answer.text
    assert token.rpartition(".")[2] not in answer.text
    assert "script-src" not in answer.headers["content-security-policy"]
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["cache-control"] == "no-store"
    assert 'lang="en"' in answer.text
    for label in re.findall(r"<(?:input|select)(?![^>]*hidden)[^>]*>", answer.text):
        assert "name=" in label


def test_storages_show_what_the_day_brought_and_their_last_probe(dsn: str) -> None:
    metrics = Metrics()
    service = Service(load_settings(dsn), metrics.observe)
    console = Console(service)
    console.enter("viewer")
    heartbeat = Heartbeat("worker", service, metrics.counted)
    minted(service)
    name = "BOREAS-T2_DATADISK"
    control_changes.add_ban(service.pool, bans.named("storage", name, "alpen"), "test", "x")
    _, none = minted(service)
    assert not none
    heartbeat.beat()
    for failed in (["audience"], []):
        audit.note(service.pool, "x", PROBED, f"alpen/{name}", {"failed": failed})
        shown = console.pages.storages()["storages"]
        found = {storage.name: row for storage, _, *row in shown}
        assert found[name][:2] == [1, 1]
        assert found[name][2].details == {"failed": failed}
        assert all(row == [0, 0, None] for other, row in found.items() if other != name)
        assert ("audience" in console.get("/storages").text) == bool(failed)
    heartbeat.stop()
    service.pool.dispose()


def test_the_keys_have_a_time_line(console: Console) -> None:
    console.enter("viewer")
    picture = console.get("/chart/keys.svg")
    assert picture.headers["content-type"] == "image/svg+xml"
    now, ring = console.service.clock(), console.pages.keys()["keys"]
    for shown in ring:
        assert shown["key"].kid[:8] in picture.text
    day, rotation = timedelta(days=1), RotationPolicy()
    of = ring[0]["key"]
    active = structs.replace(of, state="active", published_at=now - 9 * day, activated_at=now - 8 * day)
    old = structs.replace(active, state="old", retired_at=now - 2 * day, last_exp=now + day)
    waiting = structs.replace(of, state="prepared", published_at=now - day, activated_at=None)
    until = now - 8 * day + timedelta(seconds=rotation.lifetime_seconds)
    for key, *times in (
        (active, now - 9 * day, now - 8 * day, until, until),
        (old, now - 9 * day, now - 8 * day, now - 2 * day, now + day),
        (structs.replace(old, state="revoked"), now - 9 * day, now - 8 * day, now - 2 * day, now - 2 * day),
        (waiting, now - day, now, now, now),
    ):
        assert charts.KeyLine.of(key, rotation, now)[1:] == tuple(times)


def test_a_token_is_found_by_whatever_is_known_of_it(console: Console) -> None:
    console.enter("viewer")
    service = console.service
    request, _ = minted(service, "rucio-1")
    job = UUID("f0000000-0000-4000-8000-000000000001")  # no date can be read from it
    with transaction(service.pool) as connection:
        (client_id,) = connection.execute("SELECT client_id FROM clients").fetchone() or (0,)
        states.note_jobs(connection, client_id, [JobReport(job, request.request_id, (0,))])
    (one,) = console.pages.search(str(request.request_id))["tokens"]
    trace, path = one["trace"], one["claims"]["scope"].partition(":")[2]
    asked = [str(request.request_id), str(trace.jti), f"{SE}console/a", path, "rucio-1",
             trace.fts_token_id, str(job)]  # fmt: skip
    for text in asked:
        answer = console.get("/search", q=f" {text} ")
        assert answer.status_code == 200
        assert str(trace.jti) in answer.text, text
        assert "BOREAS-T2_DATADISK" in answer.text
    for by, name in (("client", "rucio-alpen"), ("storage", "BOREAS-T2_DATADISK"), ("key", trace.kid)):
        assert str(trace.jti) in console.get("/search", **{by: name}).text
    nothing = console.get("/search", q="davs://nowhere.example.org/f")
    assert (nothing.status_code, 'role="alert"' in nothing.text) == (200, True)
    odd = [f"ffffffff-ffff-{version}fff-bfff-ffffffffffff" for version in "147"] + [str(UUID(int=0))]
    for unknown in [str(clock.new_uuid7()), *odd, "00000000-0000-7000-8000-000000000000"]:
        assert "0 tokens" in console.get("/search", q=unknown).text


def test_an_operator_acts_after_a_second_question_and_under_the_own_name(console: Console) -> None:
    console.enter("operator")
    form = {
        "form_key": console.form_key,
        "kind": "path",
        "value": "/data//x",
        "vo": "alpen",
        "reason": "broken",
    }
    asked = console.post("/bans/add", **form)
    assert (asked.status_code, "Are you sure" in asked.text) == (200, True)
    assert console.pages.bans()["bans"] == []
    done = console.post("/bans/add", **form, sure="yes")
    assert "path /data/x is banned" in done.text
    (ban,) = console.pages.bans()["bans"]
    assert (ban["value"], ban["vo"], ban["reason"]) == ("/data/x", "alpen", "broken")
    console.post(
        "/bans/lift", form_key=console.form_key, kind="path", value="/data/x", vo="alpen", sure="yes"
    )
    assert console.pages.bans()["bans"] == []
    for to, disabled in (("disabled", True), ("enabled", False)):
        console.post("/clients/able", form_key=console.form_key, client="rucio-alpen", to=to, sure="yes")
        (client,) = console.pages.clients()["clients"]
        assert client.disabled is disabled
    text = console.get("/audit", actor="a operator").text
    for action in ("ban", "unban", "client.disable", "client.enable"):
        assert action in text
    (active, *_) = (k["key"] for k in console.pages.keys()["keys"] if k["key"].state == "active")
    early = console.post("/keys/rotate", form_key=console.form_key, kid=active.kid, sure="yes")
    assert (early.status_code, "no prepared" in early.text) == (503, True)
    wrong = console.post("/bans/add", **{**form, "kind": "storage", "value": "BOREAS"}, sure="yes")
    assert (wrong.status_code, "similar names" in wrong.text) == (400, True)


@pytest.mark.parametrize(
    ("role", "change"),
    [
        ("viewer", {}),
        ("operator", {"form_key": "another"}),
        ("operator", {"form_key": ""}),
        ("operator", {"origin": "https://evil.example.org"}),
        ("operator", {"origin": "null"}),
    ],
)
def test_others_change_nothing(console: Console, role: str, change: dict[str, str]) -> None:
    console.enter(role)
    form = {"form_key": console.form_key, "kind": "vo", "value": "alpen", "reason": "x", "sure": "yes"}
    assert console.post("/bans/add", **{**form, **change}).status_code == 403
    assert console.pages.bans()["bans"] == []
    assert ("Ban …" in console.get("/bans").text) is (role == "operator")


@pytest.mark.parametrize("path", ["/audit?actor=%00", "/search?client=a%00", "/search?q=%00", "/?period=%00"])
def test_odd_parameters_are_400(console: Console, path: str) -> None:
    console.enter("viewer")
    assert console.http.simulate_get(path, cookies={"minter-session": console.session}).status_code == 400


@pytest.mark.parametrize("by", ["client", "storage", "key"])
def test_the_newest_tokens_are_looked_for_in_a_bounded_time(
    console: Console, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    console.enter("viewer")
    mint(console.service, submission("a"))
    moved = floor(clock.now() - timedelta(hours=2))
    with transaction(console.service.pool) as connection:  # as if one were of two hours ago
        connection.execute("UPDATE tokens SET jti = %s WHERE side = 'source'", (moved,))
        names = one(connection.execute(
            "SELECT c.name, s.name, k.kid FROM tokens JOIN clients c USING (client_id) JOIN storages s USING (storage_id)"
            " JOIN signing_keys k USING (key_id) WHERE jti = %s", (moved,),
        ))  # fmt: skip
    asked = {by: dict(zip(("client", "storage", "key"), names, strict=True))[by]}
    monkeypatch.setattr(search, "WALK_SECONDS", 60.0)
    shown, further = f"<code>{moved}", f"{by}={asked[by]}&amp;everywhere=1"
    all_of_it = console.get("/search", **asked).text
    assert (shown in all_of_it, further in all_of_it) == (True, False)
    monkeypatch.setattr(search, "WALK_SECONDS", -1.0)
    nothing = console.get("/search", **asked).text
    assert (shown in nothing, further in nothing) == (False, True)
    assert shown in console.get("/search", everywhere="1", **asked).text


def test_a_ban_of_all_vos_says_so_before_it_is_made(console: Console) -> None:
    console.enter("operator")
    form = {"form_key": console.form_key, "kind": "activity", "value": "x", "vo": "", "reason": "r"}
    assert "<dt>vo</dt><dd>all</dd>" in console.post("/bans/add", **form).text
    assert console.post("/bans/add", **{**form, "value": "%00"}).status_code == 400
    for origin in ("http://[", "http://127.0.0.1:8446"):
        assert console.post("/bans/add", **form, origin=origin).status_code == 403


def test_links_of_a_page_for_errors_lead_out_of_its_folder(console: Console) -> None:
    text = console.post("/bans/add", kind="vo", value="alpen", reason="x").text
    assert 'href="../style.css"' in text
    console.enter("viewer")
    assert 'href="../search"' in console.post("/bans/add", kind="vo").text


def test_without_postgres_the_overview_still_says_what_is_wrong(console: Console) -> None:
    console.enter("viewer")
    console.pages.overview.lines = [Line("failed", "postgres", "Connection refused")]
    console.service.pool = open_pool("host=127.0.0.1 port=1 user=x dbname=x", 1, 1)
    answer = console.get("/")
    assert (answer.status_code, "Connection refused" in answer.text, "No rates" in answer.text) == (
        200,
        True,
        True,
    )
    assert console.get("/clients").status_code == 503


def test_a_minute_that_has_not_begun_here_does_no_harm(console: Console) -> None:
    console.enter("viewer")
    with transaction(console.service.pool) as connection:
        connection.execute(
            "INSERT INTO counts VALUES (date_trunc('minute', now()) + interval '1 minute', %s, 'alpen', 'tokens', 'mint', 5)",
            (clock.new_uuid7(),),
        )
    assert console.get("/").status_code == 200


def test_rates_are_of_all_processes(console: Console) -> None:
    console.enter("viewer")
    metrics = Metrics()
    service = Service(console.service.loaded, metrics.observe)
    try:
        for _ in range(3):
            minted(service)
        heartbeat = Heartbeat("worker", service, metrics.counted)
        heartbeat.beat()
        with transaction(service.pool) as connection:
            counts.add(connection, clock.new_uuid7(), {("alpen", "tokens", "mint"): 4})
        for period in ("hour", "day", "week"):
            assert "mint: 7" in console.get("/", period=period).text
            chart = console.get(f"/chart/tokens/{period}.svg")
            assert chart.headers["content-type"] == "image/svg+xml"
            assert b"Tokens a second" in chart.content
        heartbeat.stop()
    finally:
        service.pool.dispose()
    assert console.get("/", period="year").status_code == 400
    assert console.get("/chart/secrets/hour.svg").status_code == 400


def test_the_overview_says_what_status_says(console: Console) -> None:
    console.enter("viewer")
    assert "asking" in console.get("/").text
    console.pages.overview.look()
    text = console.get("/").text
    assert "commits wait for none" in text
    assert "no broker URL is set" in text


def test_sessions_end_and_are_bounded() -> None:
    at, person = [0.0], Person("a", "viewer", "key")
    sessions = Sessions(lambda: at[0])
    first = sessions.add(person)
    at[0] = SESSION_SECONDS - 1
    assert sessions.find(first) == person
    at[0] = SESSION_SECONDS
    assert sessions.find(first) is None
    keys = [sessions.add(person) for _ in range(MOST + 1)]
    assert (sessions.find(keys[0]), sessions.find(keys[1])) == (None, person)
    sessions.end(keys[1])
    assert sessions.find(keys[1]) is None


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (ConsoleSettings(listen="0.0.0.0"), "for loopback only"),
        (ConsoleSettings(listen="minter.example.org"), "for loopback only"),
        (ConsoleSettings(oidc_issuer="https://iam.example.org/"), "needs url"),
    ],
)
def test_a_console_that_strangers_could_reach_does_not_start(wanted: ConsoleSettings, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        server.check(wanted)
    server.check(ConsoleSettings(listen="::1"))


def test_the_link_is_in_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "link"
    path.write_text("old")
    monkeypatch.setenv(server.LINK, str(path))
    server._tell("http://x/enter?key=k")
    assert path.read_text() == "http://x/enter?key=k"
    assert path.stat().st_mode & 0o777 == 0o600
