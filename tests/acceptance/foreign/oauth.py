"""authlib, requests-oauthlib and scitokens, used as their users do. Arguments: issuer, secrets as JSON."""

import json
import sys
from pathlib import Path

import requests
import scitokens
from authlib.integrations.requests_client import OAuth2Session as Authlib
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from authlib.oidc.discovery import OpenIDProviderMetadata
from oauthlib.oauth2 import BackendApplicationClient
from requests_oauthlib import OAuth2Session

issuer, secrets = sys.argv[1], json.loads(sys.argv[2])
HOST, TOP = "se01.boreas.example.org", "/atlas/atlasdatadisk/rucio"
SCOPE = f"storage.read:{TOP}/d storage.modify:{TOP}/d"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS = "urn:ietf:params:oauth:token-type:access_token"
found = requests.get(issuer + ".well-known/openid-configuration", timeout=30).json()
url = found["token_endpoint"]
done = []

for method in ("client_secret_basic", "client_secret_post"):
    rucio = Authlib("rucio", secrets["rucio"], token_endpoint_auth_method=method)
    subject = rucio.fetch_token(url, grant_type="client_credentials", scope=SCOPE, audience=HOST)
    assert subject["scope"] == SCOPE, subject["scope"]
done.append("authlib client_credentials")

fts = Authlib(
    "fts", secrets["fts"], token_endpoint=url, revocation_endpoint_auth_method="client_secret_basic"
)
exchanged = fts.fetch_token(
    url, grant_type=EXCHANGE, subject_token=subject["access_token"], subject_token_type=ACCESS,
    scope=SCOPE + " offline_access", audience=HOST,
)  # fmt: skip
refreshed = fts.refresh_token(url, refresh_token=exchanged["refresh_token"])
assert refreshed["access_token"] != exchanged["access_token"]
done.append("authlib exchange and refresh")

state = fts.introspect_token(found["introspection_endpoint"], token=refreshed["access_token"]).json()
assert state["active"] and state["client_id"] == "fts", state
assert fts.revoke_token(found["revocation_endpoint"], token=refreshed["refresh_token"]).status_code == 200
state = fts.introspect_token(found["introspection_endpoint"], token=refreshed["refresh_token"]).json()
assert state == {"active": False}, state
done.append("authlib introspect and revoke")

session = OAuth2Session(client=BackendApplicationClient(client_id="rucio", scope=SCOPE.split()))
told = session.fetch_token(url, client_id="rucio", client_secret=secrets["rucio"], audience=HOST)
assert told["scope"] == SCOPE.split()
done.append("requests-oauthlib client_credentials")

try:
    Authlib("rucio", "wrong").fetch_token(url, grant_type="client_credentials", scope=SCOPE, audience=HOST)
except Exception as error:
    assert getattr(error, "error", "") == "invalid_client", error
    done.append("authlib error")

signer = Authlib(
    "signer", Path(sys.argv[3]).read_text(), token_endpoint_auth_method=PrivateKeyJWT(url, alg="RS256")
)
assert signer.fetch_token(url, grant_type="client_credentials", scope=SCOPE, audience=HOST)["access_token"]
done.append("authlib private_key_jwt")

OpenIDProviderMetadata(found).validate()
place = issuer.split("/", 3)
server = requests.get(
    f"{'/'.join(place[:3])}/.well-known/oauth-authorization-server/{place[3]}".rstrip("/"), timeout=30
).json()
AuthorizationServerMetadata(server).validate()
done.append("authlib discovery")

token = scitokens.SciToken.deserialize(told["access_token"], audience=HOST)
enforcer = scitokens.Enforcer(issuer, audience=HOST)
for claim in ("wlcg.ver", "client_id"):
    enforcer.add_validator(claim, bool)
assert enforcer.test(token, "storage.read", f"{TOP}/d/file")
assert not enforcer.test(token, "storage.read", f"{TOP}/dd/file")
assert not enforcer.test(token, "storage.stage", f"{TOP}/d/file")
done.append("scitokens Enforcer")
print(json.dumps(done))
