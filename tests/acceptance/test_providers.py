"""One contract for every IAM: Keycloak, npm oidc-provider, and the fake IAM of this project."""

import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import jwt
import pytest
from msgspec import structs

from minter.errors import InvalidGrant, MinterError, Misconfigured, ProviderRefused
from minter.providers.answers import Asked, Documents
from minter.providers.dialects import Provider
from minter.providers.iam import IAM, check_subject
from tests.conftest import ROOT
from tests.iam_servers import Fake, Keycloak, OidcProvider

SE, FILE = "https://se.example.org", "storage.read:/vo/file"
ASKED = Asked(FILE, (SE,), 6 * 3600)


KINDS = {
    "fake": (Fake, {"dialect": "generic"}),
    "oidc-provider": (OidcProvider, {"dialect": "resource"}),
    "keycloak": (Keycloak, {"dialect": "keycloak", "client_id": "minter-scoped", "audience_scope": "aud:"}),
}


class There:
    """One server, and Minter's client for it."""

    def __init__(self, name: str, server: Fake | OidcProvider | Keycloak, options: dict[str, Any]) -> None:
        self.name, self.server, self.options = name, server, options
        self.iam = self.client()

    def client(self, secret: str | None = None, **options: Any) -> IAM:
        settings = {"name": "iam", "issuer": self.server.issuer, "client_id": "minter", "secret_file": "-"}
        provider = Provider(**settings | self.options | options)
        known: dict[str, Documents] = {}

        def documents(*, fresh: bool = False) -> Documents:
            if fresh or not known:
                known["is"] = iam.fetch_documents()
            return known["is"]

        secret = secret or f"{provider.client_id}-secret"
        iam = IAM(provider, secret, documents, lambda: datetime.now(UTC))
        return iam

    def subject(self, scope: str = FILE) -> str:
        return self.server.subject(scope, self.options.get("client_id", "minter"))


@pytest.fixture(
    scope="module",
    params=["fake", *(pytest.param(n, marks=pytest.mark.slow) for n in ("oidc-provider", "keycloak"))],
)
def there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[There]:
    kind, options = KINDS[request.param]
    server = kind(tmp_path_factory.mktemp(request.param) / "iam")
    server.start()
    yield There(request.param, server, options)
    server.stop()


def claims_of(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


def test_client_credentials(there: There) -> None:
    given = there.iam.client_credentials(ASKED)
    assert given.error is None
    claims = claims_of(given.access)
    assert (claims["aud"], given.scope, given.refresh) == (SE, FILE, "")
    assert given.expires_at == claims["exp"]
    assert given.dropped == ()
    assert given.access not in repr(given)


def test_exchange_then_refresh_with_rotation(there: There) -> None:
    first = there.iam.exchange(ASKED, there.subject())
    assert first.error is None
    assert first.refresh
    assert claims_of(first.access)["aud"] == SE
    second = there.iam.refresh(ASKED, first.refresh)
    assert second.error is None
    assert second.access != first.access
    assert second.refresh not in ("", first.refresh)
    assert second.scope == FILE
    assert claims_of(second.access)["aud"] == SE
    third = there.iam.refresh(ASKED, second.refresh)
    assert third.refresh not in ("", second.refresh)


def test_a_spent_refresh_token_ends_its_family(there: There) -> None:
    first = there.iam.exchange(ASKED, there.subject())
    second = there.iam.refresh(ASKED, first.refresh)
    time.sleep(1.1)  # Keycloak tells tokens apart by the second of their issue
    with pytest.raises(ProviderRefused):
        there.iam.refresh(ASKED, first.refresh)
    with pytest.raises(ProviderRefused) as caught:
        there.iam.refresh(ASKED, second.refresh)
    assert second.refresh not in str(caught.value)


def test_introspection_and_revocation(there: There) -> None:
    given = there.iam.exchange(ASKED, there.subject())
    assert there.iam.introspect(given.refresh, "refresh_token")["active"] is True
    there.iam.revoke(given.refresh)
    assert there.iam.introspect(given.refresh, "refresh_token") == {"active": False}
    with pytest.raises(ProviderRefused):
        there.iam.refresh(ASKED, given.refresh)


def test_scopes_beside_what_is_granted_are_never_taken_for_granted(there: There) -> None:
    asked = structs.replace(ASKED, scope=f"{FILE} unknown:/x")
    if there.name == "keycloak":
        with pytest.raises(ProviderRefused) as caught:
            there.iam.client_credentials(asked)
        assert caught.value.fields["provider_error"] == "invalid_scope"
        return
    given = there.iam.client_credentials(asked)
    assert given.scope == FILE
    assert given.dropped == ("unknown:/x",)


def test_nothing_granted_is_an_error(there: There) -> None:
    asked = structs.replace(ASKED, scope="unknown:/x")
    if there.name != "oidc-provider":
        with pytest.raises(ProviderRefused) as caught:
            there.iam.client_credentials(asked)
        assert caught.value.fields["provider_error"] == "invalid_scope"
        return
    given = there.iam.client_credentials(asked)
    assert given.error is not None
    assert given.error.fields["claim"] == "scope"
    assert not given.access


def test_a_longer_life_than_asked_for_is_rejected(there: There) -> None:
    given = there.iam.client_credentials(structs.replace(ASKED, cap_seconds=900))
    assert given.access == ""
    assert given.error is not None
    assert given.error.fields["claim"] == "exp"


def test_a_shorter_life_than_needed_is_rejected(there: There) -> None:
    given = there.iam.client_credentials(structs.replace(ASKED, least_seconds=5 * 3600))
    assert given.error is not None
    assert given.error.fields["claim"] == "exp"


def test_an_audience_that_is_not_ours_to_have(there: There) -> None:
    if there.name != "keycloak":
        pytest.skip("only Keycloak knows which audiences there are")
    subject = there.subject()
    with pytest.raises(ProviderRefused):
        there.iam.exchange(structs.replace(ASKED, audience=("https://nobody.example.org",)), subject)


def test_a_wrong_secret(there: There) -> None:
    with pytest.raises(Misconfigured) as caught:
        there.client("not-the-secret").client_credentials(ASKED)
    assert "not-the-secret" not in str(caught.value)
    assert "client_id and secret_file" in str(caught.value)


def test_subject_tokens(there: There) -> None:
    token = there.subject()
    assert (
        check_subject(there.iam, token, (there.iam.provider.client_id,))["iss"]
        == there.iam.documents().issuer
    )
    with pytest.raises(InvalidGrant):
        check_subject(there.iam, token, ("somebody-else",))
    head, body, signature = token.split(".")
    caught: pytest.ExceptionInfo[MinterError]
    for bad in (f"{head}.{body}.{signature[:-8]}AAAAAAAA", "x.y.z", head):
        with pytest.raises(InvalidGrant) as caught:
            check_subject(there.iam, bad, (there.iam.provider.client_id,))
        assert signature[:20] not in str(caught.value)
        with pytest.raises(ProviderRefused) as caught:
            there.iam.exchange(ASKED, bad)
        assert body[:20] not in str(caught.value)


def test_a_subject_token_for_others(there: There) -> None:
    other = there.server.subject(FILE, "rucio") if there.name != "keycloak" else _other(there.server)
    with pytest.raises(ProviderRefused):
        there.iam.exchange(ASKED, other)


def _other(server: Fake | OidcProvider | Keycloak) -> str:
    import httpx

    url = f"{server.issuer}/protocol/openid-connect/token"
    form = {"grant_type": "client_credentials", "scope": FILE}
    token: str = httpx.post(url, data=form, auth=("other", "other-secret")).json()["access_token"]
    return token


def test_private_key_jwt(there: There) -> None:
    if there.name == "fake":
        pytest.skip("the fake takes secrets only")
    key = (ROOT / "tests/keys/minter-jwt.pem").read_text()
    options = {"client_id": "minter-jwt", "authentication": "private_key_jwt", "audience_scope": ""}
    iam = there.client(key, **options)
    given = iam.client_credentials(ASKED)
    if (
        there.name == "keycloak"
    ):  # Keycloak's mappers add both audiences, which is more than the request asks for
        assert given.error is not None
        assert given.error.fields["claim"] == "aud"
        given = iam.client_credentials(structs.replace(ASKED, audience=(SE, "https://se2.example.org")))
    assert given.error is None


def test_refreshing_asks_for_what_is_held_only(there: There) -> None:
    wide = structs.replace(ASKED, scope="storage.read:/vo/a storage.create:/vo/b")
    given = there.iam.exchange(wide, there.subject(wide.scope))
    assert set(given.scope.split()) == set(wide.scope.split())
    again = there.iam.refresh(structs.replace(wide, scope=given.scope), given.refresh)
    assert set(again.scope.split()) == set(wide.scope.split())
    assert uuid.UUID(int=0) not in again.dropped
