"""Rows that occur again: duplicates, contradictions and leaks, among few lines and among many, in bounded memory."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.bad_rows import ASSISTANT, GOOD, SYSTEM, TOOL, USER, call, file, image, line, preference, reply
from tunewright.datasets.checking import fingerprints
from tunewright.datasets.checking.check import check
from tunewright.datasets.checking.fingerprints import Again, Fingerprints, Known
from tunewright.datasets.report import Patch, Report


class Limits(NamedTuple):
    max_line_bytes: int = 4 * 2**20
    min_training_rows: int = 1


def checked(tmp_path: Path, data: bytes, against: bytes | None = None) -> Report:
    path, training = tmp_path / "data.jsonl", tmp_path / "training.jsonl"
    path.write_bytes(data)
    if against is not None:
        training.write_bytes(against)
    return check(path, "fine-tune", Limits(), against=None if against is None else training)


def told(report: Report, code: str) -> list[tuple[int | None, int | None]]:
    """(line, the earlier line) of each problem of this code."""
    return [(problem.line, problem.values.get("first")) for problem in report.problems if problem.code == code]


def answered(text: str, *before: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*(before or (USER,)), {**ASSISTANT, "content": text}]}


def test_a_repeated_row_names_the_first_and_can_be_dropped(tmp_path: Path) -> None:
    data = file(GOOD, answered("Rome.", SYSTEM, USER)) + b"\n" + file(GOOD, answered("x", USER, ASSISTANT, USER), GOOD)
    report = checked(tmp_path, data)
    assert told(report, "duplicate_row") == [(4, 1), (6, 1)]
    first = next(problem for problem in report.problems if problem.code == "duplicate_row")
    assert first.patch == Patch(drop=True) and report.patchable["duplicate_row"] == 2
    assert first.byte_offset == data.index(line(GOOD), 1)
    assert first.text() == "line 4 repeats line 1" and "第 4 行" in first.text("zh")
    assert "duplicates" not in report.counts


def test_a_file_of_mostly_repeated_rows_is_told_so(tmp_path: Path) -> None:
    report = checked(tmp_path, file(GOOD, GOOD, GOOD))
    problem = next(problem for problem in report.problems if problem.code == "duplicates")
    assert (problem.line, problem.values) == (None, {"found": 2, "rows": 3})


def test_rows_of_one_prompt_and_two_answers_contradict(tmp_path: Path) -> None:
    again = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    other = {"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "content": "Rome."}]}
    spaced = json.dumps(answered("Rome."), separators=(", ", " : ")).encode() + b"\n"
    parts = {
        "messages": [{**USER, "content": [{"type": "text", "text": USER["content"]}]}, {**ASSISTANT, "content": "x"}]
    }
    report = checked(tmp_path, file(GOOD, again, other, answered("Paris.", SYSTEM, USER)) + spaced + file(parts, GOOD))
    assert told(report, "contradicting_row") == [(3, 2), (5, 1), (6, 1)]


@pytest.mark.parametrize(
    ("first", "second", "contradict"),
    [
        ({"messages": [USER, call()], "tools": [TOOL]}, {"messages": [USER, ASSISTANT], "tools": [TOOL]}, True),
        ({"messages": [USER, call()], "tools": [TOOL]}, {"messages": [USER, ASSISTANT]}, False),
        (
            {"messages": [USER, call(id="a")], "tools": [TOOL]},
            {"messages": [USER, call(id="b")], "tools": [TOOL]},
            False,
        ),
        (
            {"messages": [USER, call(), reply(), ASSISTANT], "tools": [TOOL]},
            {"messages": [USER, call('{"city": "Rome"}'), reply(), {**ASSISTANT, "content": "x"}], "tools": [TOOL]},
            False,
        ),
        (GOOD, {"messages": [USER, {**ASSISTANT, "reasoning_content": "hm"}]}, True),
        (GOOD, {"messages": [USER, {**ASSISTANT, "weight": 1}]}, False),
        (GOOD, {"messages": [USER, {**ASSISTANT, "content": ""}]}, False),  # an error: nothing to compare
    ],
)
def test_what_counts_as_prompt_and_answer(
    first: dict[str, Any], second: dict[str, Any], contradict: bool, tmp_path: Path
) -> None:
    assert ("contradicting_row" in checked(tmp_path, file(first, second)).counts) == contradict


def test_preferences_contradict_if_they_are_the_other_way_round(tmp_path: Path) -> None:
    swapped = json.loads(preference())
    swapped["preferred_output"], swapped["non_preferred_output"] = (
        swapped["non_preferred_output"],
        swapped["preferred_output"],
    )
    third = preference(non_preferred_output=[{"role": "assistant", "content": "Oslo."}])
    assert told(checked(tmp_path, preference() + third + line(swapped)), "contradicting_row") == [(3, 1)]


def test_images_tell_rows_apart(tmp_path: Path) -> None:
    pictures = [image("data:image/png;base64," + "A" * size) for size in (400, 800)]
    assert "contradicting_row" not in checked(tmp_path, b"".join(pictures)).counts


def test_rows_of_the_training_file_leak(tmp_path: Path) -> None:
    training = file(GOOD, answered("Rome.", SYSTEM, USER)) + b"broken\n" + file({"messages": []})
    validation = (
        file(answered("new"))
        + json.dumps(GOOD, separators=(",", ":")).encode()
        + b"\n"
        + file(answered("Rome.", SYSTEM, USER), {"messages": []}, answered("Rome."))
    )
    report = checked(tmp_path, validation, against=b"\xef\xbb\xbf" + training)
    assert [place for place, _ in told(report, "validation_leak")] == [2, 3], "and rows with errors teach nothing"
    overlap = next(problem for problem in report.problems if problem.code == "validation_overlap")
    assert overlap.values == {"found": 2, "rows": 5}
    assert "validation_leak" not in checked(tmp_path, validation).counts
    assert "validation_leak" not in checked(tmp_path, validation, against=b"").counts


def numbers(rows: list[tuple[int, int, int]]) -> Fingerprints:
    found = Fingerprints()
    for row, prompt, answer in rows:
        found.add(row, prompt, answer, 10)
    return found


_NUMBERS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), max_size=40)


@settings(max_examples=300)
@given(_NUMBERS, _NUMBERS)
def test_many_lines_are_compared_like_few(rows: list[tuple[int, int, int]], others: list[tuple[int, int, int]]) -> None:
    expected = [
        Again(i, first)
        for i, (row, _, _) in enumerate(rows)
        if row and (first := [each[0] for each in rows].index(row)) != i
    ]
    prompts = [prompt for _, prompt, _ in rows]
    contradicting = [
        Again(i, prompts.index(prompt))
        for i, (_, prompt, answer) in enumerate(rows)
        if prompt and answer != rows[prompts.index(prompt)][2]
    ]
    contents = {(prompt, answer) for _, prompt, answer in others if prompt}
    common = [i for i, (_, prompt, answer) in enumerate(rows) if (prompt, answer) in contents]
    with pytest.MonkeyPatch.context() as patch:
        for few, chunk in ((100, 100), (0, 100), (0, 3)):
            patch.setattr(fingerprints, "_FEW", few)
            patch.setattr(fingerprints, "_CHUNK", chunk)
            found = numbers(rows)
            assert list(fingerprints.duplicates(found)) == expected
            assert list(fingerprints.contradictions(found)) == contradicting
            assert [row.line_index for row in Known(numbers(others)).common(found)] == common


def test_offsets_come_from_lengths_even_of_huge_lines() -> None:
    found = Fingerprints()
    for length in (5, 2**32 + 7, 3, 1):
        found.add(1, 0, 0, length)
    rows = [Again(0, 0), Again(2, 0), Again(3, 0)]
    assert [offset for _, offset in fingerprints.with_offsets(found, 3, rows)] == [3, 2**32 + 15, 2**32 + 18]


_CHILD = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
import numpy
from tunewright.datasets.checking.check import check
limits = SimpleNamespace(max_line_bytes=4 * 2**20, min_training_rows=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = Path(sys.argv[1])
report = check(path, "fine-tune", limits, against=path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, report.rows, report.counts["duplicate_row"])
"""


def test_a_line_takes_few_bytes_of_memory(tmp_path: Path) -> None:
    """300,000 lines: 24 bytes each, 8 of the training file and the search among them; a set of ints would take 25 MB more."""
    path = tmp_path / "data.jsonl"
    rng = random.Random(1)
    with path.open("wb") as stream:
        for _ in range(300_000):
            number = rng.randrange(250_000)
            stream.write(b'{"messages":[{"role":"user","content":"%d"},{"role":"assistant","content":"x"}]}\n' % number)
    child = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=True)
    grown_kib, rows, repeated = map(int, child.stdout.split())
    assert rows == 300_000 and 100_000 < repeated < 150_000
    assert grown_kib < 45 * 1024
