"""The exact check of one line: bytes, JSON, shape, and the rules of its kind. It decides; what is faster must agree with it."""

from typing import Any, NamedTuple

from tunewright import strict_json
from tunewright.datasets.importing import importers
from tunewright.datasets.mending import broken_json as mending
from tunewright.datasets.report import Edit, Patch, Row, json_type
from tunewright.datasets.rules import hints, messages, preferences
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark

_OTHER_STYLES = (
    ({"prompt", "completion"}, "prompt / completion"),
    ({"prompt", "response"}, "prompt / response"),
    ({"instruction"}, "instruction / output (Alpaca)"),
    ({"conversations"}, "conversations (ShareGPT)"),
    ({"chosen", "rejected"}, "chosen / rejected (TRL)"),
    ({"question", "answer"}, "question / answer"),
    ({"text"}, "text"),
)


class Checked(NamedTuple):
    """What a line is: `value` is None unless it holds an object, `kind` None unless that is a row of some kind.

    `blank` lines are no rows.
    """

    kind: str | None = None
    value: dict[str, Any] | None = None
    blank: bool = False


def check_line(row: Row, data: bytes, *, training: bool, texts: bool = True) -> Checked:
    """Complain about one line: `data` is it without the newline (a CR may be left at its end).

    Unless `training`, any object will do; `texts` also looks for what is odd in texts (`hints.py`). Which kinds may stand in
    one file together is not looked at here.
    """
    data = without_return(row, data)
    if not data or data.isspace():
        row.warn("blank_line", mark("line {line} is blank and is skipped"), (), patch=Patch(drop=True))
        return Checked(blank=True)
    try:
        value = strict_json.loads(data)
    except InvalidRequest as error:
        _report_json(row, data, error)
        return Checked()
    if not isinstance(value, dict):
        sentence = mark("line {line} is of type {found}; an object {example} is expected")
        row.error("line_not_object", sentence, (), found=json_type(value), example='{"messages": [...]}')
        return Checked()
    return Checked(_check_row(row, data, value, texts) if training else None, value)


def without_return(row: Row, data: bytes) -> bytes:
    """`data` without a CR at its end, for which there is a warning."""
    if not data.endswith(b"\r"):
        return data
    patch = Patch(edits=(Edit(offset=len(data) - 1, length=1, text=""),))
    row.warn("crlf", mark("line {line} ends in CR LF; LF alone is usual"), (), patch=patch)
    return data[:-1]


def _check_row(row: Row, data: bytes, value: dict[str, Any], texts: bool) -> str | None:
    if preferences.is_preference(value):
        kind = preferences.PREFERENCE
        preferences.check_row(row, value)
    elif "messages" in value:
        kind = messages.check_row(row, value)
    else:
        _report_other_style(row, value)
        return None
    if texts:
        hints.look(row, data, value)
    return kind


# The same codes as for a request body, but in sentences that name the line of the file.
_JSON_SENTENCES = {
    "duplicate_key": mark('line {line}: the key "{key}" appears more than once in one object'),
    "invalid_number": mark("line {line}: {number} is not a number that JSON and this server take"),
    "nesting_too_deep": mark("line {line}: objects and lists are nested deeper than {limit} levels"),
    "too_many_fields": mark("line {line}: an object has {found} keys; at most {limit} are allowed"),
}


def _report_json(row: Row, data: bytes, error: InvalidRequest) -> None:
    code, sentence, values = worded(data, row.byte_offset, error)
    patch = Patch(rewrite="utf8") if "encoding" in values else None
    if code == "invalid_json":
        patch = mending.mend(data)
    offset = row.byte_offset + _number(error.values.get("offset"))
    row.reporter.add("error", code, sentence, line=row.line, byte_offset=offset, patch=patch, **values)


def worded(data: bytes, byte_offset: int, error: InvalidRequest) -> tuple[str, str, dict[str, Any]]:
    """Code, sentence and values of what makes `data`, which begins at `byte_offset` of the file, no JSON. The line is not among
    the values; `encoding` is, if it is one that a repair knows."""
    values: dict[str, Any] = {name: value for name, value in error.values.items() if name not in ("line", "offset")}
    if values.get("reason") != "not_utf8":
        return error.code, _JSON_SENTENCES.get(error.code, error.message), values
    values["offset"] = byte_offset + _number(error.values.get("offset"))
    sentence = mark("line {line}, byte {offset} of the file is not UTF-8")
    if _looks_like_gb18030(data):
        sentence = mark("line {line}, byte {offset} of the file is not UTF-8; it looks like {encoding}: save as UTF-8")
        values["encoding"] = "GB18030 (GBK)"
    return "invalid_encoding", sentence, values


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
    converted = importers.row_of(value)
    patch = None if converted is None else Patch(operations=({"op": "replace", "path": "", "value": converted},))
    for keys, style in _OTHER_STYLES:
        if keys <= value.keys():
            sentence = mark("line {line} is written in the style {style}; expected: {example}")
            row.error("wrong_format", sentence, (), patch=patch, style=style, example='{"messages": [...]}')
            return
    row.error("missing_field", mark("line {line}, {field} is missing"), ("messages",), patch=patch)
