"""What a whole file is, from its first megabyte: the faults for which no line number would help."""

import codecs
import re
from typing import Any, NamedTuple

from tunewright import strict_json
from tunewright.datasets.report import Patch
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark

HEAD_BYTES = 1 << 20

_MAGIC = (
    (b"PK\x03\x04", "ZIP"),
    (b"PK\x05\x06", "ZIP"),
    (b"\x1f\x8b", "GZIP"),
    (b"BZh", "BZIP2"),
    (b"\xfd7zXZ\x00", "XZ"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"Rar!\x1a\x07", "RAR"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"Obj\x01", "Avro"),
    (b"\x89HDF", "HDF5"),
    (b"SQLite format 3\x00", "SQLite"),
    (b"%PDF-", "PDF"),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "XLS"),
    (b"\x80\x02", "pickle"),
    (b"\x80\x03", "pickle"),
    (b"\x80\x04", "pickle"),
    (b"\x80\x05", "pickle"),
    (b"GGUF", "GGUF"),
)
_SPACE = b" \t\r\n"
_TABLES = ("CSV", "TSV", "Parquet")
_ONE_ROW_PER_LINE = Patch(rewrite="one_row_per_line")


class Verdict(NamedTuple):
    """A whole-file fault, as an error's parts."""

    code: str
    message: str
    values: dict[str, Any]
    patch: Patch | None = None
    documents: bool = False
    """Whether there are objects inside to be looked at (`documents.py`)."""


def sniff(head: bytes, whole: bool) -> Verdict | None:
    """The fault of a file that begins with `head` (all of it if `whole`), or None if its lines should be looked at."""
    if not head:
        return Verdict("file_empty", mark("The file is empty."), {})
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return _utf16()
    head = head.removeprefix(codecs.BOM_UTF8)
    if whole and not head.strip(_SPACE):
        return Verdict("file_empty", mark("The file holds only blank lines."), {})
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return _unsupported(_archive_name(head) if name == "ZIP" else name)
    if 0.25 < head[:4096].count(b"\x00") / len(head[:4096]) < 0.75:
        return _utf16()  # without a mark: every other byte of ASCII text is NUL
    return _text_fault(head.lstrip(_SPACE), whole)


def _utf16() -> Verdict:
    sentence = mark("The file must be UTF-8; it looks like {encoding}.")
    return Verdict("invalid_encoding", sentence, {"encoding": "UTF-16"}, Patch(rewrite="utf8"))


def _unsupported(name: str) -> Verdict:
    sentence = mark("The file is {format}, not JSONL; upload a text file with one JSON object per line.")
    if name in _TABLES:
        sentence = mark('The file is {format}, not JSONL; "tunewright datasets convert" makes rows of its columns.')
    return Verdict("unsupported_format", sentence, {"format": name})


def _archive_name(head: bytes) -> str:
    for inside, name in ((b"xl/", "XLSX"), (b"word/", "DOCX"), (b"ppt/", "PPTX")):
        if inside in head:
            return name
    return "ZIP"


def _text_fault(text: bytes, whole: bool) -> Verdict | None:
    """Text that is not one object per line. `text` begins with its first byte that is not white space."""
    first, newline, rest = text.partition(b"\n")
    if not newline and b"\r" in text.rstrip(_SPACE):
        sentence = mark("The lines end in CR alone (old Macintosh); one JSON object per line is expected.")
        return Verdict("not_jsonl", sentence, {}, _ONE_ROW_PER_LINE)
    first = first.rstrip(_SPACE)
    if first.startswith((b"{", b"[")):
        return _bracket_fault(first, rest.lstrip(_SPACE), complete=bool(newline) or whole)
    if first.startswith(b"<"):
        return _unsupported("HTML / XML")
    if not first.startswith((b'"', b"'", b"/", b"#")) or re.match(rb'"[^"\\]*"[,\t]', first):
        try:
            strict_json.loads(first)
        except InvalidRequest:
            if b"\t" in first and b"{" not in first:
                return _unsupported("TSV")
            if b"," in first and b"{" not in first:
                return _unsupported("CSV")
    return None


def _goes_on(second: bytes) -> bool:
    """Whether the second line belongs to an object of the first: unless it looks like a row of its own."""
    line = second.partition(b"\n")[0].rstrip(_SPACE)
    return (
        not line.startswith(b"{")
        or line in (b"{", b"{}")
        or (line.endswith(b",") and len(line) < len(second.rstrip(_SPACE)))
    )


def _bracket_fault(first: bytes, second: bytes, complete: bool) -> Verdict | None:
    """One JSON array, or one object spread over many lines."""
    array = Verdict(
        "not_jsonl",
        mark("The file is one JSON array; write one object per line, without brackets and commas around."),
        {},
        _ONE_ROW_PER_LINE,
        documents=True,
    )
    if not complete:  # the first line alone is over a megabyte
        return array if re.match(rb"\[\s*\{", first) else None
    try:
        value = strict_json.loads(first)
    except InvalidRequest as error:
        if first.startswith(b"["):
            return array if error.values.get("reason") == "cut_off" or re.match(rb"\[\s*\{", first) else None
        if error.values.get("reason") == "cut_off" and second and _goes_on(second):
            sentence = mark("The JSON is spread over many lines; write each object on a line of its own.")
            return Verdict("not_jsonl", sentence, {}, _ONE_ROW_PER_LINE, documents=True)
        return None
    if isinstance(value, list) and (not second or any(isinstance(item, dict) for item in value)):
        return array
    return None
