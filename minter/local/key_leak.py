"""The drill of a leaked key (`minter drill --fault key-leak`), with the real engine and its own commands.

Transfers get their tokens over the broker. Then the key that signed them is revoked, an account is banned,
and `minter keys recover` makes every live token anew; it is killed in the middle and started again. The
clients repeat their requests, as docs/on-call.md has it, and each answer is verified with the new key set.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jwt
from msgspec import Struct

from minter.client import FileOperation, FileRequest, MinterClient, new_request_id
from minter.contract.messages import Answer, MintRequest
from minter.contract.names import MINT
from minter.database import control_changes, drill_transfers
from minter.database.connection import transaction
from minter.database.control import read_keys
from minter.errors import ServerError
from minter.local.stack import Stack
from minter.policy.clients import Ban
from minter.tokens import keys
from minter.tokens.keys import Key

FILES = 20
"""Files in one request."""
BANNED_OF = 10
"""One request of so many is of the account that is banned: its tokens are not made anew."""
THIEF = "thief"
FIRST_SECONDS = 120.0
"""Longest wait for the first request that is renewed."""
LOOK_SECONDS = 0.01
"""Interval of looks for the first tokens that were made anew: then the recovery is killed."""
HOSTS = ("se.drill.example.org", "other.drill.example.org")

_SETTINGS = f"""
[issuers.vo]
iss = "https://tokens.drill.example.org/vo/"
[broker]
local_client = "drill"
[[storages]]
vo = "vo"
name = "SE"
dialect = "eos"
base_path = "/data"
endpoints = [{{ host = "{HOSTS[0]}", prefix = "/data/vo" }}]
[[storages]]
vo = "vo"
name = "OTHER"
dialect = "storm"
base_path = "/data"
endpoints = [{{ host = "{HOSTS[1]}", prefix = "/data/vo" }}]
[[routes]]
name = "transfers"
operations = ["read"]
max_lifetime_seconds = 21600
"""


class LeakReport(Struct, frozen=True, kw_only=True):
    """The result of a drill; the drill failed if one of the last four is not zero.

    `tokens` are those that the leaked key had signed, `banned` those of them that the ban stopped. `killed`
    says whether the first run of the recovery was killed between its first and its last request.
    """

    transfers: int
    tokens: int
    banned: int
    killed: bool
    recover_seconds: float
    lost: int
    """Tokens of the leaked key that were not made anew, though nothing was banned."""
    twice: int
    unverified: int
    """Tokens that clients have and that do not verify with the key set."""
    let_through: int
    """Tokens of the banned account that were made anew, by the record."""

    @property
    def failed(self) -> bool:
        """Whether anything is not as it should be."""
        return bool(self.lost or self.twice or self.unverified or self.let_through)


class KeyLeak:
    """One drill, in a folder of its own."""

    def __init__(self, transfers: int, folder: Path) -> None:
        self._transfers = transfers
        self._folder = folder

    def run(self) -> LeakReport:
        """Run the drill; raises SettingsError if an embedded server does not start."""
        path = self._folder / "settings.toml"
        path.write_text(_SETTINGS)
        with Stack(path, self._folder, workers=2) as stack:
            self._stack = stack
            with MinterClient(stack.environ["MINTER_BROKER_URL"], "drill") as client:
                requests = [self._request(number) for number in range(-(-self._transfers // FILES))]
                before = list(client.ask(MINT, requests))
                if short := [a for a in before if a.error or len(a.tokens) != FILES]:
                    raise ServerError(
                        f"{len(short)} of {len(before)} requests were not granted whole at first"
                    )
                leaked = self._leaked()
                killed, seconds = self._recover(leaked.kid)
                return self._report(
                    requests, before, list(client.ask(MINT, requests)), leaked, killed, seconds
                )

    def _request(self, number: int) -> MintRequest:
        files = tuple(
            FileRequest(
                operations=(FileOperation("read", f"davs://{HOSTS[n % 2]}/data/vo/{new_request_id()}"),)
            )
            for n in range(FILES)
        )
        account = THIEF if number % BANNED_OF == 0 else ""
        return MintRequest(request_id=new_request_id(), files=files, on_behalf_of=account)

    def _ring(self) -> list[Key]:
        with transaction(self._stack.service.pool) as connection:
            return list(read_keys(connection))

    def _leaked(self) -> Key:
        return next(k for k in self._ring() if (k.state, k.algorithm) == ("active", "ES256"))

    def _recover(self, kid: str) -> tuple[bool, float]:
        """Revoke, ban and recover; return whether the first run was killed, and the seconds of it all."""
        started = time.monotonic()
        self._minter("keys", "revoke", kid, "--reason", "drill", "--yes", "--force")
        control_changes.add_ban(self._stack.service.pool, Ban("on_behalf_of", THIEF, "vo"), "drill", "drill")
        pool = self._stack.service.pool
        first = self._start("keys", "recover", kid, "--yes", "--processes", "1", "--json")
        while first.poll() is None and not drill_transfers.renewals(pool):
            if time.monotonic() - started > FIRST_SECONDS:
                break
            time.sleep(LOOK_SECONDS)
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        at_first = drill_transfers.renewals(pool)
        self._minter("keys", "recover", kid, "--yes", "--json", codes=(0, 1))  # 1: some are banned
        seconds = time.monotonic() - started
        return 0 < at_first < drill_transfers.renewals(pool), seconds

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "minter.cli", *words],
            env=self._stack.environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def _minter(self, *words: str, codes: Sequence[int] = (0,)) -> None:
        process = self._start(*words)
        _, said = process.communicate()
        if process.returncode not in codes:
            raise ServerError(
                f"minter {' '.join(words[:2])} ended with {process.returncode}: {said.decode()[-300:]}"
            )

    def _report(
        self, requests: Sequence[MintRequest], before: Sequence[Answer], after: Sequence[Answer], leaked: Key,
        killed: bool, seconds: float,
    ) -> LeakReport:  # fmt: skip
        service = self._stack.service
        key_set = {one["kid"]: jwt.PyJWK(one) for one in keys.jwks(self._ring(), service.clock())["keys"]}
        tokens = banned = lost = unverified = 0
        for request, old, new in zip(requests, before, after, strict=True):
            concerned = {slot for slot, token in _by_slot(old) if _kid(token) == leaked.kid}
            given = dict(_by_slot(new))
            tokens += len(concerned)
            if request.on_behalf_of == THIEF:
                banned += len(concerned)
                continue
            lost += len(concerned - given.keys())
            unverified += sum(not _verifies(token, key_set) for token in given.values())
        return LeakReport(
            transfers=len(requests) * FILES, tokens=tokens, banned=banned, killed=killed,
            recover_seconds=round(seconds, 2), lost=lost, twice=drill_transfers.made_twice(service.pool),
            unverified=unverified, let_through=drill_transfers.renewed_of(service.pool, THIEF),
        )  # fmt: skip


def _by_slot(answer: Answer) -> Iterator[tuple[tuple[Any, ...], str]]:
    for token in answer.tokens:
        yield (token.file, token.side, token.index), token.token


def _kid(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def _verifies(token: str, key_set: dict[str, jwt.PyJWK]) -> bool:
    try:
        jwt.decode(token, key_set[_kid(token)], options={"verify_aud": False})
    except (jwt.InvalidTokenError, KeyError):
        return False
    return True


def rehearse(transfers: int) -> LeakReport:
    """Run a drill in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="minter-drill-") as folder:
        return KeyLeak(transfers, Path(folder)).run()


def told(report: LeakReport) -> str:
    """Return the report as text."""
    lines = [
        f"{report.transfers} transfers, {report.tokens} of their tokens signed with the leaked key",
        f"made anew in {report.recover_seconds:g} s from the revocation on"
        + (", killed once and started again" if report.killed else ""),
        f"{report.banned} were of an account that was banned meanwhile: {report.let_through} made anew",
        f"{report.lost} lost, {report.twice} made twice, {report.unverified} that do not verify",
    ]
    return "\n".join(lines)
