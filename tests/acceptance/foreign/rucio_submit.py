"""Rucio's conveyor-submitter and reaper, from pip, on an sqlite database.

Arguments: issuer, secrets as JSON, FTS's URL, folder, CA, whether rucio.cfg has Minter's policy package (`own`
or `minter`), the VO's own policy package (may be empty), the RSEs that are switched to Minter, and what is done
while Minter is away (empty if Minter is there).
"""

import json
import os
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

issuer, secrets, fts, folder, ca, tool, wrapped, switched, away = sys.argv[1:]
folder, secret = Path(folder), json.loads(secrets)["rucio"]
(folder / "secret").write_text(secret)
idp = {"issuer": issuer, "client_id": "rucio", "client_secret": secret, "redirect_uris": ["https://rucio/auth"], "SCIM": {"client_id": "rucio", "client_secret": "x"}}  # fmt: skip
(folder / "idpsecrets.json").write_text(json.dumps({"idp": idp}))
(folder / "rucio.cfg").write_text(
    f"[common]\nlogdir = {folder}\n[database]\ndefault = sqlite:///{folder}/{tool}.db\n"
    f"[oidc]\nidpsecrets = {folder}/idpsecrets.json\nadmin_issuer = idp\n"
    + ("[policy]\npackage = minter.rucio\n" if tool == "minter" else "")
    + (
        ""
        if wrapped
        else "[policy]\npermission = generic\nschema = generic\n"
        if tool == "own"
        else "permission = generic\nschema = generic\n"
    )
    + f"[conveyor]\nuse_deterministic_id = True\nscheme = davs\ntransfertool = fts3\nusercert = {folder}/secret\n"
    f"[minter]\nurl = {'https://127.0.0.1:1/' if away else issuer}\naway = {away or 'wait'}\nclient = rucio\nsecret_file = {folder}/secret\nca = {ca}\n"
    + (f"policy_package = {wrapped}\n" if wrapped else "")
)
(folder / "capture.py").write_text(
    "from rucio.rse.protocols.gfal import Default as Gfal\n"
    "class Default(Gfal):\n"
    "    def connect(self): pass\n"
    "    def close(self): pass\n"
    "    def delete(self, path):\n"
    "        token = getattr(self, 'auth_token', None)\n"
    f"        open('{folder}/deleted', 'a').write(f'{{path}} {{token}}\\n')\n"
)
sys.path.insert(0, str(folder))
os.environ["RUCIO_CONFIG"] = str(folder / "rucio.cfg")
os.chdir(folder)

from rucio.common.types import InternalAccount, InternalScope
from rucio.core.account import add_account
from rucio.core.account_limit import set_local_account_limit
from rucio.core.distance import add_distance
from rucio.core.replica import add_replicas
from rucio.core.request import get_request_by_did
from rucio.core.rse import add_protocol, add_rse, add_rse_attribute
from rucio.core.rule import add_rule
from rucio.core.scope import add_scope
from rucio.daemons.conveyor.submitter import submitter
from rucio.daemons.reaper.reaper import run
from rucio.db.sqla import models
from rucio.db.sqla.constants import AccountType, DatabaseOperationType
from rucio.db.sqla.session import db_session, get_engine

models.register_models(get_engine())
root, scope = InternalAccount("root"), InternalScope("mc23")
SOURCE, DESTINATION = "BOREAS-T2_DATADISK", "FJORD-T1_DATADISK"
endpoints = {
    SOURCE: ("se01.boreas.example.org", "/atlas/atlasdatadisk/rucio"),
    DESTINATION: ("webdav1.fjord.example.org", "/data/atlas/datadisk/rucio"),
}
names = [f"file{n}" for n in range(3)]
wan = dict.fromkeys(("read", "write", "delete", "third_party_copy_read", "third_party_copy_write"), 1)
ids = {}
with db_session(DatabaseOperationType.WRITE) as session:
    models.VO(vo="def", description="the one VO", email="root@example.org").save(session=session)
    add_account(root, AccountType.SERVICE, "root@example.org", session=session)
    add_scope(scope, root, session=session)
    for name, (host, prefix) in endpoints.items():
        ids[name] = add_rse(name, session=session)
        door = {"scheme": "davs", "hostname": host, "port": 443, "prefix": prefix,
                "impl": "capture.Default", "domains": {"lan": {}, "wan": wan}}  # fmt: skip
        add_protocol(ids[name], door, session=session)
        for key, value in (("fts", fts), ("oidc_support", True), ("verify_checksum", True)):
            add_rse_attribute(ids[name], key, value, session=session)
        if name in switched:
            add_rse_attribute(ids[name], "minter", True, session=session)
        set_local_account_limit(root, ids[name], 10**15, session=session)
    add_distance(ids[SOURCE], ids[DESTINATION], distance=1, session=session)
    files = [{"scope": scope, "name": n, "bytes": 10**9, "adler32": "0cc737eb"} for n in names]
    add_replicas(ids[SOURCE], files, root, session=session)
with db_session(DatabaseOperationType.WRITE) as session:
    dids = [{"scope": scope, "name": n} for n in names]
    add_rule(dids, root, 1, DESTINATION, "NONE", None, None, False, None, session=session)

submitter(once=True, bulk=10, group_bulk=10, partition_wait_time=0)
with db_session(DatabaseOperationType.READ) as session:
    states = [get_request_by_did(scope, n, ids[DESTINATION], session=session)["state"].name for n in names]
with db_session(DatabaseOperationType.WRITE) as session:
    old = [
        {
            "scope": scope,
            "name": f"old{n}",
            "bytes": 1,
            "adler32": "0cc737eb",
            "tombstone": datetime.fromtimestamp(0, UTC).replace(tzinfo=None),
        }
        for n in range(2)
    ]
    add_replicas(ids[SOURCE], old, root, session=session)
run(once=True, rses=[SOURCE], greedy=True, chunk_size=10, sleep_time=60)
for thread in threading.enumerate():  # `run` waits for its threads three seconds only
    if thread is not threading.current_thread() and not thread.daemon:
        thread.join(60)
deleted = (
    [line.split() for line in (folder / "deleted").read_text().splitlines()]
    if (folder / "deleted").exists()
    else []
)
print(json.dumps({"states": states, "deleted": deleted}))
