"""Pages of rows and lists of problems: by place in the file, bounded whatever the file holds."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tunewright.datasets import contents, export, problem_list
from tunewright.datasets.blob_keys import content_key, report_key
from tunewright.datasets.contents import Contents
from tunewright.datasets.problem_list import BLOB_BYTES, read_problems, sort_by_line
from tunewright.datasets.records import File
from tunewright.datasets.report import Patch, Problem, Report
from tunewright.storage import Blobs


class CountedBlobs(Blobs):
    """The real store, which counts what is taken from it."""

    taken = 0

    def read(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:
        def counted() -> Iterator[bytes]:
            for piece in pieces:
                self.taken += len(piece)
                yield piece

        pieces = super().read(*args, **kwargs)
        return counted()


class Shelf:
    """A stored dataset with the problems given, in the record or in a blob."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = CountedBlobs(f"file://{folder / 'blobs'}")
        self.contents = Contents(self.blobs, max_line_bytes=100_000)

    def put(self, key: str, data: bytes) -> None:
        path = self.folder / "part"
        path.write_bytes(data)
        self.blobs.put_file(key, path)

    def file(self, data: bytes, problems: list[Problem], *, blob: bool = True) -> File:
        report = msgspec.to_builtins(Report(problems=problems[:100]))
        if blob:
            path = self.folder / "problems"
            path.write_bytes(b"".join(msgspec.json.encode(problem) + b"\n" for problem in problems))
            report[BLOB_BYTES] = sort_by_line(path)
            self.put(report_key("p", "f"), path.read_bytes())
        self.put(content_key("p", "f"), data)
        return File(
            id="f", project_id="p", filename="f", purpose="fine-tune", size_bytes=len(data), sha256="", created_at=1,
            report=report,
        )  # fmt: skip


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def problem(line: int | None, offset: int = 0, code: str = "x", text: str = "line {line}") -> Problem:
    return Problem(code=code, severity="error", message=text, values={"line": line}, line=line, byte_offset=offset)


def pages(ask: Callable[[str | None], contents.RowPage]) -> tuple[list[int], int]:
    """The line numbers of all rows, and how many pages it took."""
    seen: list[int] = []
    after, count = None, 0
    while True:
        page = ask(after)
        count += 1
        seen += [row.line for row in page.rows]
        if page.next_after is None:
            return seen, count
        after = page.next_after


@pytest.mark.parametrize("blob", [True, False])
def test_problems_come_in_order_of_lines_from_any_line_on(shelf: Shelf, blob: bool) -> None:
    disorder = [problem(line) for line in (3, 9, 1, 7, 7, 2)]
    file = shelf.file(b"", [*disorder[:3], problem(None, code="whole"), *disorder[3:]], blob=blob)
    assert [each.line for each in read_problems(shelf.blobs, file)] == [None, 1, 2, 3, 7, 7, 9]
    for after in range(11):
        expected = [line for line in (1, 2, 3, 7, 7, 9) if line > after]
        assert [each.line for each in read_problems(shelf.blobs, file, after)] == expected
    assert [each.code for each in shelf.contents.problems(file, code="whole")] == ["whole"]
    assert list(shelf.contents.problems(file, severity="warning")) == []


def test_a_place_in_a_long_list_is_found_without_reading_it(shelf: Shelf) -> None:
    lines = [line for line in range(1, 20_001) for _ in range(3)]
    file = shelf.file(b"", [problem(line, text="x" * (line % 500)) for line in lines])
    size = file.report[BLOB_BYTES]
    assert size > 40 * problem_list._NEAR_BYTES
    for after in (1, 9_999, 19_998):
        shelf.blobs.taken = 0
        found = read_problems(shelf.blobs, file, after)
        assert [next(found).line for _ in range(4)] == [after + 1] * 3 + [after + 2]
        assert shelf.blobs.taken < size / 3
    assert list(read_problems(shelf.blobs, file, 20_000)) == []


def test_problems_longer_than_a_piece_are_found_too(shelf: Shelf) -> None:
    wide = [problem(line, text="y" * (300_000 if line % 3 == 0 else 10)) for line in range(1, 31)]
    file = shelf.file(b"", wide)
    for after in range(31):
        assert [each.line for each in read_problems(shelf.blobs, file, after)] == list(range(after + 1, 31))


def test_sorting_keeps_the_order_within_a_line(tmp_path: Path) -> None:
    path = tmp_path / "problems"
    path.write_bytes(b"".join(msgspec.json.encode(problem(line, i)) + b"\n" for i, line in enumerate((2, 1, 2, 1))))
    assert sort_by_line(path) == path.stat().st_size
    kept = [msgspec.json.decode(line, type=Problem) for line in path.read_bytes().splitlines()]
    assert [(each.line, each.byte_offset) for each in kept] == [(1, 1), (1, 3), (2, 0), (2, 2)]
    assert list(tmp_path.iterdir()) == [path]


def test_the_last_page_costs_what_the_first_does(shelf: Shelf) -> None:
    rows = [json.dumps({"n": i, "text": "x" * 900}).encode() for i in range(20_000)]
    data = b"\n".join(rows) + b"\n"
    file = shelf.file(data, [problem(i, i) for i in range(1, 20_001)])
    offset = sum(len(row) + 1 for row in rows[:19_900])
    costs = []
    for after in (None, f"r19900-{offset}"):
        shelf.blobs.taken = 0
        page = shelf.contents.rows(file, after=after, limit=20)
        assert [len(row.problems) for row in page.rows] == [1] * 20
        costs.append(shelf.blobs.taken)
    assert page.rows[0].data == rows[19_900] and page.rows[0].line == 19_901
    assert max(costs) < 4 * 2**20 < len(data)


def test_pages_follow_each_other_whatever_ends_them(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"text": f"row {i}" + ("x" * (i % 7) * 3000)}) for i in range(200)]
    file = shelf.file(("\n".join(rows)).encode(), [])
    everything = list(range(1, 201))
    for limit in (1, 7, 1000):
        assert pages(lambda after, limit=limit: shelf.contents.rows(file, after=after, limit=limit))[0] == everything
    monkeypatch.setattr(contents, "PAGE_BYTES", 50_000)
    seen, count = pages(lambda after: shelf.contents.rows(file, after=after, limit=1000))
    assert seen == everything and count > 20
    monkeypatch.setattr(contents, "SCANNED_BYTES", 100_000)
    seen, count = pages(lambda after: shelf.contents.rows(file, after=after, limit=1000, search="row 19"))
    assert seen == [20, *range(191, 201)] and count > 10, "a search goes on where one request had looked enough"


def test_lines_too_long_are_passed_over_in_pieces(shelf: Shelf) -> None:
    long = b"x" * 700_000
    data = b"{}\n" + long + b"\n{}\n" + b"y" * 100_000 + b"\n{}\n" + long
    starts = [0, 3, 700_004, 700_007, 800_008, 800_011]
    file = shelf.file(data, [problem(i + 1, start) for i, start in enumerate(starts)])
    for limit in (1, 2, 10):
        for only in (False, True):
            ask = lambda after, limit=limit, only=only: shelf.contents.rows(  # noqa: E731
                file, after=after, limit=limit, problems_only=only
            )
            assert pages(ask)[0] == [1, 2, 3, 4, 5, 6]
    for only in (False, True):
        rows = shelf.contents.rows(file, limit=10, problems_only=only).rows
        assert [(row.data, row.text and len(row.text)) for row in rows] == [
            (b"{}", None), (None, None), (b"{}", None), (None, 20_000), (b"{}", None), (None, None),
        ]  # fmt: skip


def test_rows_with_problems_are_found_by_the_report_alone(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"text": f"row {i} " + "x" * 990}).encode() for i in range(20_000)]
    offsets = [sum(len(row) + 1 for row in rows[:i]) for i in (10, 15_000, 19_999)]
    found = [problem(11, offsets[0]), problem(15_001, offsets[1] + 500), problem(20_000, offsets[2] + len(rows[-1]))]
    file = shelf.file(b"\n".join(rows) + b"\n", found)
    page = shelf.contents.rows(file, limit=10, problems_only=True)
    assert [(row.line, row.data) for row in page.rows] == [(11, rows[10]), (15_001, rows[15_000]), (20_000, rows[-1])]
    assert shelf.blobs.taken < 2**20
    monkeypatch.setattr(contents, "SCANNED_BYTES", 1)
    searched = pages(
        lambda after: shelf.contents.rows(file, after=after, limit=10, problems_only=True, search="ROW 15000")
    )
    assert searched == ([15_001], 3)


def test_a_row_shows_at_most_twenty_problems(shelf: Shelf) -> None:
    file = shelf.file(b"{}\n{}\n", [problem(1)] * 30 + [problem(2, 3)])
    for only in (False, True):
        rows = shelf.contents.rows(file, limit=10, problems_only=only).rows
        assert [len(row.problems) for row in rows] == [20, 1]


def test_no_cell_of_a_table_is_a_formula() -> None:
    starts = ("=1+1", "+1", "-1", "@x", "\tx", "\rx", "x=1", "'x", 'a,"b"\nc', "训练")
    patch = Patch(drop=True)
    found = [msgspec.structs.replace(problem(1, text=text), values={}, pointer=text, patch=patch) for text in starts]
    table = b"".join(export.table(found, "en")).decode()
    cells = list(csv.DictReader(io.StringIO(table, newline="")))
    assert [cell["pointer"] for cell in cells] == [cell["message"] for cell in cells]
    assert [cell["pointer"] for cell in cells] == [*("'" + text for text in starts[:6]), *starts[6:]]
    assert json.loads(cells[0]["patch"]) == {"drop": True}


def test_downloads_come_in_pieces() -> None:
    many = (problem(i, text="x" * 500) for i in range(1, 3001))
    sizes = [len(piece) for piece in export.json_lines(many, "en")]
    assert len(sizes) > 3 and max(sizes) < 2**20
    assert list(export.json_lines([], "en")) == []
    assert b"".join(export.table([], "en")).decode().strip() == ",".join(export.COLUMNS)
