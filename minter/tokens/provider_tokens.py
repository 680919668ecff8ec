"""Record the managed tokens that the new requests of one batch need from external providers."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from minter.policy.plans import Plan, PlannedToken
from minter.tokens import managed
from minter.tokens.managed import ManagedToken, Wanted
from minter.tokens.outcomes import PendingManaged, PendingRequest
from minter.tokens.records import Recording, TokenRow
from minter.tokens.reissue import Reissuer


class _Use(NamedTuple):
    """One use of a managed token by a new request; `digest` names the token."""

    request: PendingRequest
    planned: PlannedToken
    handle: str
    digest: bytes


def record_provider_tokens(
    tx: Recording,
    fresh: Sequence[PendingRequest],
    rules: Mapping[Plan, int],
    reissuer: Reissuer,
    now: datetime,
) -> None:
    """Record the managed tokens of new requests, and hand out access tokens that equal ones already have."""
    wanted: dict[bytes, Wanted] = {}
    rows: dict[bytes, TokenRow] = {}
    uses: list[_Use] = []
    for one in fresh:
        new = one.jtis.managed
        for number, planned in enumerate(one.decision.planned_tokens):
            if not planned.managed:
                continue
            token = managed.wanted(
                planned, one.outcome.submission.request, one.client, one.jtis.uuid(new), one.activity, now
            )
            if token.digest in wanted:
                wanted[token.digest] = wanted[token.digest].joined(token)
            else:
                wanted[token.digest], new = token, new + 1
                rows[token.digest] = one.managed_row(planned, rules[planned.plan], token)
            uses.append(_Use(one, planned, one.jtis.text(number), token.digest))
    if not wanted:
        return
    recorded = tx.join_managed(list(wanted.values()))
    tx.add_managed([row for digest, row in rows.items() if str(recorded[digest].jti) == row.jti])
    for use in uses:
        least = timedelta(seconds=wanted[use.digest].least_seconds)
        _note_use(use, recorded[use.digest], reissuer, now + least)


def _note_use(use: _Use, token: ManagedToken, reissuer: Reissuer, lasts_until: datetime) -> None:
    """Record a use; hand out the access token if one lives until `lasts_until`, else note it as pending."""
    use.request.manage(use.planned, use.handle, token.jti)
    slot, storage = use.planned.need.slot, use.planned.plan.area.storage
    given = reissuer.given(token, slot, storage, use.handle) if token.shows(lasts_until) else None
    if given is not None:
        use.request.outcome.issued.append(given)
    else:
        use.request.outcome.pending.append(PendingManaged(slot, storage, use.planned.scope, use.handle))
