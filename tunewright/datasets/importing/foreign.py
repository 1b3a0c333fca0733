"""Files of other formats as rows: JSON arrays, CSV and TSV, Parquet. In bounded memory, and nothing in them is run.

Each reader is iterated once: `(number, value)`, where `number` is the line (of Parquet: the row) that a person would look
for, and `value` the row, or the reason why there is none. `done` of `total` says how far it got.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tunewright import strict_json
from tunewright.datasets.checking.sniff import HEAD_BYTES, sniff
from tunewright.datasets.lines import read_lines
from tunewright.datasets.report import json_type
from tunewright.errors import InvalidRequest, Misconfigured, quote
from tunewright.i18n import mark

FORMATS = ("jsonl", "json", "csv", "parquet")
_CHUNK = 1 << 20
_WHITE = re.compile(r"[ \t\r\n]*")
_PARQUET_BATCH = 256
"""Rows held at a time; with texts of some kilobytes this is a few megabytes."""

Found = tuple[int, dict[str, Any] | InvalidRequest]


class JsonLines:
    """One JSON object per line; blank lines are no rows."""

    def __init__(self, path: Path, max_line_bytes: int) -> None:
        self.path = path
        self.total = path.stat().st_size
        self.done = 0
        self.columns: tuple[str, ...] | None = None
        self.encoding = "utf-8"
        self._limit = max_line_bytes

    def __iter__(self) -> Iterator[Found]:
        with self.path.open("rb", buffering=_CHUNK) as stream:
            if stream.read(3) != codecs.BOM_UTF8:
                stream.seek(0)
            for line in read_lines(stream, self._limit):
                self.done = line.byte_offset
                if line.data is None:
                    yield line.number, _too_long(self._limit)
                elif line.data and not line.data.isspace():
                    yield line.number, _object(line.data, line.number)
        self.done = self.total


def _object(data: bytes, line: int) -> dict[str, Any] | InvalidRequest:
    try:
        value = strict_json.loads(data)
    except InvalidRequest as error:
        if "line" in error.values:
            error.values["line"] = line
        return error
    if isinstance(value, dict):
        return value
    return InvalidRequest("not_convertible", mark("this is of type {found}, not an object"), found=json_type(value))


def _too_long(limit: int) -> InvalidRequest:
    return InvalidRequest("line_too_long", mark("longer than {limit} bytes"), limit=limit)


class JsonArray:
    """Objects in one JSON array, or spread over lines one after the other."""

    def __init__(self, path: Path, max_line_bytes: int, encoding: str | None = None) -> None:
        self.path = path
        self.total = path.stat().st_size
        self.done = 0
        self.columns: tuple[str, ...] | None = None
        self.encoding = encoding or encoding_of(path)
        self._limit = max_line_bytes

    def __iter__(self) -> Iterator[Found]:
        with _opened(self.path, self.encoding) as stream:
            text = _Window(stream, self._limit)
            bracket = text.peek() == "["
            if bracket:
                text.skip(1)
            while text.peek() not in ("", "]"):
                line, item = text.line, text.item()
                self.done = stream.buffer.tell()  # type: ignore[attr-defined]
                yield line, _object(item.encode("utf-8", "replace"), line)
                if text.peek() == ",":
                    text.skip(1)
                elif bracket and text.peek() != "]":
                    raise _broken_json(text.line)
            if bracket and text.peek() != "]":
                raise _broken_json(text.line)
        self.done = self.total


class _Window:
    """The part of a text file that is being looked at."""

    def __init__(self, stream: TextIO, limit: int) -> None:
        self.line = 1
        self._stream = stream
        self._limit = limit
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space, or '' at the end."""
        while True:
            start = self._at
            self._at = _WHITE.match(self._text, start).end()  # type: ignore[union-attr]
            self.line += self._text.count("\n", start, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, characters: int) -> None:
        """Go on behind what `peek` showed."""
        self._at += characters

    def item(self) -> str:
        """The JSON value that begins here."""
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError):
                if len(self._text) - self._at > self._limit or not self._more():
                    raise _broken_json(self.line) from None
                continue
            if end == len(self._text) and self._more():
                continue  # a number could go on
            item = self._text[self._at : end]
            self.line += item.count("\n")
            self._at = end
            return item

    def _more(self) -> bool:
        """Read on, at least as much as is held already, so that a long item is looked at only a few times."""
        held = self._text[self._at :]
        try:
            more = self._stream.read(max(_CHUNK // 4, len(held)))
        except UnicodeDecodeError:
            raise _not_text(self.line, self._stream.encoding) from None
        self._text, self._at = held + more, 0
        return bool(more)


def _broken_json(line: int) -> InvalidRequest:
    sentence = mark("line {line}: the JSON that begins here can't be read: it is broken, cut off or too long")
    return InvalidRequest("invalid_json", sentence, line=line)


class CsvTable:
    """A table in text form with names in its first line. Cells are texts as they stand, formulas too; empty ones are absent.

    Any error of its quoting ends the reading: where the next row begins would be a guess.
    """

    def __init__(
        self, path: Path, max_line_bytes: int, encoding: str | None = None, delimiter: str | None = None
    ) -> None:
        self.path = path
        self.total = path.stat().st_size
        self.done = 0
        self.encoding = encoding or encoding_of(path)
        self._limit = max_line_bytes
        csv.field_size_limit(max_line_bytes)
        with _opened(path, self.encoding) as stream:
            lines = _bounded(stream, max_line_bytes)
            first = next((line for line in lines if line.strip()), "")
        self.delimiter = delimiter or _delimiter_of(first, path)
        self.columns: tuple[str, ...] | None = next((names for _, names in self._cells()), ())

    def __iter__(self) -> Iterator[Found]:
        names = self.columns or ()
        rows = self._cells()
        next(rows, None)
        for line, cells in rows:
            if len(cells) != len(names):
                sentence = mark("{found} cells, but the first line names {expected} columns")
                yield line, InvalidRequest("invalid_csv", sentence, found=len(cells), expected=len(names))
            else:
                yield line, {name: cell for name, cell in zip(names, cells, strict=True) if cell}
        self.done = self.total

    def _cells(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """(line where the row begins, its cells) of every row that is not blank; the names come first."""
        with _opened(self.path, self.encoding) as stream:
            reader = csv.reader(_bounded(stream, self._limit), delimiter=self.delimiter, strict=True)
            named = False
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    raise _broken_csv(line) from None
                self.done = stream.buffer.tell()  # type: ignore[attr-defined]
                if any(cell.strip() for cell in cells):
                    yield line, tuple(cells) if named else _column_names(cells)
                    named = True


def _broken_csv(line: int) -> InvalidRequest:
    sentence = mark(
        "the row that begins in line {line} can't be read: a quote is not closed, text follows a closing quote (quotes inside a "
        "cell are doubled), or a cell is too long"
    )
    return InvalidRequest("invalid_csv", sentence, line=line)


def _column_names(cells: list[str]) -> tuple[str, ...]:
    """The names without spaces around; a column without one is called as pandas would."""
    names = tuple(cell.strip() or f"Unnamed: {i}" for i, cell in enumerate(cells))
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest("invalid_columns", mark("Two columns have the name {name}."), name=quote(name))
    return names


def _bounded(stream: TextIO, limit: int) -> Iterator[str]:
    """Lines with their ends, none longer than `limit` characters."""
    number = 0
    try:
        while line := stream.readline(limit + 2):
            number += 1
            if len(line) > limit and not line.endswith(("\n", "\r")):
                raise _broken_csv(number)
            yield line
    except UnicodeDecodeError:
        raise _not_text(number + 1, stream.encoding) from None


def _not_text(line: int, encoding: str) -> InvalidRequest:
    sentence = mark("line {line} or one of the next is not {encoding} text")
    return InvalidRequest("invalid_encoding", sentence, line=line, encoding=encoding)


def _delimiter_of(line: str, path: Path) -> str:
    """What separates the names in the first line: tab, comma, semicolon or bar, whichever is there most outside of quotes."""
    if path.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    outside = "".join(line.split('"')[::2])
    return max(",\t;|", key=outside.count)


def _opened(path: Path, encoding: str) -> TextIO:
    """The file as text whose line ends stay as they are. Raises InvalidRequest(`invalid_encoding`) for an unknown encoding."""
    try:
        name = codecs.lookup(encoding).name
        return path.open(encoding="utf-8-sig" if name == "utf-8" else name, newline="")
    except LookupError:
        sentence = mark("{encoding} is not an encoding that is known.")
        raise InvalidRequest("invalid_encoding", sentence, encoding=quote(encoding)) from None


def encoding_of(path: Path) -> str:
    """'utf-8-sig', 'utf-16' or 'gb18030', whichever the whole file can be read in.

    Raises InvalidRequest(`invalid_encoding`) with the first byte that is not UTF-8 if it is none of them.
    """
    with path.open("rb") as stream:
        if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
    offset = _first_fault(path, "utf-8")
    if offset is None:
        return "utf-8-sig"
    if _first_fault(path, "gb18030") is None and _is_common_chinese(path, offset):
        return "gb18030"
    sentence = mark(
        "Byte {offset} of the file is neither UTF-8 nor GB18030 (GBK); name the encoding, or save as UTF-8."
    )
    raise InvalidRequest("invalid_encoding", sentence, offset=offset)


def _first_fault(path: Path, encoding: str) -> int | None:
    """The place of the first byte (about, for other encodings than UTF-8) that `encoding` can't have, or None."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = 0
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(_CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return offset - pending + error.start
            if not chunk:
                return None
            offset += len(chunk)


def _is_common_chinese(path: Path, offset: int) -> bool:
    """Whether the text from `offset` on is everyday Chinese: many encodings can be misread as GB18030, but not into that."""
    start = max(0, offset - (1 << 16))
    with path.open("rb") as stream:
        stream.seek(start)
        data = stream.read(1 << 17)
    # A line's begin is a character's begin; the first byte that is not UTF-8 may be the middle of one.
    text = data[data.rfind(b"\n", 0, offset - start) + 1 :].decode("gb18030", errors="ignore")
    beyond_ascii = "".join(c for c in text if c > "\x7f")
    return len(beyond_ascii.encode("gb2312", errors="ignore")) >= 2 * 0.8 * len(beyond_ascii)


class ParquetTable:
    """A Parquet file by batches of rows. Raises Misconfigured(`parquet_reader_missing`) without pyarrow."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            sentence = mark("Parquet files need one more package: pip install 'tunewright[parquet]'")
            raise Misconfigured("parquet_reader_missing", sentence) from None
        self.path = path
        self.encoding = "utf-8"
        self._fault = (pyarrow.ArrowException, OSError, ValueError)
        try:
            self._file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK)
        except self._fault:
            raise _broken_parquet() from None
        schema = self._file.schema_arrow
        self.total = self._file.metadata.num_rows
        self.done = 0
        self.columns: tuple[str, ...] | None = tuple(schema.names)
        plain = [field.name for field in schema if not isinstance(field.type, pyarrow.BaseExtensionType)]
        self._plain = plain
        for name in plain:
            if plain.count(name) > 1:
                raise InvalidRequest("invalid_columns", mark("Two columns have the name {name}."), name=quote(name))

    def only(self, names: list[str]) -> None:
        """Read these columns alone."""
        self._plain = [name for name in self._plain if name in names]

    def __iter__(self) -> Iterator[Found]:
        with self._file:
            batches = self._file.iter_batches(batch_size=_PARQUET_BATCH, columns=self._plain, use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                    rows = batch.to_pylist() if batch is not None else None
                except self._fault:
                    raise _broken_parquet() from None
                if rows is None:
                    return
                for row in rows:
                    self.done += 1
                    yield self.done, _without_nulls(row)


def _broken_parquet() -> InvalidRequest:
    return InvalidRequest("invalid_parquet", mark("The file is not Parquet, or damaged."))


def _without_nulls(node: Any) -> Any:
    """Parquet gives every object all the fields that any of them has; those that are null were not there."""
    if isinstance(node, dict):
        return {name: _without_nulls(item) for name, item in node.items() if item is not None}
    return [_without_nulls(item) for item in node] if isinstance(node, list) else node


Source = JsonLines | JsonArray | CsvTable | ParquetTable


def open_source(
    path: Path,
    max_line_bytes: int,
    *,
    file_format: str = "auto",
    encoding: str | None = None,
    delimiter: str | None = None,
) -> Source:
    """The reader for the file, by its bytes and then its name. Raises InvalidRequest for what has none, OSError."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if file_format == "auto":
        file_format = _format_of(head, path)
    if file_format == "parquet":
        return ParquetTable(path)
    if not head.strip():
        raise InvalidRequest("file_empty", mark("The file is empty."))
    if file_format == "csv":
        return CsvTable(path, max_line_bytes, encoding, delimiter)
    if file_format == "json" or encoding is not None:
        return JsonArray(path, max_line_bytes, encoding)
    return JsonLines(path, max_line_bytes)


def _format_of(head: bytes, path: Path) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    verdict = sniff(head, whole=len(head) < HEAD_BYTES)
    suffix = path.suffix.lower()
    if (
        verdict is not None
        and verdict.code == "unsupported_format"
        and verdict.values.get("format") not in ("CSV", "TSV")
    ):
        raise InvalidRequest(verdict.code, mark("The file is {format}; that can't be converted."), **verdict.values)
    if suffix in (".csv", ".tsv", ".tab"):
        return "csv"
    if verdict is not None and verdict.code == "invalid_encoding":
        return "json" if suffix in (".json", ".jsonl") else "csv"
    if verdict is None or verdict.code == "file_empty":
        return "json" if suffix == ".json" and head.lstrip().startswith(b"[") else "jsonl"
    return "json" if verdict.code == "not_jsonl" else "csv"
