"""FTS jobs from public bug reports, and their siblings: what FTS does with a job is what its tokens are for."""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minter.contract.messages import Answer, FillRequest, Slot
from minter.errors import InvalidRequest
from minter.fts.jobs import fill_job, from_fill
from minter.policy.clients import Bans, Client
from minter.policy.plans import Decision
from minter.policy.requests import Request
from minter.policy.routes import FTSInstance
from minter.policy.transfers import Policy
from minter.storages.directory import Directory, Storage
from minter.tasks.answers import answer
from minter.tokens.clock import new_uuid7, now
from minter.tokens.outcomes import Issued, Outcome, Submission

CASES = Path(__file__).parents[1] / "vectors" / "fts-cases"
SETTINGS = tomllib.loads((CASES / "settings.toml").read_text())
STORAGES = [msgspec.convert(s, Storage) for s in SETTINGS["storages"]]
POLICY = Policy(
    {"norvo": Directory(STORAGES)}, fts=[msgspec.convert(f, FTSInstance) for f in SETTINGS["fts"]]
)
CLIENT = Client(client_id=1, name="mover", vo="norvo", sub="s")
HOUR = 3600
DISK = "davs://disk.nordmark.example:2880/pnfs/nordmark/norvo/disk/f"
OTHER = "davs://se.sudmark.example:1094/store/norvo/f"
TAPE = "davs://tape.nordmark.example:2880/pnfs/nordmark/norvo/tape/f"
UNKNOWN = "davs://dav.ostmark.example:443/data/norvo/f"


def case(name: str) -> Any:
    (path,) = CASES.glob(f"{name.partition('/')[0]}*/{name.partition('/')[2]}")
    return json.loads(path.read_text())


def job(
    sources: Iterable[str] = (DISK,),
    destinations: Iterable[str] = (OTHER,),
    files: list[dict[str, Any]] | None = None,
    **params: Any,
) -> dict[str, Any]:
    files = files or [{"sources": list(sources), "destinations": list(destinations)}]
    return {"files": files, "params": params}


def decide(content: dict[str, Any]) -> tuple[Request, Decision]:
    request = from_fill(FillRequest(request_id=new_uuid7(), job=content))
    return request, POLICY.decide(request, CLIENT, Bans())


def filled(content: dict[str, Any], later: int = 0) -> Answer:
    """What a job's answer is, as if its tokens had been signed, and asked again `later` seconds after."""
    request, decision = decide(content)
    at = int(now().timestamp())
    outcome = Outcome(Submission(request, "mover"), [], [], decision=decision)
    for n, planned in enumerate(decision.planned_tokens):
        exp = at - 60 + planned.lifetime.seconds
        slot = planned.need.slot
        outcome.issued.append(
            Issued(slot, planned.plan.area.storage, planned.scope, str(n), exp, b"t", iat=at - 60)
        )
    outcome.refusals = decision.records()
    from datetime import UTC, datetime

    return answer(outcome, datetime.fromtimestamp(at + later, UTC))


def hours(content: dict[str, Any], later: int = 0) -> int:
    made = filled(content, later).job
    assert made is not None
    found: int = made["params"]["max_time_in_queue"]
    return found


def scopes(content: dict[str, Any]) -> dict[tuple[int, str, int], set[str]]:
    _, decision = decide(content)
    return {
        (p.need.file, p.need.side, p.need.index): {w.partition(":")[0] for w in p.scope.split(" ")}
        for p in decision.planned_tokens
        if p.need.side != "service"
    }


def reasons(content: dict[str, Any]) -> list[str]:
    return [r.error.reason for r in decide(content)[1].refused]


# ── time ─────────────────────────────────────────────────────────────────────────────────────


def test_fts_may_stage_for_as_long_as_it_was_told() -> None:
    assert 73 <= hours(case("07/job.json")) <= 191
    assert 168 <= hours(case("07/job-two-days.json")) <= 191
    assert 168 < hours(case("07/job-seven-days.json")) <= 191
    notes = [n.text for n in filled(case("07/job-seven-days.json")).notes]
    assert any("raised" in n for n in notes)
    assert any("asked for 168" in n for n in notes)


def test_staging_that_no_token_covers_is_refused() -> None:
    _, decision = decide(case("07/job-6h-cap.json"))
    errors = {r.error.reason: r.error.message for r in decision.refused}
    assert "lifetime_not_allowed" in errors
    assert "staging (43200 s)" in errors["lifetime_not_allowed"]


@pytest.mark.parametrize(
    "params",
    [
        {"bring_online": 259200}, {"bring_online": "259200"}, {"bring_online": 259200.0}, {"bring_online": 259200.9},
    ],
)  # fmt: skip
def test_every_form_of_a_staging_time_counts(params: dict[str, Any]) -> None:
    assert hours(job((TAPE,), **params)) >= 73


def test_a_pin_lifetime_alone_stages_for_ftss_default() -> None:
    content = job((TAPE,), copy_pin_lifetime=3600)
    assert hours(content) > 168
    assert "storage.stage" in scopes(content)[0, "source", 0]
    assert any("copy_pin_lifetime" in n.text for n in filled(content).notes)


@pytest.mark.parametrize("text", ["72h", "30m", "1d"])
def test_a_staging_time_with_a_unit_is_not_set_for_fts(text: str) -> None:
    content = job((TAPE,), bring_online=text)
    assert scopes(content)[0, "source", 0] == {"storage.read"}
    assert any("without a unit" in n.text for n in filled(content).notes)


def test_a_destination_held_to_six_hours_is_refused_for_long_staging_too() -> None:
    content = job((TAPE,), (UNKNOWN,), bring_online=43200)
    assert "lifetime_not_allowed" in reasons(content)


def test_archiving_that_no_token_covers_is_refused() -> None:
    content = job((DISK,), (TAPE,), archive_timeout=8 * 86400)
    (message,) = {
        r.error.message for r in decide(content)[1].refused if r.error.reason == "lifetime_not_allowed"
    }
    assert "archiving" in message


@pytest.mark.parametrize("later", [0, 1, 60, 599])
@pytest.mark.parametrize(
    "content",
    [
        job(), job(max_time_in_queue=168), job(max_time_in_queue="1h"), job(max_time_in_queue="60m"),
        job((TAPE,), bring_online=604800, max_time_in_queue=168), job((UNKNOWN,)), job(max_time_in_queue=500),
    ],
)  # fmt: skip
def test_a_repetition_within_the_margin_gives_the_same_job(content: dict[str, Any], later: int) -> None:
    assert hours(content, later) == hours(content)


def test_a_much_later_repetition_counts_down_and_then_ends() -> None:
    assert hours(job((UNKNOWN,)), 2 * HOUR) < hours(job((UNKNOWN,)))
    error = filled(job((UNKNOWN,)), 6 * HOUR).error
    assert error is not None
    assert error["reason"] == "expired"


def test_a_clipped_life_is_told_in_the_answer() -> None:
    notes = [n for n in filled(job(max_time_in_queue=500)).notes if n.file == 0]
    assert {n.side for n in notes} == {"source", "destination"}
    assert all("clipped" in n.text for n in notes)


# ── per hop, per side ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["10/job.json", "10/job-prestage.json"])
def test_only_the_first_hop_stages(name: str) -> None:
    found = scopes(case(name))
    staged = {slot for slot, held in found.items() if "storage.stage" in held}
    assert staged
    assert {file for file, _, _ in staged} == {0}
    assert all(
        held == {"storage.read"} for (file, side, _), held in found.items() if file and side == "source"
    )


def test_every_file_of_an_ordinary_job_stages() -> None:
    files = [{"sources": [TAPE + n], "destinations": [OTHER + n]} for n in "ab"]
    found = scopes(job(files=files, bring_online=3600))
    assert all("storage.stage" in found[n, "source", 0] for n in (0, 1))


@pytest.mark.parametrize("hops", [2, 3])
@pytest.mark.parametrize("flag", [True, 1, "Y", "yes"])
def test_flags_of_a_chain(flag: object, hops: int) -> None:
    files = [{"sources": [TAPE + str(n)], "destinations": [TAPE + str(n + 1)]} for n in range(hops)]
    found = scopes(
        job(files=files, multihop=flag, overwrite_hop=True, archive_timeout=3600, bring_online=3600)
    )
    written = [found[n, "destination", 0] for n in range(hops)]
    assert all("storage.modify" in held for held in written[:-1])
    assert "storage.modify" not in written[-1]
    assert [n for n in range(hops) if "storage.stage" in found[n, "source", 0]] == [0]


def test_a_pending_tape_copy_is_overwritten_on_the_last_hop_only() -> None:
    files = [
        {"sources": [TAPE + "0"], "destinations": [TAPE + "1"]},
        {"sources": [TAPE + "1"], "destinations": [TAPE + "2"]},
    ]
    found = scopes(job(files=files, multihop=True, overwrite_when_only_on_disk=True, archive_timeout=3600))
    assert "storage.modify" not in found[0, "destination", 0]
    assert "storage.modify" in found[1, "destination", 0]


def test_archiving_is_watched_and_a_report_asks_where_the_file_is() -> None:
    assert "storage.create" in scopes(case("22/job.json"))[0, "destination", 0]
    # dCache of unknown version knows no storage.poll: asking takes read there.
    assert scopes(job((DISK,), (TAPE,), dst_file_report=True))[0, "destination", 0] == {
        "storage.create",
        "storage.read",
    }
    assert "storage.read" in scopes(case("22/job.json"))[0, "destination", 0]
    # A disk that cannot be polled by token gets the copy all the same; tape that cannot is refused.
    assert scopes(job(dst_file_report=True))[0, "destination", 0] == {"storage.modify"}
    assert "operation_not_allowed" in reasons(job(archive_timeout=3600))


# ── one file twice ───────────────────────────────────────────────────────────────────────────


def test_a_file_that_is_its_own_destination_is_only_polled_or_staged() -> None:
    assert set(map(frozenset, scopes(case("21/archive-monitoring.json")).values())) <= {
        frozenset({"storage.poll"}), frozenset({"storage.read"}),
    }  # fmt: skip
    assert reasons(case("21/nothing-asked.json")).count("invalid_request") == 2
    assert not scopes(case("21/nothing-asked.json"))
    assert scopes(job((TAPE,), (TAPE,), bring_online=3600)) == {
        (0, "source", 0): {"storage.stage"}, (0, "destination", 0): {"storage.stage"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "again",
    [
        DISK, DISK.replace("davs", "https"), DISK.replace("davs", "DAVS"), DISK.replace("disk.nord", "DISK.Nord"),
        DISK.replace("/norvo/disk/", "/norvo//disk/"), DISK + "?copy_mode=pull",
    ],
)  # fmt: skip
@pytest.mark.parametrize("params", [{"overwrite": True}, {"overwrite": False}, {"retry": 3}])
def test_no_token_lets_fts_delete_the_only_copy(again: str, params: dict[str, Any]) -> None:
    content = job((DISK,), (again,), **params)
    assert not scopes(content)
    assert "invalid_request" in reasons(content)
    both = job((DISK,), (again,), overwrite=True)
    assert not scopes(both)


def test_of_several_sources_only_the_destination_itself_is_refused() -> None:
    content = job((TAPE, DISK), (DISK,), overwrite=True)
    assert set(scopes(content)) == {(0, "source", 0), (0, "destination", 0)}
    assert reasons(content) == ["invalid_request"]


# ── values in every form that FTS takes ──────────────────────────────────────────────────────


def test_flags_and_floats() -> None:
    request, decision = decide(case("23/job.json"))
    assert request.files[0].retries == 3
    assert not decision.refused


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("1048576", 1048576), ("1e6", 1000000), (" 5 ", 5), (1.5, 1), (0, None), (-5, None), (None, None),
        ("nan", None), ("inf", None), (2**63, None), (2**53 + 1, 2**53 + 1), (True, None),
    ],
)  # fmt: skip
def test_sizes(value: object, size: int | None) -> None:
    files = [{"sources": [DISK], "destinations": [OTHER], "filesize": value}]
    assert from_fill(FillRequest(request_id=new_uuid7(), job=job(files=files))).files[0].size == size


def test_a_size_as_text_fills_the_job() -> None:
    assert filled(case("05/job.json")).job is not None


@pytest.mark.parametrize("value", ["abc", "", [1], {}])
def test_what_is_no_size_is_refused_with_its_place(value: object) -> None:
    files = [{"sources": [DISK], "destinations": [OTHER], "filesize": value}]
    with pytest.raises(InvalidRequest, match=r"files\[0\].filesize"):
        from_fill(FillRequest(request_id=new_uuid7(), job=job(files=files)))


@pytest.mark.parametrize("value", [True, "Y", "yes", 1, 1.0])
def test_session_reuse_is_switched_off_and_told(value: object) -> None:
    done = filled(job(reuse=value))
    assert done.job is not None
    assert done.job["params"]["reuse"] is False
    assert any("reuse" in n.text for n in done.notes)


@pytest.mark.parametrize("value", [False, "N", "true", 0, None, ""])
def test_what_fts_does_not_take_for_reuse_is_no_matter(value: object) -> None:
    assert not any("reuse" in n.text for n in filled(job(reuse=value)).notes)


def test_files_in_the_spelling_of_the_command_line() -> None:
    with pytest.raises(InvalidRequest, match="`Files`"):
        decide(case("24/bulk.json"))


# ── URLs that FTS changes or cannot store ────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        DISK + " ", " " + DISK, DISK + "\n", DISK + "\u00a0", DISK + "?", DISK + "#", DISK + "?#",
        DISK + "a\tb", DISK + "日", DISK + "e\u0301",
    ],
)  # fmt: skip
@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_url_that_fts_would_not_keep_is_refused_alone(url: str, side: str) -> None:
    good = {"sources": [DISK + "2"], "destinations": [OTHER + "2"]}
    bad = {"sources": [DISK], "destinations": [OTHER]} | {f"{side}s": [url]}
    content = job(files=[good, bad])
    assert {file for file, _, _ in scopes(content)} == {0}
    assert reasons(content)[0] in ("invalid_path", "unknown_storage")
    assert "FTS" in decide(content)[1].refused[0].error.message


@pytest.mark.parametrize(
    "url", [DISK + "ü", DISK.replace("davs", "DAVS"), DISK + "a#b", DISK + "?copy_mode=pull"]
)
def test_a_url_that_fts_keeps_is_filled(url: str) -> None:
    assert (0, "source", 0) in scopes(job((url,)))


def test_fill_job_replaces_tokens_and_keeps_the_rest() -> None:
    content = job() | {"x": 1}
    content["files"][0]["source_tokens"] = ["old"]
    made = fill_job(content, {Slot(0, "source", 0): "s", Slot(0, "destination", 0): "d"}, [], 3)
    assert made is not None
    assert made["files"][0]["source_tokens"] == ["s"]
    assert made["x"] == 1
    assert made["params"]["max_time_in_queue"] == 3
