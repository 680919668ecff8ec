"""A refresher, a fake provider and a clock for the tests of managed tokens."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from msgspec import structs

from minter.contract.followups import FetchRequest
from minter.contract.messages import Answer, FileOperation, FileRequest, MintRequest
from minter.contract.operations import Operation
from minter.database import control_changes
from minter.local.fake_iam import FakeIAM
from minter.policy.requests import from_mint
from minter.policy.routes import Route
from minter.policy.transfers import Policy
from minter.providers.dialects import Provider
from minter.providers.iam import IAM
from minter.refresher.discovery import SharedDocuments
from minter.refresher.refresher import Refresher
from minter.service import Service
from minter.tasks.lifecycle import Lifecycle
from minter.tokens import clock
from minter.tokens.outcomes import Outcome, Submission
from tests.conftest import rows
from tests.integration.test_mint import SE

ME = "rucio-alpen"
OPERATIONS: tuple[Operation, ...] = ("read", "write", "overwrite", "retry", "stat")
MINTED = Route(name="minted", operations=OPERATIONS)


class Clock:
    """The clock of the engine and refresher, which a test may put forward."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Bench:
    """An engine and a refresher with one provider, on the clock of the test."""

    def __init__(self, service: Service, iam: FakeIAM, *routes: Route, **provider: Any) -> None:
        self.clock = Clock()
        self.service = service
        self.fake = iam
        self.provider = Provider(
            name="iam", issuer=iam.issuer, client_id="minter", secret_file="-",
            **{"requests_per_second": 500.0, "timeout_seconds": 10.0} | provider,
        )  # fmt: skip
        self.routes = routes
        old = service.engine.policy
        service.engine.policy = Policy(old.directories, routes, ())
        service.store.clock = lambda: datetime.now(UTC)  # Postgres's time, not the test's
        control_changes.sync_providers(service.pool, ["iam"])
        self.lifecycle = Lifecycle(service.engine, service.store)
        known = SharedDocuments(service.pool, self.provider, self.clock)
        known.iam = self.iam = IAM(self.provider, "minter-secret", known, self.clock)
        self.iam.documents()  # the documents were fetched before the outage
        self.asked: list[tuple[str, str]] = []
        self.refresher = Refresher(
            service.pool, service.keystore, self.lifecycle, {"iam": self.iam}, self.clock,
            lambda *asked: self.asked.append(asked[1:3]), jitter=lambda bound: bound / 2, checks_clock=False,
        )  # fmt: skip

    def ask(
        self,
        *names: str,
        subject: str | None = None,
        client: str = ME,
        operation: Operation | Literal["download", "upload"] = "download",
        **options: Any,
    ) -> Outcome:
        files = tuple(
            FileRequest(operations=(FileOperation(operation, SE + n),), external_id=n) for n in names
        )
        request = from_mint(
            MintRequest(
                request_id=options.pop("request_id", None) or clock.new_uuid7(), files=files, **options
            )
        )
        if subject:
            from minter.policy.token_requests import SubjectToken

            request = structs.replace(request, subject=SubjectToken(subject, "iam"))
        (outcome,) = self.service.engine.mint_many([Submission(request, client)], self.clock())
        return outcome

    def subject(self, **claims: object) -> str:
        told = {"sub": "atlas-user", "aud": "minter", "scope": "storage.read:/", **claims}
        return self.fake.sign(told)

    def run_once(self, seconds: float = 30.0, until: Callable[..., object] | None = None) -> None:
        """Let the refresher do what is due now, or whatever it takes until something has happened."""
        end = time.monotonic() + seconds
        quiet = 0
        while time.monotonic() < end and (not until() if until else quiet < 3):
            self.refresher._maintained_at = float("-inf")
            quiet = 0 if self.refresher.run_once() or self.refresher._out.total() else quiet + 1
            time.sleep(0.005)
        assert quiet >= 3 or (until and until()), f"not done within {seconds} s"

    def fetch(self, outcome: Outcome, client: str = ME) -> Answer:
        return self.lifecycle.fetch(client, FetchRequest(outcome.submission.request.request_id), self.clock())

    def forward(self, **by: float) -> None:
        self.clock.ahead += timedelta(**by)
        self.fake.behaviour = structs.replace(
            self.fake.behaviour, skew_seconds=int(self.clock.ahead.total_seconds())
        )

    def row(self) -> dict[str, Any]:
        (found,) = rows(
            self.service, "SELECT state::text, tries, spent, lead_seconds, error, uses FROM managed"
        )
        return dict(zip(("state", "tries", "spent", "lead", "error", "uses"), found, strict=True))


def exchange(**route: Any) -> Route:
    return Route(
        name="asked", operations=OPERATIONS, mode="exchange", provider="iam",
        **{"transfer_seconds": 12 * 3600} | route,
    )  # fmt: skip


def own(**route: Any) -> Route:
    return Route(name="own", operations=OPERATIONS, mode="client_credentials", provider="iam", **route)
