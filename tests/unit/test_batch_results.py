"""The journal of a batch holds each answer once, whatever broke off."""

import json
from pathlib import Path

import pytest

from tunewright.batches.input_lines import MOST_ERRORS, check_lines, input_lines
from tunewright.batches.results import Journal


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_files_are_in_the_order_of_the_input(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    for line in (3, 1, 2):
        journal.add(line, line != 2, {"n": line, "text": "点\u2028"})
    journal.write_files(tmp_path / "good", tmp_path / "bad")
    journal.close()
    assert read(tmp_path / "good") == [{"n": 1, "text": "点\u2028"}, {"n": 3, "text": "点\u2028"}]
    assert read(tmp_path / "bad") == [{"n": 2, "text": "点\u2028"}]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_short_never_was(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    for line in (1, 2, 3):
        journal.add(line, True, {"n": line})
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    assert (2 in again, 3 in again, again.completed) == (True, False, 2)
    again.add(3, False, {"n": 3})
    again.close()
    whole = Journal(path)
    whole.close()
    assert (whole.completed, whole.failed, len(path.read_bytes().splitlines())) == (2, 1, 3)


def test_a_line_twice_counts_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.add(1, True, {"n": 1})
    journal.add(1, False, {"n": 2})
    journal.write_files(tmp_path / "good", tmp_path / "bad")
    journal.close()
    assert read(tmp_path / "good") == [{"n": 1}] and read(tmp_path / "bad") == []


def line(custom_id: str) -> dict[str, object]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v4/chat/completions", "body": {"model": "m"}}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_lines_may_be_spelled_by_either_dialect_and_blank(tmp_path: Path) -> None:
    path = write(tmp_path / "f", line("a"), "\n", "  \r\n", line("b") | {"url": "/v1/chat/completions"})
    assert check_lines(path, "/v1/chat/completions", 9, 999) == (2, [])
    assert [(each.number, each.custom_id) for each in input_lines(path, 999)] == [(1, "a"), (4, "b")]


def test_what_is_wrong_with_a_file_is_bounded(tmp_path: Path) -> None:
    many = write(tmp_path / "many", *({"custom_id": str(n)} for n in range(MOST_ERRORS)))
    total, errors = check_lines(many, "/v1/chat/completions", 10**6, 999)
    assert (total, len(errors), errors[-1].code) == (MOST_ERRORS, MOST_ERRORS, "more_errors")
    assert errors[-1].values["count"] == 3 * MOST_ERRORS - MOST_ERRORS + 1
    assert [e.code for e in check_lines(many, "/v1/chat/completions", 9, 999)[1]] == ["too_many_requests"]
    assert [e.code for e in check_lines(write(tmp_path / "none", "\n"), "/v1/chat/completions", 9, 999)[1]] == [
        "empty_file"
    ]
    for text, code in (("[1]\n", "invalid_json_line"), ("{\n", "invalid_json"), ("x" * 2000 + "\n", "line_too_long")):
        assert [e.code for e in check_lines(write(tmp_path / "x", text), "/v1/chat/completions", 9, 999)[1]] == [code]
