"""The rules of function rows: the tools that are offered, the calls, and the replies to them."""

import re
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from tunewright import strict_json
from tunewright.datasets.mending import row_mends
from tunewright.datasets.mending.row_mends import RowMends
from tunewright.datasets.report import Patch, Path, Row, shown
from tunewright.datasets.rules import schemas
from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark

MAX_TOOLS = 128
MAX_REFERENCES = 100
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Tool(NamedTuple):
    """A tool that a row offers: the arguments it requires, and its schema (None: nothing to compare with)."""

    required: frozenset[str]
    schema: schemas.Schema | None


_ANYTHING = Tool(frozenset(), None)
Offered = dict[str, Tool]
"""Name of a tool -> what its arguments must be."""


def check_old_functions(row: Row, value: dict[str, Any], mends: RowMends) -> None:
    """`functions` and `function_call` were replaced by `tools`; ignoring them would lose what the row teaches."""
    for name in ("functions", "function_call"):
        if value.get(name) is not None:
            sentence = mark('line {line}, {field} is the old form; write "tools" and "tool_calls"')
            row.error("invalid_tool", sentence, (name,), patch=mends.old_form)


def check_tools(row: Row, tools: object, path: Path) -> Offered:
    """Complain about the row's `tools`; the answer holds the sound ones."""
    offered: Offered = {}
    if tools is None:
        return offered
    if not isinstance(tools, list):
        row.wrong_type(path, "array", tools, patch=row_mends.tools(tools, path))
        return offered
    if len(tools) > MAX_TOOLS:
        sentence = mark("line {line}, {field} offers {found} tools; at most {limit} are allowed")
        row.error("invalid_tool", sentence, path, found=len(tools), limit=MAX_TOOLS)
        return offered
    for i, tool in enumerate(tools):
        _check_tool(row, tool, (*path, i), offered)
    return offered


def _check_tool(row: Row, tool: object, path: Path, offered: Offered) -> None:
    if not isinstance(tool, dict):
        row.error("invalid_tool", mark("line {line}, {field} must be an object"), path)
        return
    if tool.get("type", "function") != "function":
        sentence = mark("line {line}, {field} is {found}; allowed: function")
        row.error("invalid_tool", sentence, (*path, "type"), found=shown(tool["type"]))
        return
    function = tool.get("function")
    if not isinstance(function, dict):
        sentence = mark("line {line}, {field} must be an object with name, description and parameters")
        row.error("invalid_tool", sentence, (*path, "function"), patch=row_mends.tool(tool, path))
        return
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        _refuse_name(row, "invalid_tool", name, (*path, "function", "name"))
        return
    if name in offered:
        sentence = mark("line {line}, {field}: the tool {name} is offered twice")
        row.error("invalid_tool", sentence, (*path, "function", "name"), name=shown(name))
    offered[name] = _check_parameters(row, function, (*path, "function"))


def _refuse_name(row: Row, code: str, name: object, path: Path) -> None:
    sentence = mark("line {line}, {field} is {found}; a name has 1 to 64 characters: letters, digits, _ and -")
    row.error(code, sentence, path, found=shown(name))


def _check_parameters(row: Row, function: dict[str, Any], path: Path) -> Tool:
    """What arguments must be."""
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        row.error("invalid_tool", mark("line {line}, {field} must be a text"), (*path, "description"))
    schema = function.get("parameters")
    place = (*path, "parameters")
    if schema is None:
        return _ANYTHING
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        sentence = mark('line {line}, {field} must be a JSON schema of type "object"')
        row.error("invalid_tool", sentence, place, patch=_schema_type(schema, place))
        return _ANYTHING
    sound = True
    if not isinstance(schema.get("properties", {}), dict):
        row.error("invalid_tool", mark("line {line}, {field} must be an object"), (*place, "properties"))
        sound = False
    sound = _check_references(row, schema, place) and sound
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        row.error("invalid_tool", mark("line {line}, {field} must be a list of texts"), (*place, "required"))
        return _ANYTHING
    return Tool(frozenset(required), _compiled(row, schema, place) if sound else None)


def _schema_type(schema: object, path: Path) -> Patch | None:
    if not isinstance(schema, dict):
        return None
    patch = row_mends.schema_type(schema.get("type"), ("type",), (*path, "type"))
    return patch if patch is not None and patch.operations[0]["value"] == "object" else None


def _compiled(row: Row, schema: dict[str, Any], path: Path) -> schemas.Schema | None:
    compiled = schemas.compiled(msgspec.json.encode(schema))
    if not isinstance(compiled, schemas.Fault):
        return compiled
    place = (*path, *compiled.path)
    found = schema
    for part in compiled.path:
        found = found[part]  # type: ignore[index]
    patch = row_mends.schema_type(found, compiled.path, place)
    row.error("invalid_tool", compiled.message, place, patch=patch, **compiled.values)
    return None


def _check_references(row: Row, schema: dict[str, Any], path: Path) -> bool:
    """Refuse `$ref`s that can be followed for ever. Without recursion, and bounded by the cap on references."""
    if b'"$ref"' not in msgspec.json.encode(schema):
        return True
    references: list[tuple[str, str]] = []  # where it stands, what it points at
    waiting: list[tuple[str, Any]] = [("#", schema)]
    while waiting and len(references) <= MAX_REFERENCES:
        place, node = waiting.pop()
        if isinstance(node, list):
            waiting.extend((f"{place}/{i}", item) for i, item in enumerate(node))
        elif isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                references.append((place, node["$ref"]))
            waiting.extend((f"{place}/{key.replace('~', '~0').replace('/', '~1')}", item) for key, item in node.items())
    if len(references) > MAX_REFERENCES:
        sentence = mark("line {line}, {field} has more than {limit} references ($ref)")
        row.error("invalid_tool", sentence, path, limit=MAX_REFERENCES)
        return False
    if _has_cycle(references):
        sentence = mark("line {line}, {field} refers to itself by $ref; recursive schemas are not supported")
        row.error("invalid_tool", sentence, path)
        return False
    return True


def _has_cycle(references: list[tuple[str, str]]) -> bool:
    """Take off references whose target holds none of those left, until none is left or none can be taken off."""
    left = references
    while left:
        leading_on = [
            (place, target)
            for place, target in left
            if any(other == target or other.startswith(target + "/") for other, _ in left)
        ]
        if len(leading_on) == len(left):
            return True
        left = leading_on
    return False


def check_calls(row: Row, message: dict[str, Any], path: Path, mends: RowMends | None = None) -> None:
    """Complain about the form of an assistant's `tool_calls`."""
    if message.get("function_call") is not None:
        sentence = mark('line {line}, {field} is the old form; write "tool_calls"')
        row.error("invalid_tool_call", sentence, (*path, "function_call"), patch=mends.old_form if mends else None)
    calls = message.get("tool_calls")
    if calls is None:
        return
    place = (*path, "tool_calls")
    if not isinstance(calls, list):
        row.wrong_type(place, "array", calls, patch=row_mends.replaced(place, [calls]) if _is_call(calls) else None)
        return
    ids: set[str] = set()
    for i, call in enumerate(calls):
        _check_call(row, call, (*place, i), ids, mends)


def _is_call(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("function"), dict)


def _check_call(row: Row, call: object, path: Path, ids: set[str], mends: RowMends | None) -> None:
    if not isinstance(call, dict):
        row.error("invalid_tool_call", mark("line {line}, {field} must be an object"), path)
        return
    identifier = call.get("id")
    if not isinstance(identifier, str) or not identifier:
        sentence = mark("line {line}, {field} must be a text that is not empty")
        new = mends.call_ids.get((path[-3], path[-1])) if mends else None  # type: ignore[arg-type]
        row.error("invalid_tool_call", sentence, (*path, "id"), patch=row_mends.call_id(call, new, (*path, "id")))
    elif identifier in ids:
        sentence = mark("line {line}, {field} is {found}, as in another call of the same message")
        row.error("invalid_tool_call", sentence, (*path, "id"), found=shown(identifier))
    else:
        ids.add(identifier)
    if call.get("type", "function") != "function":
        sentence = mark("line {line}, {field} is {found}; allowed: function")
        row.error("invalid_tool_call", sentence, (*path, "type"), found=shown(call["type"]))
    function = call.get("function")
    place = (*path, "function")
    if not isinstance(function, dict):
        row.error("invalid_tool_call", mark("line {line}, {field} must be an object with name and arguments"), place)
        return
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        _refuse_name(row, "invalid_tool_call", name, (*place, "name"))
    _check_arguments(row, function, (*place, "arguments"))


def _check_arguments(row: Row, function: dict[str, Any], path: Path) -> None:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        sentence = mark('line {line}, {field} must be a text that holds JSON, such as "{example}"')
        patch = row_mends.arguments(function, path)
        row.error("invalid_tool_call", sentence, path, patch=patch, example='{\\"city\\": \\"Paris\\"}')
        return
    if _arguments_of(arguments) is None:
        sentence = mark("line {line}, {field} does not hold a JSON object: {found}")
        patch = row_mends.arguments(function, path)
        row.error("invalid_tool_call", sentence, path, patch=patch, found=shown(arguments))


def _arguments_of(text: str) -> dict[str, Any] | None:
    """What a call's arguments hold, not to be changed; None if that is no object."""
    return _parsed_short(text) if len(text) < _SHORT else _parsed(text)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = strict_json.loads(text.encode())
    except InvalidRequest:
        return None
    return value if isinstance(value, dict) else None


_SHORT = 2000
# Asked for twice in a row: for the call's form, and to compare it with its tool.
_parsed_short = lru_cache(64)(_parsed)


def check_exchange(row: Row, messages: list[dict[str, Any]], offered: Offered, path: Path) -> None:
    """Whether replies belong to calls, and calls to tools. `messages` are dicts with valid roles."""
    known: set[str] = set()
    waiting: dict[str, Path] = {}
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            _check_reply(row, message, known, waiting, (*path, i, "tool_call_id"))
            continue
        _warn_unanswered(row, waiting)
        calls = message.get("tool_calls") if role == "assistant" else None
        for j, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict) and isinstance(call.get("id"), str):
                known.add(call["id"])
                waiting[call["id"]] = (*path, i, "tool_calls", j)
                _compare_with_tool(row, call.get("function"), offered, (*path, i, "tool_calls", j, "function"))


def _check_reply(row: Row, message: dict[str, Any], known: set[str], waiting: dict[str, Path], path: Path) -> None:
    identifier = message.get("tool_call_id")
    if isinstance(identifier, str) and identifier in known:
        waiting.pop(identifier, None)
        return
    patch = row_mends.reply_id(identifier, "tool_call_id" in message, known, list(waiting), path)
    if patch is not None:
        waiting.pop(patch.operations[0]["value"], None)
    if not known:
        sentence = mark("line {line}, {field}: a tool's reply without a call before it")
        row.error("invalid_tool_call", sentence, path)
    elif not isinstance(identifier, str):
        sentence = mark("line {line}, {field} must name the call that this message answers")
        row.error("invalid_tool_call", sentence, path, patch=patch)
    else:
        sentence = mark("line {line}, {field} is {found}, but no call before it has this id")
        row.error("invalid_tool_call", sentence, path, patch=patch, found=shown(identifier))


def _warn_unanswered(row: Row, waiting: dict[str, Path]) -> None:
    for path in waiting.values():
        row.warn("tool_call_unanswered", mark("line {line}, {field}: no tool message answers this call"), path)
    waiting.clear()


def _compare_with_tool(row: Row, function: object, offered: Offered, path: Path) -> None:
    """Calls that serving would hardly produce are worth a look: an unknown tool, a required argument left out."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return
    name = function["name"]
    if name not in offered:
        sentence = mark("line {line}, {field} is {found}, which the row's tools do not offer")
        row.warn("tool_not_offered", sentence, (*path, "name"), found=shown(name))
        return
    tool = offered[name]
    text = function.get("arguments")
    if tool is _ANYTHING or not isinstance(text, str):
        return
    arguments = _arguments_of(text)
    if arguments is None:
        return
    place = (*path, "arguments")
    absent = sorted(tool.required - arguments.keys())
    if absent:
        sentence = mark("line {line}, {field} lacks {absent}, which the tool {name} requires")
        absent_text = ", ".join(quote(name) for name in absent[:5])
        row.warn("missing_argument", sentence, place, absent=absent_text, name=quote(name))
    fault = schemas.mismatch(tool.schema, arguments, len(text)) if tool.schema is not None else None
    if fault is not None:
        row.warn("argument_mismatch", fault.message, place, name=quote(name), **fault.values)
