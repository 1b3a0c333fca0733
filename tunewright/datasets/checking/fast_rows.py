"""The happy path of the check: typed decoding of chat and function rows that are beyond doubt.

An answer here means that `line_check.check_line` would find nothing to say (about bytes, JSON and rules; not about what texts
hold). Every doubt goes there instead: it alone decides and complains. A property test compares the two.

msgspec proves types, fields, UTF-8 and surrogates. What it does not prove is counted: a repeated key leaves more quotes in the
bytes than the decoded row accounts for. Depth and keys are bounded by the types; numbers can only be weights.
"""

import itertools
import operator
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from tunewright import strict_json
from tunewright.datasets.checking.row_facts import (
    MAX_MESSAGES,
    Facts,
    Shape,
    answer_text,
    digest_of,
    shape_of,
    tools_digest,
)
from tunewright.datasets.report import Reporter, Row
from tunewright.datasets.rules import schemas, simple_tools, tools
from tunewright.datasets.rules.messages import CHAT, FUNCTION
from tunewright.errors import InvalidRequest

_MAX_KNOWN = 2000
"""Orders of roles, and lists of tools, that are remembered; beyond that all are forgotten and learned again."""
_MAX_TOOLS_BYTES = 1 << 16
_OptionalText = str | None | UnsetType


class _System(msgspec.Struct, tag_field="role", tag="system", forbid_unknown_fields=True, gc=False):
    content: str


class _User(msgspec.Struct, tag_field="role", tag="user", forbid_unknown_fields=True, gc=False):
    content: str


class _Assistant(msgspec.Struct, tag_field="role", tag="assistant", forbid_unknown_fields=True, gc=False):
    content: str


_PlainMessage = _System | _User | _Assistant


class _PlainRow(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    messages: list[_PlainMessage]


class _Function(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    name: str
    arguments: str


class _Call(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    id: str
    function: _Function
    type: str | UnsetType = UNSET


class _RichSystem(msgspec.Struct, tag_field="role", tag="system", forbid_unknown_fields=True, gc=False):
    content: str


class _RichUser(msgspec.Struct, tag_field="role", tag="user", forbid_unknown_fields=True, gc=False):
    content: str


class _RichAssistant(msgspec.Struct, tag_field="role", tag="assistant", forbid_unknown_fields=True, gc=False):
    content: _OptionalText = UNSET
    tool_calls: list[_Call] | UnsetType | None = UNSET
    reasoning_content: _OptionalText = UNSET
    weight: int | float | UnsetType | None = UNSET


class _RichTool(msgspec.Struct, tag_field="role", tag="tool", forbid_unknown_fields=True, gc=False):
    content: str
    tool_call_id: _OptionalText = UNSET
    name: _OptionalText = UNSET


class _RichRow(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    messages: list[_RichSystem | _RichUser | _RichAssistant | _RichTool]
    tools: Raw = Raw()
    parallel_tool_calls: bool | UnsetType | None = UNSET


_PLAIN = msgspec.json.Decoder(_PlainRow)
_RICH = msgspec.json.Decoder(_RichRow)
_REFUSED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_LETTERS = {_System: "s", _User: "u", _Assistant: "a"}
_messages_of = operator.attrgetter("messages")
_content_of = operator.attrgetter("content")
_is_regular = operator.attrgetter("regular")
_QUOTES_PER_MESSAGE = 8  # "role": "user", "content": "..."
_QUOTES_PER_ROW = 2  # "messages"


class PlainRows(NamedTuple):
    """Rows of nothing but roles and contents, column by column. `contents` are those of all rows, one after another."""

    shapes: list[Shape]
    contents: list[str]


def plain_rows(block: bytes, lines: int, quotes: int) -> PlainRows | None:
    """The rows of a block of chat, or None if one of them is in doubt or not plain.

    `lines` and `quotes` (those that open or close a text) were counted in the block's bytes; every newline in it, but for the
    last byte, stands between "}" and "{", and it holds no escaped NUL.
    """
    try:
        rows = _PLAIN.decode_lines(block)
    except _REFUSED:
        return None
    # Between two rows there is one newline at most, since it has brackets on both sides: so each row is one line.
    if len(rows) != lines:
        return None
    # No loop of Python over rows or messages: the decoding is hardly slower than one would be.
    messages = list(map(_messages_of, rows))
    shapes = _plain_shapes_of(messages)
    contents = list(map(_content_of, itertools.chain.from_iterable(messages)))
    if quotes != _QUOTES_PER_ROW * lines + _QUOTES_PER_MESSAGE * len(contents):
        return None
    if not all(contents) or any(map(str.isspace, contents)) or not all(map(_is_regular, shapes)):
        return None
    return PlainRows(shapes, contents)


_plain_shapes: dict[tuple[type, ...], Shape] = {}


def _plain_shapes_of(rows: list[list[_PlainMessage]]) -> list[Shape]:
    types: list[tuple[type, ...]] = list(map(tuple, map(map, itertools.repeat(type), rows)))  # type: ignore[arg-type]
    shapes = list(map(_plain_shapes.get, types))
    return [shape or _learn_shape(each) for shape, each in zip(shapes, types, strict=True)]


def _learn_shape(types: tuple[type, ...]) -> Shape:
    shape = shape_of("".join(map(_LETTERS.__getitem__, types)))
    if len(types) <= MAX_MESSAGES:
        if len(_plain_shapes) >= _MAX_KNOWN:
            _plain_shapes.clear()
        _plain_shapes[types] = shape
    return shape


def rich_rows(block: bytes, lines: int, quotes: int) -> list[Facts | None] | None:
    """Every row of a block, None for one in doubt; None at all if the block is. The arguments are those of `plain_rows`."""
    try:
        rows = _RICH.decode_lines(block)
    except _REFUSED:
        return None
    if len(rows) != lines:
        return None
    found: list[Facts | None] = []
    total = 0
    for row in rows:
        facts, expected = _read(row)
        if expected < 0:
            return None
        found.append(facts)
        total += expected
    return found if quotes == total else None


def one_row(line: bytes) -> Facts | None:
    """The row of one line (without newline or CR), or None if it is in doubt."""
    if b"\\u0000" in line:
        return None
    try:
        row = _RICH.decode(line)
    except _REFUSED:
        return None
    facts, expected = _read(row)
    return facts if facts is not None and expected == strict_json.count_quotes(line) else None


def _read(row: _RichRow) -> tuple[Facts | None, int]:
    """(the facts, unless the row is in doubt; the quotes that it accounts for, or -1 if that can't be said)."""
    known = _known_tools(row.tools)
    if known is None:
        return None, -1
    messages = row.messages
    quotes = _QUOTES_PER_ROW + known.quotes + _QUOTES_PER_MESSAGE * len(messages)
    if row.parallel_tool_calls is not UNSET:
        quotes += 2
    reader = _Reader(known)
    code = ""
    texts: list[str] = []
    # One loop for all, without calls for the messages that most are: it runs for every message of a function file.
    for message in messages:
        content = message.content
        if isinstance(message, _RichAssistant):
            calls = message.tool_calls
            if calls is not UNSET or message.reasoning_content is not UNSET or message.weight is not UNSET:
                code += "c" if calls else "a"
                texts.append(reader.read_answer(message, content, calls))
                continue
            code += "a"
            reader.teaches = True
            if content is UNSET or content is None:
                quotes -= 4 if content is UNSET else 2
                content = ""
        elif isinstance(message, _RichTool):
            code += "t"
            texts.append(message.content)
            if message.tool_call_id in reader.known and message.name is UNSET:
                quotes += 4
                reader.waiting.discard(message.tool_call_id)
            else:
                reader.read_reply(message)
            continue
        else:
            code += "u" if isinstance(message, _RichUser) else "s"
        if reader.waiting:
            reader.doubtful = True
        texts.append(content)  # type: ignore[arg-type]
    shape = shape_of(code)
    quotes += reader.quotes
    if reader.doubtful or not reader.teaches or not shape.regular or not all(texts) or any(map(str.isspace, texts)):
        return None, quotes
    kind = FUNCTION if reader.calls or known.digest or "t" in code else CHAT
    characters = list(map(len, texts))
    trained = characters[-1] if shape.single else sum(map(characters.__getitem__, shape.answers))
    marks = reader.marks
    return Facts(
        kind,
        shape,
        texts,
        sum(characters) - marks,
        texts[-1],
        trained - marks - reader.untrained,
        known.digest,
        reader.calls,
        reader.reasoning,
        reader.weights,
    ), quotes


class _Reader:
    """Reads the messages of one row that have more than a role and a content."""

    __slots__ = (
        *("calls", "doubtful", "known", "marks", "quotes", "reasoning", "teaches", "tools", "untrained", "waiting"),
        "weights",
    )

    def __init__(self, tools: "_Tools") -> None:
        self.tools = tools
        self.quotes = 0
        """Those that the messages have more than role and content."""
        self.doubtful = False
        """Whether the exact rules might complain."""
        self.teaches = False
        self.calls: list[str] = []
        self.reasoning = False
        self.weights = False
        self.known: set[str] = _NO_IDS
        """Ids of the calls so far."""
        self.waiting: set[str] = _NO_IDS
        """Those of them without a reply yet."""
        self.marks = 0
        """Characters of the texts that only tell their parts apart."""
        self.untrained = 0
        """Characters of answers that are not trained on."""

    def read_reply(self, message: _RichTool) -> None:
        """A tool's message."""
        identifier = message.tool_call_id
        if message.name is not UNSET:
            self.quotes += _quotes_of(message.name)
        if identifier is not UNSET:
            self.quotes += _quotes_of(identifier)
        if identifier in self.known:
            self.waiting.discard(identifier)  # type: ignore[arg-type]
        else:
            self.doubtful = True

    def read_answer(
        self, message: _RichAssistant, content: _OptionalText, calls: "list[_Call] | UnsetType | None"
    ) -> str:
        """The message's canonical text."""
        reasoning, weight = message.reasoning_content, message.weight
        if self.waiting:
            self.doubtful = True
        if not content:
            self.quotes -= 4 if content is UNSET else 0 if content == "" else 2
            content = ""
            if not calls:
                self.doubtful = True
        elif content.isspace():
            self.doubtful = True
        plain_calls: list[tuple[str, str]] = []
        if calls:
            plain_calls = self._read_calls(calls)
        elif calls is not UNSET:
            self.quotes += 2
        if reasoning is not UNSET:
            self.quotes += _quotes_of(reasoning)
            if reasoning:
                self.reasoning = True
        trained = True
        if weight is not UNSET:
            self.quotes += 2
            self.weights = True
            trained = weight != 0
            if weight is not None and (type(weight) is not int or weight not in (0, 1)):
                self.doubtful = True
        text, size = answer_text(content, plain_calls, reasoning or None, trained=trained)
        self.marks += len(text) - size
        if trained:
            self.teaches = True
        else:
            self.untrained += size
        return text

    def _read_calls(self, calls: list[_Call]) -> list[tuple[str, str]]:
        """Their names and arguments. Beyond doubt are calls that the tools offered allow, each with an id of its own."""
        found: list[tuple[str, str]] = []
        ids: set[str] = set()
        take = self.tools.take
        for call in calls:
            function = call.function
            name, arguments = function.name, function.arguments
            if call.type is not UNSET:
                self.quotes += 4
                if call.type != "function":
                    self.doubtful = True
            if not self.doubtful and not (call.id and take(name, arguments)):
                self.doubtful = True
            ids.add(call.id)
            found.append((name, arguments))
            self.calls.append(name)
        self.quotes += 2 + 14 * len(calls)
        if len(ids) < len(calls):
            self.doubtful = True
        self.known = self.known | ids if self.known else set(ids)
        self.waiting = ids
        return found


_NO_IDS: set[str] = set()


def _quotes_of(value: str | UnsetType | None) -> int:
    """Of a key and its value."""
    return 2 if value is None else 4


class _Tools:
    """A row's `tools` that passed; `digest` is empty if there are none."""

    __slots__ = ("_exact", "_known", "_value", "digest", "quotes")

    def __init__(self, value: Any, digest: str, quotes: int, known: dict[str, simple_tools.Arguments] | None) -> None:
        self.digest = digest
        self.quotes = quotes
        self._known = known or {}
        self._value = value
        self._exact: tools.Offered | None = None

    def take(self, name: str, text: str) -> bool:
        """Whether `text` holds arguments that the tool `name` takes."""
        known = self._known.get(name)
        return (known is not None and known.take(text)) or self._take(name, text)

    def _take(self, name: str, text: str) -> bool:
        if self._exact is None:
            self._exact = tools.check_tools(Row(Reporter(), 1, 0), self._value, ("tools",))
        tool = self._exact.get(name)
        if tool is None:
            return False
        try:
            arguments = strict_json.loads(text.encode())
        except InvalidRequest:
            return False
        if not isinstance(arguments, dict) or not tool.required <= arguments.keys():
            return False
        return tool.schema is None or schemas.mismatch(tool.schema, arguments, len(text)) is None


_NO_TOOLS = _Tools(None, "", 0, None)
_tools: dict[bytes, _Tools | None] = {}


def _known_tools(raw: Raw) -> _Tools | None:
    """None if there is something to say about them."""
    data = bytes(raw)
    if not data:
        return _NO_TOOLS
    if data in _tools:
        return _tools[data]
    learned = _learn_tools(data)
    if len(data) <= _MAX_TOOLS_BYTES:
        if len(_tools) >= _MAX_KNOWN:
            _tools.clear()
        _tools[data] = learned
    return learned


def _learn_tools(data: bytes) -> _Tools | None:
    quotes = strict_json.count_quotes(data)
    try:
        value = msgspec.json.decode(data)
        encoded = msgspec.json.encode(value, order="sorted")
        # A repeated key was dropped, and its quotes with it.
        known = simple_tools.known_tools(data, value) if quotes == strict_json.count_quotes(encoded) else None
        if known:
            return _Tools(value, digest_of(encoded), 2 + quotes, known)
        value = strict_json.loads(data, strict_json.MAX_DEPTH - 1)
    except (InvalidRequest, *_REFUSED):
        return None
    reporter = Reporter()
    tools.check_tools(Row(reporter, 1, 0), value, ("tools",))
    return None if reporter.counts else _Tools(value, tools_digest(value), 2 + quotes, None)
