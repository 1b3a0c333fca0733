"""Mends of one row that are certain, as patches: for faults with only one thing that can have been meant.

The rules ask here when they complain. What needs the whole row to be certain (ids of calls, the old form of functions) is worked
out once, and only when a rule asks.
"""

import difflib
from functools import cached_property, lru_cache
from typing import Any

import msgspec

from tunewright import strict_json
from tunewright.datasets.mending import broken_json as mending
from tunewright.datasets.report import Patch, Path, json_pointer
from tunewright.errors import InvalidRequest

Operation = dict[str, Any]
_FALSE_WEIGHTS = (0, 0.0, False, "0")
_TRUE_WEIGHTS = (1, 1.0, True, "1")


class RowMends:
    """Mends of the row `value` for which its parts must be seen together."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value

    @cached_property
    def old_form(self) -> Patch | None:
        """`functions` and `function_call` rewritten as `tools` and `tool_calls`, if every reply follows its call."""
        return _old_form(self.value)

    @cached_property
    def call_ids(self) -> dict[tuple[int, int], str]:
        """(message, call) -> the id for a call that has none."""
        messages = self.value.get("messages")
        return _call_ids(messages) if isinstance(messages, list) else {}


def replaced(path: Path, value: Any) -> Patch:
    """Put `value` where something else stands."""
    return Patch(operations=({"op": "replace", "path": json_pointer(path), "value": value},))


def added(path: Path, value: Any) -> Patch:
    """Put `value` where nothing stands, or at this index of a list."""
    return Patch(operations=({"op": "add", "path": json_pointer(path), "value": value},))


def removed(*paths: Path) -> Patch:
    """Take fields or items out; of items the last first."""
    return Patch(operations=tuple({"op": "remove", "path": json_pointer(path)} for path in paths))


def moved(source: Path, target: Path) -> Patch:
    """Move an item or rename a field."""
    return Patch(operations=({"op": "move", "from": json_pointer(source), "path": json_pointer(target)},))


def unknown_field(holder: dict[str, Any], key: str, known: frozenset[str], path: Path) -> Patch | None:
    """Without the field; or under its right name, if only case and space are wrong. None if it may be a misspelling."""
    if len(key) > 200:
        return None
    plain = key.strip().lower()
    if plain in known:
        return moved((*path, key), (*path, plain)) if holder.get(plain) is None and plain not in holder else None
    return None if _may_mean(plain, known.difference(holder)) else removed((*path, key))


@lru_cache(1024)
def _may_mean(key: str, names: frozenset[str]) -> bool:
    """Whether `key` may be a misspelling of one of the names, or one of them with something around it."""
    return bool(difflib.get_close_matches(key, names, 1, 0.75)) or any(name in key for name in names if len(name) > 5)


def weight(found: object, path: Path) -> Patch | None:
    """`"1"`, `1.0` and `true` are 1."""
    if found in _TRUE_WEIGHTS:
        return replaced(path, 1)
    return replaced(path, 0) if found in _FALSE_WEIGHTS else None


def arguments(call_function: dict[str, Any], path: Path) -> Patch | None:
    """An object as JSON text; none at all as `{}`; a text with mendable JSON mended, or taken out of the text around it."""
    if "arguments" not in call_function:
        return added(path, "{}")
    found = call_function["arguments"]
    if isinstance(found, dict):
        return replaced(path, msgspec.json.encode(found).decode())
    if found is None or found == "":
        return replaced(path, "{}")
    if not isinstance(found, str):
        return None
    try:
        value = strict_json.loads(found.encode())
    except InvalidRequest:
        data = found.encode()
        patch = mending.mend(data)
        mended = mending.edited(data, list(patch.edits)) if patch else b""
        return replaced(path, mended.decode()) if _is_object(mended) else None
    return replaced(path, value) if isinstance(value, str) and _is_object(value.encode()) else None


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(strict_json.loads(data), dict)
    except InvalidRequest:
        return False


def tools(found: object, path: Path) -> Patch | None:
    """`tools` as a text that holds the list, as one tool alone, or as nothing."""
    if isinstance(found, str):
        if not found.strip():
            return removed(path)
        try:
            found = strict_json.loads(found.encode())
        except InvalidRequest:
            return None
        if isinstance(found, list) and all(isinstance(item, dict) for item in found):
            return replaced(path, found) if found else removed(path)
        return None
    if isinstance(found, dict) and (isinstance(found.get("function"), dict) or _is_flat(found)):
        return replaced(path, [found])
    return None


def tool(found: dict[str, Any], path: Path) -> Patch | None:
    """A tool without `function` around its name and parameters."""
    if not _is_flat(found):
        return None
    function = {key: item for key, item in found.items() if key != "type"}
    return replaced(path, {"type": "function", "function": function})


def _is_flat(found: dict[str, Any]) -> bool:
    return (
        "function" not in found
        and isinstance(found.get("name"), str)
        and found.keys() <= {"type", "name", "description", "parameters", "strict"}
        and found.get("type", "function") == "function"
    )


_TYPE_NAMES = {
    "str": "string",
    "text": "string",
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "decimal": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "dict": "object",
    "map": "object",
    "none": "null",
}


def schema_type(found: object, where: Path, path: Path) -> Patch | None:
    """The type names of programming languages inside a JSON schema; `where` is inside it, `path` inside the row."""
    if not where or where[-1] != "type" or not isinstance(found, str):
        return None
    plain = found.strip().lower()
    name = _TYPE_NAMES.get(plain)
    if name is None and plain in ("string", "integer", "number", "boolean", "array", "object", "null"):
        name = plain
    return replaced(path, name) if name else None


def answer(found: object, path: Path) -> Patch | None:
    """A preference's answer that stands alone instead of in a list, or as its text alone."""
    if isinstance(found, str) and found.strip():
        return replaced(path, [{"role": "assistant", "content": found}])
    if isinstance(found, dict) and found.get("role") == "assistant":
        return replaced(path, [found])
    return None


def content(found: object, path: Path) -> Patch | None:
    """One content part that stands alone instead of in a list."""
    if isinstance(found, dict) and found.get("type") in ("text", "image_url"):
        return replaced(path, [found])
    return None


def system_first(roles: list[str], index: int, path: Path) -> Patch | None:
    """The only system message, moved to the front if no answer stands before it: so all answers still come after it."""
    if roles.count("system") == 1 and "assistant" not in roles[:index] and "tool" not in roles[:index]:
        return moved((*path, index), (*path, 0))
    return None


def reply_id(found: object, present: bool, known: set[str], waiting: list[str], path: Path) -> Patch | None:
    """The call that a reply must mean: the one with this number, or the only one without a reply."""
    identifier = str(found) if type(found) is int and str(found) in known else None
    if identifier is None and len(waiting) == 1:
        identifier = waiting[0]
    if identifier is None:
        return None
    return replaced(path, identifier) if present else added(path, identifier)


def call_id(found: dict[str, Any], new: str | None, path: Path) -> Patch | None:
    """The id for a call that has none, if there is a certain one."""
    if new is None:
        return None
    return replaced(path, new) if "id" in found else added(path, new)


def _call_ids(messages: list[Any]) -> dict[tuple[int, int], str]:
    taken = {identifier for message in messages for identifier in _ids_in(message)}
    result: dict[tuple[int, int], str] = {}
    for i, message in enumerate(messages):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if not isinstance(calls, list):
            continue
        own = {call["id"] for call in calls if isinstance(call, dict) and isinstance(call.get("id"), str)}
        nameless = [j for j, call in enumerate(calls) if isinstance(call, dict) and not _is_id(call.get("id"))]
        loose = [found for found in _replies_after(messages, i) if not (isinstance(found, str) and found in own)]
        texts = [found for found in loose if isinstance(found, str) and found]
        for j in nameless:
            number = calls[j].get("id")
            if type(number) is int:
                result[i, j] = str(number)
            elif len(nameless) == len(loose) == len(texts) == 1:
                result[i, j] = texts[0]
            elif not texts and (len(nameless) == 1 or not loose):
                result[i, j] = _fresh(taken, i, j)
    return result


def _is_id(identifier: object) -> bool:
    return isinstance(identifier, str) and bool(identifier)


def _ids_in(message: Any) -> list[str]:
    if not isinstance(message, dict):
        return []
    calls = message.get("tool_calls")
    found = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [identifier for identifier in [*found, message.get("tool_call_id")] if isinstance(identifier, str)]


def _replies_after(messages: list[Any], i: int) -> list[Any]:
    """The `tool_call_id` of each tool message right behind message `i`."""
    found: list[Any] = []
    for message in messages[i + 1 :]:
        if not isinstance(message, dict) or message.get("role") != "tool":
            break
        found.append(message.get("tool_call_id"))
    return found


def _fresh(taken: set[str], i: int, j: int) -> str:
    name = f"call_{i}_{j}"
    while name in taken:
        name += "_"
    taken.add(name)
    return name


# --- the old form ----------------------------------------------------------------------------------------------------


def _old_form(value: dict[str, Any]) -> Patch | None:
    messages = value.get("messages")
    functions = value.get("functions")
    if not isinstance(messages, list) or (functions is not None and value.get("tools")):
        return None
    operations: list[Operation] = []
    if functions is not None:
        if not isinstance(functions, list) or not all(isinstance(item, dict) for item in functions):
            return None
        tools_ = [{"type": "function", "function": item} for item in functions]
        operations += [{"op": "remove", "path": "/functions"}, {"op": "add", "path": "/tools", "value": tools_}]
    if value.get("function_call") is not None:
        operations.append({"op": "remove", "path": "/function_call"})  # how to call the model, nothing to learn
    rewritten = _rewritten(messages)
    if rewritten is None:
        return None
    if rewritten != messages:
        operations.append({"op": "replace", "path": "/messages", "value": rewritten})
    return Patch(operations=tuple(operations)) if operations else None


def _rewritten(messages: list[Any]) -> list[Any] | None:
    """Messages with `tool_calls` and tool replies, or None if a reply does not follow a call of its name."""
    result: list[Any] = []
    called: tuple[str, str] | None = None  # the name, the id
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return None
        if message.get("role") == "function":
            name = message.get("name")
            if called is None or name not in (None, called[0]):
                return None
            kept = {key: item for key, item in message.items() if key not in ("role", "name")}
            result.append({"role": "tool", **kept, "tool_call_id": called[1]})
            called = None
            continue
        called = None
        call = message.get("function_call")
        if call is None:
            result.append(message)
            continue
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or message.get("tool_calls"):
            return None
        called = (call["name"], f"call_{i}")
        kept = {key: item for key, item in message.items() if key not in ("function_call", "tool_calls")}
        result.append({**kept, "tool_calls": [{"id": called[1], "type": "function", "function": call}]})
    return result
