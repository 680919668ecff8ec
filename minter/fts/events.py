"""FTS monitoring messages: what each says of one file's transfer (fts3 3.14.4, msg_producer; facts of FTS).

None carries a token or a jti. They come at least once, in any order, from several servers, so what is read
from each is whether the file's tokens are in use, or needed no more.
"""

from typing import Any, Literal
from uuid import UUID

import msgspec
from msgspec import Struct

from minter.errors import InvalidRequest

_TAIL = b" \x04\x00\r\n\t"
"""What FTS ends a message with: 0x04 before 3.6, a space since."""
_ENDED = frozenset({"FINISHED", "FAILED", "CANCELED"})
_RUNNING = frozenset({"ACTIVE", "STARTED", "ARCHIVING"})


class FTSEvent(Struct, frozen=True, kw_only=True):
    """One file of one job, and its tokens' new state; `external_id` is Rucio's request id, if it has one."""

    vo: str
    job_id: UUID
    file_id: int
    external_id: str
    state: Literal["active", "finished"]


def read_event(body: bytes) -> FTSEvent | None:
    """Return what a message says; None if that changes nothing. Raises InvalidRequest for any other."""
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
        return None  # tried again, with the same tokens
    return None if _others_go_on(told) else "finished"


def _of_state(state: str, told: dict[str, Any]) -> Literal["active", "finished"] | None:
    if state in _RUNNING:
        return "active"
    if state == "FAILED" and _others_go_on(told):
        return None
    return "finished" if state in _ENDED else None


def _others_go_on(told: dict[str, Any]) -> bool:
    """Say whether another replica of the same file is tried next: it has its own token, under one file."""
    return told.get("job_state") in ("ACTIVE", "READY", "SUBMITTED") and not told.get("job_multihop")
