"""One answer of a provider to the refresher, and what follows from it."""

from collections.abc import Callable

from msgspec import Struct

from minter.database.leases import Leased, Result, Taken
from minter.errors import (
    MinterError,
    ProviderAway,
    ProviderTokenRejected,
)
from minter.providers.answers import Obtained
from minter.providers.iam import IAM

Observe = Callable[[str, str, str, float], None]
"""Called for each request with the provider's name, the OAuth grant type, the outcome and the seconds."""


class ProviderAnswer(Struct, frozen=True):
    """The result of one request to a provider; `sent` is False if the request was not sent."""

    grant: str
    obtained: Obtained | None = None
    error: MinterError | None = None
    sent: bool = True
    seconds: float = 0.0

    @property
    def asked(self) -> bool:
        """Whether the provider was asked: no grant means that nothing could be asked for."""
        return self.sent and self.grant != "none"


def kept(taken: Taken, token: Leased) -> Result:
    """Return the result that ends a lease and leaves the token unchanged."""
    return Result(
        jti=token.jti, lease=taken.lease, lead_seconds=token.lead_seconds, needed_at=token.needed_at,
        tries=token.tries,
    )  # fmt: skip


def health_of(answer: ProviderAnswer) -> tuple[bool, float]:
    """Return whether an answer counts as a failure of the provider, and its Retry-After in seconds."""
    rejected = answer.obtained is not None and isinstance(answer.obtained.error, ProviderTokenRejected)
    retry_after = float(answer.error.fields.get("retry_after", 0)) if answer.error else 0.0
    return rejected or isinstance(answer.error, ProviderAway), retry_after


def threads_of(iam: IAM) -> int:
    """Return how many requests this process may have in progress, with those that wait for their slots."""
    return min(2 * iam.provider.in_flight, 64)
