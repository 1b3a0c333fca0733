"""JSON as the rest of the world reads it: what Python's parser lets through by mistake is refused here.

Refused: duplicate keys, NaN and infinities (also `1e999`), numbers over 32 characters, lone surrogates, NUL, nesting over
32 levels, more than 10,000 keys in one object, anything but UTF-8.

msgspec parses (it is fast, and strict in all but four things); counts over the raw bytes prove that the four did not
happen. Where it fails or a proof does, Python's own scanner with hooks goes over the same bytes: it decides, and
knows the position. So the hooks are the rule and msgspec is a short cut that must agree with them (a property test compares).
"""

import json
import re
from typing import Any, NoReturn

import msgspec

from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark

MAX_DEPTH = 32
MAX_KEYS = 10_000
MAX_NUMBER_CHARACTERS = 32


def loads(data: bytes, max_depth: int = MAX_DEPTH) -> Any:
    """The value that `data` holds: dict, list, str, int, float, bool or None.

    Raises InvalidRequest; `values` hold the named places:
    - `invalid_json`: `line`, `column` (from 1, in characters), `offset` (from 0, in bytes), `reason` (one word)
    - `invalid_unicode`: the same for an escape; `offset` (and `line`) for bytes that are not UTF-8
    - `duplicate_key`: `key`; `invalid_number`: `number`; `nesting_too_deep`: `limit`; `too_many_fields`: `limit`, `found`
    """
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decide(data, max_depth)
    if _proven(data, value, max_depth):
        return value
    return _decide(data, max_depth)


def _proven(data: bytes, value: Any, max_depth: int) -> bool:
    """Whether `value`, as msgspec read it, also keeps the rules that msgspec does not know. False may mean: not sure."""
    if data.count(b"[") + data.count(b"{") > max_depth and _too_deep(data, max_depth):
        return False
    encoded = msgspec.json.encode(value)
    if b"\\u00" in data:  # NUL, or an escaped quote that upsets the count below
        if b"\\u0000" in data or count_quotes(data) != count_quotes(encoded):
            return False
    elif data.count(b'"') != encoded.count(b'"'):  # a repeated key was dropped, and its quotes with it
        return False
    if len(data) > 4 * MAX_KEYS and data.count(b":") > MAX_KEYS and _widest_object(value) > MAX_KEYS:
        return False
    return not has_long_number(data)


# Every byte a number can hold becomes "0", every other one a space.
_NUMBER_BYTES = bytes(ord("0") if chr(b) in "0123456789+-.eE" else ord(" ") for b in range(256))
_LONG_NUMBER = b"0" * (MAX_NUMBER_CHARACTERS + 1)
_STRIDE = 8
_BRACKETS_ALIKE = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE = bytes(b for b in range(256) if b not in b'"[]{}')


def has_long_number(data: bytes) -> bool:
    """True also for long runs of digits inside a text: the slow path tells them apart.

    A run of 33 bytes touches four or more consecutive samples of every eighth byte, so most texts need no full pass.
    """
    samples = data[::_STRIDE].translate(_NUMBER_BYTES)
    if b"0" * (MAX_NUMBER_CHARACTERS // _STRIDE) not in samples:
        return False
    return _LONG_NUMBER in data.translate(_NUMBER_BYTES)


def _without_escapes(data: bytes) -> bytes:
    if b"\\" not in data:
        return data
    return data.replace(b"\\\\", b"").replace(b'\\"', b"")


def count_quotes(data: bytes) -> int:
    """Quotes that open or close a string (not those inside one)."""
    if b"\\\\" in data:
        data = data.replace(b"\\\\", b"")
    return data.count(b'"') - data.count(b'\\"')


def _too_deep(data: bytes, max_depth: int) -> bool:
    """Whether brackets nest deeper than `max_depth`, in a few linear passes and without recursion.

    Each pass takes off the innermost pairs, so a text of height h is empty after h passes. For text with brackets left open
    the answer may be False up to twice the limit; the parser refuses such text anyway.
    """
    structure = _without_escapes(data).translate(None, delete=_NOT_STRUCTURE).translate(_BRACKETS_ALIKE)
    brackets = b"".join(structure.split(b'"')[::2])
    for _ in range(max_depth):
        if b"[]" not in brackets:
            break
        brackets = brackets.replace(b"[]", b"")
    return b"[]" in brackets or brackets.count(b"[") > max_depth


def _widest_object(value: Any) -> int:
    """Keys of the object with the most of them, anywhere in the tree."""
    widest = 0
    waiting: list[Any] = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            widest = max(widest, len(node))
            waiting.extend(child for child in node.values() if isinstance(child, (dict, list)))
        elif isinstance(node, list):
            waiting.extend(child for child in node if isinstance(child, (dict, list)))
    return widest


def _decide(data: bytes, max_depth: int) -> Any:
    """The slow, exact way: parse with hooks, or raise with a position."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            "invalid_unicode",
            mark("byte {offset}: the text is not valid UTF-8; save it as UTF-8"),
            line=data.count(b"\n", 0, error.start) + 1,
            offset=error.start,
            reason="not_utf8",
        ) from None
    if _too_deep(data, max_depth):
        _refuse_depth(max_depth)
    try:
        value = _HOOKED.decode(text)
    except json.JSONDecodeError as error:
        _refuse_syntax(text, error)
    except RecursionError:
        _refuse_depth(max_depth)
    if "\\u" in text:
        _refuse_bad_escapes(text)
    return value


def _refuse_depth(max_depth: int) -> NoReturn:
    raise InvalidRequest(
        "nesting_too_deep", mark("objects and lists are nested deeper than {limit} levels"), limit=max_depth
    ) from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(pairs) > MAX_KEYS:
        raise InvalidRequest(
            "too_many_fields",
            mark("an object has {found} keys; at most {limit} are allowed"),
            found=len(pairs),
            limit=MAX_KEYS,
        )
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequest(
                    "duplicate_key", mark('the key "{key}" appears more than once in one object'), key=quote(key)
                )
            seen.add(key)
    return result


def _whole_number(digits: str) -> int:
    _refuse_long_number(digits)
    return int(digits)


def _decimal_number(digits: str) -> float:
    _refuse_long_number(digits)
    number = float(digits)
    if number - number != 0.0:
        raise InvalidRequest("invalid_number", mark("the number {number} is too large"), number=quote(digits))
    return number


def _refuse_long_number(digits: str) -> None:
    if len(digits) > MAX_NUMBER_CHARACTERS:
        raise InvalidRequest(
            "invalid_number",
            mark("the number {number} has {length} characters; at most {limit} are allowed"),
            number=quote(digits),
            length=len(digits),
            limit=MAX_NUMBER_CHARACTERS,
        )


def _constant(name: str) -> NoReturn:
    raise InvalidRequest("invalid_number", mark("{number} is not a JSON number"), number=name)


_HOOKED = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=_whole_number, parse_float=_decimal_number, parse_constant=_constant
)

# An escape that needs a look: NUL, a surrogate pair (fine), half a pair. Escaped backslashes before it are stepped over.
_SUSPECT_ESCAPE = re.compile(
    r"(?<!\\)(?:\\\\)*\\u(?:(?P<nul>0000)|[dD][89abAB][0-9a-fA-F]{2}(?P<pair>\\u[dD][c-fC-F][0-9a-fA-F]{2})?"
    r"|[dD][c-fC-F][0-9a-fA-F]{2})"
)


def _refuse_bad_escapes(text: str) -> None:
    for found in _SUSPECT_ESCAPE.finditer(text):
        if found["pair"]:
            continue
        where = _place(text, text.rindex("\\u", found.start(), found.end()))
        if found["nul"]:
            sentence = mark("line {line}, column {column}: the character NUL (\\u0000) is not allowed in a text")
            raise InvalidRequest("invalid_unicode", sentence, **where, reason="nul")
        sentence = mark("line {line}, column {column}: half of a surrogate pair, which is no character")
        raise InvalidRequest("invalid_unicode", sentence, **where, reason="lone_surrogate")


def _place(text: str, position: int) -> dict[str, Any]:
    return {
        "line": text.count("\n", 0, position) + 1,
        "column": position - text.rfind("\n", 0, position),
        "offset": len(text[:position].encode()),
    }


_SYNTAX = {
    "empty": mark("line {line}, column {column}: not valid JSON: there is nothing here"),
    "cut_off": mark("line {line}, column {column}: not valid JSON: the text ends too early; it may be cut off"),
    "byte_order_mark": mark("line {line}, column {column}: not valid JSON: a byte order mark; save without BOM"),
    "trailing_data": mark(
        "line {line}, column {column}: not valid JSON: more text follows after the end of the value (one value is allowed)"
    ),
    "control_character": mark(
        "line {line}, column {column}: not valid JSON: a raw control character (line break, tab, ...) inside a text; "
        "write it as an escape such as \\n or \\t"
    ),
    "escape": mark("line {line}, column {column}: not valid JSON: an unknown escape after a backslash"),
    "trailing_comma": mark("line {line}, column {column}: not valid JSON: a comma before a closing bracket"),
    "single_quotes": mark("line {line}, column {column}: not valid JSON: texts and keys need double quotes"),
    "comment": mark("line {line}, column {column}: not valid JSON: comments are not allowed"),
    "python_word": mark(
        "line {line}, column {column}: not valid JSON: {found} is not JSON; write true, false or null in lower case"
    ),
    "colon": mark("line {line}, column {column}: not valid JSON: a colon is expected after the key"),
    "comma": mark(
        "line {line}, column {column}: not valid JSON: a comma or a closing bracket is expected; "
        'quotes inside a text are written as \\"'
    ),
    "key": mark("line {line}, column {column}: not valid JSON: a key in double quotes is expected"),
    "value": mark("line {line}, column {column}: not valid JSON: a value is expected"),
}
SYNTAX_SENTENCES = _SYNTAX
"""Why a text is not JSON: the `reason` of an `invalid_json` -> its sentence, with places for `line` and `column`."""
_PYTHON_WORD = re.compile(r"True|False|None|TRUE|FALSE|NULL|Null|undefined|nan|inf")


def _refuse_syntax(text: str, error: json.JSONDecodeError) -> NoReturn:
    reason = _reason(text, error)
    word = _PYTHON_WORD.match(text, error.pos)
    raise InvalidRequest(
        "invalid_json", _SYNTAX[reason], **_place(text, error.pos), reason=reason, found=word[0] if word else ""
    ) from None


def _reason(text: str, error: json.JSONDecodeError) -> str:
    """Which sentence of `_SYNTAX` explains the error, by the scanner's own word and by what stands there."""
    if text.startswith("\ufeff"):
        return "byte_order_mark"
    for start, reason in (
        ("Unterminated string", "cut_off"),
        ("Invalid control", "control_character"),
        ("Invalid \\", "escape"),
        ("Illegal trailing comma", "trailing_comma"),
    ):
        if error.msg.startswith(start):
            return reason
    rest = text[error.pos :].lstrip(" \t\r\n")[:16]
    if not rest:
        return "cut_off" if text.strip(" \t\r\n") else "empty"
    if rest[0] in "/#":
        return "comment"
    if error.msg.startswith("Extra data"):
        return "trailing_data"
    if rest[0] == "'":
        return "single_quotes"
    if rest[0] in "]}" and text[: error.pos].rstrip(" \t\r\n").endswith(","):
        return "trailing_comma"
    if _PYTHON_WORD.match(rest):
        return "python_word"
    if error.msg.startswith("Expecting ','"):
        return "comma"
    if error.msg.startswith("Expecting ':'"):
        return "colon"
    return "key" if error.msg.startswith("Expecting property") else "value"
