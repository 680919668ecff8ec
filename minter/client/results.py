"""Results of the client: tokens that hide their bytes, refusals, filled jobs."""

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from minter.contract.messages import (
    Answer,
    LiveToken,
    MintRequest,
    Note,
    TokenAnswer,
    URLAnswer,
)
from minter.errors import MinterError, from_dict


class Token:
    """One token; `str` and `repr` hide its bytes, and `reveal()` returns them."""

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
        """Handle that fetches the refreshed token later, if a provider signed this one; empty otherwise."""

    def reveal(self) -> str:
        """Return the compact JWS itself, which is a secret."""
        return self._token

    def __repr__(self) -> str:
        """Name the token without showing it."""
        return f"<Token {self.jti} for {self.side}[{self.index}] of file {self.file}>"

    __str__ = __repr__


class SignedURL:
    """A URL with which anybody may read one file until `exp`; `str` and `repr` hide it, as of a `Token`."""

    __slots__ = ("_signed", "exp", "jti", "notes", "storage")

    def __init__(self, answer: URLAnswer, notes: Sequence[Note] = ()) -> None:
        self._signed = answer.signed
        self.storage = answer.storage
        self.jti = answer.jti
        self.exp = answer.exp
        self.notes = tuple(note.text for note in notes)
        """What the requester should know, such as that the storage matches paths loosely."""

    def reveal(self) -> str:
        """Return the URL, which holds a token and is a secret like one."""
        return self._signed

    def __repr__(self) -> str:
        """Name the URL's token without showing it."""
        return f"<SignedURL {self.jti} at {self.storage}>"

    __str__ = __repr__


class Refusal(Struct, frozen=True):
    """One slot of the request that got no token, and the typed error."""

    file: int
    side: str
    index: int
    error: MinterError


class Pending(Struct, frozen=True):
    """A provider's token that is still pending; fetch it by its handle, which is not a secret."""

    file: int
    side: str
    index: int
    storage: str
    scope: str
    handle: str


class MintResult(Struct, frozen=True):
    """Tokens and refusals of a request; files are numbered in the order in which they were given."""

    request_ids: tuple[uuid.UUID, ...]
    tokens: tuple[Token, ...]
    refusals: tuple[Refusal, ...]
    pending: tuple[Pending, ...] = ()
    notes: tuple[Note, ...] = ()


class FilledJob(Struct, frozen=True):
    """An FTS job filled with tokens, and the token for FTS; `job` is None if every file was refused."""

    request_id: uuid.UUID
    job: dict[str, Any] | None
    bearer: Token | None
    refused: tuple[dict[str, Any], ...]
    dropped_sources: tuple[dict[str, Any], ...]
    notes: tuple[Note, ...] = ()

    def __repr__(self) -> str:
        """Count the files without showing their tokens."""
        files = len(self.job["files"]) if self.job else 0
        return f"<FilledJob {self.request_id}: {files} files, {len(self.refused)} refused>"


class Changed(Struct, frozen=True):
    """Changes that a report or a cancellation made.

    `tokens` counts the changed tokens, `unknown` lists the places in the message that name nothing known,
    `alive` the cancelled tokens that still work until they expire.
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
    notes: list[Note] = []
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
        notes += [replace(n, file=n.file + first) if n.file >= 0 else n for n in answer.notes]
        first += len(request.files)
    ids = tuple(r.request_id for r in requests)
    return MintResult(ids, tuple(tokens), tuple(refusals), tuple(pending), tuple(notes))


def _pending(answer: Answer, first: int = 0) -> Iterator[Pending]:
    for a in answer.pending:
        yield Pending(a.file + first, a.side, a.index, a.storage, a.scope, a.handle)


def minted(request_id: uuid.UUID | None, answer: Answer) -> MintResult:
    """Return the result of a renewal or a fetch."""
    tokens = sorted(map(Token, answer.tokens), key=lambda t: (t.file, t.side, t.index))
    refusals = [Refusal(r.file, r.side, r.index, from_dict(r.error)) for r in answer.refusals]
    ids = (request_id,) if request_id else ()
    return MintResult(ids, tuple(tokens), tuple(refusals), tuple(_pending(answer)), tuple(answer.notes))


def shifted(where: str, start: int) -> str:
    """Return a place such as `files[3]` in the chunk that begins at `start` as a place in the whole list."""
    name, _, number = where.rstrip("]").partition("[")
    return f"{name}[{int(number) + start}]"
