"""All problems of a dataset as a download: JSON lines, or a table for a spreadsheet."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from tunewright.datasets.presentation import problem_object
from tunewright.datasets.problem_list import sort_by_line
from tunewright.datasets.report import Problem
from tunewright.files_on_disk import writing

COLUMNS = ("line", "byte_offset", "pointer", "code", "severity", "message", "patch")
_PIECE_BYTES = 256 * 1024
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def json_lines(problems: Iterable[Problem], language: str) -> Iterator[bytes]:
    """One object a line (`presentation.problem_object`), in pieces of some hundred kilobytes."""
    piece = bytearray()
    for problem in problems:
        piece += msgspec.json.encode(problem_object(problem, language)) + b"\n"
        if len(piece) >= _PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def table(problems: Iterable[Problem], language: str) -> Iterator[bytes]:
    """CSV (RFC 4180) in UTF-8 with a head line. No cell is a formula for a spreadsheet: such text gets a ' before it."""
    text = io.StringIO()
    write = csv.writer(text).writerow
    write(COLUMNS)
    for problem in problems:
        shown = problem_object(problem, language)
        shown["patch"] = None if problem.patch is None else msgspec.json.encode(problem.patch).decode()
        write([_cell(shown[name]) for name in COLUMNS])
        if text.tell() >= _PIECE_BYTES:
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    if text.tell():
        yield text.getvalue().encode()


def _cell(value: Any) -> Any:
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value


def export_list(listed: Path, target: Path, language: str) -> None:
    """Write the problems of the list that a check has made to `target`, in the order of their lines: as a table if it is called
    .csv, else as JSON lines. The file appears whole or not at all."""
    sort_by_line(listed)
    write = table if target.suffix.lower() == ".csv" else json_lines
    decode = msgspec.json.Decoder(Problem).decode
    with listed.open("rb") as lines, writing(target) as stream:
        stream.writelines(write((decode(line) for line in lines), language))
