"""Arguments of calls against the tools' JSON schemas: what is found, in which words, and that nothing runs away."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bad_rows import ASSISTANT, USER, call, function, reply
from tests.unit.test_datasets_check import checked
from tunewright.datasets.report import Problem
from tunewright.datasets.rules import schemas

CODE = "argument_mismatch"


def found(tmp_path: Path, parameters: object, arguments: object, code: str = CODE) -> list[Problem]:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    data = function(USER, call(json.dumps(arguments)), reply(), ASSISTANT, tools=[tool])
    return [problem for problem in checked(tmp_path, data).problems if problem.code == code]


def properties(**schema: object) -> dict[str, object]:
    return {"type": "object", "properties": {"city": schema}}


@pytest.mark.parametrize(
    ("schema", "arguments", "part"),
    [
        (properties(type="string"), {"city": 5}, ": city must be of type string, as the tool get_weather says"),
        (properties(type=["string", "null"]), {"city": 5}, "must be of type null | string"),
        (properties(enum=["Rome", 1, None]), {"city": "SECRET"}, 'must be one of "Rome", 1, null'),
        (properties(enum=list(range(9))), {"city": "SECRET"}, "one of 0, 1, 2, 3, 4, …, as"),
        (properties(required=["zip"]), {"city": {}}, "city lacks zip, which"),
        (properties(items={"maximum": 3}), {"city": [1, 2, 77]}, 'city[2] breaks the rule "maximum 3"'),
        (properties(pattern="^[A-Z]"), {"city": "SECRET".lower()}, 'city breaks the rule "pattern"'),
        (properties(anyOf=[{"type": "number"}, {"type": "null"}]), {"city": "SECRET"}, 'breaks the rule "anyOf"'),
        ({"properties": {"zip": {}}, "additionalProperties": False}, {"city": "SECRET"}, "{} holds city, which"),
        ({"additionalProperties": False}, {"city": "SECRET"}, '{} breaks the rule "additionalProperties"'),
        (
            {"properties": {"city": {"$ref": "#/$defs/c"}}, "$defs": {"c": {"type": "null"}}},
            {"city": 1},
            "of type null",
        ),
    ],
)
def test_a_mismatch_names_place_and_rule_but_not_the_value(
    tmp_path: Path, schema: object, arguments: object, part: str
) -> None:
    (problem,) = found(tmp_path, schema, arguments)
    assert (problem.line, problem.severity) == (2, "warning")
    assert problem.pointer == "/messages/1/tool_calls/0/function/arguments"
    assert part in problem.text("en")
    assert problem.text("zh") != problem.text("en")
    said = problem.text("en") + problem.text("zh") + str(problem.values)
    assert "SECRET" not in said.upper() and "77" not in said


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        (properties(type="string"), {"city": "Rome"}),
        (properties(type="string"), {}),
        (properties(type="string", format="email"), {"city": "no address"}),
        ({"type": "object", "required": ["city"]}, {}),  # has a warning of its own
        (properties(type="number"), {"city": 1}),
        (None, {"city": 1}),
        ({}, {"city": 1}),
        (properties(pattern="^(a+)+$(?=x)"), {"city": "A"}),
    ],
)
def test_what_keeps_the_schema_is_let_pass(tmp_path: Path, schema: object, arguments: object) -> None:
    if arguments == {"city": "A"}:
        assert found(tmp_path, schema, arguments)
    else:
        assert not found(tmp_path, schema, arguments)


@pytest.mark.parametrize(
    ("schema", "pointer", "mended"),
    [
        (properties(type="dict"), "/properties/city/type", "object"),
        (properties(type="Float"), "/properties/city/type", "number"),
        (properties(type="any"), "/properties/city/type", None),
        (properties(required=True), "/properties/city/required", None),
        (properties(pattern="("), "/properties/city/pattern", None),
        ({"properties": {"city": 5}}, "/properties/city", None),
        ({"properties": {"city": {"$ref": "#/nowhere"}}}, "", None),
        ({"$ref": "http://127.0.0.1:9/schema"}, "", None),
        ({"$schema": "http://127.0.0.1:9/schema"}, "", None),
    ],
)
def test_an_invalid_schema_is_an_error_at_its_place_and_nothing_is_fetched(
    tmp_path: Path, schema: object, pointer: str, mended: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    (problem,) = found(tmp_path, schema, {}, "invalid_tool")
    assert problem.severity == "error"
    assert problem.pointer == "/tools/0/function/parameters" + pointer
    assert problem.text("zh") != problem.text("en")
    operations = problem.patch.operations if problem.patch else ()
    assert [operation["value"] for operation in operations] == ([mended] if mended else [])


def test_schemas_that_explode_are_refused_or_left_alone() -> None:
    chain: dict[str, Any] = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(45)}
    chain["d45"] = {"type": "string"}
    bomb = schemas.compiled(json.dumps({"$ref": "#/$defs/d0", "$defs": chain}).encode())
    assert isinstance(bomb, schemas.Fault) and "too large" in bomb.message
    assert schemas.compiled(b'{"description": "' + b"x" * schemas.MAX_SCHEMA_BYTES + b'"}') is None
    wide = schemas.compiled(json.dumps({"properties": {"a": {"items": {"enum": list(range(9000))}}}}).encode())
    assert isinstance(wide, schemas.Schema)
    assert schemas.mismatch(wide, {"a": ["x"]}, 100) is not None
    assert schemas.mismatch(wide, {"a": ["x"] * 10**6}, 4 * 10**6) is None, "too much work to compare"


def test_a_pattern_that_backtracks_decides_nothing_and_ends() -> None:
    schema = schemas.compiled(json.dumps(properties(pattern="^(?=(a|aa)+$)(a|aa)+b\\1$")).encode())
    assert isinstance(schema, schemas.Schema)
    start = time.perf_counter()
    schemas.mismatch(schema, {"city": "a" * 5000 + "!"}, 5000)
    assert time.perf_counter() - start < 30  # exponential otherwise


def test_compiled_schemas_are_remembered_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    first = schemas.compiled(b'{"maximum": 1}')
    assert schemas.compiled(b'{"maximum": 1}') is first
    monkeypatch.setattr(schemas, "_MAX_KEPT_BYTES", 0)
    for i in range(5):
        schemas.compiled(b'{"maximum": %d}' % i)
    assert len(schemas._kept) == 1
