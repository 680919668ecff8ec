"""`minter storages probe` on a real XRootD: a right site passes, and each seeded fault is named."""

import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from msgspec import structs

from minter.policy.diagnose import Verdict
from minter.probe import probe
from tests.acceptance.served import Served
from tests.acceptance.test_xrootd import ROUTES, STORAGE, curl, token
from tests.conftest import rows
from tests.servers import XRootD, free_ports

pytestmark = pytest.mark.slow
MORE = """
[[storages]]
vo = "alpen"
name = "NEW"
dialect = "xrootd"
base_path = "/grid"
endpoints = [{{ host = "localhost", port = {port}, prefix = "/grid/new" }}]

[[storages]]
vo = "alpen"
name = "AWAY"
dialect = "xrootd-5.5"
endpoints = [{{ host = "localhost", port = {away}, prefix = "/" }}]
"""
"""At the server of A: a storage whose settings name a later version. And a storage that does not run."""


@pytest.fixture(scope="module")
def site(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, XRootD]]:
    """The HTTP service, and a storage that is configured but does not run."""
    XRootD.need()
    folder = tmp_path_factory.mktemp("probe")
    port, away = free_ports(2)
    served = Served(
        folder, postgres_dsn, STORAGE.format(name="A", port=port) + MORE.format(port=port, away=away) + ROUTES
    )
    served.add_client("rucio")
    storage = XRootD(folder / "a", port, served.ca)
    try:
        storage.configure(served.minter("storages", "site-config", "--storage", "A").stdout)
        for name in ("vo/scratch", "new/scratch", "vo/dir"):
            (storage.files / "grid" / name).mkdir(parents=True)
        (storage.files / "grid/vo/dir/file10").write_text("data")
        yield served, storage
    finally:
        storage.stop()
        served.close()


@pytest.fixture
def right(site: tuple[Served, XRootD]) -> Iterator[tuple[Served, XRootD]]:
    """The storage as `site-config` configures it."""
    site[1].start()
    yield site
    site[1].stop()


def verdicts(served: Served, name: str, path: str, *, read_only: bool = False) -> list[Verdict]:
    """Probe the one endpoint of a storage."""
    storage = next(s for s in served.service.loaded.storages if s.name == name)
    (asker,) = probe.askers(served.service, storage, path, "rucio", str(served.ca)).values()
    return list(probe.read_only(asker, path) if read_only else probe.write_and_read(asker, path))


def failed(found: list[Verdict]) -> dict[str, str]:
    return {one.check: one.text for one in found if not one.passes}


def files(storage: XRootD) -> list[str]:
    return [p.name for p in (storage.files / "grid").rglob("*") if p.name.startswith("minter-probe")]


def test_a_right_site_passes_and_nothing_is_left(right: tuple[Served, XRootD]) -> None:
    served, storage = right
    done = served.minter(
        "storages", "probe", "A", "/vo/scratch", "--client", "rucio", "--ca", str(served.ca), "--json"
    )
    told = json.loads(done.stdout)
    assert told["passes"]
    checks = {verdict[1] for verdict in told["endpoints"][f"localhost:{storage.port}"]}
    assert checks == {
        "write", "dialect", "create", "isolation", "read only", "overwrite", "read", "matching", "anonymous",
        "audience", "signature", "expiry", "delete",
    }  # fmt: skip
    assert not files(storage)
    newest = "SELECT details FROM audit WHERE action = 'storage.probed' ORDER BY audit_id DESC LIMIT 1"
    ((details,),) = rows(served.service, newest)
    assert (details["path"], details["failed"]) == ("/vo/scratch", [])


def test_every_token_of_a_probe_is_on_record_and_soon_over(right: tuple[Served, XRootD]) -> None:
    served, _ = right
    before = rows(served.service, "SELECT count(*) FROM tokens")[0][0]
    assert not failed(verdicts(served, "A", "/vo/scratch"))
    left = "SELECT count(*), max(expires_at) < now() + interval '61 s' FROM tokens JOIN requests USING (request_id) WHERE activity = 'probe'"
    ((count, soon),) = rows(served.service, left)
    assert (count > before + 10, soon) == (True, True)


def test_a_probe_that_only_reads_writes_nothing(right: tuple[Served, XRootD]) -> None:
    served, storage = right
    at = (storage.files / "grid/vo/dir/file10").stat().st_mtime_ns
    found = verdicts(served, "A", "/vo/dir/file10", read_only=True)
    assert not failed(found)
    assert {"read", "matching", "isolation", "anonymous", "audience", "signature", "expiry"} <= {
        one.check for one in found
    }
    assert (storage.files / "grid/vo/dir/file10").stat().st_mtime_ns == at
    assert set(failed(verdicts(served, "A", "/vo/dir/none", read_only=True))) == {"path"}


def test_a_dialect_of_a_later_version_is_named(right: tuple[Served, XRootD]) -> None:
    served, storage = right
    wrong = failed(verdicts(served, "NEW", "/new/scratch"))
    assert set(wrong) == {"dialect", "matching"}
    assert 'matching = "prefix"' in wrong["matching"]
    assert not files(storage)


def test_a_folder_without_rights_is_told_apart(right: tuple[Served, XRootD]) -> None:
    served, storage = right
    folder = storage.files / "grid/vo/scratch"
    subprocess.run(["chown", "root:", folder], check=True)
    try:
        assert set(failed(verdicts(served, "A", "/vo/scratch"))) == {"rights"}
    finally:
        subprocess.run(["chown", "xrootd:", folder], check=True)


def test_paths_and_clients_that_cannot_be_probed(right: tuple[Served, XRootD]) -> None:
    served, storage = right
    for name, path, told in (
        ("A", "/other/scratch", "expected below"),
        ("A", "vo/scratch", "not absolute"),
        ("NONE", "/vo", "0 storages are named"),
    ):
        done = served.minter("storages", "probe", name, path, "--client", "rucio", check=False)
        assert done.returncode != 0
        assert told.replace("expected below", "below /grid/vo") in done.stderr
    served.add_client("reader", operations=["read"])
    done = served.minter("storages", "probe", "A", "/vo/scratch", "--client", "reader", check=False)
    assert "may not delete" in done.stderr
    served.add_client("writer", operations=["read", "write", "overwrite"])
    done = served.minter("storages", "probe", "A", "/vo/scratch", "--client", "writer", check=False)
    assert "no token to delete" in done.stderr
    assert not files(storage)


def test_a_storage_that_does_not_answer(site: tuple[Served, XRootD]) -> None:
    served, _ = site
    assert "Connection refused" in failed(verdicts(served, "AWAY", "/scratch"))["endpoint"]


def test_a_certificate_of_an_unknown_ca(right: tuple[Served, XRootD]) -> None:
    served, _ = right
    done = served.minter("storages", "probe", "A", "/vo/scratch", "--client", "rucio", check=False)
    assert done.returncode == 1
    assert "CERTIFICATE_VERIFY_FAILED" in done.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("old", "new", "check", "told"),
    [
        ("issuer = {iss}", "issuer = https://iam.example.org/", "trust", "issuer = {iss}"),
        ("issuer = {iss}", "issuer = {bare}", "trust", "issuer = {iss}"),
        ('"https://localhost:{port}"', '"localhost:{port}"', "audience", "takes tokens for localhost:{port},"),
        ('"https://localhost:{port}"', '"https://localhost"', "audience", "takes tokens for https://localhost,"),
        ('"https://localhost:{port}"', '"localhost"', "audience", "takes tokens for localhost,"),
        ('"https://localhost:{port}"', '"https://alias.example.org"', "audience", "any audience"),
        ('audience_json = ["https://localhost:{port}"]', "", "audience", "audience_json"),
        ("base_path = /grid", "base_path = /", "base path", "is /, "),
        ("base_path = /grid", "base_path = /grid/vo", "base path", "is /grid/vo, "),
        ("base_path = /grid", "base_path = /grid\nrestricted_path = /other", "trust", "keeps the issuer to"),
        ("onmissing = deny", "onmissing = allow", "anonymous", "onmissing = deny"),
        ("ofs.authorize", "", "anonymous", "ofs.authorize"),
        ("http.header2cgi Authorization authz", "", "header", "http.header2cgi"),
    ],
)  # fmt: skip
def test_each_fault_of_a_site_is_named(
    site: tuple[Served, XRootD], old: str, new: str, check: str, told: str
) -> None:
    served, storage = site
    values = {"iss": served.iss, "bare": served.iss.rstrip("/"), "port": storage.port}
    old, new, told = (text.format(**values) for text in (old, new, told))
    texts = {name: (storage.folder / name).read_text() for name in ("scitokens.cfg", "xrootd.cfg")}
    assert sum(old in text for text in texts.values()) == 1
    try:
        for name, text in texts.items():
            (storage.folder / name).write_text(text.replace(old, new))
        storage.start()
        wrong = failed(verdicts(served, "A", "/vo/scratch"))
        assert check in wrong
        assert told in wrong[check]
        assert not files(storage)
    finally:
        storage.stop()
        for name, text in texts.items():
            (storage.folder / name).write_text(text)


def test_403_at_a_storage_as_on_call_has_it(site: tuple[Served, XRootD]) -> None:
    """The site forgets its base path: docs/on-call.md, "403 at a storage", from symptom to cure."""
    served, storage = site
    url, name = f"davs://localhost:{storage.port}/grid/vo/dir/file10", "scitokens.cfg"
    right = (storage.folder / name).read_text()
    try:
        (storage.folder / name).write_text(right.replace("base_path = /grid", "base_path = /"))
        storage.start()
        bearer = token(served, storage, "download", "dir/file10")
        assert curl(storage, bearer, "GET", "dir/file10") == 403
        traced = served.minter("trace", "--path", url, "--limit", "1", "--json").stdout
        (record,) = json.loads(traced)["tokens"]
        assert (record["state"], record["operations"], record["storage"]) == ("issued", ["read"], "A")
        explained = served.minter("explain", "--url", url, "--client", "rucio").stdout
        assert "storage.read:/vo/dir/file10" in explained
        predicted = json.loads(served.minter("diagnose", record["jti"], url, "--json").stdout)
        assert predicted["allowed"]  # so the site differs from the settings
        (served.folder / "token").write_text(bearer)
        assert json.loads(served.minter("verify", served.folder / "token", "--json").stdout)["valid"]
        probed = served.minter(
            "storages", "probe", "A", "/vo/dir/file10", "--read-only", "--client", "rucio", "--ca", served.ca,
            check=False,
        )  # fmt: skip
        assert probed.returncode == 1
        assert "its base path is /, the settings say /grid" in probed.stdout
        assert "the site's configuration must say: base_path = /grid" in probed.stdout
        storage.stop()
        (storage.folder / name).write_text(right)
        storage.start()
        assert curl(storage, bearer, "GET", "dir/file10") == 200
    finally:
        storage.stop()
        (storage.folder / name).write_text(right)


class Odd(BaseHTTPRequestHandler):
    """A storage with the faults that a test sets: statuses by method, a date, a place to redirect to."""

    statuses: ClassVar[dict[str, int]] = {}
    headers_sent: ClassVar[dict[str, str]] = {}
    seen: ClassVar[list[str]] = []

    def handle_any(self) -> None:
        self.seen.append(f"{self.command} {self.headers.get('Authorization', '')}")
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        known = "Authorization" in self.headers
        self.send_response_only(self.statuses.get(self.command if known else "none", 401))
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.handle_any()

    def do_PUT(self) -> None:
        self.handle_any()

    def do_DELETE(self) -> None:
        self.handle_any()

    def do_PROPFIND(self) -> None:
        self.handle_any()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def odd(site: tuple[Served, XRootD]) -> Iterator[type[Odd]]:
    """A storage at the address of AWAY that behaves as the test says."""
    served, _ = site
    (port,) = [e.port for s in served.service.loaded.storages if s.name == "AWAY" for e in s.endpoints]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served.folder / "host.pem", served.folder / "host.key")
    server = ThreadingHTTPServer(("127.0.0.1", port), Odd)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    Odd.statuses, Odd.headers_sent, Odd.seen = {}, {}, []
    yield Odd
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("statuses", "headers", "check", "told"),
    [
        ({}, {"Date": "Sun, 29 Nov 2020 00:00:00 GMT"}, "clock", "s from ours"),
        ({"none": 404, "GET": 404}, {}, "trust", "refuses every token"),  # 404 is told to anybody
        ({"GET": 429}, {}, "trust", "refuses every token"),
        ({"GET": 404}, {}, "rights", "it may not write"),
        ({"PUT": 504}, {}, "delete", "these may be left: /scratch/minter-probe-"),
        ({"PUT": 404, "DELETE": 404}, {}, "path", "is the path right?"),
        ({"PUT": 302}, {"Location": "https://login.example.org/sso"}, "endpoint", "https://login.example.org,"),
        ({"PUT": 302}, {"Location": "http://localhost/f"}, "endpoint", "http://localhost,"),
    ],
)  # fmt: skip
def test_odd_answers_are_not_misread(
    site: tuple[Served, XRootD], odd: type[Odd], statuses: dict[str, int], headers: dict[str, str], check: str, told: str
) -> None:  # fmt: skip
    served, _ = site
    odd.statuses, odd.headers_sent = statuses, headers
    wrong = failed(verdicts(served, "AWAY", "/scratch"))
    assert told in wrong[check]
    assert "eyJ" not in str(wrong)


def test_no_token_goes_to_a_server_of_another_domain(site: tuple[Served, XRootD], odd: type[Odd]) -> None:
    served, _ = site
    (storage,) = (s for s in served.service.loaded.storages if s.name == "AWAY")
    (asker,) = probe.askers(served.service, storage, "/scratch", "rucio", str(served.ca)).values()
    asker.endpoint = structs.replace(asker.endpoint, host="door.site.example.org")
    urls = ("https://pool1.site.example.org:2880/x", "https://door.site.example.org/x", "https://example.org/x",
            "https://site.example.org.evil.org/x", "http://pool1.site.example.org/x", "https://login.other.org/x")  # fmt: skip
    assert [asker._is_ours(url) for url in urls] == [True, True, False, False, False, False]
    assert not odd.seen
