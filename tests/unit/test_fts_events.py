"""Reading FTS's monitoring messages; the vectors follow msg_producer of fts3 3.14.4."""

import json
from typing import Any

import pytest

from minter.errors import InvalidRequest
from minter.fts.events import FTSEvent, read_event
from tests.conftest import ROOT

VECTORS = ROOT / "tests/vectors/fts"


def told(kind: str, **changes: object) -> bytes:
    body = json.loads((VECTORS / f"{kind}.json").read_text().rstrip(" \x04\n"))
    return json.dumps(body | changes).encode()


COMPLETE: dict[str, tuple[dict[str, Any], str | None]] = {
    "finished": ({}, "finished"),
    "archiving": ({"is_archiving": True}, "active"),
    "tried again": (
        {"t_final_transfer_state": "Error", "is_recoverable": True, "retry": 0, "retry_max": 3},
        None,
    ),
    "numbers as text": (
        {"t_final_transfer_state": "Error", "is_recoverable": True, "retry": "1", "retry_max": "3"},
        None,
    ),
    "last try": (
        {"t_final_transfer_state": "Error", "is_recoverable": True, "retry": 3, "retry_max": 3},
        "finished",
    ),
    "hopeless": ({"t_final_transfer_state": "Error", "is_recoverable": False, "retry_max": 3}, "finished"),
    "another replica": (
        {"t_final_transfer_state": "Error", "job_state": "ACTIVE", "job_m_replica": True},
        None,
    ),
    "one of a bulk": (
        {"t_final_transfer_state": "Error", "job_state": "ACTIVE", "job_m_replica": False},
        "finished",
    ),
    "a hop": ({"t_final_transfer_state": "Error", "job_state": "FAILED", "job_multihop": True}, "finished"),
    "cancelled": ({"t_final_transfer_state": "Abort"}, "finished"),
}


@pytest.mark.parametrize("case", COMPLETE)
def test_complete(case: str) -> None:
    changes, state = COMPLETE[case]
    event = read_event(told("complete", **changes))
    assert (event and event.state) == state


STATES = {
    "ACTIVE": "active", "ARCHIVING": "active", "FINISHED": "finished", "FAILED": "finished", "CANCELED": "finished",
    "SUBMITTED": None, "READY": None, "STAGING": None, "NOT_USED": None, "TOKEN_PREP": None, "STARTED": "active",
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_states(name: str) -> None:
    event = read_event(told("state", file_state=name, job_state="FINISHED"))
    assert (event and event.state) == STATES[name]


def event_of(body: bytes) -> FTSEvent:
    event = read_event(body)
    assert event is not None
    return event


@pytest.mark.parametrize("tail", [b"", b" ", b"\x04", b" \n", b"\x00"])
def test_start_names_the_file(tail: bytes) -> None:
    event = event_of(told("start") + tail)
    assert event.state == "active"
    assert str(event.job_id) == "c3b5e6a2-9d1e-11f0-8d43-fa163e0a1b2c"
    assert event.file_id == 4400012345
    assert event.external_id == "8f1b0c2d3e4f5a6b7c8d9e0f1a2b3c4d"
    assert event.vo


@pytest.mark.parametrize("metadata", [None, "", "text", [], {"request_id": None}, {}])
def test_a_file_without_metadata(metadata: object) -> None:
    assert event_of(told("complete", file_metadata=metadata)).external_id == ""


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"t_final_transfer_state":"Ok"}',
        b"\xff\xfe",
        b'{"file_state":"ACTIVE","job_id":"x","file_id":1}',
        b"[" * 50_000,
    ],
)
def test_what_is_no_message(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="monitoring message"):
        read_event(body)


@pytest.mark.parametrize("state", ["ACTIVE", "SUBMITTED", "READY", "STAGING"])
def test_a_failed_file_of_a_job_that_goes_on_ends_unless_it_has_other_sources(state: str) -> None:
    event = event_of(told("state", file_state="FAILED", job_state=state))
    assert (event.state, event.unless_others) == ("finished", True)


@pytest.mark.parametrize("state", ["FAILED", "FINISHED", "FINISHEDDIRTY", "CANCELED"])
def test_a_failed_file_of_a_job_that_has_ended_ends(state: str) -> None:
    assert not event_of(told("state", file_state="FAILED", job_state=state)).unless_others


def test_a_failed_hop_ends_the_later_ones() -> None:
    assert event_of(
        told("complete", t_final_transfer_state="Error", job_state="FAILED", job_multihop=True)
    ).ends_chain
    assert not event_of(told("complete", job_multihop=True)).ends_chain


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ('{"request_id": "0f0e0d0c0b0a09080706050403020100", "name": "a"b"}', "0f0e0d0c0b0a09080706050403020100"),
        ('{"request_id":"x"}', "x"), ("no metadata", ""), ({"request_id": "y"}, "y"),
    ],
)  # fmt: skip
def test_metadata_that_fts_could_not_read(metadata: object, found: str) -> None:
    assert event_of(told("complete", file_metadata=metadata)).external_id == found
