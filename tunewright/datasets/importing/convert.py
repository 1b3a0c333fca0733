"""A file of another format or style -> JSONL rows of the guide. Row by row; the target appears whole or not at all."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tunewright import strict_json
from tunewright.datasets.importing.foreign import JsonArray, JsonLines, ParquetTable, Source, open_source
from tunewright.datasets.importing.importers import BOOKKEEPING, KNOWN_FIELDS, detect, import_row
from tunewright.datasets.report import MAX_PROBLEMS, Problem
from tunewright.datasets.rules import preferences
from tunewright.errors import InvalidRequest, quote
from tunewright.files_on_disk import writing
from tunewright.i18n import mark

OWN = "messages"
"""The style of rows that are in the guide's format already."""

_OWN_FIELDS = frozenset({"messages", "tools", "parallel_tool_calls"})
_JSON_COLUMNS = ("messages", "conversations", "conversation")
_OTHER_WORDS = {
    "问题": "question", "提问": "question", "query_text": "query", "提示": "prompt", "提示词": "prompt", "指令": "instruction",
    "输入": "input", "输出": "output", "回答": "answer", "答案": "answer", "回复": "response", "系统": "system",
    "系统提示": "system", "系统提示词": "system", "对话": "conversations",
}  # fmt: skip


@dataclass
class Converted:
    """What became of the rows. `written` is False if there were problems and they were not to be skipped.

    `styles` and `dropped` count rows by style, and by field that was left out; `problems` holds the first 100 of `skipped`.
    """

    file_format: str
    encoding: str
    written: bool = False
    rows: int = 0
    skipped: int = 0
    styles: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)


def convert(
    source: Path,
    target: Path,
    *,
    style: str = "auto",
    columns: Mapping[str, str] | None = None,
    drop: Collection[str] = (),
    skip_bad: bool = False,
    file_format: str = "auto",
    encoding: str | None = None,
    delimiter: str | None = None,
    max_line_bytes: int = 4 * 2**20,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write the rows of `source` to `target` as JSONL of the guide's formats.

    `columns` maps a row's field to the column (or key) that holds it, `{"prompt": "question"}`; columns it does not name are
    left out. Without it they are found by their names. `style` other than `auto` takes rows of that style alone.
    Rows without a certain meaning are counted and named; with any of them nothing is written, unless `skip_bad`.
    `progress(done, total)` is called now and then, in bytes or rows.

    Raises InvalidRequest for a file that can't be read as a whole or whose columns say nothing, Misconfigured for Parquet
    without pyarrow, OSError.
    """
    rows = open_source(source, max_line_bytes, file_format=file_format, encoding=encoding, delimiter=delimiter)
    names = dict(columns) if columns else {}
    for name in names:
        if name not in KNOWN_FIELDS:
            known = ", ".join(sorted(KNOWN_FIELDS))
            raise _columns(mark("{name} is not a field of a row; known: {known}."), name=quote(name), known=known)
    if rows.columns is not None:
        names = _plan(rows.columns, names, drop)
        if isinstance(rows, ParquetTable):
            rows.only(list(names.values()))
    reader = _Reader(names, style, drop, table=rows.columns is not None)
    converted = Converted(_name_of(rows), rows.encoding)
    try:
        with writing(target) as stream:
            for number, value in rows:
                line = reader.line(number, value, converted, max_line_bytes)
                if line is not None:
                    stream.write(line)
                if progress is not None and not (converted.rows + converted.skipped) & 255:
                    progress(rows.done, rows.total)
            if not converted.rows or (converted.skipped and not skip_bad):
                raise _NotWritten
    except _NotWritten:
        if not converted.skipped:
            raise InvalidRequest("file_empty", mark("The file holds no rows.")) from None
        return converted
    converted.written = True
    if isinstance(rows, ParquetTable):  # columns that were not even read
        converted.dropped.update({name: converted.rows for name in rows.columns or () if name not in names.values()})
    return converted


class _NotWritten(Exception):
    """Leaves the block that would put the target in its place."""


def _columns(sentence: str, **values: str) -> InvalidRequest:
    return InvalidRequest("invalid_columns", sentence, **values)  # type: ignore[arg-type]


def _name_of(rows: Source) -> str:
    if isinstance(rows, ParquetTable):
        return "Parquet"
    return "JSONL" if isinstance(rows, JsonLines) else "JSON" if isinstance(rows, JsonArray) else "CSV"


def _plan(found: tuple[str, ...], given: dict[str, str], drop: Collection[str]) -> dict[str, str]:
    """Field of a row -> column of the table that holds it, as given or by the columns' names."""
    listed = ", ".join(quote(name) for name in found[:20])
    for name, column in given.items():
        if column not in found:
            sentence = mark("There is no column {column} for {name}; the file has: {listed}.")
            raise _columns(sentence, column=quote(column), name=name, listed=listed)
    if given:
        return given
    plan: dict[str, str] = {}
    homeless: list[str] = []
    for column in found:
        name = column.strip().lower()
        name = _OTHER_WORDS.get(name, name)
        if column in drop:
            continue
        if name in KNOWN_FIELDS and name not in plan:
            plan[name] = column
        elif name in BOOKKEEPING or name.startswith("unnamed: "):
            plan[column] = column  # whether it holds anything, each row shows
        else:
            homeless.append(quote(column))
    if not plan.keys() & KNOWN_FIELDS:
        sentence = mark(
            "None of the columns has a known name ({listed}). Say which is which: --column prompt=... --column completion=..."
        )
        raise _columns(sentence, listed=listed)
    if homeless:
        sentence = mark(
            "These columns have no place in a row: {names}. Leave them out (--drop NAME), or name those to use (--column)."
        )
        raise _columns(sentence, names=", ".join(homeless[:20]))
    return plan


class _Reader:
    """One row after the other: columns renamed, style found, written anew."""

    def __init__(self, names: dict[str, str], style: str, drop: Collection[str], table: bool) -> None:
        self._names = names
        self._style = style
        self._drop = drop
        self._table = table

    def line(
        self, number: int, value: dict[str, Any] | InvalidRequest, converted: Converted, max_line_bytes: int
    ) -> bytes | None:
        """The row's line, or None if there is none; either is counted in `converted`."""
        try:
            if isinstance(value, InvalidRequest):
                raise value
            style, row, dropped = self._row(value)
            line = msgspec.json.encode(row) + b"\n"
            if len(line) > max_line_bytes + 1:
                raise InvalidRequest("line_too_long", mark("longer than {limit} bytes"), limit=max_line_bytes)
            if b"\\u0000" in line:
                strict_json.loads(line)
        except InvalidRequest as error:
            converted.skipped += 1
            if len(converted.problems) < MAX_PROBLEMS:
                problem = Problem(
                    code=error.code, severity="error", message=error.message, values=error.values, line=number
                )
                converted.problems.append(problem)
            return None
        converted.rows += 1
        converted.styles[style] += 1
        converted.dropped.update(dropped)
        return line

    def _row(self, value: dict[str, Any]) -> tuple[str, dict[str, Any], tuple[str, ...]]:
        if self._names:
            dropped = tuple(name for name in value if name not in self._names.values())
            value = {name: value[column] for name, column in self._names.items() if column in value}
        else:
            dropped = tuple(name for name in self._drop if name in value)
        if self._table:
            value = {name: _unpacked(name, item) for name, item in value.items()}
        if self._style in ("auto", OWN) and _is_own(value):
            row, more = self._own(value)
            return OWN, row, (*dropped, *more)
        style = detect({name: item for name, item in value.items() if name not in self._drop})
        if style is not None and self._style not in ("auto", style):
            sentence = mark("the row is of the style {found}, not {expected}")
            raise InvalidRequest("not_convertible", sentence, found=style, expected=self._style)
        imported = import_row(value, self._drop)
        return imported.style, imported.row, (*dropped, *imported.dropped)

    def _own(self, value: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """A row of the guide, as it is; of a table without the columns that only keep the books."""
        value = {name: item for name, item in value.items() if name not in self._drop}
        if not self._table or "messages" not in value:
            return value, ()
        left = [name for name in value if name not in _OWN_FIELDS]
        for name in left:
            if name.lower() not in BOOKKEEPING:
                sentence = mark("the field {field} has no place in the row")
                raise InvalidRequest("not_convertible", sentence, field=quote(name))
        return {name: value[name] for name in value if name in _OWN_FIELDS}, tuple(left)


def _is_own(value: dict[str, Any]) -> bool:
    if "messages" in value:
        return "chosen" not in value and "rejected" not in value
    return preferences.is_preference(value)


def _unpacked(name: str, item: object) -> object:
    """Lists of messages stand in a table's cell as JSON."""
    if name not in _JSON_COLUMNS and not (name == "tools" and isinstance(item, str)):
        return item
    if not isinstance(item, str):
        return item
    try:
        return strict_json.loads(item.encode("utf-8", "replace"))
    except InvalidRequest:
        raise InvalidRequest("not_convertible", mark("{field} is a text that does not hold JSON"), field=name) from None
