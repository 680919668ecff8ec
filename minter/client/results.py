"""What the client returns: tokens that hide their bytes, refusals, filled jobs."""

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import Struct

from minter.contract.messages import (
    Answer,
    LiveToken,
    MintRequest,
    TokenAnswer,
)
from minter.errors import MinterError, from_dict


class Token:
    """One token. `str` and `repr` hide it; `reveal()` gives it to whoever sends it on."""

    __slots__ = ("_token", "exp", "file", "handle", "index", "jti", "scope", "side", "storage")

    def __init__(self, answer: TokenAnswer, first_file: int = 0) -> None:
        self._token = answer.token
        self.file = answer.file + first_file if answer.file >= 0 else answer.file
        self.side = answer.side
        self.index = answer.index
        self.storage = answer.storage
        self.scope = answer.scope
        self.jti = answer.jti
        self.exp = answer.exp
        self.handle = answer.handle
        """By which the one that follows it is fetched, if a provider signed it; empty otherwise."""

    def reveal(self) -> str:
        """Return the compact JWS itself: a secret."""
        return self._token

    def __repr__(self) -> str:
        """Name the token without showing it."""
        return f"<Token {self.jti} for {self.side}[{self.index}] of file {self.file}>"

    __str__ = __repr__


class Refusal(Struct, frozen=True):
    """One file's side that got no token, and the typed reason."""

    file: int
    side: str
    index: int
    error: MinterError


class Pending(Struct, frozen=True):
    """A provider's token that is not there yet; fetch it by its handle, which is no secret."""

    file: int
    side: str
    index: int
    storage: str
    scope: str
    handle: str


class MintResult(Struct, frozen=True):
    """What a request got; files are numbered as they were given."""

    request_ids: tuple[uuid.UUID, ...]
    tokens: tuple[Token, ...]
    refusals: tuple[Refusal, ...]
    pending: tuple[Pending, ...] = ()


class FilledJob(Struct, frozen=True):
    """An FTS job with tokens in it, `None` if every file was refused, and the token for FTS."""

    request_id: uuid.UUID
    job: dict[str, Any] | None
    bearer: Token | None
    refused: tuple[dict[str, Any], ...]
    dropped_sources: tuple[dict[str, Any], ...]

    def __repr__(self) -> str:
        """Count the files without showing their tokens."""
        files = len(self.job["files"]) if self.job else 0
        return f"<FilledJob {self.request_id}: {files} files, {len(self.refused)} refused>"


class Changed(Struct, frozen=True):
    """What a report or a cancellation did.

    `tokens` counts those changed, `unknown` has the places that named nothing known, `alive` the
    cancelled tokens that work until they expire.
    """

    tokens: int
    unknown: tuple[str, ...]
    alive: tuple[LiveToken, ...]


def whole_result(
    requests: Sequence[MintRequest], answers: Sequence[Answer], *, whole: bool = True
) -> MintResult:
    """Join the answers to the parts of one large request; file numbers count through all parts."""
    tokens: list[Token] = []
    refusals: list[Refusal] = []
    pending: list[Pending] = []
    first = 0
    for request, answer in zip(requests, answers, strict=True):
        if answer.error is not None:
            error = from_dict(answer.error)
            if whole:
                raise error
            refusals += [Refusal(first + n, "request", -1, error) for n in range(len(request.files))]
        tokens += sorted((Token(t, first) for t in answer.tokens), key=lambda t: (t.file, t.side, t.index))
        refusals += [Refusal(r.file + first, r.side, r.index, from_dict(r.error)) for r in answer.refusals]
        pending += _pending(answer, first)
        first += len(request.files)
    ids = tuple(r.request_id for r in requests)
    return MintResult(ids, tuple(tokens), tuple(refusals), tuple(pending))


def _pending(answer: Answer, first: int = 0) -> Iterator[Pending]:
    for a in answer.pending:
        yield Pending(a.file + first, a.side, a.index, a.storage, a.scope, a.handle)


def minted(request_id: uuid.UUID | None, answer: Answer) -> MintResult:
    """Return the answer to one request that was made before."""
    tokens = sorted(map(Token, answer.tokens), key=lambda t: (t.file, t.side, t.index))
    refusals = [Refusal(r.file, r.side, r.index, from_dict(r.error)) for r in answer.refusals]
    ids = (request_id,) if request_id else ()
    return MintResult(ids, tuple(tokens), tuple(refusals), tuple(_pending(answer)))


def shifted(where: str, start: int) -> str:
    """Return the place `files[3]` of a later chunk as a place in the whole."""
    name, _, number = where.rstrip("]").partition("[")
    return f"{name}[{int(number) + start}]"
