"""DIRAC's FTS3Job with examples/dirac, through the real fts3 client.

Arguments: issuer, secrets as JSON, FTS's URL, CA. DIRAC's storage elements need gfal2, which no package
registry has, so the test provides the transfers; all later code is that of DIRAC, fts3 and the example.
"""

import json
import sys
import warnings

warnings.simplefilter("ignore")
import fts3.rest.client.easy as fts3
from DIRAC import S_OK
from DIRAC.DataManagementSystem.Client.FTS3File import FTS3File
from DIRAC.DataManagementSystem.Client.FTS3Job import FTS3Job
from minter_fts3job import install

from minter.client import MinterClient

issuer, secrets, fts, ca = sys.argv[1:]
SOURCE = "davs://se01.boreas.example.org:443/atlas/atlasdatadisk/rucio/"
DESTINATION = "davs://webdav1.fjord.example.org/data/atlas/datadisk/rucio/"


def transfers(self, *_, tokensEnabled=False, **__):
    assert tokensEnabled is False
    made = [
        fts3.new_transfer(SOURCE + f.lfn, DESTINATION + f.lfn, filesize=f.size, metadata={"fileID": f.fileID})
        for f in self.filesToSubmit
    ]
    job = fts3.new_job(
        transfers=made, overwrite=True, retry=3, unmanaged_tokens=True, metadata={"useTokens": False}
    )
    return S_OK((job, {f.fileID for f in self.filesToSubmit}))


FTS3Job._constructTransferJob = transfers
FTS3Job._FTS3Job__fetchSpaceToken = lambda *_: S_OK(None)
install(MinterClient(issuer, "dirac", json.loads(secrets)["dirac"], ca=ca))

job = FTS3Job()
job.type, job.ftsServer, job.username, job.vo = "Transfer", fts, "prod", "alpen"
for number in range(3):
    file = FTS3File()
    file.fileID, file.lfn, file.size, file.attempt, file.ftsGUID = (
        number,
        f"prod/file{number}",
        10**9,
        0,
        None,
    )
    job.filesToSubmit.append(file)
result = job.submit(ftsServer=fts, fts_access_token="of DIRAC's own IdProvider")
assert result["OK"], result
print(json.dumps(sorted(result["Value"])))
