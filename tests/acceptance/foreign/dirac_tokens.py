"""DIRAC's identity provider, TokenManager and its cache, without a DIRAC installation.

Arguments: issuer, secrets as JSON.
"""

import json
import sys
import warnings

warnings.simplefilter("ignore")
from DIRAC.ConfigurationSystem.Client.Config import gConfig
from DIRAC.ConfigurationSystem.Client.ConfigurationData import gConfigurationData
from DIRAC.ConfigurationSystem.private.ConfigurationData import ConfigurationData  # noqa: F401
from diraccfg import CFG

issuer, secrets = sys.argv[1], json.loads(sys.argv[2])
TOP = "/atlas/atlasdatadisk/rucio"


def provider(name, client):
    return f"""
  {name}
  {{
    ProviderType = IAM
    issuer = {issuer}
    client_id = {client}
    client_secret = {secrets[client]}
    scope = storage.read:{TOP}/d
  }}"""


cfg = CFG()
cfg.loadFromBuffer(
    "Resources\n{\n IdProviders\n {"
    + provider("Minter", "dirac")
    + provider("FTS", "fts")
    + """
 }
}
Registry
{
  VO
  {
    alpen
    {
      IdProvider = Minter
    }
  }
  Groups
  {
    alpen_prod
    {
      VO = alpen
      IdPRole = wlcg.groups:/alpen/prod
    }
  }
}
"""
)
gConfigurationData.localCFG = cfg
gConfig.loadCFG(cfg)

from DIRAC.FrameworkSystem.Client.TokenManagerClient import TokenManagerClient
from DIRAC.FrameworkSystem.Service.TokenManagerHandler import TokenManagerHandlerMixin
from DIRAC.Resources.IdProvider.IdProviderFactory import IdProviderFactory


def value(result):
    assert result["OK"], result
    return result["Value"]


done = []
mine = value(IdProviderFactory().getIdProvider("Minter"))
token = value(
    mine.fetchToken(grant_type="client_credentials", scope=[f"storage.read:{TOP}/d/f", "offline_access"])
)
assert token["scope"] == f"storage.read:{TOP}/d/f offline_access", token["scope"]
assert value(mine.verifyToken(token["access_token"]))["client_id"] == "dirac"
done.append("fetchToken and verifyToken")

assert value(IdProviderFactory().getIdProviderFromToken(token["access_token"])).name == "Minter"
done.append("getIdProviderFromToken")

fts = value(IdProviderFactory().getIdProvider("FTS"))
exchanged = value(
    fts.exchangeToken(token["access_token"], scope=[f"storage.read:{TOP}/d/f", "offline_access"])
)
refreshed = value(fts.refreshToken(exchanged["refresh_token"]))
assert refreshed["access_token"] != exchanged["access_token"]
value(fts.revokeToken(refreshed["refresh_token"]))
assert not fts.refreshToken(refreshed["refresh_token"])["OK"]
done.append("exchangeToken, refreshToken, revokeToken")


class Service(TokenManagerHandlerMixin):
    """Calls the handler directly instead of through DISET."""

    def __init__(self):
        pass

    def getRemoteCredentials(self):
        return {"username": "prod", "group": "alpen_prod", "properties": ["FullDelegation"]}


class Client(TokenManagerClient):
    calls = 0

    def executeRPC(self, *arguments, call):
        Client.calls += 1
        return getattr(Service(), f"export_{call}")(*arguments)


client = Client()
for _ in range(2):
    got = value(
        client.getToken(userGroup="alpen_prod", scope=[f"storage.read:{TOP}/"], requiredTimeLeft=3600)
    )
assert Client.calls == 1, Client.calls  # the second token came from DIRAC's cache
assert "storage.read" in got["scope"]
done.append("TokenManager and its cache")
print(json.dumps(done))
