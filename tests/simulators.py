"""A simulated FTS, for faults that a real FTS does not make on demand.

`FakeFTS` does what fts-rest-flask a8b49830c does on POST /jobs, GET /jobs/…/files and GET /whoami:
deterministic ids, 409 for an id that exists, and the checks of a job with tokens. No package registry has the
real FTS.
"""

import json
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from minter.cli.demo import fts_objections
from workers.fts_forwarder import BASE_ID

VO = "alpen"


class FakeFTS:
    """An FTS on a free port; each entry of `faults` applies to one of the next submissions."""

    def __init__(self):
        self.jobs: dict[str, dict] = {}
        self.faults: list[str] = []
        self.posts = 0
        self.bearers: set[str] = set()
        self.port = 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Listen on a free port, or after a stop on the same port as before."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        self.server.fts = self
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self):
        if self.thread.is_alive():
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    @property
    def fts(self):
        return self.server.fts

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.fts.bearers.add(self.headers["Authorization"])
        if self.path == "/whoami":
            return self.answer(200, {"base_id": str(BASE_ID), "vos": [VO]})
        if self.path == "/":
            return self.answer(200, {"api": {"major": 3, "minor": 14, "patch": 0}, "_links": {}})
        job = self.fts.jobs.get(self.path.split("/")[2])
        if job is None:
            return self.answer(404, {"message": "No job with that id"})
        files = [
            {"file_id": 1000 + n, "source_surl": f["sources"][0], "dest_surl": f["destinations"][0]}
            for n, f in enumerate(job["files"])
        ]
        return self.answer(200, files)

    def do_POST(self):
        fts = self.fts
        fts.posts += 1
        fts.bearers.add(self.headers["Authorization"])
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = fts.faults.pop(0) if fts.faults else ""
        if fault.isdigit():
            return self.answer(int(fault), {"message": "the fault that was asked for"})
        if fault in ("html", "odd"):
            return self.answer(200, None if fault == "html" else {"what": "no job_id"})
        sid = job["params"].get("sid") or uuid.uuid4().hex
        job_id = str(uuid.uuid5(uuid.uuid5(BASE_ID, VO), sid))
        if job_id in fts.jobs:
            return self.answer(409, {"message": "The sid provided by the user is duplicated"})
        managed = "unmanaged_tokens" not in job["params"]  # FTS would exchange such tokens
        if not managed and (objections := fts_objections(job, int(time.time()))):
            return self.answer(400, {"message": objections[0]})
        fts.jobs[job_id] = job
        if fault == "lost":  # FTS has the job, but its answer is lost
            return self.connection.close()
        return self.answer(200, {"job_id": job_id})

    def answer(self, status, body):
        raw = b"<html>proxy</html>" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
