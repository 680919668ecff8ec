"""DIRAC's FTS3Agent as the CS option HandlerPath loads it, down to the real fts3 client.

Arguments: issuer, secrets as JSON, FTS's URL, CA, the agent's section of the CS, what happens. DIRAC's storage
elements need gfal2, which no package registry has, and its database needs a server, so stand-ins give the URLs
and keep nothing; the agent, its jobs and the client of FTS are DIRAC's and fts3's own.
"""

import errno
import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import fts3.rest.client.easy as fts3
from DIRAC import S_ERROR, S_OK, gConfig
from DIRAC.ConfigurationSystem.Client import PathFinder
from DIRAC.ConfigurationSystem.Client.ConfigurationData import gConfigurationData
from diraccfg import CFG

issuer, secrets, fts, ca, options, case = sys.argv[1:]
case = json.loads(case)
Path("dirac.secret").write_text(json.loads(secrets)["dirac"])
cfg = CFG()
cfg.loadFromBuffer(
    "Systems\n{\nDataManagement\n{\nAgents\n{\nFTS3Agent\n{\nHandlerPath = minter/dirac/FTS3Agent\nUseTokens = True\nMinter\n{\n"
    f"URL = {issuer}\nClient = dirac\nSecretFile = {Path('dirac.secret').resolve()}\nCA = {ca}\n{options}"
    + "\n}"
    * 5
)
gConfigurationData.localCFG = cfg
gConfig.loadCFG(cfg)
gConfigurationData.sync()

from DIRAC.ConfigurationSystem.Client.LocalConfiguration import LocalConfiguration

LocalConfiguration()._LocalConfiguration__initLogger(
    "DataManagement/FTS3Agent", "/Systems/DataManagement"
)  # as dirac-agent
from DIRAC.Core.Base.AgentModule import AgentModule
from DIRAC.Core.Base.private.ModuleLoader import ModuleLoader
from DIRAC.DataManagementSystem.Client import FTS3Job as jobs
from DIRAC.DataManagementSystem.Client.FTS3File import FTS3File
from DIRAC.FrameworkSystem.Client import TokenManagerClient
from DIRAC.Resources.Storage import StorageElement as elements

ROOTS = {
    "A": "davs://se01.boreas.example.org:443/atlas/atlasdatadisk/rucio/",
    "B": "davs://webdav1.fjord.example.org/data/atlas/datadisk/rucio/",
    "C": "davs://se01.boreas.example.org:443/atlas/atlasdatadisk/rucio/back/",
    "TAPE": "root://se01.boreas.example.org:1094//atlas/tape/",
}
asked = []


class Manager:
    """DIRAC's TokenManager."""

    def getToken(self, **what):
        asked.append("TokenManager")
        return S_OK({"access_token": "of-DIRACs-TokenManager"})


class Provider:
    """DIRAC's identity provider."""

    def fetchToken(self, **what):
        asked.append("IdProvider")
        return S_OK({"access_token": "of-DIRACs-IdProvider"})


class Element:
    """A storage element that can make URLs."""

    def __init__(self, name, vo=None):
        self.name = name
        self.options = {"TokenSupport": "true"} if name in case["switched"] else {}
        self.localStageProtocolList = ["root"] if name == "TAPE" else ["davs"]

    def getStorageParameters(self, **what):
        return S_ERROR(errno.ENOPROTOOPT, "no SRM")

    def getStatus(self):
        return {"OK": True, "Value": {"TapeSE": self.name == "TAPE"}}

    def generateTransferURLsBetweenSEs(self, lfns, source, protocols=None):
        urls = {lfn: (_url(source.name, lfn), _url(self.name, lfn)) for lfn in lfns}
        return S_OK({"Successful": urls, "Failed": {}, "Protocols": ("davs", "davs")})

    def getURL(self, lfns, protocol=None):
        return S_OK({"Successful": {lfn: ROOTS["TAPE"] + lfn for lfn in lfns}, "Failed": {}})

    def getWLCGTokenPath(self, lfn):
        return S_OK(f"rucio/{lfn}")


def _url(name, lfn):
    return ROOTS["A" if name == "TAPE" else name] + lfn


class Database:
    """Keeps no operations."""

    def persistOperation(self, operation):
        return S_OK()


class Operation:
    """One operation with one new job."""

    operationID, rmsReqID, status = 1, 0, "Active"
    fts3Plugin = type(
        "Plugin",
        (),
        {"selectFTS3Server": lambda s, ftsJob: fts, "selectTPCProtocols": lambda s, ftsJob: ["davs"]},
    )()

    def __init__(self, job):
        self.job, self.ftsJobs = job, []

    def isTotallyProcessed(self):
        return False

    def prepareNewJobs(self, **what):
        return S_OK([self.job])


TokenManagerClient.gTokenManager = Manager()
jobs.StorageElement = elements.StorageElement = Element
jobs.get_scitag = lambda vo, activity=None: 65
loader = ModuleLoader("Agent", PathFinder.getAgentSection, AgentModule)
loaded = loader.loadModule("DataManagement/FTS3Agent")
assert loaded["OK"], loaded
(agent_class,) = (module["classObj"] for module in loader.getModules().values())
jobs.FTS3Job._getIdpClient = classmethod(lambda cls, group: Provider())

agent = agent_class.__new__(agent_class)
agent.maxFilesPerJob, agent.maxAttemptsPerFile, agent.useTokens, agent.fts3db = 10, 3, True, Database()
agent.getFTS3Context = lambda *_, **__: S_OK(fts3.Context(endpoint=fts, fts_access_token="an-X509-proxy"))
job = jobs.FTS3Job()
job.type, job.username, job.userGroup, job.vo, job.priority, job.activity = (
    "Transfer",
    "prod",
    "alpen_prod",
    "alpen",
    3,
    None,
)
job.sourceSE, job.multiHopSE, job.targetSE = (
    *case["path"][:1],
    *(case["path"][1:-1] or [None]),
    *case["path"][-1:],
)
job.operationID, job.rmsReqID = 1, 0
for number, name in enumerate(case["files"]):
    file = FTS3File()
    file.fileID, file.lfn, file.size, file.checksum, file.attempt, file.ftsGUID = (
        number,
        name,
        10**9,
        "ABCDEF01",
        0,
        None,
    )
    file.status = "New"
    job.filesToSubmit.append(file)
operation = Operation(job)
_, result = agent._treatOperation(operation)
assert result["OK"], result
assert "generateContext" not in vars(job)  # no token is kept
print(json.dumps({
    "jobs": len(operation.ftsJobs), "asked": asked, "states": [file.status for file in job.filesToSubmit],
}))  # fmt: skip
