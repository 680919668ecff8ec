"""A simulated FTS, for faults that a real FTS does not make on demand.

`FakeFTS` does what fts-rest-flask a8b49830c does on POST /jobs, GET /jobs/…/files and GET /whoami:
deterministic ids, 409 for an id that exists, and the checks of a job with tokens. No package registry has the
real FTS.
"""

import hashlib
import json
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

from minter.cli.demo import fts_objections
from minter.fts.rest import BASE_ID

VO = "alpen"


def _token_id(token: str) -> str:
    return hashlib.sha1(token.encode(), usedforsecurity=False).hexdigest()[:16]


class FakeFTS:
    """An FTS on a free port; each entry of `faults` applies to one of the next submissions."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.refuses = ""
        """What every submission is refused with, while it is set."""
        self.lenient = False
        """Whether it takes unmanaged jobs without tokens, or with others than Minter's."""
        self.old = False
        """Whether it is a release that shows no token ids."""
        self.states: dict[str, str] = {}
        """States of the jobs that ended."""
        self.posts = 0
        self.bearers: set[str] = set()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen on a free port, or after a stop on the same port as before."""
        self.server = _Server(("127.0.0.1", self.port), _Handler)
        self.server.fts = self
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()


class _Server(ThreadingHTTPServer):
    fts: FakeFTS


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    @property
    def fts(self) -> FakeFTS:
        return self.server.fts

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.fts.bearers.add(self.headers["Authorization"])
        if self.path == "/whoami":
            return self.answer(200, {"base_id": str(BASE_ID), "vos": [VO]})
        if self.path == "/":
            return self.answer(200, {"api": {"major": 3, "minor": 14, "patch": 0}, "_links": {}})
        job = self.fts.jobs.get(self.path.split("/")[2])
        if job is None:
            return self.answer(404, {"message": "No job with that id"})
        if not self.path.endswith("/files"):
            return self.answer(200, {"job_id": self.path.split("/")[2], "job_state": "SUBMITTED"})
        files, number = [], 1000
        for index, file in enumerate(job["files"]):
            for n, source in enumerate(file["sources"]):
                for m, destination in enumerate(file["destinations"]):
                    entry = {
                        "file_id": number, "file_index": index, "file_state": "SUBMITTED",
                        "source_surl": urlparse(source.strip()).geturl(),
                        "dest_surl": urlparse(destination.strip()).geturl(),
                    }  # fmt: skip
                    if not self.fts.old and "source_tokens" in file:
                        entry["src_token_id"] = _token_id(file["source_tokens"][n])
                        entry["dst_token_id"] = _token_id(file["destination_tokens"][m])
                    files.append(entry)
                    number += 1
        return self.answer(200, files)

    def do_DELETE(self) -> None:
        self.fts.bearers.add(self.headers["Authorization"])
        job_id = self.path.split("/")[2]
        if job_id not in self.fts.jobs:
            return self.answer(404, {"message": "No job with that id"})
        if self.fts.faults:
            return self.answer(int(self.fts.faults.pop(0)), {"message": "the fault that was asked for"})
        state = self.fts.states.setdefault(job_id, "CANCELED")  # a job that ended keeps its state
        return self.answer(200, {"job_id": job_id, "job_state": state})

    def do_POST(self) -> None:  # noqa: PLR0911 - one answer for each fault
        fts = self.fts
        fts.posts += 1
        fts.bearers.add(self.headers["Authorization"])
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = fts.faults.pop(0) if fts.faults else ""
        try:
            json.dumps(job, ensure_ascii=False).encode("latin-1")
        except UnicodeEncodeError:
            return self.answer(500, {"message": "Data too long or not Latin-1"})
        if fts.refuses:
            return self.answer(400, {"message": fts.refuses})
        if fault == "500-kept":  # FTS fails after it has stored the job
            sid = job["params"]["sid"]
            fts.jobs[str(uuid.uuid5(uuid.uuid5(BASE_ID, VO), sid))] = job
            return self.answer(500, {"message": "failed late"})
        if fault.isdigit():
            return self.answer(int(fault), {"message": "the fault that was asked for"})
        if fault in ("html", "odd"):
            return self.answer(200, None if fault == "html" else {"what": "no job_id"})
        sid = job["params"].get("sid") or uuid.uuid4().hex
        job_id = str(uuid.uuid5(uuid.uuid5(BASE_ID, VO), sid))
        if job_id in fts.jobs:
            return self.answer(409, {"message": "The sid provided by the user is duplicated"})
        managed = "unmanaged_tokens" not in job["params"]  # FTS would exchange such tokens
        if not (managed or fts.lenient) and (objections := fts_objections(job, int(time.time()))):
            return self.answer(400, {"message": objections[0]})
        fts.jobs[job_id] = job
        if fault == "lost":  # FTS has the job, but its answer is lost
            self.connection.close()
            return None
        return self.answer(200, {"job_id": job_id})

    def answer(self, status: int, body: object) -> None:
        raw = b"<html>proxy</html>" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
