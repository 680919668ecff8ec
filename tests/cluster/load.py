"""A client that asks all the time, repeats what is not answered, and keeps a book: `python -m tests.cluster.load`.

The book has a JSON line for each request at its start, and one for each answer, with hashes of the tokens.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from minter.client import FileRequest, MinterClient, new_request_id
from minter.errors import MinterError, Unavailable

SOURCE = "davs://se01.boreas.example.org:443/atlas/atlasdatadisk/rucio/data/"
DESTINATION = "davs://webdav1.fjord.example.org/data/atlas/datadisk/rucio/data/"
REPEATED = 0.15
"""Share of the requests that repeat an earlier one."""
THINK_SECONDS = 0.08
TIMEOUT_SECONDS = 10.0


class Asker(threading.Thread):
    """One connection, which asks one request after the other until `stop` is set."""

    def __init__(self, name: str, url: str, options: dict[str, Any], book: "Book", seed: int) -> None:
        super().__init__(name=name)
        self.client = MinterClient(url, timeout_seconds=TIMEOUT_SECONDS, **options)
        self.book, self.random = book, random.Random(seed)
        self.asked: list[tuple[uuid.UUID, list[FileRequest]]] = []
        self.stop = False

    def run(self) -> None:
        while not self.stop:
            if self.asked and self.random.random() < REPEATED:
                self.ask(*self.random.choice(self.asked[-500:]), again=True)
            else:
                count = self.random.choice((1, 1, 1, 2, 10))
                files = [
                    FileRequest(sources=(f"{SOURCE}{uuid.uuid4()}",), destinations=(f"{DESTINATION}{uuid.uuid4()}",))
                    for _ in range(count)
                ]  # fmt: skip
                request_id = new_request_id()
                self.asked.append((request_id, files))
                self.ask(request_id, files, again=False)
            time.sleep(self.random.uniform(0, 2 * THINK_SECONDS))
        self.client.close()

    def ask(self, request_id: uuid.UUID, files: list[FileRequest], again: bool) -> None:
        """Ask until there is an answer, and note it."""
        asked, tries = time.time(), 0
        self.book.note(event="asked", client=self.name, request_id=str(request_id), at=asked, again=again)
        while True:
            tries += 1
            try:
                result = self.client.mint(files, request_id=request_id)
            except Unavailable as error:
                self.book.note(event="tried", client=self.name, request_id=str(request_id), why=error.message)
                time.sleep(0.2)
                continue
            except MinterError as error:
                self.book.note(
                    event="refused", client=self.name, request_id=str(request_id), why=error.message
                )
                return
            break
        tokens = {
            token.jti: [f"{token.file}/{token.side}/{token.index}", hashlib.sha256(token.reveal().encode()).hexdigest()]
            for token in result.tokens
        }  # fmt: skip
        self.book.note(
            event="answered", client=self.name, request_id=str(request_id), asked=asked, at=time.time(),
            tries=tries, tokens=tokens, refusals=len(result.refusals), files=len(files), again=again,
        )  # fmt: skip


class Book:
    """A file of JSON lines, written by several threads."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._lock = threading.Lock()

    def note(self, **line: object) -> None:
        with self._lock:
            self._file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--each", type=int, default=3)
    parser.add_argument("--ca", required=True)
    arguments = parser.parse_args()
    book = Book(arguments.book)
    over_amqp = (os.environ["LOAD_BROKER_URL"], {"ca": arguments.ca})
    over_http = (
        os.environ["LOAD_HTTP_URL"],
        {"client": "rucio-http", "secret": os.environ["LOAD_SECRET"], "ca": arguments.ca},
    )
    askers = [
        Asker(f"{kind}-{n}", url, options, book, arguments.seed * 100 + n)
        for kind, (url, options) in (("amqp", over_amqp), ("http", over_http))
        for n in range(arguments.each)
    ]

    def stop(*_: object) -> None:
        for asker in askers:
            asker.stop = True

    signal.signal(signal.SIGTERM, stop)
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()


if __name__ == "__main__":
    main()
