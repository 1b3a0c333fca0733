"""The forms in which models write one call, read back (docs/tool-format.md)."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


class Offered:
    """The functions that a request offers: false when there are none."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._arguments: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool["function"]
            properties = (function.get("parameters") or {}).get("properties")
            self._arguments[function["name"]] = properties if isinstance(properties, Mapping) else {}

    def __bool__(self) -> bool:
        return bool(self._arguments)

    def __contains__(self, name: str) -> bool:
        return name in self._arguments

    def begins(self, text: str) -> bool:
        """Whether one of their names begins with `text`."""
        return any(name.startswith(text) for name in self._arguments)

    def takes_text(self, name: str, argument: str) -> bool:
        """Whether the schema says that the argument is a text and nothing else."""
        schema = self._arguments.get(name, {}).get(argument)
        return isinstance(schema, Mapping) and schema.get("type") == "string"


class ObjectEnd:
    """Finds where the JSON object ends that a growing text begins with. Each character is looked at once."""

    def __init__(self) -> None:
        self._place = 0
        self._end: int | None = None
        self._depth = 0
        self._in_text = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The place behind the object; 0 if the text begins with anything else, None while that can't be known."""
        if self._end is None and not self._depth:
            content = text.lstrip()
            if not content.startswith("{"):
                return 0 if content else None
            self._place = len(text) - len(content)
        while self._end is None and self._place < len(text):
            self._see(text[self._place])
            self._place += 1
            if not self._depth:
                self._end = self._place
        return self._end

    def _see(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_text:
            self._escaped = character == "\\"
            self._in_text = character != '"'
        elif character == '"':
            self._in_text = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1


def read_call(body: str, offered: Offered) -> tuple[str, str] | None:
    """Name and arguments (JSON text) of what stands between the tags; None if it is no call."""
    text = body.strip()
    return _from_json(text) if text.startswith("{") else _from_pairs(text, offered)


def read_bare_call(text: str, offered: Offered) -> tuple[str, str] | None:
    """The same of an object without tags. It must name an offered function and hold arguments, else it is an answer in JSON."""
    call = _from_json(text)
    named = call is not None and call[0] in offered
    return call if named and not {"arguments", "parameters"}.isdisjoint(json.loads(text)) else None


def read_cut_call(body: str, offered: Offered) -> tuple[str, str] | None:
    """Name and arguments of a call that breaks off, as far as they are written; None if it is no call of an offered function.

    Both are empty while the name is not whole. Arguments that are not whole are not JSON: nobody can take them for the call.
    """
    text = body.strip()
    begun = _BEGUN.match(text)
    if begun is not None:
        name = _value(begun[1])
        return (name, begun[2] or "") if name in offered else None
    name, pair, rest = text.partition("<arg_key>")
    name = name.strip()
    if pair and name in offered:
        call = _from_pairs(name + "".join(found[0] for found in _PAIR.finditer(pair + rest)), offered)
        return name, "" if call is None or call[1] == "{}" else call[1].removesuffix("}")
    if not pair and name in offered:
        return name, ""
    compact = "".join(text.split())
    in_name = compact.startswith(_NAMED) and '"' not in compact.removeprefix(_NAMED)
    return ("", "") if in_name or _NAMED.startswith(compact) or offered.begins(name) else None


def _from_json(text: str) -> tuple[str, str] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str) or not name or not isinstance(arguments, (dict, str)):
        return None
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _from_pairs(text: str, offered: Offered) -> tuple[str, str] | None:
    """The form that GLM bases write: the name, then keys and values in tags of their own; without arguments the name alone."""
    name, begin, rest = text.partition("<arg_key>")
    name = name.strip()
    if not begin:
        return (name, "{}") if name in offered else None
    pairs = _PAIR.findall(begin + rest)
    if not pairs or _PAIR.sub("", begin + rest).strip() or not _NAME.fullmatch(name):
        return None
    values = {key.strip(): value for key, value in pairs}
    arguments = {key: text if offered.takes_text(name, key) else _value(text) for key, text in values.items()}
    return name, json.dumps(arguments, ensure_ascii=False)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_NAMED = '{"name":"'
_BEGUN = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")(?:\s*,\s*"(?:arguments|parameters)"\s*:\s*(.*))?', re.DOTALL
)
_NAME = re.compile(r"[\w.-]{1,64}")
