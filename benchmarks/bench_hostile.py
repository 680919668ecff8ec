"""Measure what a greedy client costs honest ones: `python -m benchmarks.bench_hostile [--json FILE]`.

Ten honest clients mint one file after the other, first alone, then beside a client that always has 60
requests of 500 files under way. Over HTTP it has 60 connections; over AMQP (RabbitMQ) its 60 requests wait in
its own queue, then in the common one, and at last it sends 3 000 requests of 100 files at once. All phases of
one transport are of the same run, on the same service. In each, an operator bans and lifts a path once a second.
"""

import argparse
import base64
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Queue
from pathlib import Path
from statistics import median, quantiles
from uuid import uuid4

import kombu
import urllib3

from benchmarks.bench_http import minter
from benchmarks.engine import bench, versions
from benchmarks.load import Load
from minter.broker import rabbitmq
from minter.broker.publisher import declare
from minter.client import new_request_id
from minter.contract import names
from minter.contract.messages import MAX_NEEDS
from minter.database import control_changes
from minter.local import stack
from minter.policy.clients import Ban
from minter.service import Service
from minter.tokens.keystore import new_secret

HONEST, GREEDY, GREEDY_FILES, SOURCES = 10, 60, 500, 4
SOURCE = "davs://se3.example.org:443/data/vo/{name}"
Told = tuple[str, list[float], "Counter[int]"]


def request(name: str, files: int) -> str:
    """Return a request to read files, with `ID` where its request_id belongs."""
    sources = [{"sources": [SOURCE.format(name=f"{name}/{i}")]} for i in range(files)]
    return json.dumps({"request_id": "ID", "files": sources})


def ask(
    url: str, name: str, secret: str, files: int, connections: int, until: float, out: "Queue[Told]"
) -> None:
    """Mint `files` files a request on each connection until `until`; put seconds and statuses."""
    http = urllib3.PoolManager(maxsize=connections)
    basic = "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()
    parts = request(name, files).partition("ID")
    took: list[float] = []
    statuses: Counter[int] = Counter()

    def one(_: int) -> None:
        while (started := time.monotonic()) < until:
            body = parts[0] + str(new_request_id()) + parts[2]
            headers = {"Authorization": basic, "Content-Type": "application/json"}
            answer = http.request("POST", url, body=body, headers=headers, retries=False)
            took.append(time.monotonic() - started)
            statuses[answer.status] += 1
            time.sleep(float(answer.headers.get("Retry-After", 0)))

    with ThreadPoolExecutor(connections) as threads:
        list(threads.map(one, range(connections)))
    out.put((name, took, statuses))


def bans(service: Service, until: float) -> list[float]:
    """Ban and lift again a path once a second until `until`; return how many seconds each took to commit.

    A change holds the control lock alone, so every batch after its commit follows it.
    """
    took = []
    while time.monotonic() < until - 1:
        for change in (control_changes.add_ban, control_changes.lift_ban):
            reason = ("bench",) if change is control_changes.add_ban else ()
            started = time.monotonic()
            change(service.pool, Ban("path", "/vo/banned", "vo"), *reason, "bench")
            took.append(time.monotonic() - started)
        time.sleep(0.5)
    return took


def ask_amqp(
    url: str, name: str, files: int, in_flight: int, exchange: str, until: float, out: "Queue[Told]"
) -> None:
    """Keep `in_flight` requests of `files` files under way until `until`; put seconds and outcomes."""
    load = Load(url, name, {"keys": []}, exchange)
    parts = request(name, files)
    outcomes = Counter[int]()
    while time.monotonic() < until:
        if room := in_flight - len(load.sent):
            load.publisher.publish(
                [
                    load.message(
                        b"[[%b],{},{}]" % parts.replace("ID", str(new_request_id()), 1).encode(), uuid4().hex
                    )
                    for _ in range(room)
                ]
            )
        with suppress(TimeoutError):
            load.connection.drain_events(timeout=1)
    outcomes[200] = load.answers
    out.put((name, load.latencies, outcomes))


def told(
    processes: Sequence[multiprocessing.Process], out: "Queue[Told]", service: Service, seconds: float
) -> dict[str, object]:
    """Run the clients; return the honest ones' latencies, what the greedy one got, and how long bans took."""
    for process in processes:
        process.start()
    changes = bans(service, time.monotonic() + seconds)
    found = [out.get() for _ in processes]
    for process in processes:
        process.join()
    honest = [t for name, took, _ in found if name != "greedy" for t in took]
    answers = sum((statuses for name, _, statuses in found if name == "greedy"), Counter[int]())
    return {
        "honest_per_s": round(len(honest) / seconds),
        "honest_p50_ms": round(median(honest) * 1000, 1),
        "honest_p99_ms": round(quantiles(honest, n=100)[98] * 1000, 1),
        "ban_max_ms": round(max(changes) * 1000, 1),
        "ban_p50_ms": round(median(changes) * 1000, 1),
        "greedy_answers": {str(status): count for status, count in answers.items()},
    }


def over_http(folder: Path, seconds: float) -> dict[str, object]:
    """Return the figures of the HTTP service."""
    phases = {}
    with minter(folder, 2) as (base, _, service):
        secrets = {name: new_secret() for name in [*(f"honest{n}" for n in range(HONEST)), "greedy"]}
        for name, secret in secrets.items():
            service.set_secret(stack.add_client(service, name, "vo", "bench"), secret, "bench")
        time.sleep(2)  # every process of the service reads the new clients once a second
        for phase, greedy in (("alone", False), ("beside a greedy client", True)):
            out: Queue[Told] = multiprocessing.Queue()
            until = time.monotonic() + seconds
            who = [(name, 1, 1) for name in secrets if name != "greedy"]
            who += [("greedy", GREEDY_FILES, GREEDY // 3)] * (3 if greedy else 0)
            url = f"{base}/vo/v1/mint"
            clients = [
                multiprocessing.Process(
                    target=ask, args=(url, name, secrets[name], files, connections, until, out)
                )
                for name, files, connections in who
            ]
            phases[phase] = told(clients, out, service, seconds)
    return phases


def largest_requests(folder: Path) -> dict[str, object]:
    """Return the memory of the HTTP service, then of a worker, under six of the largest requests at once."""
    sources = [SOURCE.format(name=f"{n}{'x' * 900}") for n in range(SOURCES)]
    files = [{"sources": sources}] * (MAX_NEEDS // SOURCES)
    request = json.dumps({"request_id": "ID", "files": files}).encode()
    return {
        "request_mb": round(len(request) / 1e6, 1),
        "http": largest_over_http(folder / "http", request),
        "amqp": largest_over_amqp(folder / "amqp", request),
    }


def largest_over_amqp(folder: Path, request: bytes) -> dict[str, object]:
    """Return the memory of one worker on RabbitMQ while six requests wait."""
    with bench(folder, "rabbitmq") as running:
        load = Load(running.broker.url, running.client, {"keys": []})
        bodies = [
            b"[[%b],{},{}]" % request.replace(b"ID", str(new_request_id()).encode(), 1) for _ in range(6)
        ]
        running.workers(1)
        before = peak_mb("workers.app")
        load.publisher.publish([load.message(body, uuid4().hex) for body in bodies])
        while load.answers < len(bodies):
            load.connection.drain_events(timeout=300)
        return {"answers": load.answers, "refused": load.refused, "rss_mb_before": before,
                "rss_mb_peak": peak_mb("workers.app")}  # fmt: skip


def largest_over_http(folder: Path, request: bytes) -> dict[str, object]:
    """Return the memory of the HTTP service while three clients send six requests at once."""
    with minter(folder, 1) as (base, _, service):
        secrets = {f"large{n}": new_secret() for n in range(3)}
        for client, secret in secrets.items():
            service.set_secret(stack.add_client(service, client, "vo", "bench"), secret, "bench")
        time.sleep(2)

        def send(client: str) -> int:
            headers = urllib3.make_headers(basic_auth=f"{client}:{secrets[client]}") | {
                "Content-Type": "application/json"
            }
            body = request.replace(b"ID", str(new_request_id()).encode(), 1)
            return urllib3.request(
                "POST", f"{base}/vo/v1/mint", body=body, headers=headers, retries=False, timeout=300
            ).status

        before = peak_mb("serve")
        with ThreadPoolExecutor(6) as threads:
            statuses = Counter(threads.map(send, list(secrets) * 2))
        return {
            "answers": dict(statuses),
            "rss_mb_before": before,
            "rss_mb_peak": peak_mb("serve"),
        }


def peak_mb(word: str) -> int:
    """Return the largest resident memory so far of a process with `word` in its command, in MB."""
    peaks = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            if word.encode() in (status.parent / "cmdline").read_bytes():
                peaks += [
                    int(line.split()[1])
                    for line in status.read_text().splitlines()
                    if line.startswith("VmHWM")
                ]
    return max(peaks) // 1000


def over_amqp(folder: Path, seconds: float) -> dict[str, object]:
    """Return the figures of two workers on RabbitMQ."""
    phases = {}
    with bench(folder, "rabbitmq") as running:
        clients = [*(f"honest{n}" for n in range(HONEST)), "greedy"]
        for name in clients:
            stack.add_client(running.service, name, "vo", "bench")
        passwords = folder / "passwords.json"
        rabbitmq.setup_users(
            dict.fromkeys(clients, ()), running.broker.url, str(running.broker.ctl), passwords
        )
        secrets = json.loads(passwords.read_text())
        with kombu.Connection(running.broker.url) as connection:
            declare(connection, clients=clients)
        running.workers(2)
        own = names.client_requests("greedy")
        for phase, greedy in (
            ("alone", None),
            ("beside a greedy client, own queue", (GREEDY_FILES, GREEDY, own)),
            ("beside a greedy client, common queue", (GREEDY_FILES, GREEDY, names.REQUEST_EXCHANGE)),
            ("beside a flood in its own queue", (100, 3_000, own)),
        ):
            out: Queue[Told] = multiprocessing.Queue()
            until = time.monotonic() + seconds
            url = f"amqp://{{0}}:{{1}}@127.0.0.1:{running.broker.port}//"
            who = [(name, 1, 1, names.client_requests(name)) for name in clients if name != "greedy"]
            who += [("greedy", *greedy)] if greedy else []
            processes = [
                multiprocessing.Process(
                    target=ask_amqp, args=(url.format(name, secrets[name]), name, *rest, until, out)
                )
                for name, *rest in who
            ]
            phases[phase] = told(processes, out, running.service, seconds)
            with kombu.Connection(running.broker.url) as connection:
                for queue in (own, names.REQUEST_QUEUE):
                    connection.default_channel.queue_purge(queue)
            time.sleep(3)
    return phases


def main() -> None:
    """Run all phases and print the figures."""
    measures = {"http": over_http, "amqp": over_amqp, "largest": lambda folder, _: largest_requests(folder)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--only", choices=list(measures))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, object] = {"versions": versions()}
    for transport, measure in measures.items():
        if options.only in (None, transport):
            with tempfile.TemporaryDirectory() as folder:
                found[transport] = measure(Path(folder), options.seconds)
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
