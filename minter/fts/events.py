"""Read FTS monitoring messages, each about one file's transfer (as fts3 3.14.4's msg_producer sends them).

No message has a token or a jti. Messages come at least once, in any order, from several servers. Each one
tells only whether the file's tokens are in use, or no longer needed.
"""

from typing import Any, Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from minter.errors import InvalidRequest

_TAIL = b" \x04\x00\r\n\t"
"""Bytes that may end an FTS message: 0x04 before FTS 3.6, a space since then."""
_ENDED = frozenset({"FINISHED", "FAILED", "CANCELED"})
_RUNNING = frozenset({"ACTIVE", "STARTED", "ARCHIVING"})


class FTSEvent(Struct, frozen=True, kw_only=True):
    """New state of the tokens of a job's file; `external_id` is Rucio's request id, or empty."""

    vo: str
    job_id: UUID
    file_id: int
    external_id: str
    state: Literal["active", "finished"]


def read_event(body: bytes) -> FTSEvent | None:
    """Return the event in a message, None if it changes no token; raises InvalidRequest for other bodies."""
    try:
        told = msgspec.json.decode(body.rstrip(_TAIL), type=dict[str, Any])
        state = _state(told)
        metadata = told.get("file_metadata")
        external_id = metadata.get("request_id", "") if isinstance(metadata, dict) else ""
        return state and FTSEvent(
            vo=str(told.get("vo") or told.get("vo_name") or ""),
            job_id=UUID(told["job_id"]),
            file_id=int(told["file_id"]),
            external_id=str(external_id or ""),
            state=state,
        )
    except (
        msgspec.DecodeError, KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError,
    ) as error:  # fmt: skip
        raise InvalidRequest(f"not a monitoring message of FTS ({type(error).__name__})") from None


def _state(told: dict[str, Any]) -> Literal["active", "finished"] | None:
    final = told.get("t_final_transfer_state")
    if final is not None:
        return _of_complete(str(final), told)
    if "file_state" in told:
        return _of_state(str(told["file_state"]), told)
    return "active" if "transfer_id" in told else None


def _of_complete(final: str, told: dict[str, Any]) -> Literal["active", "finished"] | None:
    if final == "Ok":  # the destination is polled until the file is on tape
        return "active" if told.get("is_archiving") is True else "finished"
    retries_left = int(told.get("retry_max") or 0) - int(told.get("retry") or 0)
    if final == "Error" and told.get("is_recoverable") is True and retries_left > 0:
        return None  # FTS tries again with the same tokens
    return None if _others_go_on(told) else "finished"


def _of_state(state: str, told: dict[str, Any]) -> Literal["active", "finished"] | None:
    if state in _RUNNING:
        return "active"
    if state == "FAILED" and _others_go_on(told):
        return None
    return "finished" if state in _ENDED else None


def _others_go_on(told: dict[str, Any]) -> bool:
    """Say whether FTS tries another replica next: its token belongs to the same file of the request."""
    return told.get("job_state") in ("ACTIVE", "READY", "SUBMITTED") and not told.get("job_multihop")
