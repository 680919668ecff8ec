"""The token endpoint: the numbered requirements of its clients (#1 …), and where Minter is stricter."""

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from minter.database import control_changes
from minter.issuer.well_known import EXCHANGE
from minter.policy.clients import Ban
from minter.tokens import keys
from tests.acceptance.served import VO, Served
from tests.conftest import rows
from tests.servers import free_ports

HOST, FJORD = "se01.boreas.example.org", "https://webdav1.fjord.example.org"
TOP = "/atlas/atlasdatadisk/rucio"
FTS = "fts3-atlas.example.org"
ANY = "https://wlcg.cern.ch/jwt/v1/any"
EXCHANGES = """
[[exchanges]]
name = "fts"
clients = ["fts"]
subject_clients = ["rucio", "dirac"]
offline_access = true

[[exchanges]]
name = "self"
clients = ["rucio"]
subject_clients = ["rucio"]
scopes = ["storage.read"]

[[exchanges]]
name = "third"
clients = ["third"]
subject_clients = ["fts"]

[[exchanges]]
name = "fourth"
clients = ["fourth"]
subject_clients = ["third"]
"""


@pytest.fixture(scope="module")
def served(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("token"), postgres_dsn, EXCHANGES)
    made.add_client("rucio")
    made.add_client("fts")
    made.add_client("third")
    made.add_client("fourth")
    made.add_client(
        "dirac",
        default_audience=[HOST],
        scopes=["compute.*", "openid", "profile"],
        groups=["/alpen/prod", "/alpen"],
    )
    yield made
    made.close()


@pytest.fixture
def ask(served: Served) -> Callable[..., Any]:
    """Ask as a client; return the answer's JSON, or (status, error)."""

    def asking(name: str, **form: Any) -> Any:
        answer = served.token(name, **{"grant_type": "client_credentials", **form})
        if answer.status_code != 200:
            told = answer.json()
            assert told["error_description"]
            return answer.status_code, told["error"]
        return answer.json()

    return asking


def claims(answer: dict[str, Any]) -> dict[str, Any]:
    return jwt.decode(answer["access_token"], options={"verify_signature": False})


# ── client credentials ───────────────────────────────────────────────────────────────────────


def test_what_rucio_asks_for_a_storage(served: Served, ask: Callable[..., Any]) -> None:
    """#1, #4, #8, #9, #10, #11, #13: RSE-wide scopes, a bare host as audience, offline_access echoed."""
    scope = f"offline_access storage.modify:{TOP}/ storage.read:{TOP}/"
    told = ask("rucio", scope=scope, audience=HOST)
    assert (told["scope"], told["token_type"]) == (scope, "Bearer")
    assert "refresh_token" not in told  # #16
    found = claims(told)
    assert (found["iss"], found["aud"], found["scope"], found["client_id"]) == (
        served.iss,
        HOST,
        scope,
        "rucio",
    )
    assert found["wlcg.ver"] == "1.0"
    assert found["nbf"] == found["iat"] <= time.time() - 60
    assert 4500 <= told["expires_in"] <= 21600  # #12
    assert set(found) == {"iss", "sub", "aud", "exp", "iat", "nbf", "jti", "scope", "wlcg.ver", "client_id"}
    ((kind, payload, storage),) = rows(
        served.service,
        "SELECT r.kind, t.payload, s.name FROM tokens t JOIN requests r USING (request_id, client_id)"
        " JOIN storages s USING (storage_id) WHERE t.jti = %s",
        found["jti"],
    )
    assert (kind, json.loads(payload), storage) == ("token", found, "BOREAS-T2_DATADISK")


def test_the_token_for_fts_itself(ask: Callable[..., Any]) -> None:
    assert claims(ask("rucio", scope="fts", audience=FTS))["aud"] == FTS
    assert ask("rucio", scope="fts", audience=HOST) == (400, "invalid_scope")


def test_several_audiences_in_one_parameter(ask: Callable[..., Any]) -> None:
    told = ask("rucio", scope=f"storage.read:{TOP}/f", audience=f"{HOST} https://{HOST}:443")
    assert claims(told)["aud"] == [HOST, f"https://{HOST}:443"]
    # The token would be accepted at both storages, and only one of them has the path.
    assert ask("rucio", scope=f"storage.read:{TOP}/f", audience=f"{HOST} {FJORD}") == (400, "invalid_scope")
    assert claims(ask("rucio", scope="fts", audience=f"{FTS} {HOST}"))["aud"] == [FTS, HOST]
    assert claims(ask("rucio", scope=f"storage.read:{TOP}/f", resource=HOST))["aud"] == HOST
    both = ask("rucio", scope=f"storage.read:{TOP}/f", resource=HOST, audience=f"https://{HOST}:443")
    assert set(claims(both)["aud"]) == {HOST, f"https://{HOST}:443"}
    assert ask("rucio", scope=f"storage.read:{TOP}/f", resource=HOST, audience=FJORD)[1] == "invalid_scope"


def test_several_audiences_in_repeated_parameters(ask: Callable[..., Any]) -> None:
    """RFC 8693 §2.1 and RFC 8707 §2 repeat the parameter; other parameters come once."""
    told = ask("rucio", scope=f"storage.read:{TOP}/f", audience=[HOST, f"https://{HOST}:443", HOST])
    assert claims(told)["aud"] == [HOST, f"https://{HOST}:443"]
    told = ask("rucio", scope=f"storage.read:{TOP}/f", resource=[HOST, f"https://{HOST}:443"])
    assert claims(told)["aud"] == [HOST, f"https://{HOST}:443"]
    assert ask("rucio", scope=[f"storage.read:{TOP}/f", "fts"], audience=HOST) == (400, "invalid_request")


def test_without_audience_the_clients_default_or_nothing(ask: Callable[..., Any]) -> None:
    assert claims(ask("dirac", scope=f"storage.read:{TOP}/f"))["aud"] == HOST
    assert ask("rucio", scope=f"storage.read:{TOP}/f") == (400, "invalid_target")
    assert ask("rucio", scope=f"storage.read:{TOP}/f", audience="https://nobody.example.org") == (
        400,
        "invalid_target",
    )


def test_groups_are_the_clients_own_and_never_beside_storage_scopes(ask: Callable[..., Any]) -> None:
    alone = ask("dirac", scope="wlcg.groups:/alpen/prod wlcg.groups:/other")
    assert claims(alone)["wlcg.groups"] == ["/alpen/prod"]
    assert claims(ask("dirac", scope="wlcg.groups"))["wlcg.groups"] == ["/alpen/prod", "/alpen"]
    beside = ask("dirac", scope=f"storage.read:{TOP}/ wlcg.groups:/alpen/prod")
    assert "wlcg.groups" not in claims(beside)
    assert beside["scope"] == f"storage.read:{TOP}/"
    assert ask("rucio", scope="wlcg.groups", audience=HOST) == (400, "invalid_scope")


def test_other_scopes_only_as_listed(ask: Callable[..., Any]) -> None:
    assert (
        ask("dirac", scope="compute.read compute.create openid")["scope"]
        == "compute.read compute.create openid"
    )
    assert ask("dirac", scope="compute.read host.auth")["scope"] == "compute.read"
    assert ask("rucio", scope="compute.read", audience=HOST) == (400, "invalid_scope")
    assert ask("rucio", scope="offline_access", audience=HOST) == (400, "invalid_scope")
    assert ask("rucio", audience=HOST) == (400, "invalid_scope")


def test_paths_are_narrowed_to_the_area_and_to_the_clients_own(
    served: Served, ask: Callable[..., Any]
) -> None:
    assert ask("rucio", scope="storage.read:/", audience=HOST)["scope"].startswith(f"storage.read:{TOP}")
    assert ask("rucio", scope="storage.read:/elsewhere", audience=HOST) == (400, "invalid_scope")
    served.add_client("narrow", paths=[f"{TOP}/mine"], operations=["read"], max_lifetime_seconds=1000)
    told = ask("narrow", scope=f"storage.read:{TOP} storage.modify:{TOP}", audience=HOST)
    assert told["scope"] == f"storage.read:{TOP}/mine"
    assert told["expires_in"] <= 1000
    for odd in (
        "storage.read",
        "storage.read:relative",
        f"storage.read:{TOP}/../x",
        f"storage.read:{TOP}/%252e",
    ):
        assert ask("rucio", scope=odd, audience=HOST) == (400, "invalid_scope")


def test_audience_any_only_by_explicit_opt_in_and_an_hour(served: Served, ask: Callable[..., Any]) -> None:
    assert ask("rucio", scope=f"storage.read:{TOP}", audience=ANY) == (400, "invalid_target")
    served.add_client("glob", audiences=["*"])
    assert ask("glob", scope=f"storage.read:{TOP}", audience=ANY) == (400, "invalid_target")
    served.add_client("wide", audiences=[ANY], scopes=["openid"])
    told = ask("wide", scope=f"storage.read:{TOP}", audience=ANY)
    assert claims(told)["aud"] == ANY
    assert told["expires_in"] <= 3600
    assert ask("wide", scope="openid", audience=ANY)["expires_in"] > 3600
    assert "wide" in served.minter("check").stdout


def test_a_ban_refuses_and_the_refusal_is_recorded(served: Served, ask: Callable[..., Any]) -> None:
    control_changes.add_ban(served.service.pool, Ban("path", f"{TOP}/secret"), "leak", "tests")
    try:
        assert ask("rucio", scope=f"storage.read:{TOP}", audience=HOST) == (403, "access_denied")
        assert ask("rucio", scope=f"storage.read:{TOP}/open", audience=HOST)["scope"]
        ((reason,),) = rows(
            served.service,
            "SELECT error ->> 'reason' FROM requests WHERE error IS NOT NULL ORDER BY request_id DESC LIMIT 1",
        )
        assert reason == "banned"
    finally:
        control_changes.lift_ban(served.service.pool, Ban("path", f"{TOP}/secret"), "tests")


# ── who asks ─────────────────────────────────────────────────────────────────────────────────


def test_the_three_ways_of_authentication_and_only_one_at_once(served: Served) -> None:
    form = {"grant_type": "client_credentials", "scope": f"storage.read:{TOP}/f", "audience": HOST}
    secret = {"client_id": "rucio", "client_secret": served.secrets["rucio"]}
    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key())) | {"alg": "ES256"}
    served.add_client("signer", auth_key=public)

    def assertion(**changes: object) -> dict[str, str]:
        now = int(time.time())
        told = {
            "iss": "signer",
            "sub": "signer",
            "aud": f"{served.iss}token",
            "exp": now + 60,
            "jti": uuid.uuid4().hex,
            **changes,
        }
        kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
        return {"client_assertion_type": kind, "client_assertion": jwt.encode(told, private, "ES256")}

    with served.http() as http:
        url = f"/{VO}/token"
        assert http.post(url, data=form | secret).status_code == 200
        signed = assertion()
        assert http.post(url, data=form | signed).status_code == 200
        assert http.post(url, data=form | signed).status_code == 401  # the assertion was used before
        for spoiled in (
            {"aud": "https://other/"},
            {"sub": "rucio"},
            {"exp": int(time.time()) - 60},
            {"exp": int(time.time()) + 9999},
            {"iss": "rucio"},
            {"exp": 1e30},
            {"exp": "soon"},
            {"jti": "with space"},
            {"jti": 5},
        ):
            assert http.post(url, data=form | assertion(**spoiled)).status_code == 401
        told = http.post(url, data=form | assertion(exp=int(time.time()) + 9999)).json()
        assert "at most 3600 s" in told["error_description"]
        padded = assertion()
        padded["client_assertion"] += "="
        assert http.post(url, data=form | padded).status_code == 401
        assert http.post(url, data=form | assertion(exp=time.time() + 3000.5)).status_code == 200
        both = http.post(url, data=form | secret, auth=("rucio", served.secrets["rucio"]))
        assert (both.status_code, both.json()["error"]) == (400, "invalid_request")
        for wrong in (
            form,
            form | {"client_id": "rucio", "client_secret": "x"},
            form | {"client_id": "rucio"},
        ):
            answer = http.post(url, data=wrong)
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
            assert "basic" in answer.headers["www-authenticate"].lower()


def test_forms_as_ftss_c_plus_plus_sends_them_and_what_is_none(served: Served) -> None:
    """#6: not percent-encoded; with a charset. RFC 6749 §3.2: nothing twice."""
    basic = base64.b64encode(f"rucio:{served.secrets['rucio']}".encode()).decode()
    headers = {
        "Authorization": f"Basic {basic}",
        "Content-Type": "application/x-www-form-urlencoded;charset=UTF-8",
    }
    raw = f"grant_type=client_credentials&scope=offline_access storage.read:{TOP}/f&audience={HOST}"
    with served.http() as http:
        url = f"/{VO}/token"
        answer = http.post(url, content=raw, headers=headers)
        assert answer.json()["scope"] == f"offline_access storage.read:{TOP}/f"
        assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
        for body in (
            raw + "&scope=x",
            "grant_type=password",
            "&" * 50 + "a=b&" * 50,
            b"\xff=\xfe",
            "x" * 70_000,
        ):
            assert http.post(url, content=body, headers=headers).status_code == 400
        assert (
            http.post(
                url, json={"grant_type": "client_credentials"}, headers={"Authorization": f"Basic {basic}"}
            ).status_code
            == 400
        )
        assert http.get(url).status_code == 405


# ── exchange and refresh ─────────────────────────────────────────────────────────────────────


def exchange(ask: Callable[..., Any], name: str, subject: dict[str, Any], **form: Any) -> Any:
    return ask(name, grant_type=EXCHANGE, subject_token=subject["access_token"],
               subject_token_type="urn:ietf:params:oauth:token-type:access_token", **form)  # fmt: skip


def refresh(ask: Callable[..., Any], name: str, token: str, **form: Any) -> Any:
    return ask(name, grant_type="refresh_token", refresh_token=token, **form)


@pytest.fixture
def subject(ask: Callable[..., Any]) -> Any:
    return ask("rucio", scope=f"storage.modify:{TOP}/d storage.read:{TOP}/d", audience=HOST)


def test_what_fts_exchanges_and_refreshes(served: Served, ask: Callable[..., Any], subject: Any) -> None:
    """#14, #15, #16: the token of another client, for a storage; scope and audience named each time."""
    scope = f"{subject['scope']} offline_access"
    told = exchange(ask, "fts", subject, scope=scope, audience=HOST,
                    requested_token_type="urn:ietf:params:oauth:token-type:refresh_token")  # fmt: skip
    first, mine = claims(told), claims(subject)
    assert told["issued_token_type"].endswith(":access_token")
    assert (first["scope"], first["aud"], first["sub"], first["client_id"]) == (
        scope,
        HOST,
        mine["sub"],
        "fts",
    )
    assert list(first["act"]) == ["sub"]
    token = told["refresh_token"]
    header, decoded = jwt.get_unverified_header(token), jwt.decode(token, options={"verify_signature": False})
    assert header["typ"] == "rt+jwt"
    assert decoded["aud"] == f"{served.iss}token"
    assert decoded["exp"] > time.time() + 6 * 86400
    assert not {"scope", "wlcg.ver"} & decoded.keys()
    again = refresh(ask, "fts", token, scope=scope, audience=HOST)
    second = claims(again)
    assert {**second, "jti": 0, "iat": 0, "nbf": 0, "exp": 0} == {
        **first,
        "jti": 0,
        "iat": 0,
        "nbf": 0,
        "exp": 0,
    }
    assert abs(again["expires_in"] - told["expires_in"]) < 5
    assert again["refresh_token"] != token
    narrower = refresh(ask, "fts", again["refresh_token"], scope=f"storage.read:{TOP}/d/f")
    assert narrower["scope"] == f"storage.read:{TOP}/d/f"


def test_the_old_refresh_token_works_until_the_new_one_was_used_then_ends_the_family(
    served: Served, ask: Callable[..., Any], subject: Any
) -> None:
    zero = exchange(ask, "fts", subject, scope="offline_access " + subject["scope"])["refresh_token"]
    one = refresh(ask, "fts", zero)["refresh_token"]
    assert refresh(ask, "fts", zero)["refresh_token"] == one  # a repeat gets the same bytes
    two = refresh(ask, "fts", one)["refresh_token"]
    family = jwt.decode(two, options={"verify_signature": False})["jti"].partition(".")[0]
    assert refresh(ask, "fts", zero) == (400, "invalid_grant")
    for token in (two, one, zero):
        assert refresh(ask, "fts", token) == (400, "invalid_grant")
    states = rows(served.service, "SELECT s.state::text FROM family_tokens f LEFT JOIN token_states s"
                  " USING (jti) WHERE f.family_id = %s", family)  # fmt: skip
    assert states == [("cancelled",)] * 4
    assert rows(served.service, "SELECT actor, action FROM audit WHERE subject = %s", family) == [
        ("fts", "refresh.reused")
    ]


def test_an_exchange_that_is_asked_again_makes_no_second_family(
    served: Served, ask: Callable[..., Any], subject: Any
) -> None:
    """Its answer was lost: FTS asks again, here also at the same time, and gets the same refresh token."""
    scope = "offline_access " + subject["scope"]
    with ThreadPoolExecutor(4) as threads:
        told = list(threads.map(lambda _: exchange(ask, "fts", subject, scope=scope), range(8)))
    told.append(exchange(ask, "fts", subject, scope=scope))
    assert len({answer["refresh_token"] for answer in told}) == 1
    assert len({answer["access_token"] for answer in told}) == len(told)
    jti = jwt.decode(subject["access_token"], options={"verify_signature": False})["jti"]
    families = "SELECT count(*) FROM families WHERE subject_jti = %s"
    assert rows(served.service, families, jti) == [(1,)]
    refresh(ask, "fts", told[0]["refresh_token"])
    later = exchange(ask, "fts", subject, scope=scope)["refresh_token"]  # the first one is in use
    assert later != told[0]["refresh_token"]
    assert rows(served.service, families, jti) == [(2,)]
    narrow = exchange(ask, "fts", subject, scope=f"offline_access storage.read:{TOP}/d/f")["refresh_token"]
    assert narrow not in (later, told[0]["refresh_token"])


def test_an_exchange_needs_a_rule_and_only_narrows(ask: Callable[..., Any], subject: Any) -> None:
    assert exchange(ask, "third", subject) == (400, "invalid_request")
    assert exchange(ask, "rucio", subject, scope=f"storage.read:{TOP}/d offline_access") == (
        400,
        "invalid_request",
    )
    assert exchange(ask, "rucio", subject)["scope"] == f"storage.read:{TOP}/d"  # the exchange rule's scopes
    assert "refresh_token" not in exchange(ask, "fts", subject)
    assert (
        exchange(ask, "fts", subject, scope=f"storage.read:{TOP} compute.read")["scope"]
        == f"storage.read:{TOP}/d"
    )
    assert exchange(ask, "fts", subject, scope=f"storage.read:{TOP}/e storage.stage:{TOP}/d") == (
        400,
        "invalid_scope",
    )
    assert exchange(ask, "fts", subject, audience=FJORD) == (400, "invalid_target")
    assert (
        exchange(ask, "fts", subject, scope=f"storage.read:{TOP}/d/f")["scope"] == f"storage.read:{TOP}/d/f"
    )


def test_actors_are_named_two_deep_at_most(ask: Callable[..., Any], subject: Any) -> None:
    one = exchange(ask, "fts", subject)
    two = exchange(ask, "third", one)
    assert "act" in claims(two)["act"]
    assert claims(two)["sub"] == claims(subject)["sub"]
    assert exchange(ask, "fourth", two) == (400, "invalid_request")


def test_a_per_file_token_is_refreshed_no_longer_than_its_transfer(
    served: Served, ask: Callable[..., Any]
) -> None:
    from minter.client import FileRequest

    with served.client() as client:
        (token,) = client.mint(
            [FileRequest(sources=(f"davs://{HOST}:443{TOP}/t/f",))], lifetime_seconds=5000
        ).tokens
    told = exchange(ask, "fts", {"access_token": token.reveal()}, scope=f"{token.scope} offline_access")
    ends = jwt.decode(told["refresh_token"], options={"verify_signature": False})["exp"]
    assert ends == token.exp
    assert told["expires_in"] <= 5000


@pytest.mark.parametrize("spoil", ["signature", "payload", "foreign", "garbage", "refresh"])
def test_a_subject_that_is_not_ours_as_recorded(
    served: Served, ask: Callable[..., Any], subject: Any, spoil: str
) -> None:
    token = subject["access_token"]
    if spoil == "signature":
        token = token[:-8] + "AAAAAAAA"
    elif spoil == "payload":
        head, body, signature = token.split(".")
        changed = json.loads(base64.urlsafe_b64decode(body + "==")) | {"scope": "storage.read:/"}
        token = ".".join(
            [head, base64.urlsafe_b64encode(json.dumps(changed).encode()).decode().rstrip("="), signature]
        )
    elif spoil == "foreign":
        signer = keys.generate("ES256")
        token = signer.sign(json.dumps(claims(subject)).encode()).decode()
    elif spoil == "refresh":
        token = exchange(ask, "fts", subject, scope="offline_access " + subject["scope"])["refresh_token"]
    else:
        token = "eyJ.x.y"
    assert exchange(ask, "fts", {"access_token": token}) == (400, "invalid_request")


def test_a_ban_or_cancellation_of_the_subject_ends_its_exchange(
    served: Served, ask: Callable[..., Any], subject: Any
) -> None:
    told = exchange(ask, "fts", subject, scope="offline_access " + subject["scope"])
    control_changes.add_ban(served.service.pool, Ban("client", "rucio"), "stolen", "tests")
    try:
        assert refresh(ask, "fts", told["refresh_token"]) == (403, "access_denied")
        assert exchange(ask, "fts", subject) == (403, "access_denied")
    finally:
        control_changes.lift_ban(served.service.pool, Ban("client", "rucio"), "tests")
    assert refresh(ask, "fts", told["refresh_token"])["access_token"]  # a refusal spends no refresh token
    with served.http("rucio") as http:
        assert http.post(f"/{VO}/revoke", data={"token": subject["access_token"]}).json() == {}
    assert exchange(ask, "fts", subject) == (400, "invalid_request")


def test_what_may_not_be_had_is_not_had_by_exchange_either(
    served: Served, ask: Callable[..., Any], subject: Any
) -> None:
    control_changes.change_client(served.service.pool, "fts", {"operations": ["read"]}, "tests")
    try:
        assert exchange(ask, "fts", subject)["scope"] == f"storage.read:{TOP}/d"
    finally:
        control_changes.change_client(served.service.pool, "fts", {"operations": []}, "tests")


def test_a_family_ends_with_its_subject_and_with_its_subjects_client(
    served: Served, ask: Callable[..., Any]
) -> None:
    subject = ask("rucio", scope=f"storage.read:{TOP}/s", audience=HOST)
    told = exchange(ask, "fts", subject, scope=f"storage.read:{TOP}/s offline_access")
    control_changes.disable_client(served.service.pool, "rucio", "tests", disabled=True)
    try:
        assert exchange(ask, "fts", subject) == (400, "invalid_request")
        assert refresh(ask, "fts", told["refresh_token"]) == (400, "invalid_grant")
    finally:
        control_changes.disable_client(served.service.pool, "rucio", "tests", disabled=False)
    told = refresh(ask, "fts", told["refresh_token"])
    with served.http("rucio") as http:
        http.post(f"/{VO}/revoke", data={"token": subject["access_token"]})
    assert refresh(ask, "fts", told["refresh_token"]) == (400, "invalid_grant")


def test_a_banned_activitys_token_is_not_acted_with(served: Served, ask: Callable[..., Any]) -> None:
    from minter.client import FileRequest

    with served.client() as client:
        (token,) = client.mint(
            [FileRequest(sources=(f"davs://{HOST}:443{TOP}/act/f",))], activity="Bad"
        ).tokens
    told = exchange(ask, "fts", {"access_token": token.reveal()}, scope=f"{token.scope} offline_access")
    control_changes.add_ban(served.service.pool, Ban("activity", "Bad"), "test", "tests")
    try:
        assert exchange(ask, "fts", {"access_token": token.reveal()}) == (403, "access_denied")
        assert refresh(ask, "fts", told["refresh_token"]) == (403, "access_denied")
    finally:
        control_changes.lift_ban(served.service.pool, Ban("activity", "Bad"), "tests")


def test_tokens_of_the_endpoint_are_not_given_again_by_v1_fetch(
    served: Served, ask: Callable[..., Any]
) -> None:
    from minter.errors import UnknownRequest

    found = claims(ask("rucio", scope=f"storage.read:{TOP}/f", audience=HOST))
    ((request_id,),) = rows(served.service, "SELECT request_id FROM tokens WHERE jti = %s", found["jti"])
    with served.client() as client, pytest.raises(UnknownRequest):
        client.fetch(request_id)


def test_what_callers_word_makes_no_rules_and_harms_nobody_else(
    served: Served, ask: Callable[..., Any]
) -> None:
    assert ask("rucio", scope="storage.read:/a", audience="https://[") == (400, "invalid_target")
    assert ask("rucio", scope="storage.read:/a " * 200, audience=HOST) == (400, "invalid_scope")
    assert ask("dirac", scope="compute.\N{GRINNING FACE}") == (400, "invalid_scope")
    ask("rucio", scope=f"storage.read:{TOP}/r1", audience=HOST)
    before = rows(served.service, "SELECT count(*) FROM rules")
    for n in range(5):
        ask("rucio", scope=f"offline_access storage.read:{TOP}/r{n} junk{n}", audience=f"https://{HOST}")
    assert rows(served.service, "SELECT count(*) FROM rules") == before


# ── introspection and revocation ─────────────────────────────────────────────────────────────


def test_introspection(served: Served, ask: Callable[..., Any], subject: Any) -> None:
    """#19: any client of the VO may introspect; only its own client sees a refresh token's state."""
    told = exchange(ask, "fts", subject, scope="offline_access " + subject["scope"])

    def introspect(name: str, token: str) -> Any:
        with served.http(name) as http:
            return http.post(f"/{VO}/introspect", data={"token": token}).json()

    state = introspect("fts", subject["access_token"])
    assert state["active"] is True
    assert {n: state[n] for n in ("iss", "sub", "exp", "scope", "client_id")} == {
        n: claims(subject)[n] for n in ("iss", "sub", "exp", "scope", "client_id")
    }
    assert introspect("fts", told["refresh_token"])["active"] is True
    assert introspect("rucio", told["refresh_token"]) == {"active": False}
    assert introspect("fts", "nonsense") == {"active": False}
    with served.http() as http:
        assert http.post(f"/{VO}/introspect", data={"token": "x"}).status_code == 401


def test_revoking_a_refresh_token_ends_its_family_and_only_its_client_can(
    served: Served, ask: Callable[..., Any], subject: Any
) -> None:
    told = exchange(ask, "fts", subject, scope="offline_access " + subject["scope"])

    def revoke(name: str, token: str) -> int:
        with served.http(name) as http:
            return http.post(
                f"/{VO}/revoke", data={"token": token, "token_type_hint": "refresh_token"}
            ).status_code

    assert revoke("rucio", told["refresh_token"]) == 400
    assert revoke("fts", subject["access_token"]) == 400
    assert refresh(ask, "fts", told["refresh_token"] + "=") == (400, "invalid_grant")
    renewed = refresh(ask, "fts", told["refresh_token"])
    assert revoke("fts", renewed["refresh_token"]) == 200
    assert refresh(ask, "fts", renewed["refresh_token"]) == (400, "invalid_grant")
    for access in (told, renewed):  # RFC 7009 §2.1
        with served.http("rucio") as http:
            form = {"token": access["access_token"]}
            assert http.post(f"/{VO}/introspect", data=form).json() == {"active": False}
        assert exchange(ask, "third", access) == (400, "invalid_request")
    assert revoke("fts", "nonsense") == 200


def test_no_secret_is_logged(served: Served) -> None:
    text = served.log()
    assert "eyJ" not in text
    assert not [s for s in served.secrets.values() if s in text]


# ── under the IAM's issuer (ADR 16) ──────────────────────────────────────────────────────────


def test_under_the_iams_issuer_tokens_have_its_iss_and_names_of_our_prefix(
    postgres_dsn: str, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    more = (
        f'[issuers.{VO}.co_issuer]\nkeys = "http://127.0.0.1:{port}/jwk"\npath = "/jwk"\nprefix = "minter-"\n'
        f'url = "https://localhost/{VO}/"\n'
    )
    iam = "https://iam.vo-alpen.example.org"
    served = Served(tmp_path, postgres_dsn, more, processes=1, iam=iam)
    try:
        served.add_client("minter-rucio")
        asked = {"audience": HOST, "scope": f"storage.read:{TOP}/f"}
        answer = served.token("minter-rucio", grant_type="client_credentials", **asked)
        assert answer.status_code == 200, answer.text
        token = answer.json()["access_token"]
        claims = jwt.decode(token, options={"verify_signature": False})
        assert (claims["iss"], claims["client_id"]) == (iam, "minter-rucio")
        assert claims["sub"].startswith("minter-")
        with served.http("minter-rucio") as http:
            assert http.post(f"/{VO}/introspect", data={"token": token}).json()["active"] is True
            for path in (f"/{VO}/.well-known/openid-configuration", f"/{VO}/jwks.json"):
                assert http.get(path).status_code == 404, "the IAM has these"
            theirs = jwt.encode(
                {"iss": iam, "sub": "minter-rucio", "exp": 2**32}, "k" * 32, headers={"kid": "iam"}
            )
            assert http.post(f"/{VO}/introspect", data={"token": theirs}).json() == {"active": False}
            form = {"grant_type": EXCHANGE, "subject_token": theirs,
                    "subject_token_type": "urn:ietf:params:oauth:token-type:access_token"}  # fmt: skip
            assert http.post(f"/{VO}/token", data=form).status_code == 400
    finally:
        served.close()
