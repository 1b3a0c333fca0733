"""Whole files mended into new ones: what changes, what is copied, what is left, and in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings

from tests.unit.bad_rows import ASSISTANT, CASES, GOOD, USER, Case, file, reply
from tests.unit.bad_rows import line as one_line
from tests.unit.test_datasets_check import _ANY
from tests.unit.test_datasets_guide import repaired
from tunewright.datasets.mending.repair import Choice, Repaired, repair

HUMAN = {"messages": [{**USER, "role": "human"}, ASSISTANT]}
OTHER = {"messages": [USER, {**ASSISTANT, "content": "Not Rome."}]}
HOPELESS = {"messages": [USER]}


def chosen(*codes: str, lines: set[int] | None = None, drop: bool = False) -> Choice:
    return Choice(frozenset(codes) or None, None if lines is None else frozenset(lines), drop)


def test_good_lines_are_copied_byte_for_byte(tmp_path: Path) -> None:
    data = b'{"messages" : [{"content":"\\u4f60", "role": "user"},  {"role":"assistant","content":"x"}]}\n' + one_line(
        OTHER
    )
    assert repaired(tmp_path, data)[:2] == (data, Repaired(0, 0, 0))


def test_every_mend_is_made_until_none_is_left(tmp_path: Path) -> None:
    broken = one_line({**HUMAN, "mood": 1}).replace(b"}]", b",},]").replace(b"\n", b"\r\n")
    data = b"\xef\xbb\xbf" + broken + b"\n" + one_line(OTHER) + one_line(HOPELESS)
    result, counts, report = repaired(tmp_path, data)
    assert [json.loads(line) for line in result.splitlines()] == [GOOD, OTHER, HOPELESS]
    assert counts == Repaired(2, 1, 1)  # the mark and the first line; the blank line; the hopeless one
    assert report.counts == {"contradicting_row": 1, "few_rows": 1, "no_assistant_message": 1}


def test_only_what_is_chosen_is_mended(tmp_path: Path) -> None:
    data = file(HUMAN, {**OTHER, "mood": 1}, {"messages": [{**USER, "role": "User", "mood": 1}, OTHER["messages"][1]]})
    result, counts, _ = repaired(tmp_path, data, chosen("invalid_role", lines={2, 3}))
    rows = [json.loads(line) for line in result.splitlines()]
    assert rows == [HUMAN, {**OTHER, "mood": 1}, {"messages": [{**USER, "mood": 1}, OTHER["messages"][1]]}]
    assert counts == Repaired(1, 0, 1)
    assert repaired(tmp_path, data, chosen("crlf"))[:2] == (data, Repaired(0, 0, 2))


def test_bad_rows_are_left_out_if_told(tmp_path: Path) -> None:
    data = file(HOPELESS, GOOD, HUMAN, HOPELESS) + b"{broken\n"
    result, counts, report = repaired(tmp_path, data, chosen("invalid_role", drop=True))
    assert [json.loads(line) for line in result.splitlines()] == [GOOD, GOOD]
    assert counts == Repaired(1, 3, 0) and report.ok
    result, counts, _ = repaired(tmp_path, data, chosen("invalid_role", lines={1, 3}, drop=True))
    assert counts == Repaired(1, 1, 2) and result.count(b"\n") == 4


def test_repeated_rows_are_left_out_if_chosen(tmp_path: Path) -> None:
    data = file(GOOD, OTHER, GOOD, GOOD)
    assert repaired(tmp_path, data, chosen("duplicate_row", lines={3}))[:2] == (
        file(GOOD, OTHER, GOOD),
        Repaired(0, 1, 0),
    )
    assert repaired(tmp_path, data)[:2] == (file(GOOD, OTHER), Repaired(0, 2, 0))
    assert repaired(tmp_path, data, chosen("crlf"))[:2] == (data, Repaired(0, 0, 0))


def test_other_encodings_become_utf8(tmp_path: Path) -> None:
    row = {"messages": [{**USER, "content": "你好，世界。"}, ASSISTANT]}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    for data in (text.encode("utf-16"), text.encode("utf-16-le"), b"\xfe\xff" + text.encode("utf-16-be")):
        result, counts, report = repaired(tmp_path, data)
        assert (json.loads(result), counts, report.ok) == (row, Repaired(1, 0, 0), True)
    result, counts, report = repaired(tmp_path, text.encode("gb18030") + file(GOOD))
    assert (result, counts, report.ok) == (text.encode() + file(GOOD), Repaired(1, 0, 0), True)
    assert repaired(tmp_path, text.encode("utf-16"), chosen("crlf"))[:2] == (text.encode("utf-16"), Repaired(0, 0, 1))
    assert list(tmp_path.glob("*.utf8")) == []


def test_lines_that_end_in_cr_and_rows_on_one_line(tmp_path: Path) -> None:
    data = file(GOOD, OTHER)
    assert repaired(tmp_path, data.replace(b"\n", b"\r"))[:2] == (data, Repaired(2, 0, 0))
    together = one_line(GOOD).strip() + one_line(OTHER)
    result, counts, report = repaired(tmp_path, file(GOOD) + together, chosen("invalid_json"))
    assert (result, counts, report.ok) == (file(GOOD) + data, Repaired(1, 0, 0), True)
    listed = b"[" + one_line(GOOD).strip() + b",\n" + one_line(OTHER).strip() + b"]"
    assert repaired(tmp_path, listed)[:2] == (data, Repaired(2, 0, 0))
    commas = data.replace(b"\n", b",\n")
    assert repaired(tmp_path, commas)[:2] == (data, Repaired(2, 0, 0))


def test_other_styles_become_rows_of_the_guide(tmp_path: Path) -> None:
    data = file(
        {"instruction": "a", "input": "", "output": "b"},
        {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
        {"prompt": "e", "completion": "f"},
    )
    _, counts, report = repaired(tmp_path, data)
    assert (counts, report.kind, report.errors) == (Repaired(3, 0, 0), "chat", 0)


def test_a_row_may_need_many_rounds(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    turns = [message for _ in range(8) for message in ({"role": "bot", "tool_calls": calls}, reply(None))]
    _, counts, report = repaired(tmp_path, file({"messages": [USER, *turns, ASSISTANT]}))
    assert (counts, report.errors, report.kind) == (Repaired(1, 0, 0), 0, "function")


def test_lines_over_the_limit_are_kept_or_left_out(tmp_path: Path) -> None:
    class Limits:
        max_line_bytes = 1000
        min_training_rows = 1

    source, target = tmp_path / "s.jsonl", tmp_path / "t.jsonl"
    data = file(GOOD) + b"x" * 3_000_000 + b"\n" + file(HUMAN)
    source.write_bytes(data)
    assert repair(source, target, "fine-tune", Limits(), Choice()) == Repaired(1, 0, 1)
    assert (
        target.read_bytes()
        == file(GOOD) + b"x" * 3_000_000 + b"\n" + json.dumps(GOOD, separators=(",", ":")).encode() + b"\n"
    )
    assert repair(source, target, "fine-tune", Limits(), Choice(drop_bad_rows=True)) == Repaired(1, 1, 0)


@pytest.mark.parametrize("case", [case for case in CASES if case.purpose == "fine-tune"], ids=lambda case: case.id)
def test_a_repair_never_adds_errors_and_a_second_finds_nothing(case: Case, tmp_path: Path) -> None:
    result, counts, report = repaired(tmp_path, case.data)
    assert counts.left == report.bad_rows or not result.strip() or report.file_errors
    assert {code: n for code, n in report.patchable.items() if code != "duplicate_row"} == {}
    again, more, _ = repaired(tmp_path, result)
    assert more.patched == 0
    if "duplicate_row" not in report.counts:  # objects of one list are compared once each has its line
        assert again == result and more.dropped == 0


@settings(max_examples=300)
@given(_ANY)
def test_any_bytes_can_be_repaired(tmp_path: Path, data: bytes) -> None:
    _, counts, report = repaired(tmp_path, data, chosen(drop=True))
    assert report.bad_rows == 0 or counts.left, "what has errors was left out"


_CHILD = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from tunewright.datasets.mending.repair import Choice, repair
limits = SimpleNamespace(max_line_bytes=2**20, min_training_rows=1)
source, target = Path(sys.argv[1]), Path(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*repair(source, target, "fine-tune", limits, Choice()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("between", [b",\n", b"\n"])
def test_a_repair_takes_little_memory(tmp_path: Path, between: bytes) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    row = one_line({"messages": [{**USER, "content": "x" * 200_000}, {**ASSISTANT, "weight": True}]}).strip()
    with source.open("wb") as stream:
        stream.write(b"[" if between == b",\n" else b"")
        for _ in range(300):
            stream.write(row + between)
        stream.write(b"]" if between == b",\n" else b"")
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(source), str(target)], capture_output=True, text=True, check=True
    )
    patched, dropped, left, grown_kib = map(int, child.stdout.split())
    assert patched == 300 - dropped and left == 0
    assert grown_kib < 48 * 1024
