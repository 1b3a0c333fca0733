"""What a user reads of each fault of the catalogue of bad data, and what large files cost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.bad_rows import ASSISTANT, CASES, USER, call, file, function, reply
from tests.unit.test_datasets_check import Limits, checked

BY_ID = {case.id: case for case in CASES}

# (case, words of its first sentence)
SENTENCES = [
    ("J01", ["empty"]),
    ("J02 blank lines", ["blank lines"]),
    ("J06 little end first", ["UTF-8", "UTF-16"]),
    ("J06 without a mark", ["UTF-8", "UTF-16"]),
    ("J07", ["line 2", "byte 1", "GB18030"]),
    ("J09", ["line 2"]),
    ("J10", ["line 2"]),
    ("J11 lone CR", ["line"]),
    ("J15 on one line", ["one object per line"]),
    ("J15 on many lines", ["one object per line"]),
    ("J16 one object", ["many lines", "line of its own"]),
    ("J16 many objects", ["many lines", "line of its own"]),
    ("J17 CSV", ["CSV"]),
    ("J17 TSV", ["TSV"]),
    ("J17 XLSX", ["XLSX"]),
    ("J17 ZIP", ["ZIP"]),
    ("J17 GZIP", ["GZIP"]),
    ("J17 Parquet", ["Parquet"]),
    ("J17 HTML", ["HTML"]),
    ("J18 array", ["line 2", "array", "object"]),
    ("J19 trailing comma", ["line 2", "column 17"]),
    ("J19 single quotes", ["line 2", "column 2"]),
    ("J19 comment", ["line 2", "column 18"]),
    ("J19 None", ["line 2", "column 14"]),
    ("J20", ["line 2", "cut off"]),
    ("J21", ["line 2", "column"]),
    ("J22 NaN", ["line 2", "NaN"]),
    ("J23", ["line 2"]),
    ("J24 33", ["line 2", "32"]),
    ("J25", ["line 2", '"messages"']),
    ("J33 human", ["line 2, messages[0].role", '"human"', 'Did you mean "user"?']),
    ("J33 function", ["system, user, assistant, tool"]),
    ("J43", ["prompt / completion"]),
    ("J43 Alpaca", ["Alpaca"]),
    ("J43 ShareGPT", ["ShareGPT"]),
    ("J45 not JSON", ["line 2, messages[1].tool_calls[0].function.arguments"]),
    ("J45 argument missing", ["line 2", "city", "get_weather"]),
    ("J46 200 tools", ["200"]),
    ("J58", ["1000"]),
]


@pytest.mark.parametrize(("case", "words"), SENTENCES, ids=[case for case, _ in SENTENCES])
def test_the_sentence_names_place_and_reason(tmp_path: Path, case: str, words: list[str]) -> None:
    report = checked(tmp_path, BY_ID[case].data, BY_ID[case].purpose)
    sentence = next(problem.text() for problem in report.problems if problem.code == BY_ID[case].code)
    assert [word for word in words if word.lower() not in sentence.lower()] == [], sentence


def test_j08_the_bad_byte_of_a_late_line_is_found(tmp_path: Path) -> None:
    """Line 500,000, as the catalogue has it, in lines that need no rules."""
    data = b"{}\n" * 499_999 + b'{"a": "\xff"}\n'
    problem = next(p for p in checked(tmp_path, data, "batch").problems if p.code == "invalid_encoding")
    assert (problem.line, problem.byte_offset) == (500_000, 3 * 499_999 + 7)


def test_a_bad_byte_inside_pretty_printed_json_is_found(tmp_path: Path) -> None:
    data = json.dumps({"messages": [USER, ASSISTANT]}, indent=1).encode().replace(b"France", b"Fr\xffnce")
    problem = next(p for p in checked(tmp_path, data).problems if p.code == "invalid_encoding")
    assert problem.byte_offset == data.index(b"\xff")
    assert problem.line == data.count(b"\n", 0, problem.byte_offset) + 1
    assert problem.text() == f"line {problem.line}, byte {problem.byte_offset} of the file is not UTF-8"


def test_faults_as_translated_tool_data_has_them(tmp_path: Path) -> None:
    """A second call without its required argument, and a tool's answer whose call was turned into prose."""
    search = {
        "type": "function",
        "function": {
            "name": "search_books",
            "parameters": {
                "type": "object",
                "properties": {
                    "keywords": {"type": "array", "items": {"type": "string"}},
                    "author": {"type": "string"},
                },
                "required": ["keywords"],
            },
        },
    }
    asked = [
        {"role": "user", "content": "我正在寻找关于人工智能的书籍。"},
        call('{"keywords": ["人工智能"]}', name="search_books"),
        reply(),
        ASSISTANT,
        {"role": "user", "content": "您还能找到别的吗？"},
        call('{"author": "马斯克"}', name="search_books", id="c2"),
        reply("c2"),
        ASSISTANT,
    ]
    in_prose = [
        {"role": "user", "content": "原价是200美元，打八折多少钱？"},
        {"role": "assistant", "content": '计算折扣: {"原价": 200, "折扣百分比": 20}'},
        {"role": "tool", "content": '{"discounted_price": 160}', "tool_call_id": None},
        ASSISTANT,
    ]
    good = json.loads(function(USER, call(), reply(), ASSISTANT).splitlines()[1])
    rows = [good, {"messages": asked, "tools": [search]}, {"messages": in_prose, "tools": [search]}]
    report = checked(tmp_path, file(*rows))
    assert (report.kind, report.rows, report.bad_rows) == ("function", 3, 1)
    found = {(p.line, p.code, p.severity, p.pointer) for p in report.problems if p.line is not None}
    assert found == {
        (2, "missing_argument", "warning", "/messages/5/tool_calls/0/function/arguments"),
        (3, "invalid_tool_call", "error", "/messages/2/tool_call_id"),
    }


_CHILD = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from tunewright.datasets.checking.check import check
limits = SimpleNamespace(max_line_bytes=4 * 2**20, min_training_rows=1)
check(Path(sys.argv[1]), "fine-tune", limits)  # what is loaded once is no growth
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = check(Path(sys.argv[2]), "fine-tune", limits, problems_to=Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, report.rows, report.bad_rows, report.errors)
"""


def _write(path: Path, rows: int, words: int, *, bad_every: int) -> None:
    """So many different rows, of which every `bad_every`-th has an unknown role."""
    text = "word " * words
    row = (
        b'{"messages": [{"role": "%s", "content": "%d '
        + text.encode()
        + b'"}, {"role": "assistant", "content": "%d"}]}\n'
    )
    with path.open("wb") as stream:
        for n in range(rows):
            stream.write(row % (b"user" if (n + 1) % bad_every else b"human", n, n))


@pytest.mark.parametrize(
    ("rows", "words", "bad_every", "limit_mib"),
    [
        pytest.param(250_000, 200, 1000, 128, id="256 MiB"),
        pytest.param(40_000, 5, 1, 128, id="errors in every row"),
        pytest.param(5_000_000, 400, 1000, 256, id="10 GB", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, rows: int, words: int, bad_every: int, limit_mib: int
) -> None:
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    _write(small, 100, words, bad_every=10)
    _write(large, rows, words, bad_every=bad_every)
    command = [sys.executable, "-c", _CHILD, str(small), str(large), str(tmp_path / "problems")]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    grown_kib, found_rows, bad_rows, errors = map(int, child.stdout.split())
    assert (found_rows, bad_rows, errors) == (rows, rows // bad_every, rows // bad_every)
    assert grown_kib < limit_mib * 1024
    large.unlink()


def test_line_numbers_and_offsets_hold_at_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    _write(path, 30_000, 10, bad_every=29_999)
    data = path.read_bytes()
    problem = next(p for p in checked(tmp_path, data, limits=Limits()).problems if p.code == "invalid_role")
    assert problem.line == 29_999
    assert problem.byte_offset == data.index(b'{"messages": [{"role": "human"')
