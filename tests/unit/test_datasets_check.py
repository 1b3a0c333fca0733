"""The check of data files: every fault of the catalogue, in bounded memory and with sentences in both languages."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.bad_rows import (
    ASSISTANT,
    CASES,
    GOOD,
    PIXEL,
    SYSTEM,
    USER,
    Case,
    call,
    chat,
    file,
    function,
    image,
    preference,
    reply,
)
from tests.unit.bad_rows import line as one_line
from tunewright.datasets.checking import scan
from tunewright.datasets.checking.check import check
from tunewright.datasets.report import MAX_PROBLEMS, Report


class Limits(NamedTuple):
    max_line_bytes: int = 4 * 2**20
    min_training_rows: int = 1


LIMITS = Limits()


def checked(tmp_path: Path, data: bytes, purpose: str = "fine-tune", limits: Limits = LIMITS) -> Report:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    return check(path, purpose, limits)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_fault_of_the_catalogue(case: Case, tmp_path: Path) -> None:
    report = checked(tmp_path, case.data, case.purpose)
    if case.severity == "none":
        assert case.code not in report.counts
        assert report.ok, report.problems
        return
    found = [p for p in report.problems if p.code == case.code]
    assert found, (report.counts, report.problems)
    assert {p.severity for p in found} == {case.severity}
    assert report.ok == (case.severity == "warning")
    if case.line is not None:
        assert found[0].line == case.line
    if case.pointer is not None:
        assert case.pointer in [p.pointer for p in found]
    for problem in report.problems:
        english, chinese = problem.text("en"), problem.text("zh")
        assert english != chinese, f"no Chinese for {problem.message}"
        assert len(english) < 300
        if problem.line is not None:
            assert f"line {problem.line}" in english and str(problem.line) in chinese


def test_good_files_have_their_kind_and_no_problem(tmp_path: Path) -> None:
    answer_in_picture = {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "Who?"}]}
    top = {"messages": [USER], "preferred_completion": [ASSISTANT]}
    for data, kind in (
        (chat(SYSTEM, USER, ASSISTANT), "chat"),
        (chat(parts, {**ASSISTANT, "reasoning_content": "...", "name": "a"}), "chat"),
        (function(USER, call(), reply(), ASSISTANT), "function"),
        (image(f"data:image/jpeg;base64,{PIXEL}"), "image_understanding"),
        (file({"messages": [SYSTEM, USER, answer_in_picture]}), "image_generation"),
        (preference(), "preference"),
        (file({**top, "non_preferred_completion": [{**ASSISTANT, "content": "Rome."}]}), "preference"),
    ):
        report = checked(tmp_path, data)
        assert (report.kind, report.counts) == (kind, {"few_rows": 1}), report.problems
        assert report.rows == data.count(b"\n")


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_an_image_has_no_characters_and_no_language(tmp_path: Path, role: str) -> None:
    shown = {"type": "image_url", "image_url": {"url": PIXEL}}
    turns = {"user": [{"type": "text", "text": "图里是什么"}], "assistant": [{"type": "text", "text": "一个点"}]}
    turns[role] = [shown, *turns[role], *([shown] if role == "user" else [])]
    report = checked(tmp_path, file({"messages": [{"role": name, "content": parts} for name, parts in turns.items()]}))
    assert report.ok, report.problems
    found = report.statistics
    assert (found["characters"], found["characters_per_row"]["max"], found["images"]) == (8, 8, 1 + (role == "user"))
    assert found["trained_characters_per_row"]["max"] == 3
    assert found["languages"]["shares"] == {"zh": 1.0}


def test_rows_with_other_images_are_other_rows(tmp_path: Path) -> None:
    other = "data:image/png;base64," + PIXEL
    report = checked(tmp_path, image(PIXEL) + image(other) + image(PIXEL))
    assert report.counts == {"few_rows": 1, "duplicate_row": 1}
    assert [problem.line for problem in report.problems if problem.code == "duplicate_row"] == [3]


def test_a_file_is_what_its_rows_agree_on(tmp_path: Path) -> None:
    with_tools = function(USER, call(), reply(), ASSISTANT)
    assert checked(tmp_path, with_tools + file(GOOD)).kind == "function"
    assert checked(tmp_path, image(PIXEL) + file(GOOD)).kind == "image_understanding"
    report = checked(tmp_path, with_tools + image(PIXEL) + image(PIXEL, "assistant"))
    assert report.counts["wrong_format"] == 2


def test_sentences_name_line_and_field_and_suggest(tmp_path: Path) -> None:
    data = file(*[GOOD] * 16) + file({"messages": [USER, ASSISTANT, {"role": "assistnat", "content": "x"}]})
    problem = checked(tmp_path, data).problems[0]
    assert problem.text() == (
        'line 17, messages[2].role is "assistnat"; allowed: system, user, assistant, tool. Did you mean "assistant"?'
    )
    assert problem.text("zh") == (
        '第 17 行，messages[2].role 是 "assistnat"；允许的值：system, user, assistant, tool。是否想写“assistant”？'
    )
    assert problem.byte_offset == data.index(b'{"messages"', 16 * len(one_line(GOOD)))
    report = checked(tmp_path, chat({**USER, "role": "human"}, ASSISTANT))
    assert report.problems[0].values["suggestion"] == "user"
    long = checked(tmp_path, chat({**USER, "role": "x" * 10_000}, ASSISTANT)).problems[0]
    assert "x" * 40 + "…" in long.text() and "x" * 41 not in long.text()


def test_bytes_that_are_no_utf8_are_found_in_the_file(tmp_path: Path) -> None:
    gbk = '{"messages": "你好，这是训练数据"}'.encode("gbk")
    problem = checked(tmp_path, one_line(GOOD) + gbk).problems[0]
    assert problem.byte_offset == problem.values["offset"] == len(one_line(GOOD)) + gbk.index(b"\xc4")
    assert "GB18030" in problem.text()
    other = checked(tmp_path, one_line(GOOD) + b'{"a": "\xff"}').problems[0]
    assert "GB18030" not in other.text()


def test_tables_are_pointed_to_the_command_that_converts_them(tmp_path: Path) -> None:
    for data, name in ((b"prompt,answer\na,b\n", "CSV"), (b"prompt\tanswer\na\tb\n", "TSV")):
        problem = checked(tmp_path, data).problems[0]
        assert problem.code == "unsupported_format"
        assert f"is {name}, not JSONL" in problem.text() and "tunewright datasets convert" in problem.text("zh")
    assert "datasets convert" not in checked(tmp_path, b"<html></html>").problems[0].text()


def test_a_secret_is_never_repeated(tmp_path: Path) -> None:
    secret = "sk-" + "Zx9" * 10
    report = checked(tmp_path, chat(USER, {**ASSISTANT, "content": f"use {secret} please"}))
    assert report.counts["possible_secret"] == 1
    assert secret not in json.dumps([p.text() + str(p.values) for p in report.problems])


def test_minimum_of_rows_is_a_setting(tmp_path: Path) -> None:
    limits = Limits(max_line_bytes=1000, min_training_rows=10)
    report = checked(tmp_path, file(*[GOOD] * 9), limits=limits)
    assert [p.code for p in report.problems if p.severity == "error"] == ["too_few_examples"]
    assert report.problems[0].values == {"found": 9, "needed": 10}
    assert checked(tmp_path, file(*[GOOD] * 10), limits=limits).ok


def test_a_file_of_too_many_lines_is_refused_at_the_first_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MAX_ROWS", 3)
    report = checked(tmp_path, file(*[GOOD] * 9))
    assert report.counts["too_many_examples"] == 1 and report.rows == 3
    assert checked(tmp_path, file(*[GOOD] * 3)).ok


def test_a_line_at_the_limit_passes_and_one_over_it_does_not(tmp_path: Path) -> None:
    row = one_line(GOOD)
    limits = Limits(max_line_bytes=len(row) - 1, min_training_rows=1)
    assert checked(tmp_path, row * 2, limits=limits).ok
    longer = Limits(max_line_bytes=len(row) - 2, min_training_rows=1)
    assert checked(tmp_path, row + b"{}\n" + row, limits=longer).counts["line_too_long"] == 2


def test_errors_on_every_line_stay_few_and_are_all_counted(tmp_path: Path) -> None:
    bad = one_line({"messages": [{**USER, "role": "human"}, {**ASSISTANT, "extra": 1}]})
    report = checked(tmp_path, bad * 20_000)
    assert report.counts["invalid_role"] == report.counts["unknown_field"] == report.rows == 20_000
    assert len(report.problems) == MAX_PROBLEMS
    assert [p.line for p in report.problems] == list(range(1, 101)), "warnings do not push errors out"


def test_many_kinds_of_warnings_leave_room_for_each_other(tmp_path: Path) -> None:
    report = checked(tmp_path, file(*[GOOD] * 50, {**GOOD, "x": 1}))
    assert report.counts["duplicate_row"] == 49
    assert [p.code for p in report.problems] == ["duplicate_row"] * 10 + ["unknown_field", "duplicates", "few_rows"]


_CHILD = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from tunewright.datasets.checking.check import check
limits = SimpleNamespace(max_line_bytes=4 * 2**20, min_training_rows=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = check(Path(sys.argv[1]), "fine-tune", limits)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sorted(report.counts))
"""


@pytest.mark.parametrize("newline_at_end", [True, False])
def test_a_line_of_half_a_gib_takes_little_memory(tmp_path: Path, newline_at_end: bool) -> None:
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"messages": "')
        stream.truncate(2**29)  # a hole of NULs: no disk is used
        if newline_at_end:
            stream.seek(0, 2)
            stream.write(b"\n" + one_line(GOOD))
    child = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=True)
    grown_kib, counts = child.stdout.split(maxsplit=1)
    assert "line_too_long" in counts
    assert int(grown_kib) < 60 * 1024


def test_patterns_are_linear(tmp_path: Path) -> None:
    texts = ["<|" * 400_000, "sk-" * 300_000, "a" * 10**6 + "\u0301" * 8, "0af9" * 250_000, "-----BEGIN " * 90_000]
    start = time.perf_counter()
    for text in texts:
        checked(tmp_path, chat({**USER, "content": text}, ASSISTANT))
        checked(tmp_path, image(text[:1000] + "A" * 10**6))
    assert time.perf_counter() - start < 20


_PARTS = st.sampled_from(
    (
        *(
            '{"messages": [',
            '{"role": "user", "content": "x"}',
            '{"role": "assistant", "content": "y"}',
            ",",
            "]}",
            "\n",
        ),
        *(
            "\r\n",
            "\r",
            "\x00",
            "\ufeff",
            "[",
            "{",
            "null",
            '"tools": [{}]',
            '"weight": true',
            '"content": [{}]',
            "汉字",
        ),
        *(
            '"tool_calls": [{"id": 1}]',
            '{"role": "tool"}',
            '"preferred_output": [1]',
            '{"input": {}}',
            '"image_url": 5',
        ),
    )
)
_KEYS = (
    *("messages", "role", "content", "tools", "tool_calls", "function", "name", "arguments", "id", "type", "weight"),
    *("input", "preferred_output", "non_preferred_output", "image_url", "url", "text", "parameters", "$ref"),
    *("required", "tool_call_id", "properties"),
)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(["", " ", "user", "assistant", "tool", "image_url", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(_KEYS),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)
_ROWS = st.lists(_JSON.map(lambda value: json.dumps(value)), max_size=3).map(lambda rows: "\n".join(rows).encode())
_ANY = st.binary(max_size=60) | st.lists(_PARTS, max_size=15).map(lambda parts: "".join(parts).encode()) | _ROWS


@settings(max_examples=400)
@given(_ANY, st.sampled_from(["fine-tune", "batch", "fine-tune-vision-cogview"]))
def test_any_bytes_give_a_report(tmp_path: Path, data: bytes, purpose: str) -> None:
    report = checked(tmp_path, data, purpose)
    for problem in report.problems:
        assert problem.text("en") and problem.text("zh")
    assert report.errors + report.warnings == sum(report.counts.values())
    assert report.ok or report.problems[0].severity == "error"


@settings(max_examples=200)
@given(
    st.lists(st.lists(_JSON, max_size=4).map(lambda messages: {"messages": [USER, *messages, ASSISTANT]}), max_size=2)
)
def test_any_messages_give_a_report(tmp_path: Path, rows: list[object]) -> None:
    report = checked(tmp_path, file(*rows))
    assert report.rows == len(rows)
