"""Renewals: a resubmission makes a new request for the tokens of an earlier request.

Only what was requested is copied from the earlier decision: every token is decided again, with the current
bans, routes and limits.
"""

import json
from collections.abc import Mapping, Sequence

from minter.contract.followups import RenewRequest
from minter.contract.operations import Operation
from minter.errors import UnknownRequest, UnknownStorage
from minter.policy.requests import SEVERAL, File, Need, Request, content_digest, subject_of
from minter.policy.transfers import Policy
from minter.scopes import parse_scopes
from minter.tokens.records import RequestRow, TokenRow, path_hash


def renewal(
    wire: RenewRequest,
    row: RequestRow,
    tokens: Sequence[TokenRow],
    operations: Mapping[int, Sequence[Operation]],
    vo: str,
    policy: Policy,
    consumer: str = "",
) -> Request:
    """Return the request that renews `tokens`, all of one request; `operations` maps rule_id to operations.

    If `wire` does not say how long a file may wait, a token gets the same lifetime again. The lifetime of a
    shared token was not chosen for one file, so its uses get the route's ordinary lifetime. Raises
    UnknownRequest if there is nothing to renew, or the record does not say what was requested. Raises
    UnknownStorage if the settings no longer have an endpoint of the storage for the token.
    """
    if row.activity == SEVERAL:
        raise UnknownRequest(f"the files of request {wire.renews} have several activities; ask anew")
    chosen = [t for t in tokens if t.side != "service" and (not wire.files or t.file in wire.files)]
    if not chosen:
        raise UnknownRequest(f"request {wire.renews} was granted no token for these files; ask anew")
    service = next((t for t in tokens if t.side == "service"), None)
    files: dict[int, list[TokenRow]] = {}
    for token in chosen:
        files.setdefault(token.file, []).append(token)
    return Request(
        request_id=wire.request_id,
        kind="renew",
        digest=content_digest(wire),
        files=tuple(
            File(
                tuple(_need(t, wire, operations, vo, policy, via_fts=service is not None) for t in group),
                activity=row.activity,
                external_id=group[0].external_id,
            )
            for _, group in sorted(files.items())
        ),
        on_behalf_of=row.on_behalf_of,
        activity=row.activity,
        all_or_nothing=row.all_or_nothing,
        reply_queue=wire.reply_queue,
        service=Need(-1, "service", 0, policy.fts_url(vo, service.storage), ()) if service else None,
        via="direct" if service is None else "fts",
        renews=wire.renews,
        subject=subject_of(wire.subject_token),
        consumer=wire.consumer or consumer,
    )


def _need(
    token: TokenRow,
    wire: RenewRequest,
    operations: Mapping[int, Sequence[Operation]],
    vo: str,
    policy: Policy,
    *,
    via_fts: bool,
) -> Need:
    claims = json.loads(token.payload)
    audience = [claims["aud"]] if isinstance(claims["aud"], str) else claims["aud"]
    paths = {s.path for s in parse_scopes(claims["scope"]) if s.path is not None}
    # A use has its own path. Of other tokens, one path in the scopes is the file's; others may be parents.
    path = token.path or next((p for p in paths if path_hash(p) == token.path_hash), None)
    if path is None or token.rule_id not in operations:
        raise UnknownRequest(
            f"the record of token {token.jti} does not say what was asked for; ask anew", jti=token.jti
        )
    url = policy.directories[vo].url(token.storage, path, audience) if vo in policy.directories else None
    if url is None:
        raise UnknownStorage(
            f"storage {token.storage!r} has no endpoint for token {token.jti} any more; ask with new URLs",
            storage=token.storage,
        )
    return Need(
        token.file,
        token.side,
        token.index,
        url,
        tuple(operations[token.rule_id]),
        wire.wait_seconds,
        one_token=via_fts,
        life_seconds=None if wire.wait_seconds is not None or token.use_id else claims["exp"] - claims["iat"],
    )
