"""The console in a real Chromium, and its sign-in at a real Keycloak."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from minter.local.servers import Valkey
from tests.acceptance.conftest import Running
from tests.conftest import EXAMPLES, ROOT
from tests.iam_servers import Keycloak
from tests.servers import RabbitMQ, free_ports, lacking

pytestmark = pytest.mark.slow
CHROMIUM = "/usr/bin/chromium"
PAGES = ("", "search", "storages", "clients", "bans", "keys", "providers", "dead", "audit")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if shutil.which(CHROMIUM) is None:
        lacking("Chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The one-time link that `minter up` prints."""
    folder = tmp_path_factory.mktemp("console")
    http, console = free_ports(2)
    text = (EXAMPLES / "settings.toml").read_text().replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
    settings = folder / "settings.toml"
    settings.write_text(f"{text}\n[http]\nport = {http}\nprocesses = 1\n[console]\nport = {console}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "minter.cli", "up", "--settings", settings, "--state", folder / "state", "--workers", "1"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    found = ""
    for line in process.stdout:
        if told := re.match(r"The console, once: (\S+)", line):
            found = told[1]
        if "Ctrl-C" in line:
            break
    assert found, (folder / "state/console.log").read_text()
    yield found
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.fixture(scope="module")
def page(browser: Browser, link: str) -> Iterator[Page]:
    """A page that is signed in by the link."""
    opened = browser.new_context().new_page()
    opened.goto(link)
    yield opened
    opened.context.close()


def base(link: str) -> str:
    return link.partition("/enter")[0]


def test_every_page_is_whole_from_a_telephone_to_a_wide_screen(page: Page, link: str) -> None:
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    for width, scheme in ((360, "dark"), (1400, "light")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        for name in PAGES:
            answer = page.goto(f"{base(link)}/{name}")
            assert answer is not None
            assert answer.status == 200
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"/{name} is {wide} wide"
            assert page.locator("h1").count() == 1
    assert wrong == []  # nothing was blocked by the content policy, nothing is missing


def test_a_keyboard_alone_bans_and_lifts(page: Page, link: str) -> None:
    page.goto(f"{base(link)}/bans")
    page.keyboard.press("Tab")
    expect(page.locator("a.skip")).to_be_focused()
    page.get_by_label("Kind").select_option("storage")
    page.get_by_label("Value").fill("BOREAS-T2_DATADISK")
    page.get_by_label("Reason").fill("disk is broken")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Are you sure?")
    expect(page.get_by_role("button", name="Yes")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("storage BOREAS-T2_DATADISK is banned")
    page.get_by_role("link", name="Back").press("Enter")
    expect(page.get_by_role("row", name="BOREAS-T2_DATADISK")).to_contain_text("disk is broken")
    page.get_by_role("button", name="Lift").press("Enter")
    page.get_by_role("button", name="Yes").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("not banned any more")


def test_the_link_does_not_sign_in_twice(browser: Browser, link: str, page: Page) -> None:
    assert page.url
    stranger = browser.new_context().new_page()
    answer = stranger.goto(link)
    assert answer is not None
    assert answer.status == 401
    stranger.context.close()


# ── OpenID Connect ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def keycloak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keycloak]:
    server = Keycloak(tmp_path_factory.mktemp("keycloak"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def console(
    keycloak: Keycloak, broker: Valkey | RabbitMQ, database_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of a console whose people sign in at Keycloak."""
    folder, (port,) = tmp_path_factory.mktemp("oidc"), free_ports(1)
    (folder / "secret").write_text("console-secret")
    (folder / "secret").chmod(0o600)
    text = (EXAMPLES / "settings.toml").read_text().replace('"rucio-41.5/', f'"{EXAMPLES}/rucio-41.5/')
    (folder / "settings.toml").write_text(
        f'{text}\n[console]\nport = {port}\nurl = "http://127.0.0.1:{port}"\noidc_issuer = "{keycloak.issuer}"\n'
        'oidc_scope = "openid"\nclient_id = "minter-console"\nclient_secret_file = "secret"\n'
        'operators = ["minter-operators"]\nviewers = ["minter-*"]\n'
    )
    running = Running(broker, database_dsn, folder, settings=folder / "settings.toml")
    with (folder / "console.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "minter.cli", "console"], env=running.environ, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 30
    while not _healthy(url):
        assert time.monotonic() < deadline, (folder / "console.log").read_text()
        time.sleep(0.1)
    yield url
    process.terminate()
    process.wait(30)
    logged = (folder / "console.log").read_text()
    assert "console-secret" not in logged
    assert "code=" not in logged
    running.close()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def person(browser: Browser) -> Iterator[Page]:
    """A page of a fresh browser."""
    context = browser.new_context()
    yield context.new_page()
    context.close()


def sign_in(page: Page, console: str, name: str) -> None:
    """Sign in as people do: at the console, by Keycloak's form, and back."""
    page.goto(f"{console}/sign-in")
    page.locator("#username").fill(name)
    page.locator("#password").fill(f"{name}-password")
    page.locator("#password").press("Enter")
    page.wait_for_url(f"{console}/**")


@pytest.mark.parametrize(("name", "role"), [("olga", "operator"), ("vera", "viewer")])
def test_groups_of_the_iam_give_the_role(console: str, person: Page, name: str, role: str) -> None:
    sign_in(person, console, name)
    expect(person.locator("header")).to_contain_text(re.compile(rf"{name} \([0-9a-f-]+\) \({role}\)"))
    person.goto(f"{console}/bans")
    ban = person.get_by_role("button", name="Ban …")
    assert ban.count() == (role == "operator")
    if role == "operator":
        person.get_by_label("Kind").select_option("vo")
        person.get_by_label("Value").fill("alpen")
        person.get_by_label("Reason").fill("test")
        ban.click()
        person.get_by_role("button", name="Yes").click()
        expect(person.get_by_role("status")).to_contain_text("The audit names olga")
        person.goto(f"{console}/audit?action=ban")
        expect(person.get_by_role("row", name="alpen")).to_contain_text("olga")
    person.get_by_role("button", name="Sign out").click()
    answer = person.goto(f"{console}/bans")
    assert answer is not None
    assert answer.status == 401


def test_a_person_of_no_group_sees_nothing(console: str, person: Page) -> None:
    sign_in(person, console, "nora")
    expect(person.get_by_role("alert")).to_contain_text(re.compile(r"nora \([0-9a-f-]+\) is in no group"))
    answer = person.goto(f"{console}/")
    assert answer is not None
    assert answer.status == 401


def test_a_sign_in_belongs_to_the_browser_that_began_it(console: str, person: Page, browser: Browser) -> None:
    backs: list[str] = []
    person.on("request", lambda asked: backs.append(asked.url) if "/callback" in asked.url else None)
    sign_in(person, console, "vera")
    (back,) = backs
    victim = browser.new_context()
    for page in (victim.new_page(), person):  # another's sign-in, and a code that was taken
        answer = page.goto(back)
        assert answer is not None
        assert answer.status == 401
    victim.close()
