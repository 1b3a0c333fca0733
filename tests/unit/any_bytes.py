"""Bytes that nobody meant as training data: rows cut, bent, nested and recoded; and what must hold of all of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec

from tests.unit.bad_rows import (
    ASSISTANT,
    CASES,
    PIXEL,
    SYSTEM,
    USER,
    call,
    chat,
    file,
    function,
    image,
    preference,
    reply,
)
from tunewright import strict_json
from tunewright.datasets.checking.check import check
from tunewright.datasets.lines import read_lines
from tunewright.datasets.mending.patches import apply
from tunewright.datasets.mending.repair import Choice, repair
from tunewright.datasets.records import PURPOSES
from tunewright.datasets.report import Problem, Report
from tunewright.datasets.rows import conversation_of
from tunewright.rendering.renderer import Renderer


class Limits(NamedTuple):
    max_line_bytes: int = 2**16
    min_training_rows: int = 1


LIMITS = Limits()
GOOD_FILES = (
    chat(SYSTEM, USER, {**ASSISTANT, "reasoning_content": "Let me see."}, USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT),
    function(USER, call(), reply(), ASSISTANT),
    preference(),
    file({"messages": [USER], "preferred_completion": [ASSISTANT], "non_preferred_completion": [{**ASSISTANT, "content": "x"}]}),
    image(f"data:image/png;base64,{PIXEL}"),
    image(PIXEL, "assistant"),
)  # fmt: skip
CORPUS = (*GOOD_FILES, *(case.data for case in CASES if len(case.data) <= 4096))

_ENCODINGS = (
    "utf-16",
    "utf-16-le",
    "utf-32",
    "gb18030",
    "big5",
    "shift_jis",
    "latin-1",
    "cp1252",
    "utf-7",
    "utf-8-sig",
)
_TOKENS = (
    *(b"\n", b"\r", b"\r\n", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f", b"\\ud800", b"\\u0000"),
    *(b"[", b"]", b"{", b"}", b'"', b":", b",", b"\\", b" ", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0"),
    *(b'"role"', b'"messages"', b'"tools":[{}],', b'"weight":true', b"\xe2\x80\xa8", b"\xe4\xbd", "你".encode(), b"<|im_start|>"),
    *(b"PAR1", b"PK\x03\x04", b"\x1f\x8b", b"%PDF-", b"{'a': 1}", b"// x", b"sk-" + b"a1" * 12, b"9" * 5000, b"\x1b[31m"),
)  # fmt: skip
_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 10**400, "", " ", "user", "assistant", "tool", "system", [], {}, [[]], [None]),
    *("a" * 3000, "\u0301" * 50, "\u202e", "{}", '{"city": 5}', "{", [{}], {"type": "text"}, {"type": "image_url"}),
    *({"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#"}}}, [{"type": "text", "text": "x"}], [USER], call()),
    *({"messages": []}, "data:image/png;base64,", "http://127.0.0.1/x", "file:///etc/passwd", [ASSISTANT] * 40, {"": ""}),
)  # fmt: skip


def mutated(data: bytes, random: Random) -> bytes:
    """`data` after one to five changes."""
    for _ in range(random.choice((1, 1, 2, 3, 5))):
        data = random.choice(_MUTATIONS)(data, random)
    return data[: 1 << 20]


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _without(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + data[start + random.randrange(20) :]


def _inserted(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + random.choice((random.choice(_TOKENS), random.randbytes(3))) + data[start:]


def _flipped(data: bytes, random: Random) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _repeated(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    piece = data[start : start + random.randrange(200)]
    return data[:start] + piece * random.choice((2, 3, 50)) + data[start:]


def _recoded(data: bytes, random: Random) -> bytes:
    return data.decode("utf-8", "replace").encode(random.choice(_ENCODINGS), "replace")


def _nested(data: bytes, random: Random) -> bytes:
    depth = random.choice((2, 31, 32, 33, 1000, 50_000))
    opened, closed = random.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"messages":[', b"]}")))
    return opened * depth + data.strip() + closed * random.choice((0, depth))


def _many_lines(data: bytes, random: Random) -> bytes:
    return data + random.choice((b"\n", b"{}\n", b"\r\n", b"x\n", b" \n", data)) * random.choice((10, 300))


def _joined(data: bytes, random: Random) -> bytes:
    return data + random.choice(CORPUS)


def _odd_value(data: bytes, random: Random) -> bytes:
    """Replace, remove, repeat or rename something inside of one row, and leave it JSON."""
    lines = data.split(b"\n")
    number = random.randrange(len(lines))
    try:
        row = json.loads(lines[number])
        _bend(row, random)
        lines[number] = json.dumps(row, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return data
    return b"\n".join(lines)


def _bend(value: Any, random: Random) -> None:
    while isinstance(value, list | dict) and value:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if random.random() < 0.7 and isinstance(value[key], list | dict) and value[key]:
            value = value[key]
            continue
        change = random.randrange(4)
        if change == 0:
            del value[key]
        elif change == 1 and isinstance(value, list):
            value.insert(random.randrange(len(value) + 1), value[key])
        elif change == 2 and isinstance(value, dict):
            value[random.choice(("role", "content", "tools", "x", "__proto__", "name", "arguments"))] = value[key]
        else:
            value[key] = random.choice(_ODD_VALUES)
        return


_MUTATIONS: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(_cut, _without, _inserted, _inserted, _flipped, _repeated, _recoded, _nested, _many_lines, _joined),
    *(_odd_value,) * 10,
)  # fmt: skip


def holds(folder: Path, data: bytes, purpose: str, renderer: Renderer) -> Report:
    """Check `data` and assert all that must hold of any report on any bytes; the report."""
    path, problems_to = folder / "any.jsonl", folder / "problems.jsonl"
    path.write_bytes(data)
    problems_to.unlink(missing_ok=True)
    report = check(path, purpose, LIMITS, problems_to=problems_to)
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report, "what is stored is what was found"
    assert report.errors + report.warnings == sum(report.counts.values())
    assert report.bad_rows + report.file_errors <= report.errors
    if report.file_errors == 0:  # else a row is an object, on as many lines as it likes
        assert report.bad_rows <= report.rows <= data.count(b"\n") + 1
    assert report.size_bytes == len(data)
    assert all(0 < report.patchable[code] <= report.counts[code] for code in report.patchable)
    for problem in report.problems:
        _problem_holds(problem, data)
    every = [msgspec.json.decode(line, type=Problem) for line in problems_to.read_bytes().splitlines()]
    assert len(every) == report.errors + report.warnings
    bad = {problem.line for problem in every if problem.severity == "error" and problem.line is not None}
    assert len(bad) == report.bad_rows or report.file_errors > 0
    if report.file_errors == 0:
        _patches_fit(path, [problem for problem in every if problem.patch is not None][:200])
    if purpose in PURPOSES[:-1] and report.file_errors == 0 and report.kind in ("chat", "function"):
        _good_rows_train(path, bad, renderer)
    return report


def _problem_holds(problem: Problem, data: bytes) -> None:
    english, chinese = problem.text("en"), problem.text("zh")
    assert english != chinese and len(english) < 1000, problem
    assert problem.line is None or 1 <= problem.line <= data.count(b"\n") + 1
    assert problem.byte_offset is None or 0 <= problem.byte_offset <= len(data)
    assert problem.pointer is None or problem.pointer == "" or problem.pointer.startswith("/")
    if problem.patch is not None:
        patch = problem.patch
        assert sum(map(bool, (patch.operations, patch.edits, patch.drop, patch.rewrite))) == 1


def mended(folder: Path, data: bytes, purpose: str, choice: Choice) -> None:
    """Repair `data` and assert that the result is as good as the repair says, and that a second one finds nothing to mend."""
    source, target, again = (folder / name for name in ("any.jsonl", "mended.jsonl", "again.jsonl"))
    source.write_bytes(data)
    before = check(source, purpose, LIMITS)
    done = repair(source, target, purpose, LIMITS, choice)
    after = check(target, purpose, LIMITS)
    assert source.read_bytes() == data
    if done.patched == done.dropped == 0:
        assert before.file_errors > 0 or target.read_bytes().split() == data.split(), "nothing was done"
        return
    assert after.bad_rows <= max(before.bad_rows, done.left)
    if choice.lines is None and before.file_errors == after.file_errors == 0:
        assert choice.drop_bad_rows is False or after.bad_rows == _of_another_kind(after), after.counts
        # Objects that shared a line may be equal, and are then rows that repeat.
        # A byte order mark that stood after blank lines has become one of the file.
        has_mark = target.read_bytes().startswith(b"\xef\xbb\xbf")
        assert has_mark or repair(target, again, purpose, LIMITS, choice).patched == 0


def _of_another_kind(report: Report) -> int:
    """Rows that are good by themselves and do not fit the rows before: which to leave out, nobody can say for certain."""
    return report.counts.get("wrong_format", 0)


def _patches_fit(path: Path, problems: list[Problem]) -> None:
    """Every patch of one line can be applied to it, and what comes out is JSON if the line was or the patch mends that."""
    lines = dict(_numbered_lines(path))
    for problem in problems:
        data = lines.get(problem.line or 0)
        if data is None or problem.patch is None:
            continue
        mended = apply(data, problem.patch)
        if mended is None:
            assert problem.patch.drop
            continue
        if problem.patch.operations or problem.patch.edits:
            assert mended != data, "a patch changes something"
        if problem.patch.operations or problem.code == "invalid_json":
            for part in mended.split(b"\n"):
                strict_json.loads(part)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    with path.open("rb") as stream:
        if stream.read(3) != b"\xef\xbb\xbf":
            stream.seek(0)
        for line in read_lines(stream, LIMITS.max_line_bytes):
            yield line.number, line.data


def _good_rows_train(path: Path, bad: set[int], renderer: Renderer) -> None:
    """Every row that no error names is one that the trainer can read and render."""
    for number, data in _numbered_lines(path):
        if number in bad or not data or data.isspace():
            continue
        conversation = conversation_of(strict_json.loads(data), number)
        example = renderer.example(conversation)
        assert len(example.tokens) == len(example.trained)
