"""What a constrained answer may look like, as a grammar in llguidance's words: a JSON value by a schema, calls of tools, or
either. The counterpart of `tools.AnswerParser`: whatever these grammars let through, it reads."""

import json
from collections.abc import Sequence
from typing import Any

_SPACE = r"[ ]?|\n[ \t]{0,32}"
"""White space between the parts of a value. Bounded, or a model that likes spaces never ends; room for pretty-printed rows."""
_CALL = r"""call: "<tool_call>" called
called: "\n"? body "\n"? "</tool_call>"
"""


def is_strict(tool: dict[str, Any]) -> bool:
    """Whether its calls have to satisfy every word of its schema."""
    return tool["function"].get("strict") is True


def json_grammar(schema: dict[str, Any]) -> str:
    """An answer that is one JSON value by `schema`."""
    return _grammar(f"start: {_value(schema)}\n")


def calls_grammar(tools: Sequence[dict[str, Any]], *, several: bool, schema: dict[str, Any] | None = None) -> str:
    """An answer that is a call of one of `tools` (OpenAI's shape) with arguments by its parameters, or `several` of them. With a
    `schema`, a JSON value by it is allowed instead."""
    calls = r'calls: call ("\n"? call)*' if several else "calls: call"
    start = "start: calls\n" if schema is None else f"start: calls | value\nvalue: {_value(schema)}\n"
    return _grammar(f"{start}{calls}\n{_CALL}{_bodies(tools)}")


def free_grammar(tools: Sequence[dict[str, Any]], *, several: bool) -> str:
    """Any text, in which whatever begins as a call is one of `tools` with arguments by its parameters."""
    calls, text = "(opening called)*", r"TEXT: /(.|\n)*/"
    if not several:
        calls, text = "(opening called)?", text + r" & ~/(.|\n)*<tool_call>(.|\n)*/"
    lines = [f"start: {calls} TEXT", r"opening[lazy]: /(.|\n)*<tool_call>/", text]
    return _grammar("\n".join(lines) + "\n" + _CALL + _bodies(tools))


def _bodies(tools: Sequence[dict[str, Any]]) -> str:
    bodies = [
        f"body_{index}: {_value(_call_schema(tool['function']), lenient=not is_strict(tool))}"
        for index, tool in enumerate(tools)
    ]
    names = " | ".join(f"body_{index}" for index in range(len(tools)))
    return "\n".join([f"body: {names}", *bodies]) + "\n"


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    """The value between the tags. What the parameters define for themselves has to move with them to the root."""
    parameters = dict(function.get("parameters") or {"type": "object"})
    definitions = {name: parameters.pop(name) for name in ("$defs", "definitions") if name in parameters}
    return {
        **definitions,
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _value(schema: dict[str, Any], *, lenient: bool = False) -> str:
    """`lenient` passes over keywords that can't be enforced instead of refusing the schema."""
    return "%json " + json.dumps(schema | {"x-guidance": {"whitespace_pattern": _SPACE, "lenient": lenient}})


def _grammar(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})
