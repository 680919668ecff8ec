"""A client process for benchmarks: it pipelines requests, counts every answer, verifies one token in 100.

    python -m benchmarks.load URL CLIENT FILES REQUESTS IN_FLIGHT JWKS.json [KIND]

It prints one JSON line with seconds, requests, tokens, refused, verified, and latencies in ms. With KIND
`mixed`, a quarter of the requests is repeated and a quarter is refused.
"""

import json
import random
import sys
import time
from pathlib import Path
from statistics import median

import jwt
import kombu
import msgspec
import uuid_utils

from minter.broker.publisher import Outgoing, Publisher
from minter.contract import names
from minter.contract.messages import Answer


class _Envelope(msgspec.Struct):
    result: Answer


def body(files: int, number: int, storages: int, algorithm: str = "") -> tuple[str, bytes]:
    """Return the id and the message body of a new request to copy `files` files.

    Storages with odd numbers verify ES256, those with even numbers RS256 only (see `settings_text`). Without
    an `algorithm` each file has a token of both.
    """
    request_id = str(uuid_utils.uuid7())
    a, b = number % storages, (number * 7 + 1) % storages
    if algorithm:
        a, b = (n // 2 * 2 + (algorithm == "ES256") for n in (a, b))
    request = {
        "request_id": request_id,
        "activity": "Production Output",
        "files": [
            {
                "sources": [
                    f"davs://se{a}.example.org/data/vo/mc23_13p6TeV/{n:02x}/{number:08d}.{n}.pool.root.1"
                ],
                "destinations": [
                    f"davs://se{b}.example.org/data/vo/mc23_13p6TeV/{n:02x}/{number:08d}.{n}.pool.root.1"
                ],
                "size": 3_000_000_000,
                "overwrite": True,
                "external_id": uuid_utils.uuid7().hex,
            }
            for n in range(files)
        ],
    }
    return request_id, msgspec.json.encode([[request], {}, {}])


class Load:
    """One connection that keeps `in_flight` requests under way."""

    def __init__(
        self, url: str, client: str, jwks: dict[str, object], exchange: str = names.REQUEST_EXCHANGE
    ) -> None:
        self.exchange = exchange
        self.user = {"user_id": client} if url.startswith("amqp") else {}
        self.keys = {k["kid"]: jwt.PyJWK(k) for k in jwks["keys"]}
        self.connection = kombu.Connection(url)
        self.publisher = Publisher(self.connection)
        self.reply_to = f"{names.reply_prefix(client)}{uuid_utils.uuid7().hex}"
        channel = self.connection.channel()
        queue = kombu.Queue(self.reply_to, channel=channel, durable=False, exclusive=True, auto_delete=True)
        kombu.Consumer(channel, [queue], on_message=self.receive, no_ack=True).consume()
        self.sent: dict[str, float] = {}
        self.latencies: list[float] = []
        self.tokens = self.refused = self.verified = self.answers = 0

    def receive(self, message: object) -> None:
        raw = message.body if isinstance(message.body, bytes) else message.body.encode()
        answer = msgspec.json.decode(raw, type=_Envelope).result
        if answer.part == 0:
            self.latencies.append(time.perf_counter() - self.sent.pop(message.properties["correlation_id"]))
            self.answers += 1
        self.refused += bool(answer.error)
        for token in answer.tokens:
            self.tokens += 1
            if self.keys and self.tokens % 100 == 0:
                kid = jwt.get_unverified_header(token.token)["kid"]
                jwt.decode(
                    token.token,
                    self.keys[kid].key,
                    algorithms=["ES256", "RS256"],
                    options={"verify_aud": False},
                )
                self.verified += 1

    def message(self, raw: bytes, correlation: str) -> Outgoing:
        properties = {"reply_to": self.reply_to, "correlation_id": correlation, **self.user}
        self.sent[correlation] = time.perf_counter()
        return Outgoing(
            raw,
            self.exchange,
            self.exchange,
            properties,
            {"task": names.MINT, "id": correlation},
            persistent=True,
        )

    def run(self, bodies: list[tuple[str, bytes]], in_flight: int) -> float:
        started = time.perf_counter()
        number, done = 0, self.answers
        burst = max(1, in_flight // 4)
        while self.answers - done < len(bodies):
            room = in_flight - len(self.sent)
            if number < len(bodies) and (room >= burst or in_flight == 1 == room):
                group = [
                    self.message(raw, f"{id_}.{n}")
                    for n, (id_, raw) in enumerate(bodies[number : number + room], number)
                ]
                number += len(group)
                self.publisher.publish(group)
            else:
                try:
                    self.connection.drain_events(timeout=60)
                except TimeoutError:
                    sys.exit("no answer within 60 s")
        return time.perf_counter() - started


def main() -> None:
    url, client, files, count, in_flight, jwks = sys.argv[1:7]
    mixed = sys.argv[7:] == ["mixed"]
    load = Load(url, client, json.loads(Path(jwks).read_text()))
    storages = 200
    bodies = [body(int(files), n, storages) for n in range(int(count))]
    if mixed:  # a quarter repeated, a quarter refused whole
        for n in range(0, len(bodies), 4):
            bodies[n] = bodies[max(0, n - random.randrange(1, 200))]
        for n in range(2, len(bodies), 4):
            bodies[n] = (bodies[n][0], bodies[n][1].replace(b'"activity"', b'"vo":"other","activity"', 1))
    seconds = load.run(bodies, int(in_flight))
    ordered = sorted(load.latencies)
    print(
        json.dumps(
            {
                "seconds": round(seconds, 3), "requests": load.answers, "tokens": load.tokens, "refused": load.refused,
                "verified": load.verified, "p50_ms": round(median(ordered) * 1000, 2),
                "p99_ms": round(ordered[int(len(ordered) * 0.99) - 1] * 1000, 2),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
