"""The check of a data file: one pass, bounded memory, every problem counted, the first ones with their place.

First what the file is as a whole (`sniff.py`), then line by line: bytes, JSON, shape, and the rules of the row's kind.
Nothing here needs a tokenizer: lengths in tokens are the business of the job that knows its base model.
"""

import codecs
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tunewright import strict_json
from tunewright.datasets import hints, messages, preferences
from tunewright.datasets.lines import Line, read_lines
from tunewright.datasets.messages import CHAT, FUNCTION, IMAGE_GENERATION, IMAGE_UNDERSTANDING
from tunewright.datasets.records import FINE_TUNE_PURPOSES
from tunewright.datasets.report import Report, Reporter, Row, json_type
from tunewright.datasets.sniff import HEAD_BYTES, sniff
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark

MAX_ROWS = 5_000_000
MAX_HASHES = 500_000
"""Rows whose hash is kept to find duplicates: 64 bits each, about 40 MB."""
ADVISED_ROWS = 100
_BUFFER_BYTES = 1 << 18

_PURPOSE_KIND = {
    "fine-tune-vision-cogview": IMAGE_GENERATION,
    "fine-tune-vision-cogvlm": IMAGE_UNDERSTANDING,
}
_OTHER_STYLES = (
    ({"prompt", "completion"}, "prompt / completion"),
    ({"prompt", "response"}, "prompt / response"),
    ({"instruction"}, "instruction / output (Alpaca)"),
    ({"conversations"}, "conversations (ShareGPT)"),
    ({"chosen", "rejected"}, "chosen / rejected (TRL)"),
    ({"question", "answer"}, "question / answer"),
    ({"text"}, "text"),
)


class Limits(Protocol):
    """What the check reads of the settings."""

    @property
    def max_line_bytes(self) -> int: ...
    @property
    def min_training_rows(self) -> int: ...


def check(path: Path, purpose: str, limits: Limits) -> Report:
    """The report on the file at `path`, whatever bytes it holds. Raises only OSError, if the file can't be read.

    For `batch` the lines need to be JSON objects; for the fine-tune purposes they must be rows to train on.
    """
    reporter = Reporter()
    size = path.stat().st_size
    with path.open("rb", buffering=_BUFFER_BYTES) as stream:
        head = stream.read(HEAD_BYTES)
        verdict = sniff(head, whole=len(head) == size)
        if verdict is not None:
            reporter.add("error", verdict.code, verdict.message, **verdict.values)
            return reporter.report(None, 0, size)
        stream.seek(0)
        if head.startswith(codecs.BOM_UTF8):
            stream.seek(len(codecs.BOM_UTF8))
            reporter.add(
                "warning", "byte_order_mark", mark("The file begins with a byte order mark (BOM); it is dropped.")
            )
        lines = _Lines(reporter, purpose, limits)
        lines.read(stream)
    lines.sum_up()
    return reporter.report(lines.kind, lines.rows, size)


class _Lines:
    """The pass over the lines: what is counted, and which kind the rows agreed on."""

    def __init__(self, reporter: Reporter, purpose: str, limits: Limits) -> None:
        self.reporter = reporter
        self.purpose = purpose
        self.training = purpose in FINE_TUNE_PURPOSES
        self.limits = limits
        self.kind: str | None = None
        self.rows = 0
        self._hashes: set[int] = set()

    def read(self, stream: BinaryIO) -> None:
        """Check every line."""
        for line in read_lines(stream, self.limits.max_line_bytes):
            if line.number > MAX_ROWS:
                sentence = mark("The file has more than {limit} lines.")
                self.reporter.add("error", "too_many_examples", sentence, limit=MAX_ROWS)
                return
            self._read_line(line)

    def _read_line(self, line: Line) -> None:
        row = Row(self.reporter, line.number, line.byte_offset)
        data = line.data
        if data is None:
            self.rows += 1
            sentence = mark("line {line} is longer than {limit} bytes")
            row.error("line_too_long", sentence, (), limit=self.limits.max_line_bytes)
            return
        if data.endswith(b"\r"):
            data = data[:-1]
            row.warn("crlf", mark("line {line} ends in CR LF; LF alone is usual"), ())
        if not data or data.isspace():
            row.warn("blank_line", mark("line {line} is blank and is skipped"), ())
            return
        self.rows += 1
        try:
            value = strict_json.loads(data)
        except InvalidRequest as error:
            _report_json(row, data, error)
            return
        if not isinstance(value, dict):
            sentence = mark("line {line} is of type {found}; an object {example} is expected")
            row.error("line_not_object", sentence, (), found=json_type(value), example='{"messages": [...]}')
        elif self.training:
            self._check_row(row, data, value)

    def _check_row(self, row: Row, data: bytes, value: dict[str, Any]) -> None:
        self._note_duplicate(row, data)
        if preferences.is_preference(value):
            kind = preferences.PREFERENCE
            preferences.check_row(row, value)
        elif "messages" in value:
            kind = messages.check_row(row, value)
        else:
            _report_other_style(row, value)
            return
        self._agree(row, kind)
        hints.look(row, data, value)

    def _note_duplicate(self, row: Row, data: bytes) -> None:
        digest = hash(data)
        if digest in self._hashes:
            row.warn("duplicate_row", mark("line {line} repeats an earlier line"), ())
        elif len(self._hashes) < MAX_HASHES:
            self._hashes.add(digest)

    def _agree(self, row: Row, kind: str) -> None:
        """One file, one kind; rows without tools may stand among function rows, text rows among image questions."""
        if self.kind is None or self.kind == kind:
            self.kind = kind
        elif {self.kind, kind} in ({CHAT, FUNCTION}, {CHAT, IMAGE_UNDERSTANDING}):
            self.kind = kind if self.kind == CHAT else self.kind
        else:
            sentence = mark(
                "line {line} is a row of kind {found}, the lines before are {expected}; use one file for each"
            )
            row.error("wrong_format", sentence, (), found=kind, expected=self.kind)

    def sum_up(self) -> None:
        """What can be said only after the last line."""
        if self.rows == 0 and self.reporter.errors == 0:
            self.reporter.add("error", "file_empty", mark("The file holds only blank lines."))
            return
        if not self.training:
            return
        needed = self.limits.min_training_rows
        if self.rows < needed:
            sentence = mark("The file has {found} rows; at least {needed} are needed.")
            self.reporter.add("error", "too_few_examples", sentence, found=self.rows, needed=needed)
        elif self.rows < ADVISED_ROWS:
            sentence = mark("The file has {found} rows; good results usually need some hundreds.")
            self.reporter.add("warning", "few_rows", sentence, found=self.rows)
        wanted = _PURPOSE_KIND.get(self.purpose)
        if wanted is not None and self.kind is not None and self.kind != wanted:
            sentence = mark("The purpose {purpose} is for rows of kind {expected}; these are {found}.")
            self.reporter.add(
                "warning", "purpose_mismatch", sentence, purpose=self.purpose, expected=wanted, found=self.kind
            )


# The same codes as for a request body, but in sentences that name the line of the file.
_JSON_SENTENCES = {
    "duplicate_key": mark('line {line}: the key "{key}" appears more than once in one object'),
    "invalid_number": mark("line {line}: {number} is not a number that JSON and this server take"),
    "nesting_too_deep": mark("line {line}: objects and lists are nested deeper than {limit} levels"),
    "too_many_fields": mark("line {line}: an object has {found} keys; at most {limit} are allowed"),
}


def _report_json(row: Row, data: bytes, error: InvalidRequest) -> None:
    values: dict[str, Any] = {name: value for name, value in error.values.items() if name not in ("line", "offset")}
    offset = row.byte_offset + _number(error.values.get("offset"))
    if values.get("reason") == "not_utf8":
        if _looks_like_gb18030(data):
            sentence = mark(
                "line {line}, byte {offset} of the file is not UTF-8; it looks like {encoding}: save as UTF-8"
            )
            values["encoding"] = "GB18030 (GBK)"
        else:
            sentence = mark("line {line}, byte {offset} of the file is not UTF-8")
        code = "invalid_encoding"
        values["offset"] = offset
    else:
        code = error.code
        sentence = _JSON_SENTENCES.get(code, error.message)
    row.reporter.add("error", code, sentence, line=row.line, byte_offset=offset, **values)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _looks_like_gb18030(data: bytes) -> bool:
    """Decodes as GB18030, and into common Chinese characters rather than chance hits."""
    try:
        text = data[:65536].decode("gb18030", errors="strict" if len(data) <= 65536 else "ignore")
    except UnicodeDecodeError:
        return False
    beyond_ascii = [c for c in text if c > "\x7f"]
    common = sum(
        "\u4e00" <= c <= "\u9fa5" or "\u3000" <= c <= "\u303f" or "\uff00" <= c <= "\uff5e" for c in beyond_ascii
    )
    return common * 10 >= len(beyond_ascii) * 9


def _report_other_style(row: Row, value: dict[str, Any]) -> None:
    """Neither `messages` nor a preference: say which other style it looks like, if one."""
    for keys, style in _OTHER_STYLES:
        if keys <= value.keys():
            sentence = mark("line {line} is written in the style {style}; expected: {example}")
            row.error("wrong_format", sentence, (), style=style, example='{"messages": [...]}')
            return
    row.missing(("messages",))
