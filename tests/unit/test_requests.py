import json
import uuid
from typing import Any

import jsonschema
import msgspec
import pytest
import uuid_utils

from minter.cli.demo import read_jobs
from minter.contract.messages import (
    MAX_BODY_BYTES,
    Answer,
    FileRequest,
    FillRequest,
    MintRequest,
    RefusedNeed,
    Side,
    Slot,
    TokenAnswer,
)
from minter.errors import BY_REASON, Banned, InvalidRequest, ServerError, from_dict
from minter.fts.jobs import decode_fill, fill_job
from minter.policy.requests import check_request_id, decode_mint
from minter.tasks.answers import failure, parts
from schemas.__main__ import generate
from tests.conftest import EXAMPLES, ROOT

ID = str(uuid_utils.uuid7())
URL = "davs://se.example.org/data/f"
VALID = {"request_id": ID, "files": [{"sources": [URL]}]}
JOB = {"files": [{"sources": [URL], "destinations": [URL + "2"]}], "params": {}}


def spoil(**changes: object) -> bytes:
    return json.dumps({**VALID, **changes}).encode()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"\xff\xfe", "schema"),
        (b"[]", "Expected `object`"),
        (spoil(request_id="x"), "`$.request_id`"),
        (spoil(request_id=None), "`$.request_id`"),
        (spoil(files=[]), "`$.files`"),
        (spoil(files=[{}]), "`$.files[0]`"),
        (spoil(files=[{"sources": [URL]}] * 2001), "`$.files`"),
        (spoil(files=[{"sources": [URL]}] * 100_000), "`$.files`"),
        (spoil(files=[{"sources": [""]}]), "`$.files[0].sources[0]`"),
        (spoil(files=[{"sources": ["x" * 8193]}]), "`$.files[0].sources[0]`"),
        (spoil(files=[{"sources": [1]}]), "`$.files[0].sources[0]`"),
        (spoil(files=[{"sources": [URL], "size": -1}]), "`$.files[0].size`"),
        (spoil(files=[{"sources": [URL], "wait_seconds": 10**12}]), "`$.files[0].wait_seconds`"),
        (
            spoil(files=[{"operations": [{"operation": "chmod", "url": URL}]}]),
            "`$.files[0].operations[0].operation`",
        ),
        (spoil(files=[{"sources": [URL], "extra": 1}]), "`extra`"),
        (spoil(extra=1), "`extra`"),
        (spoil(lifetime_seconds="1h"), "`$.lifetime_seconds`"),
        (b'{"a":' * 5000, "schema"),
        (b"x" * (MAX_BODY_BYTES + 1), "too large"),
    ],
    ids=lambda v: v if isinstance(v, str) else "body",  # bodies hold new ids, names of tests are fixed
)
def test_a_spoiled_request_is_refused_and_says_where(body: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_mint(body)
    assert why in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"files": []}, "$.job.files"),
        ({"files": None}, "$.job.files"),
        ({"files": [{"sources": [URL], "destinations": []}]}, "$.job.files[0].destinations"),
        ({"files": [{"sources": URL, "destinations": [URL]}]}, "$.job.files[0].sources"),
        ({"params": {"overwrite": "no"}}, "$.job.params.overwrite"),
        ({"params": {"multihop": "false"}}, "$.job.params.multihop"),
        ({"params": {"retry": "3s"}}, "$.job.params.retry"),
        (
            {"files": [{"sources": [URL], "destinations": [URL], "filesize": "big"}]},
            "$.job.files[0].filesize",
        ),
        ({"Files": [], "files": None}, "$.job.files"),
        ({"params": {"bring_online": "soon"}}, "$.job.params.bring_online"),
        ({"params": {"max_time_in_queue": 10**9}}, "$.job.params.max_time_in_queue"),
    ],
)
def test_a_spoiled_job_is_refused_and_says_where(change: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_fill(json.dumps({"request_id": ID, "job": {**JOB, **change}}).encode())
    assert where in caught.value.message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (168, 604800),
        ("2h", 7200),
        ("30m", 1800),
        ("90s", 90),
        ("1d", 86400),
        ("24", 86400),
        (24.0, 86400),
        (True, 3600),
        (" 2H ", 7200),
        (-1, None),
        ("-1", None),
        (None, None),
        ("", None),
        (0, None),
    ],
)
def test_ftss_durations(text: object, seconds: int | None) -> None:
    job = {**JOB, "params": {"max_time_in_queue": text}}
    request = decode_fill(msgspec.json.encode({"request_id": ID, "job": job}))
    assert request.files[0].needs[0].wait_seconds == seconds


@pytest.mark.parametrize(
    ("offset", "why"),
    [(-31 * 86400, "31.0 days old"), (301, "in the future"), (0, None), (-29 * 86400, None), (299, None)],
)
def test_ids_from_the_far_past_or_future(offset: int, why: str | None) -> None:
    now = 1_795_315_000.0
    id_ = uuid.UUID(int=(int((now + offset) * 1000) << 80) | 7 << 76 | 2 << 62)
    request = decode_mint(spoil(request_id=str(id_)))
    if why is None:
        check_request_id(request, now, 30 * 86400)
        return
    with pytest.raises(InvalidRequest, match=why):
        check_request_id(request, now, 30 * 86400)


def test_an_id_that_is_no_uuid7() -> None:
    with pytest.raises(InvalidRequest, match="not a UUIDv7"):
        check_request_id(decode_mint(spoil(request_id=str(uuid.uuid4()))), 0, 1)


def test_the_digest_is_of_the_content_not_of_its_spelling() -> None:
    one = decode_fill(json.dumps({"request_id": ID, "job": JOB}).encode())
    two = decode_fill(
        json.dumps({"job": dict(reversed(JOB.items())), "request_id": ID.upper()}, indent=3).encode()
    )
    assert one.digest == two.digest
    other = decode_fill(json.dumps({"request_id": ID, "job": {**JOB, "x": 1}}).encode())
    assert one.digest != other.digest


def test_every_job_that_rucio_wrote_is_read() -> None:
    jobs = list(read_jobs(EXAMPLES / "rucio-41.5/jobs"))
    requests = [decode_fill(msgspec.json.encode({"request_id": ID, "job": job})) for _, job in jobs]
    assert len(requests) == 107
    assert sum(len(r.files) for r in requests) == 1413
    assert all(f.external_id for r in requests for f in r.files)
    assert {r.on_behalf_of for r in requests} == {"panda", "root"}


SIDES: tuple[Side, ...] = ("source", "destination")


def test_filling_changes_nothing_but_tokens_and_two_params() -> None:
    for _, job in read_jobs(EXAMPLES / "rucio-41.5/jobs"):
        tokens = {
            Slot(n, s, i): f"t{n}{s}{i}"
            for n, file in enumerate(job["files"]) for s in SIDES for i, _ in enumerate(file[f"{s}s"])
        }  # fmt: skip
        filled = fill_job(job, tokens, [], 12)
        assert filled is not None
        assert filled["params"] == {**job["params"], "unmanaged_tokens": True, "max_time_in_queue": 12}
        for before, after in zip(job["files"], filled["files"], strict=True):
            assert len(after["source_tokens"]) == len(after["sources"])
            strip = {"source_tokens", "destination_tokens"}
            assert {k: v for k, v in after.items() if k not in strip} == {
                k: v for k, v in before.items() if k not in strip
            }


def test_refused_files_and_sources_are_left_out() -> None:
    job = {
        "files": [
            {"sources": [URL, URL + "b"], "destinations": [URL + "c"]},
            {"sources": [URL], "destinations": [URL]},
        ]
    }
    filled = fill_job(job, {Slot(0, "source", 1): "s", Slot(0, "destination", 0): "d"}, [1], 1)
    assert filled is not None
    assert filled["files"] == [
        {
            "sources": [URL + "b"],
            "destinations": [URL + "c"],
            "source_tokens": ["s"],
            "destination_tokens": ["d"],
        }
    ]
    assert fill_job(job, {}, [0, 1], 1) is None


def test_the_schemas_are_those_of_the_structs() -> None:
    for name, schema in generate().items():
        committed = json.loads((ROOT / "schemas" / name).read_text())
        assert committed == json.loads(json.dumps(schema)), f"run make schemas: {name}"
        jsonschema.Draft202012Validator.check_schema(schema)


def test_schemas_and_structs_agree_on_real_and_spoiled_requests() -> None:
    made = generate()
    mint, fill = (jsonschema.Draft202012Validator(made[f"{n}-request.json"]) for n in ("mint", "fill"))
    full = MintRequest(request_id=uuid.UUID(ID), files=(FileRequest(sources=(URL,), size=1),), activity="x")
    assert mint.is_valid(json.loads(msgspec.json.encode(full)))
    for _, job in read_jobs(EXAMPLES / "rucio-41.5/jobs"):
        assert fill.is_valid({"request_id": ID, "job": job})
    spoiled: dict[str, Any]
    for spoiled in (
        {"files": []},
        {"files": [{"sources": [1]}]},
        {"x": 1},
        {"lifetime_seconds": -1},
        {"request_id": 3},
    ):
        assert not mint.is_valid({**VALID, **spoiled})
        with pytest.raises(InvalidRequest):
            decode_mint(spoil(**spoiled))
    answer = jsonschema.Draft202012Validator(made["answer.json"])
    assert answer.is_valid(json.loads(msgspec.json.encode(failure(ID, Banned("no")))))


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_every_error_survives_the_wire(reason: str) -> None:
    error = BY_REASON[reason]("what is wrong", expected=1, got=2)
    wire = json.loads(json.dumps(error.as_dict()))
    jsonschema.validate(wire, generate()["error.json"])
    back = from_dict(wire)
    assert type(back) is type(error)
    assert (back.message, back.fields) == (error.message, error.fields)


def test_what_is_not_the_callers_stays_opaque() -> None:
    answer = failure(ID, BY_REASON["token_rejected"]("claims differ in scope"))
    assert answer.error is not None
    assert answer.error["reason"] == ServerError.reason
    assert "scope" not in answer.error["error_description"]


def test_a_large_answer_comes_in_parts_and_is_whole_again() -> None:
    tokens = [TokenAnswer(n, "source", 0, "SE", "storage.read:/f", "j", 1, "t" * 100) for n in range(100)]
    whole = Answer(request_id=ID, tokens=tokens)
    pieces = [msgspec.json.decode(p, type=Answer) for p in parts(whole, 5_000)]
    assert len(pieces) > 1
    assert {p.parts for p in pieces} == {len(pieces)}
    assert sorted(t.file for p in pieces for t in p.tokens) == list(range(100))
    assert all(len(p) <= 5_000 for p in parts(whole, 5_000))


def test_no_part_of_an_answer_is_larger_than_allowed_however_its_items_lie() -> None:
    """Large and small items in turn: equal counts of items would give parts of very different sizes."""
    tokens = [
        TokenAnswer(n, "source", 0, "SE", "s", "j", 1, "t" * (2_000 if n % 3 == 0 else 9)) for n in range(60)
    ]
    refusals = [
        RefusedNeed(n, "source", 0, {"reason": "banned", "error_description": "x" * 700})
        for n in range(60, 90)
    ]
    whole = Answer(request_id=ID, tokens=tokens, refusals=refusals)
    pieces = parts(whole, 4_000)
    assert max(map(len, pieces)) <= 4_000
    answers = [msgspec.json.decode(p, type=Answer) for p in pieces]
    assert [a.part for a in answers] == list(range(len(pieces)))
    assert [t.file for a in answers for t in a.tokens] == list(range(60))
    assert [r.file for a in answers for r in a.refusals] == list(range(60, 90))


def test_tokens_are_hidden_in_repr() -> None:
    answer = TokenAnswer(0, "source", 0, "SE", "s", "j", 1, "eyJsecret")
    assert "eyJsecret" not in repr(answer)
    assert "eyJsecret" not in repr(FillRequest(request_id=uuid.UUID(ID), job={}))
