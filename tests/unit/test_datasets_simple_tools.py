"""Tools understood without a validator: what is taken there, the validator takes too, and what is ordinary is taken."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunewright import strict_json
from tunewright.datasets.report import Reporter, Row
from tunewright.datasets.rules import schemas, simple_tools, tools

_NAMES = st.sampled_from(["a", "b", "c", "é", 'q"', "$ref"])
_TYPES = st.sampled_from(["string", "number", "integer", "boolean", "array", "object", "null", "text", 5, None])
_WORDS = st.sampled_from(["x", "y", 'say "so"', "汉", ""])
_NUMBERS = st.sampled_from([0, -0.0, 1, 2, 5, 1.0, 2.5, 1 << 53, (1 << 53) + 1, 1 << 70, 1e300, True])
_KEYWORDS: dict[str, st.SearchStrategy[Any]] = {
    "type": _TYPES | st.lists(_TYPES, max_size=3),
    "enum": st.lists(_WORDS | _NUMBERS | st.none(), max_size=3) | st.none(),
    "minimum": _NUMBERS,
    "maximum": _NUMBERS,
    "minItems": st.integers(-1, 2),
    "maxItems": st.integers(-1, 2),
    "required": st.lists(_NAMES, max_size=3) | st.none(),
    "additionalProperties": st.booleans() | st.just({}),
    "description": _WORDS | st.none(),
    "default": _NUMBERS | st.just([]),
    "format": st.just("date"),
    "pattern": st.just("^x"),
    "const": _WORDS,
}
_LEAVES = st.fixed_dictionaries({"type": _TYPES}) | st.fixed_dictionaries({}, optional=_KEYWORDS)
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.builds(
        lambda kind, more: {"type": kind} | more,
        st.sampled_from(["object", "array", ["array", "null"]]),
        st.fixed_dictionaries(
            {}, optional=_KEYWORDS | {"properties": st.dictionaries(_NAMES, inner, max_size=3), "items": inner}
        ),
    ),
    max_leaves=5,
)
_PARAMETERS = st.builds(
    lambda properties, more: {"type": "object", "properties": properties} | more,
    st.dictionaries(_NAMES, _SCHEMAS, max_size=3),
    st.fixed_dictionaries(
        {}, optional={name: _KEYWORDS[name] for name in ("required", "additionalProperties", "type")}
    ),
)
_TOOLS = st.lists(
    st.builds(
        lambda parameters, more: {"type": "function", "function": {"name": "f", "parameters": parameters} | more},
        _PARAMETERS | st.none(),
        st.sampled_from(
            [{}, {}, {"name": "g"}, {"name": "no name"}, {"description": None}, {"description": 5}, {"x": 1}]
        ),
    ),
    min_size=1,
    max_size=2,
)
_VALUES = st.recursive(
    _WORDS | _NUMBERS | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=4,
)
_TEXTS = st.builds(
    lambda value, spell: spell(value),
    st.dictionaries(_NAMES, _VALUES, max_size=3) | _VALUES,
    st.sampled_from(
        [
            json.dumps,
            lambda value: json.dumps(value, ensure_ascii=False),
            lambda value: json.dumps(value, ensure_ascii=False)[:-1] + ', "a": "x"}',
            lambda value: json.dumps(value).replace("1", "1" * 40),
            lambda value: json.dumps(value).replace("2.5", "2." + "5" * 40),
            lambda value: json.dumps(value).replace("x", "\\u0000"),
            lambda value: json.dumps(value)[:-1],
        ]
    ),
)


def exactly_allowed(tool: tools.Tool, text: str) -> bool:
    arguments = strict_json.loads(text.encode())
    fits = tool.schema is None or schemas.mismatch(tool.schema, arguments, len(text)) is None
    return isinstance(arguments, dict) and tool.required <= arguments.keys() and fits


@settings(max_examples=1500)
@given(_TOOLS, st.lists(_TEXTS, min_size=1, max_size=3))
@example([{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}], ['{"a": 1, "a": 2}'])
def test_what_is_taken_is_beyond_doubt(value: list[dict[str, Any]], texts: list[str]) -> None:
    found = simple_tools.known_tools(msgspec.json.encode(value), value)
    if found is None:
        return
    reporter = Reporter()
    offered = tools.check_tools(Row(reporter, 1, 0), value, ("tools",))
    assert not reporter.counts and offered.keys() == found.keys()
    for name, arguments in found.items():
        for text in texts:
            if arguments.take(text):
                assert exactly_allowed(offered[name], text)


def known(**parameters: Any) -> simple_tools.Arguments:
    value = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}]
    found = simple_tools.known_tools(msgspec.json.encode(value), value)
    assert found is not None
    return found["f"]


@pytest.mark.parametrize(
    ("schema", "taken", "not_taken"),
    [
        ({"type": "string"}, ["x", "", 'say "so"\n汉'], [1, None, True, []]),
        ({"type": "integer", "minimum": 1, "maximum": 5}, [1, 5], [0, 6, True, "1", 2.5]),
        ({"type": "number", "minimum": 0.5}, [1, 0.5, 2.5], [0.25, "1", False]),
        ({"type": "boolean"}, [True, False], [0, "true", None]),
        ({"type": "string", "enum": ["x", "y"]}, ["x"], ["z", 1]),
        ({"enum": ["x", "y"]}, ["x"], ["z", 1]),
        ({"type": ["string", "null"]}, ["x", None], [1]),
        (
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
            [["x"], ["x", "y"]],
            [[], [1], ["x"] * 3],
        ),
        (
            {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
            [{"a": 1}],
            [{}, {"a": "x"}, {"a": 1, "b": 2}],
        ),
    ],
)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_ordinary_arguments_are_taken(
    schema: dict[str, Any], taken: list[Any], not_taken: list[Any], ensure_ascii: bool
) -> None:
    arguments = known(type="object", properties={"p": schema, "q": {"type": "string"}}, required=["p"])
    for value in taken:
        assert arguments.take(json.dumps({"p": value, "q": "x"}, ensure_ascii=ensure_ascii))
        assert not arguments.take(json.dumps({"q": "x"})), "it is required"
    for value in not_taken:
        assert not arguments.take(json.dumps({"p": value}))


def test_arguments_that_only_msgspec_takes_are_not_taken() -> None:
    arguments = known(type="object", properties={"a": {"type": "string"}, "n": {"type": "number"}})
    for text in (
        *('{"a": "x", "a": "x"}', '{"a": "\\"", "a": "y"}', '{"n": 1, "n": 1}', '{"a": "\\u0000"}', '{"z": 1}', "[]"),
        *('{"n": 1.' + "0" * 40 + "}", '{"n": ' + "1" * 40 + "}", '{"n": 1e999}', '{"a": "x"} ,', ""),
    ):
        assert not arguments.take(text), text
    assert arguments.take('{"a": "x"}') and arguments.take('{"n": 1, "a": "\\"汉"}')


def test_tools_in_doubt_are_left_to_the_exact_rules() -> None:
    sound = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for value in (
        [sound, sound],
        [{**sound, "type": "other"}],
        [{**sound, "more": [[]]}],
        [{"function": {"name": "a b", "parameters": {}}}],
        [{"function": {"name": "f", "parameters": {"type": ["object"]}}}],
        [{"function": {"name": "f", "parameters": {"required": ["a", "a"]}}}],
        [{"function": {"name": "f", "parameters": {"properties": {"$ref": {"type": "string"}}}}}],
        [{"function": {"name": f"f{i}", "parameters": {}}} for i in range(tools.MAX_TOOLS + 1)],
        {},
        None,
    ):
        assert simple_tools.known_tools(msgspec.json.encode(value), value) is None
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(6):
        nested = {"type": "array", "items": nested}
    deep = [{"function": {"name": "f", "parameters": {"properties": {"a": nested}}}}]
    assert simple_tools.known_tools(msgspec.json.encode(deep), deep) is None
