"""The object that shows a dataset: the same for the API and the command line."""

import json
from pathlib import Path

import msgspec

from tests.unit.bad_rows import ASSISTANT, GOOD, USER, file
from tunewright.datasets.checking.check import check
from tunewright.datasets.presentation import dataset_object, report_of, status_sentence, stored_object, summary_object
from tunewright.datasets.records import File
from tunewright.datasets.report import MAX_PROBLEMS, Report
from tunewright.settings import Settings

BOSS = {"messages": [{"role": "boss", "content": "x"}, ASSISTANT]}
CRLF = (json.dumps(GOOD) + "\r\n").encode()


def report_on(tmp_path: Path, data: bytes) -> Report:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    return check(path, "fine-tune", Settings(home=tmp_path))


def stored(report: Report, status: str = "error") -> File:
    return File(
        id="file-1", project_id="p", filename="rows.jsonl", purpose="fine-tune", size_bytes=report.size_bytes,
        sha256="0" * 64, created_at=7, status=status, kind=report.kind, rows=report.rows,
        report=msgspec.to_builtins(report), statistics={"turns": 3}, parent_id="file-0", version=2,
        origin={"made_by": "repair"},
    )  # fmt: skip


def test_a_report_without_a_stored_file(tmp_path: Path) -> None:
    report = report_on(tmp_path, file(GOOD, BOSS))
    shown = dataset_object(report, filename="rows.jsonl", purpose="fine-tune", language="zh")
    assert json.loads(msgspec.json.encode(shown)) == shown, "plain values only"
    assert (shown["id"], shown["object"], shown["kind"], shown["rows"]) == (None, "dataset", "chat", 2)
    assert (shown["status"], shown["bytes"], shown["version"]) == ("error", len(file(GOOD, BOSS)), 1)
    inner = shown["report"]
    assert (inner["errors"], inner["bad_rows"], inner["truncated"]) == (1, 1, False)
    assert inner["counts"] == {"few_rows": 1, "invalid_role": 1}
    problem = inner["problems"][0]
    assert (problem["line"], problem["pointer"], problem["severity"]) == (2, "/messages/0/role", "error")
    assert problem["message"] == problem["messages"]["zh"] != problem["messages"]["en"]
    assert problem["messages"]["en"].startswith('line 2, messages[0].role is "boss"')


def test_a_stored_file_adds_what_only_it_has(tmp_path: Path) -> None:
    report = report_on(tmp_path, file(GOOD, BOSS))
    kept = stored(report)
    shown = stored_object(kept, "en")
    assert shown["report"] == dataset_object(report, filename="x", purpose="fine-tune")["report"]
    assert (shown["id"], shown["created_at"], shown["version"], shown["parent_id"]) == ("file-1", 7, 2, "file-0")
    assert (shown["origin"], shown["statistics"]) == ({"made_by": "repair"}, {"turns": 3})
    assert shown["report"]["problems"][0]["message"].startswith("line 2")
    short = summary_object(kept)
    assert short.keys() < shown.keys()
    assert short["report"] == {name: shown["report"][name] for name in ("errors", "warnings", "bad_rows", "counts")}


def test_groups_count_all_and_lead_with_errors(tmp_path: Path) -> None:
    data = CRLF * 30 + file(*[{"messages": []}] * 3, *[BOSS] * (MAX_PROBLEMS + 5), {"nothing": 1})
    inner = dataset_object(report_on(tmp_path, data), filename="x", purpose="fine-tune")["report"]
    assert len(inner["problems"]) == MAX_PROBLEMS
    severities = [group["severity"] for group in inner["groups"]]
    assert severities == sorted(severities)
    by_code = {group["code"]: group for group in inner["groups"]}
    assert {code: group["count"] for code, group in by_code.items()} == inner["counts"]
    assert inner["groups"][0]["code"] == "invalid_role" and inner["groups"][0]["count"] == MAX_PROBLEMS + 5
    assert "missing_field" not in {problem["code"] for problem in inner["problems"]}
    assert by_code["missing_field"]["severity"] == "error", "a code that comes after the first hundred has its sentence"
    assert by_code["missing_field"]["message"] == "line 139, messages is missing"
    assert by_code["crlf"]["severity"] == "warning" and by_code["crlf"]["message"].startswith("line 1 ")


def test_the_status_of_a_file_in_a_sentence(tmp_path: Path) -> None:
    report = report_on(tmp_path, file(GOOD, BOSS, {"messages": [USER]}))
    assert status_sentence(stored(report, "processed"), "en") is None
    sentence = status_sentence(stored(report), "en")
    assert sentence is not None and sentence.startswith("2 of 3 rows can't be trained on (2 errors); the first: line 2")
    assert status_sentence(stored(report), "zh") != sentence
    assert "images" in (status_sentence(stored(report, "processing"), "en") or "")


def test_a_file_of_an_earlier_release_has_an_empty_report() -> None:
    old = File(
        id="file-1", project_id="p", filename="x", purpose="fine-tune", size_bytes=1, sha256="0", created_at=1,
        kind="chat", rows=9,
    )  # fmt: skip
    assert (report_of(old).kind, report_of(old).rows, stored_object(old, "en")["report"]["problems"]) == ("chat", 9, [])
