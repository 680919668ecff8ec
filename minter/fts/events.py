"""Read FTS monitoring messages, each about one file's transfer (as fts3 3.14.4's msg_producer sends them).

No message has a token or a jti. Messages come at least once, in any order, from several servers. Each one
tells only whether the file's tokens are in use, or no longer needed.
"""

import re
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec
from msgspec import Struct

from minter.errors import InvalidRequest

_TAIL = b" \x04\x00\r\n\t"
"""Bytes that may end an FTS message: 0x04 before FTS 3.6, a space since then."""
_ENDED = frozenset({"FINISHED", "FAILED", "CANCELED"})
_RUNNING = frozenset({"ACTIVE", "STARTED", "ARCHIVING"})


class FTSEvent(Struct, frozen=True, kw_only=True):
    """New state of the tokens of a job's file; `external_id` is Rucio's request id, or empty.

    The URLs are those of the transfer, empty if the message has none. With `unless_others`, the file's tokens
    end only if the file has no other source, which FTS would try next. With `ends_chain`, the later hops of a
    chain will not run, and their tokens end, too.
    """

    vo: str
    job_id: UUID
    file_id: int
    external_id: str
    state: Literal["active", "finished"]
    source_url: str = ""
    destination_url: str = ""
    unless_others: bool = False
    ends_chain: bool = False


class _Told(NamedTuple):
    state: Literal["active", "finished"]
    unless_others: bool = False
    ends_chain: bool = False


_GOES_ON = ("ACTIVE", "READY", "SUBMITTED", "STAGING")
"""States of a job in which FTS may try another replica of a file that failed."""


def read_event(body: bytes) -> FTSEvent | None:
    """Return the event in a message, None if it changes no token; raises InvalidRequest for other bodies."""
    try:
        told = msgspec.json.decode(body.rstrip(_TAIL), type=dict[str, Any])
        state = _state(told)
        return state and FTSEvent(
            vo=str(told.get("vo") or told.get("vo_name") or ""),
            job_id=UUID(told["job_id"]),
            file_id=int(told["file_id"]),
            external_id=_external_id(told.get("file_metadata")),
            state=state.state,
            source_url=_text(told.get("src_url")),
            destination_url=_text(told.get("dst_url")),
            unless_others=state.unless_others,
            ends_chain=state.ends_chain,
        )
    except (
        msgspec.DecodeError, KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError,
    ) as error:  # fmt: skip
        raise InvalidRequest(f"not a monitoring message of FTS ({type(error).__name__})") from None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _external_id(metadata: object) -> str:
    """Return Rucio's request id. Metadata that FTS could not read as JSON comes as text."""
    if isinstance(metadata, str):
        found = _REQUEST_ID(metadata)
        return found.group(1) if found else ""
    found_id = metadata.get("request_id") if isinstance(metadata, dict) else None
    return str(found_id or "")


_REQUEST_ID = re.compile(r'"request_id"\s*:\s*"([0-9A-Za-z-]{1,255})"').search


def _state(told: dict[str, Any]) -> _Told | None:
    final = told.get("t_final_transfer_state")
    if final is not None:
        return _of_complete(str(final), told)
    if "file_state" in told:
        return _of_state(str(told["file_state"]), told)
    return _Told("active") if "transfer_id" in told else None


def _of_complete(final: str, told: dict[str, Any]) -> _Told | None:
    if final == "Ok":  # the destination is polled until the file is on tape
        return _Told("active" if told.get("is_archiving") is True else "finished")
    retries_left = int(told.get("retry_max") or 0) - int(told.get("retry") or 0)
    if final == "Error" and told.get("is_recoverable") is True and retries_left > 0:
        return None  # FTS tries again with the same tokens
    if told.get("job_m_replica") is True and told.get("job_state") == "ACTIVE":
        return None  # FTS tries the next replica
    return _Told("finished", ends_chain=told.get("job_multihop") is True)


def _of_state(state: str, told: dict[str, Any]) -> _Told | None:
    if state in _RUNNING:
        return _Told("active")
    if state not in _ENDED:
        return None
    failed = state in ("FAILED", "CANCELED")
    chain = failed and told.get("job_multihop") is True
    return _Told("finished", failed and told.get("job_state") in _GOES_ON and not chain, chain)
