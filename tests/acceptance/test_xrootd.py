"""A real XRootD over HTTPS with the output of `site-config`: each token opens its file and nothing else.

The tests run on Debian's XRootD 5.5.3 with libscitokens 0.7.3 and cover the known faults of that version (it
compares paths by prefix).
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jwt
import pytest

from minter.client import FileOperation, FileRequest
from minter.contract.operations import Operation
from minter.database import control_changes
from minter.errors import OperationNotAllowed
from minter.policy.clients import Ban
from tests.acceptance.served import Served
from tests.servers import XRootD, free_ports

pytestmark = pytest.mark.slow
FOREIGN = Path(__file__).parent / "foreign"
STORAGE = """
[[storages]]
vo = "alpen"
name = "{name}"
dialect = "xrootd-5.5"
base_path = "/grid"
endpoints = [{{ host = "localhost", port = {port}, prefix = "/grid/vo" }}]
"""
NEIGHBOURS = """
[[storages]]
vo = "alpen"
name = "A-RSA"
dialect = "profile"
audience = ["https://localhost:{port}"]
base_path = "/grid"
endpoints = [{{ host = "localhost", port = {port}, prefix = "/grid/rsa" }}]

[[storages]]
vo = "alpen"
name = "A-SCRATCH"
dialect = "xrootd-5.5"
base_path = "/grid"
endpoints = [{{ host = "localhost", port = {port}, prefix = "/grid/vo-scratch" }}]
"""
"""At the server of A: a storage whose software is unknown, so that RS256 signs for it, and one whose prefix
begins with that of A, which the server's prefix matching cannot tell from A."""
FOLDERS = [
    "vo/dir",
    "rsa/dir",
    "vo-scratch/dir",
    "vo/user/bob",
    "vo/user/bobby",
    "vo/out/job1",
    "vo/out/job2",
]
ROUTES = """
[[routes]]
name = "open data"
via = "url"
operations = ["read"]

[[routes]]
name = "direct"
operations = ["read", "write", "overwrite", "retry", "stat", "make_parents", "delete"]
"""


@pytest.fixture(scope="module")
def site(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, XRootD, XRootD]]:
    """The HTTP service, and two storages that trust it."""
    XRootD.need()
    folder = tmp_path_factory.mktemp("site")
    ports = free_ports(2)
    text = "".join(STORAGE.format(name=n, port=p) for n, p in zip(("A", "B"), ports, strict=True))
    text += NEIGHBOURS.format(port=ports[0]) + ROUTES
    served = Served(folder, postgres_dsn, text)
    served.add_client("rucio")
    storages = [XRootD(folder / name, port, served.ca) for name, port in zip("ab", ports, strict=True)]
    try:
        for name, storage in zip(("A", "B"), storages, strict=True):
            storage.configure(served.minter("storages", "site-config", "--storage", name).stdout)
            for folder_name in FOLDERS:
                (storage.files / "grid" / folder_name).mkdir(parents=True)
                for file in ("file1", "file2", "file10", "odd+=:,@name"):
                    (storage.files / "grid" / folder_name / file).write_text(file)
            storage.start()
        yield served, storages[0], storages[1]
    finally:
        for storage in storages:
            storage.stop()
        served.close()


def token(
    served: Served,
    storage: XRootD,
    operation: Operation | Literal["download", "upload"],
    path: str,
    owner: str = "rucio",
    area: str = "vo",
) -> str:
    """Mint a token for one operation on one file of a storage."""
    url = f"davs://localhost:{storage.port}/grid/{area}/{path}"
    with served.client(owner) as client:
        (made,) = client.mint([FileRequest(operations=(FileOperation(operation, url),))]).tokens
    return made.reveal()


def refusal(
    served: Served,
    storage: XRootD,
    operation: Operation | Literal["download", "upload"],
    path: str,
    client: str = "rucio",
) -> str:
    """Return the reason why no token is minted for one operation on one file."""
    url = f"davs://localhost:{storage.port}/grid/vo/{path}"
    with served.client(client) as minter:
        (refused,) = minter.mint([FileRequest(operations=(FileOperation(operation, url),))]).refusals
    return refused.error.reason


def fetch(storage: XRootD, url: str, *options: str) -> int:
    """Return the status of a request for a whole URL."""
    done = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", storage.ca, "--path-as-is", *options, url],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return int(done.stdout)


def curl(storage: XRootD, bearer: str | None, method: str, path: str, *options: str, area: str = "vo") -> int:
    """Return the status of a request; the path is below an area."""
    header = ["-H", f"Authorization: Bearer {bearer}"] if bearer else []
    return fetch(storage, f"{storage.url}/grid/{area}/{path}", "-X", method, *header, *options)


def put(storage: XRootD, bearer: str | None, path: str, content: str = "new") -> int:
    return curl(storage, bearer, "PUT", path, "-H", "Expect:", "--data-binary", content)


def test_no_token_no_file(site: tuple[Served, XRootD, XRootD]) -> None:
    _, a, _ = site
    assert curl(a, None, "GET", "dir/file1") == 403


def test_a_read_token_reads_its_file_at_its_storage(site: tuple[Served, XRootD, XRootD]) -> None:
    served, a, b = site
    read = token(served, a, "download", "dir/file1")
    assert curl(a, read, "GET", "dir/file1") == 200
    assert curl(a, read, "GET", "dir/file1", "-r", "0-1") == 206
    assert curl(a, read, "HEAD", "dir/file1", "-I") == 200
    assert curl(a, read, "PROPFIND", "dir/file1") == 207
    refused = [
        ("GET", "dir/file2"),
        ("PROPFIND", "dir/file2"),
        ("GET", "dir/../dir/file2"),
        ("DELETE", "dir/file1"),
    ]
    assert {curl(a, read, *r) for r in refused} == {403}
    assert put(a, read, "dir/file1") == 403
    assert curl(b, read, "GET", "dir/file1") == 403
    # The dialect `xrootd-5.5` knows this fault of 5.5 (`matching = prefix`): tokens live six hours at most.
    assert curl(a, read, "GET", "dir/file10") == 200


def test_a_write_token_makes_its_file_once(site: tuple[Served, XRootD, XRootD]) -> None:
    served, a, _ = site
    write = token(served, a, "upload", "dir/new")
    assert put(a, write, "dir/other") == 403
    assert put(a, write, "dir/new") in (200, 201)
    assert put(a, write, "dir/new") == 403
    assert curl(a, write, "DELETE", "dir/new") == 403


def test_an_overwriting_and_a_deleting_token(site: tuple[Served, XRootD, XRootD]) -> None:
    served, a, _ = site
    assert put(a, token(served, a, "overwrite", "dir/again"), "dir/again") in (200, 201)
    assert put(a, token(served, a, "overwrite", "dir/again"), "dir/again", "more") in (200, 201)
    assert (a.files / "grid/vo/dir/again").read_text() == "more"
    delete = token(served, a, "delete", "dir/again")
    assert curl(a, delete, "DELETE", "dir/file2") == 403
    assert curl(a, delete, "DELETE", "dir/again") in (200, 204)


def test_names_as_the_dialect_writes_them(site: tuple[Served, XRootD, XRootD]) -> None:
    served, a, _ = site
    assert curl(a, token(served, a, "download", "dir/odd+=:,@name"), "GET", "dir/odd+=:,@name") == 200


@pytest.mark.parametrize(("area", "algorithm"), [("vo", "ES256"), ("rsa", "RS256")])
def test_both_algorithms_open_what_they_name_and_nothing_else(
    site: tuple[Served, XRootD, XRootD], area: str, algorithm: str
) -> None:
    served, a, b = site
    read = token(served, a, "download", "dir/file2", area=area)
    assert jwt.get_unverified_header(read)["alg"] == algorithm
    assert curl(a, read, "GET", "dir/file2", area=area) == 200
    assert curl(a, read, "GET", "dir/file1", area=area) == 403
    assert curl(a, read, "GET", "dir/file2", area="rsa" if area == "vo" else "vo") == 403
    assert curl(b, read, "GET", "dir/file2", area=area) == 403
    write = token(served, a, "upload", f"dir/by-{algorithm}", area=area)
    assert curl(
        a, write, "PUT", f"dir/by-{algorithm}", "-H", "Expect:", "--data-binary", "new", area=area
    ) in (200, 201)
    assert curl(a, write, "DELETE", f"dir/by-{algorithm}", area=area) == 403
    header, payload, signature = read.split(".")
    forged = f"{header}.{payload}.{signature[:-8]}{'A' if signature[-8] != 'A' else 'B'}{signature[-7:]}"
    assert curl(a, forged, "GET", "dir/file2", area=area) == 403


def test_no_token_opens_a_neighbour_whose_name_begins_alike(site: tuple[Served, XRootD, XRootD]) -> None:
    """The server compares paths as strings (dialect xrootd-5.5), so Minter must not sign what it misreads."""
    served, a, _ = site
    served.add_client("bob", paths=["/vo/user/bob"], operations=["read", "write", "overwrite", "delete"])
    mine = token(served, a, "download", "user/bob/file1", owner="bob")
    assert curl(a, mine, "GET", "user/bob/file1") == 200
    assert curl(a, mine, "GET", "user/bobby/file1") == 403
    assert curl(a, mine, "GET", "dir/file1", area="vo-scratch") == 403
    assert refusal(served, a, "delete", "user/bob", client="bob") == "path_not_allowed"
    served.add_client("area", paths=["/vo"])
    for client, path in (("bob", "/vo/user/bob"), ("bob", "/vo/user"), ("area", "/vo")):
        told = served.token(client, grant_type="client_credentials", scope=f"storage.modify:{path}",
                            audience=f"https://localhost:{a.port}")  # fmt: skip
        assert (told.status_code, told.json()["reason"]) == (400, "invalid_scope")


def test_a_ban_on_a_file_holds_for_the_names_that_open_it(site: tuple[Served, XRootD, XRootD]) -> None:
    """A token for file1 opens file10 here, so a ban on file10 refuses tokens for file1, too."""
    served, a, _ = site
    control_changes.add_ban(served.service.pool, Ban("path", "/vo/dir/file10"), "leak", "tests")
    try:
        for name in ("file1", "file10"):
            assert refusal(served, a, "download", f"dir/{name}") == "banned"
        assert curl(a, token(served, a, "download", "dir/file2"), "GET", "dir/file10") == 403
    finally:
        control_changes.lift_ban(served.service.pool, Ban("path", "/vo/dir/file10"), "tests")


@pytest.mark.parametrize(
    ("operation", "method", "path", "at"),
    [
        ("read", "GET", "dir/file1", 0),
        ("read", "GET", "dir/file10", 0),
        ("read", "GET", "dir/file2", 0),
        ("read", "GET", "dir/file1", 1),
        ("delete", "DELETE", "dir/file1", 0),
        ("overwrite", "PUT", "dir/file1", 0),
    ],
)
def test_diagnose_predicts_what_the_server_answers(
    site: tuple[Served, XRootD, XRootD], operation: Operation, method: str, path: str, at: int
) -> None:
    served, *storages = site
    read = token(served, storages[0], "download", "dir/file1")
    asked = storages[at]
    answered = curl(asked, read, method, path, *(["-d", "x"] if method == "PUT" else []))
    url = f"davs://localhost:{asked.port}/grid/vo/{path}"
    jti = jwt.decode(read, options={"verify_signature": False})["jti"]
    done = served.minter("diagnose", jti, url, "--operation", operation, "--json", check=False)
    assert json.loads(done.stdout)["allowed"] == (answered < 300), (answered, done.stdout)
    assert done.returncode == (0 if answered < 300 else 1)


def test_check_names_the_neighbours_that_begin_alike(site: tuple[Served, XRootD, XRootD]) -> None:
    served, _, _ = site
    assert "the prefix of A-SCRATCH begins with that of A" in served.minter("check").stdout.replace("\n", " ")


def test_tokens_of_the_token_endpoint(site: tuple[Served, XRootD, XRootD]) -> None:
    served, a, b = site
    told = served.token(
        "rucio",
        grant_type="client_credentials",
        scope="storage.read:/vo/dir/",
        audience=f"https://localhost:{a.port}",
    )
    bearer = told.json()["access_token"]
    assert curl(a, bearer, "GET", "dir/file2") == 200
    assert put(a, bearer, "dir/file2") == 403
    assert curl(b, bearer, "GET", "dir/file2") == 403


def test_a_signed_url_reads_its_file_without_a_header(site: tuple[Served, XRootD, XRootD]) -> None:
    served, a, b = site
    with served.client() as client:
        signed = client.sign_url(f"davs://localhost:{a.port}/grid/vo/dir/file2", 900).reveal()
        odd = client.sign_url(f"davs://localhost:{a.port}/grid/vo/dir/odd+=:,@name").reveal()
        with pytest.raises(OperationNotAllowed, match="spelling"):  # its dialect is not known
            client.sign_url(f"davs://localhost:{a.port}/grid/rsa/dir/file1")

    assert fetch(a, signed) == fetch(a, odd) == 200
    assert fetch(a, signed, "-r", "0-1") == 206
    refused = (
        fetch(a, signed.replace("file2", "file1")),
        fetch(a, signed, "-X", "DELETE"),
        fetch(a, signed, "-T", str(a.ca)),
        fetch(a, signed.replace(str(a.port), str(b.port))),
    )
    assert set(refused) == {403}


def htcondor_allows(a: XRootD, served: Served, bearer: str, audience: str) -> str:
    """Return what HTCondor's library (scitokens-cpp) says of a token at a service."""
    listed = (
        'mount --bind "$1/bundle.pem" /etc/ssl/certs/ca-certificates.crt && XDG_CACHE_HOME="$1" exec '
        'scitokens-list-access "$(cat)" "$2" "$3"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", listed, "sh", a.folder, served.iss, audience],
        input=bearer, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout


def test_a_pilots_token_lets_it_run_jobs_at_its_ce_only(site: tuple[Served, XRootD, XRootD]) -> None:
    served, a, _ = site
    here, there = "https://ce01.example.org:9619", "https://ce02.example.org:9619"
    served.add_client("panda", scopes=["compute.*"], audiences=[here, there])
    wanted = {"grant_type": "client_credentials", "scope": "compute.create compute.read"}
    bearer = served.token("panda", **wanted, audience=here).json()["access_token"]
    assert "ACL: compute.create:/" in htcondor_allows(a, served, bearer, here)
    assert "'aud' claim verification failed" in htcondor_allows(a, served, bearer, there)
    assert served.token("panda", **wanted, audience="https://ce03.example.org").status_code == 400


def test_a_jobs_tokens_read_its_inputs_and_write_below_its_output(
    site: tuple[Served, XRootD, XRootD],
) -> None:
    served, a, _ = site
    url = f"davs://localhost:{a.port}/grid/vo/"
    job = FileRequest(
        operations=(FileOperation("read", f"{url}dir/file2"), FileOperation("write", f"{url}out/job1"))
    )
    with served.client() as client:
        read, write = (token.reveal() for token in client.mint([job], lifetime_seconds=3600).tokens)
    assert curl(a, read, "GET", "dir/file2") == 200
    assert put(a, write, "out/job1/result") in (200, 201)
    assert put(a, write, "out/job2/result") == put(a, read, "out/job1/other") == 403
    assert curl(a, write, "GET", "dir/file2") == 403


# ── third-party copies, with the two tokens of one request ───────────────────────────────────


def copy_tokens(served: Served, a: XRootD, b: XRootD, name: str) -> tuple[str, str]:
    (a.files / "grid/vo/dir" / name).write_bytes(os.urandom(20 << 20))
    urls = [f"davs://localhost:{s.port}/grid/vo/dir/{name}" for s in (a, b)]
    with served.client() as client:
        made = client.mint([FileRequest(sources=(urls[0],), destinations=(urls[1],), retry=True)])
    by_side = {t.side: t.reveal() for t in made.tokens}
    return by_side["source"], by_side["destination"]


def same(a: XRootD, b: XRootD, name: str) -> bool:
    return (a.files / "grid/vo/dir" / name).read_bytes() == (b.files / "grid/vo/dir" / name).read_bytes()


def test_a_third_party_copy_by_curl(site: tuple[Served, XRootD, XRootD]) -> None:
    served, a, b = site
    read, write = copy_tokens(served, a, b, "tpc")

    def copy(write: str, read: str) -> str:
        done = subprocess.run(
            ["curl", "-s", "--cacert", a.ca, "-X", "COPY", "-H", "Credential: none", "-H", f"Authorization: Bearer {write}",
             "-H", f"TransferHeaderAuthorization: Bearer {read}", "-H", f"Source: {a.url}/grid/vo/dir/tpc", f"{b.url}/grid/vo/dir/tpc"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return (done.stdout.strip().splitlines() or [""])[-1]  # its last line has the verdict

    assert "success" not in copy(read, write)  # the two tokens are swapped
    assert "success" in copy(write, read)
    assert same(a, b, "tpc")


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_a_third_party_copy_by_gfal2(site: tuple[Served, XRootD, XRootD], mode: str) -> None:
    served, a, b = site
    read, write = copy_tokens(served, a, b, f"gfal-{mode}")
    certificates = a.folder.parent / "certificates"
    certificates.mkdir(exist_ok=True)
    (certificates / "ca.pem").write_bytes(a.ca.read_bytes())
    subprocess.run(["openssl", "rehash", certificates], check=True, capture_output=True)
    done = subprocess.run(
        ["/usr/bin/python3", FOREIGN / "gfal_copy.py", f"{a.url}/grid/vo/dir/gfal-{mode}", f"{b.url}/grid/vo/dir/gfal-{mode}", read, write, mode],
        env={**os.environ, "X509_CERT_DIR": str(certificates)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(a, b, f"gfal-{mode}")


def test_what_was_signed_is_verified_while_the_issuer_is_down(site: tuple[Served, XRootD, XRootD]) -> None:
    served, a, _ = site
    made = [token(served, a, "download", f"dir/{name}") for name in ("file1", "file2")]
    assert curl(a, made[0], "GET", "dir/file1") == 200
    served.stop()
    try:
        assert curl(a, made[1], "GET", "dir/file2") == 200
    finally:
        served.start()
