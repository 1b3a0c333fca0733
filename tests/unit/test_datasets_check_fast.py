"""The fast ways through the check say what the exact one says: on any mix of clean, nearly clean and broken lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.bad_rows import ASSISTANT, CASES, GOOD, SYSTEM, TOOL, USER, call, preference, reply
from tests.unit.bad_rows import line as one_line
from tunewright.datasets import lines
from tunewright.datasets.checking import check as check_module
from tunewright.datasets.checking import fast_rows, parts, scan
from tunewright.datasets.checking.block_marks import BlockMarks
from tunewright.datasets.checking.check import check, check_in_child
from tunewright.datasets.report import Problem, Report


class Limits(NamedTuple):
    max_line_bytes: int = 4 * 2**20
    min_training_rows: int = 1


LIMITS = Limits()


class Outcome(NamedTuple):
    """A report, and all problems in a form that can be sorted."""

    report: Report
    problems: list[bytes]


def outcome(folder: Path, data: bytes, purpose: str = "fine-tune", limits: Limits = LIMITS, **options: Any) -> Outcome:
    path, problems = folder / "data.jsonl", folder / "problems.jsonl"
    path.write_bytes(data)
    report = check(path, purpose, limits, problems_to=problems, **options)
    return Outcome(report, sorted(problems.read_bytes().splitlines()))


def exactly(folder: Path, data: bytes, **options: Any) -> Outcome:
    """Every line the exact way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_rows, "one_row", lambda line: None)
        return outcome(folder, data, **options)


def by_line(folder: Path, data: bytes, **options: Any) -> Outcome:
    """Every line by itself, fast if it is clean."""
    return outcome(folder, data, **options)


def in_blocks(folder: Path, data: bytes, **options: Any) -> Outcome:
    """Whole blocks at once; they are small, so that lines of all sorts meet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "BLOCKS_FROM_BYTES", 0)
        patch.setattr(lines, "BLOCK_BYTES", 700)
        patch.setattr(scan, "_PLAIN_AGAIN", 1)
        return outcome(folder, data, **options)


def in_parts(folder: Path, data: bytes, **options: Any) -> Outcome:
    """Many pieces, taken in turn by three, each scanned by the code of a process of its own."""

    def run(orders: list[parts.Order], progress: Callable[[int], None] | None, own: parts.Order) -> None:
        for i, order in enumerate((own, *orders)):
            with pytest.MonkeyPatch.context() as patch:
                pieces = range(i, len(order.cuts) - 1, 3)
                patch.setattr(parts, "_taken", lambda queue, pieces=pieces: pieces)
                parts.scan_pieces(msgspec.json.decode(msgspec.json.encode(order), type=parts.Order), lambda done: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "run", run)
        patch.setattr(parts, "PIECE_BYTES", 300)
        patch.setattr(check_module, "PARTS_FROM_BYTES", 0)
        patch.setattr(scan, "BLOCKS_FROM_BYTES", 0)
        return outcome(folder, data, processes=3, **options)


WAYS = (by_line, in_blocks, in_parts)

_FUNCTION = {"messages": [USER, call(), reply(), ASSISTANT], "tools": [TOOL]}
_TEXTS = st.sampled_from(
    (
        *(
            'a "quoted" word',
            "back\\slash",
            'both \\" here',
            "tab\tand\nline",
            "汉字，“引号”",
            "é",
            "\U0001f600",
            "\u2028",
        ),
        *(
            "\\\\",
            '"',
            "}\n{",
            '{"role": "user"}',
            "</s>",
            "sk-" + "a1" * 12,
            "a\u200bb",
            "me@realname.com",
            "",
            " \n",
            "x",
        ),
    )
) | st.text(max_size=12)
_ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": _TEXTS},
    optional={
        "weight": st.sampled_from([0, 1, None, 1.0, True, 2, "1", -0.0]),
        "reasoning_content": _TEXTS | st.none(),
        "name": st.sampled_from(["a", None, 5]),
        "tool_calls": st.sampled_from([None, [], call()["tool_calls"], call("{}", id="c2")["tool_calls"], [{}]]),
        "mood": st.just("x"),
    },
)
_MESSAGES = (
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool", "human"]), "content": _TEXTS})
    | st.fixed_dictionaries({"role": st.just("user"), "content": _TEXTS}, optional={"name": st.none(), "x": st.none()})
    | _ANSWERS
    | st.sampled_from([reply(), reply("c2"), call(), call("{}"), call("[]"), call(name="other"), {"role": "assistant"}])
)
_CONVERSATIONS = st.tuples(_TEXTS, _TEXTS | st.just("Paris."), st.booleans()).map(
    lambda t: [*([SYSTEM] if t[2] else []), {"role": "user", "content": t[0]}, {"role": "assistant", "content": t[1]}]
)
_ROWS = st.fixed_dictionaries({"messages": _CONVERSATIONS}) | st.fixed_dictionaries(
    {"messages": st.lists(_MESSAGES, max_size=4).map(lambda more: [USER, *more, ASSISTANT])},
    optional={
        "tools": st.sampled_from([None, [], [TOOL], [TOOL, TOOL], {}, [{"type": "function"}]]),
        "parallel_tool_calls": st.sampled_from([True, None, 1]),
        "id": st.integers(),
    },
)
_SPELLINGS: tuple[Callable[[Any], str], ...] = (
    lambda row: json.dumps(row, ensure_ascii=False),
    lambda row: json.dumps(row),
    lambda row: json.dumps(row, ensure_ascii=False, separators=(",", ":")),
    lambda row: " " + json.dumps(row, separators=(" , ", " : ")) + " ",
    lambda row: json.dumps(row, sort_keys=True).replace("user", "us\\u0065r"),
    lambda row: json.dumps(row).replace('"role": "user"', '"role": "user", "role": "user"', 1),
    lambda row: json.dumps(row).replace('"content": "', '"content": "x", "content": "', 1),
    lambda row: json.dumps(row)[:-1] + ', "messages": []}',
    lambda row: json.dumps(row).replace("a", "\\u0000", 1),
    lambda row: json.dumps(row).replace("a", "\\ud800", 1),
    lambda row: json.dumps(row).replace('\\"', "\\u0022"),
    lambda row: json.dumps(row) + "\r",
    lambda row: json.dumps(row) * 2,
    lambda row: json.dumps(row)[:-1],
)
_LINES = st.tuples(_ROWS, st.sampled_from(_SPELLINGS[:5]) | st.sampled_from(_SPELLINGS)).map(
    lambda pair: pair[1](pair[0]).encode("utf-8", "replace")
)
_OTHER_LINES = st.sampled_from(
    (
        *(b"", b" ", b"\r", b"{}", b"[]", b"1", b"}", b"{", b"\xff", b'{"messages": ', b"null", b"\xef\xbb\xbf{}"),
        *(
            preference().strip(),
            b'{"instruction": "x"}',
            b"[" * 40,
            b'{"messages": [{"role": "user", "content": "\x01"}]}',
        ),
        *(one_line(GOOD).strip(), one_line(_FUNCTION).strip()) * 4,
    )
)


@st.composite
def _files(draw: st.DrawFn) -> bytes:
    found = draw(st.lists(_LINES | _OTHER_LINES, max_size=8))
    again = draw(st.lists(st.sampled_from(found), max_size=3)) if found else []
    return b"\n".join([*found, *again]) + draw(st.sampled_from([b"", b"\n"]))


_SETTINGS = settings(max_examples=500)


@_SETTINGS
@given(_files())
def test_every_way_gives_the_same_report(tmp_path: Path, data: bytes) -> None:
    expected = exactly(tmp_path, data)
    for way in WAYS:
        assert way(tmp_path, data) == expected, way.__name__


@pytest.mark.parametrize("way", WAYS)
def test_every_way_finds_the_faults_of_the_catalogue(way: Callable[..., Outcome], tmp_path: Path) -> None:
    for case in CASES:
        for data in (case.data, case.data + one_line(GOOD) * 20, one_line(GOOD) * 20 + case.data):
            assert way(tmp_path, data, purpose=case.purpose) == exactly(tmp_path, data, purpose=case.purpose), case.id


@pytest.mark.parametrize("way", WAYS)
def test_lines_over_the_limit_are_found_by_every_way(way: Callable[..., Outcome], tmp_path: Path) -> None:
    row = one_line(GOOD)
    data = row * 3 + b"x" * 5000 + b"\n" + row * 2 + b'{"messages": "' + b"y" * 5000
    limits = Limits(max_line_bytes=len(row) + 5)
    expected = exactly(tmp_path, data, limits=limits)
    assert expected.report.counts["line_too_long"] == 2 and expected.report.rows == 7
    assert way(tmp_path, data, limits=limits) == expected


def test_clean_rows_take_the_fast_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact: list[bytes] = []

    def note(row: Any, data: bytes, **options: Any) -> Any:
        exact.append(data)
        return real(row, data, **options)

    real = scan.check_line
    monkeypatch.setattr(scan, "check_line", note)
    reasoning = {"messages": [USER, {**ASSISTANT, "reasoning_content": "so", "weight": 1}]}
    for row in (GOOD, {"messages": [SYSTEM, USER, ASSISTANT]}, _FUNCTION, reasoning):
        for way in (by_line, in_blocks):
            assert way(tmp_path, one_line(row) * 10).report.ok
    assert not exact, "no clean row needs the exact check"
    in_blocks(tmp_path, one_line(GOOD) * 4 + b"{}\n" + one_line(GOOD) * 4)
    assert exact == [b"{}"], "and its neighbours do not either"


@settings(max_examples=300)
@given(st.lists(st.text(alphabet='\\"}{u0n\x00 a', max_size=12), min_size=1, max_size=5))
def test_quotes_of_a_block_are_counted_right(texts: list[str]) -> None:
    block = b"\n".join(json.dumps({"x": text}).encode() for text in texts) + b"\n"
    marks = BlockMarks().of(block)
    assert (marks is None) == (b"\\u0000" in block)
    if marks is not None:
        assert marks.quotes == 4 * len(texts)
        assert [block[end : end + 1] for end in marks.ends] == [b"\n"] * len(texts)


def test_blocks_hold_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 16)
    path = tmp_path / "lines"
    for data in (
        b"",
        b"\n",
        b"ab\n" * 20,
        b"x" * 40 + b"\n\nyy",
        b"z" * 200 + b"\n" + b"a\n" * 9,
        b"q" * 17,
        b"\n" * 40,
    ):
        path.write_bytes(data)
        for end in {len(data), data.rfind(b"\n") + 1}:
            with path.open("rb") as stream:
                blocks = list(lines.read_blocks(stream, end, 50))
            at = 0
            for block in blocks:
                assert block.byte_offset == at
                assert block.data is None or (
                    len(block.data) == block.size and data[at : at + block.size] == block.data
                )
                assert block.data is not None or block.size > 50
                at += block.size
            assert at == end
        with path.open("rb") as stream:
            cuts = lines.line_starts(stream, 0, len(data), 4)
        assert cuts[0] == 0 and cuts[-1] == len(data)
        assert all(cut == 0 or cut == len(data) or data[cut - 1 : cut] == b"\n" for cut in cuts)


def test_processes_of_their_own_agree_and_tell_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "PARTS_FROM_BYTES", 1 << 16)
    monkeypatch.setattr(check_module, "CHILD_FROM_BYTES", 0)
    monkeypatch.setattr(parts, "PIECE_BYTES", 1 << 15)
    bad = {"messages": [{**USER, "role": "human"}, ASSISTANT]}
    rows = [{"messages": [{**USER, "content": f"question {i} " + "x" * 200}, ASSISTANT]} for i in range(3000)]
    data = b"".join(one_line(row) for row in [*rows, bad, *rows[:50], _FUNCTION, bad])
    expected = exactly(tmp_path, data)
    told: list[tuple[int, int]] = []
    assert outcome(tmp_path, data, processes=2, progress=lambda *done: told.append(done)) == expected
    assert expected.report.counts["duplicate_row"] == 51 and expected.report.bad_rows == 2
    path, problems = tmp_path / "data.jsonl", tmp_path / "of_child.jsonl"
    report = check_in_child(path, "fine-tune", LIMITS, problems_to=problems)
    assert report == expected.report
    written = [msgspec.json.decode(line, type=Problem) for line in problems.read_bytes().splitlines()]
    assert len(written) == report.errors + report.warnings


def test_a_check_in_a_child_can_be_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    row = one_line({"messages": [{**USER, "content": "x" * 5000}, ASSISTANT]})
    path.write_bytes(row * (60_000_000 // len(row)))
    started: list[Any] = []
    real = parts.subprocess.Popen

    def note(*given: Any, **options: Any) -> Any:
        started.append(real(*given, **options))
        return started[-1]

    monkeypatch.setattr(parts.subprocess, "Popen", note)

    def stop(done: int, total: int) -> None:
        assert 0 < done <= total == path.stat().st_size
        raise InterruptedError

    with pytest.raises(InterruptedError):
        check_in_child(path, "fine-tune", LIMITS, progress=stop)
    assert [child.poll() is not None for child in started] == [True]


def test_a_process_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "CHILD_FROM_BYTES", 0)
    path = tmp_path / "data.jsonl"
    path.write_bytes(one_line(GOOD) * 10)
    with pytest.raises(ChildProcessError):
        check_in_child(path, "fine-tune", LIMITS, problems_to=tmp_path / "no folder" / "x")
