"""gfal2's third-party copy, one token for each URL. Arguments: source, destination, both tokens, pull or push."""

"""X509_CERT_DIR=... /usr/bin/python3 gfal_tpc.py SRC DST READ_TOKEN WRITE_TOKEN [pull|push]"""
import sys

import gfal2

src, dst, rt, wt = sys.argv[1:5]
mode = sys.argv[5] if len(sys.argv) > 5 else "pull"
c = gfal2.creat_context()
c.set_opt_boolean("HTTP PLUGIN", "RETRIEVE_BEARER_TOKEN", False)
c.set_opt_boolean("HTTP PLUGIN", "ENABLE_FALLBACK_TPC_COPY", False)
c.set_opt_boolean("HTTP PLUGIN", "ENABLE_STREAM_COPY", False)
c.set_opt_string("HTTP PLUGIN", "DEFAULT_COPY_MODE", "3rd " + mode)
c.cred_set(src, c.cred_new("BEARER", rt))
c.cred_set(dst, c.cred_new("BEARER", wt))
p = c.transfer_parameters()
p.overwrite = False
p.timeout = 60
try:
    c.filecopy(p, src, dst)
    print("COPIED", mode)
except gfal2.GError as e:
    print("GERROR", mode, e.code, e.message)
    sys.exit(1)
