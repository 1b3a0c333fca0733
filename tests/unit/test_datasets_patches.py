"""What patches do to a line, and which mends the rules offer."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bad_rows import ASSISTANT, GOOD, SYSTEM, TOOL, USER, call, file, reply
from tests.unit.bad_rows import line as one_line
from tests.unit.test_datasets_check import checked
from tunewright.datasets.mending import patches
from tunewright.datasets.report import Edit, Patch, Problem
from tunewright.errors import InvalidRequest


def done(row: object, *operations: dict[str, Any]) -> object:
    result = patches.apply(json.dumps(row).encode(), Patch(operations=operations))
    return json.loads(result or b"null")


def test_operations_do_what_json_patch_says() -> None:
    row = {"a": [1, 2], "b/c": {"~": 1}}
    assert done(row, {"op": "replace", "path": "/a/1", "value": 9}) == {**row, "a": [1, 9]}
    assert done(row, {"op": "add", "path": "/a/0", "value": 9}) == {**row, "a": [9, 1, 2]}
    assert done(row, {"op": "add", "path": "/a/2", "value": 9}) == {**row, "a": [1, 2, 9]}
    assert done(row, {"op": "add", "path": "/a/-", "value": 9}) == {**row, "a": [1, 2, 9]}
    assert done(row, {"op": "remove", "path": "/b~1c/~0"}) == {"a": [1, 2], "b/c": {}}
    assert done(row, {"op": "move", "from": "/a/1", "path": "/a/0"}) == {**row, "a": [2, 1]}
    assert done(row, {"op": "move", "from": "/a", "path": "/d"}) == {"b/c": {"~": 1}, "d": [1, 2]}
    assert done(row, {"op": "replace", "path": "", "value": {"x": 1}}) == {"x": 1}
    assert done(row, {"op": "remove", "path": "/a/1"}, {"op": "remove", "path": "/a/0"}) == {**row, "a": []}


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "replace", "path": "/x", "value": 1},
        {"op": "replace", "path": "/a/2", "value": 1},
        {"op": "replace", "path": "/a/-", "value": 1},
        {"op": "add", "path": "/a/3", "value": 1},
        {"op": "add", "path": "/a/01x", "value": 1},
        {"op": "add", "path": "/x/y", "value": 1},
        {"op": "add", "path": "a", "value": 1},
        {"op": "add", "path": "/a"},
        {"op": "add", "path": "/s/x", "value": 1},
        {"op": "remove", "path": ""},
        {"op": "remove", "path": "/x"},
        {"op": "move", "path": "/x"},
        {"op": "test", "path": "/a", "value": 1},
        {},
    ],
)
def test_an_operation_that_does_not_fit_is_refused(operation: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        done({"a": [1, 2], "s": "text"}, operation)
    assert caught.value.code == "patch_not_applicable"
    assert caught.value.text("zh") != caught.value.text("en")


def test_other_forms_of_patches() -> None:
    assert patches.apply(b"abc", Patch(drop=True)) is None
    edits = (Edit(offset=2, length=1, text="汉"), Edit(offset=0, length=0, text="x"))
    assert patches.apply(b"abc", Patch(edits=edits)) == "xab汉".encode()
    assert patches.apply("你".encode("gb18030"), Patch(rewrite="utf8")) == "你".encode()
    for patch in (
        Patch(edits=(Edit(offset=2, length=2, text=""),)),
        Patch(edits=(Edit(offset=0, length=2, text=""), Edit(offset=1, length=1, text=""))),
        Patch(edits=(Edit(offset=-1, length=1, text=""),)),
        Patch(operations=({"op": "remove", "path": "/a"},)),
    ):
        with pytest.raises(InvalidRequest, match="patch_not_applicable"):
            patches.apply(b"abc", patch)


def mend_of(tmp_path: Path, row: object, code: str) -> tuple[Problem, Any]:
    """The first problem of this code, and the row with its patch (None without one)."""
    problem = next(p for p in checked(tmp_path, one_line(row)).problems if p.code == code)
    if problem.patch is None:
        return problem, None
    return problem, json.loads(patches.apply(one_line(row).strip(), problem.patch) or b"null")


def rows_of(*messages: object, **more: object) -> dict[str, Any]:
    return {"messages": list(messages), **more}


PARTS = [{"type": "text", "text": "What?"}]
OLD_CALL = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
OLD_REPLY = {"role": "function", "name": "f", "content": "1"}
NEW_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
NEW_REPLY = {"role": "tool", "content": "1", "tool_call_id": "call_1"}
ANSWERS = {"preferred_output": [ASSISTANT], "non_preferred_output": [{"role": "assistant", "content": "London."}]}


def nameless(**changes: object) -> dict[str, Any]:
    made = call()
    (only,) = made["tool_calls"]
    del only["id"]
    return {**made, "tool_calls": [{**only, **changes}]}


@pytest.mark.parametrize(
    ("code", "row", "mended"),
    [
        ("invalid_role", rows_of({**USER, "role": "human"}, ASSISTANT), GOOD),
        ("invalid_role", rows_of({**USER, "role": " User"}, ASSISTANT), GOOD),
        ("invalid_role", rows_of({**USER, "role": "assistnat"}, ASSISTANT), None),
        ("invalid_role", rows_of({**USER, "role": 3}, ASSISTANT), None),
        ("invalid_weight", rows_of(USER, {**ASSISTANT, "weight": "1"}), rows_of(USER, {**ASSISTANT, "weight": 1})),
        ("invalid_weight", rows_of(USER, {**ASSISTANT, "weight": True}), rows_of(USER, {**ASSISTANT, "weight": 1})),
        ("invalid_weight", rows_of(USER, {**ASSISTANT, "weight": 0.0}, USER, ASSISTANT),
         rows_of(USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT)),
        ("invalid_weight", rows_of(USER, {**ASSISTANT, "weight": 2}), None),
        ("invalid_type", rows_of({**USER, "content": PARTS[0]}, ASSISTANT), rows_of({**USER, "content": PARTS}, ASSISTANT)),
        ("invalid_type", rows_of({**USER, "content": 5}, ASSISTANT), None),
        ("system_not_first", rows_of(USER, SYSTEM, ASSISTANT), rows_of(SYSTEM, USER, ASSISTANT)),
        ("system_not_first", rows_of(USER, ASSISTANT, SYSTEM, USER, ASSISTANT), None),
        ("system_not_first", rows_of(SYSTEM, SYSTEM, USER, ASSISTANT), None),
        ("last_message_not_assistant", rows_of(USER, ASSISTANT, USER, USER), GOOD),
        ("no_assistant_message", rows_of(USER), None),
        ("trailing_messages_ignored", rows_of(USER, call(), reply(), ASSISTANT, USER, tools=[TOOL]),
         rows_of(USER, call(), reply(), ASSISTANT, tools=[TOOL])),
        ("unknown_field", rows_of({**USER, "mood": 1}, ASSISTANT), GOOD),
        ("unknown_field", rows_of({**USER, "a/b~": 1}, ASSISTANT), GOOD),
        ("unknown_field", {**GOOD, "id": 7}, GOOD),
        ("unknown_field", rows_of({"role": "user", "contents": "x"}, ASSISTANT), None),
        ("unknown_field", rows_of({"role": "user", "Content": "x"}, ASSISTANT),
         rows_of({"role": "user", "content": "x"}, ASSISTANT)),
        ("invalid_tool_call", rows_of(USER, call({"city": "Paris"}), reply(), ASSISTANT, tools=[TOOL]),
         rows_of(USER, call('{"city":"Paris"}'), reply(), ASSISTANT, tools=[TOOL])),
        ("invalid_tool_call", rows_of(USER, call("{'city': 'Paris'}"), reply(), ASSISTANT, tools=[TOOL]),
         rows_of(USER, call('{"city": "Paris"}'), reply(), ASSISTANT, tools=[TOOL])),
        ("invalid_tool_call", rows_of(USER, call('"{\\"city\\": 1}"'), reply(), ASSISTANT, tools=[TOOL]),
         rows_of(USER, call('{"city": 1}'), reply(), ASSISTANT, tools=[TOOL])),
        ("invalid_tool_call", rows_of(USER, call(""), reply(), ASSISTANT), rows_of(USER, call("{}"), reply(), ASSISTANT)),
        ("invalid_tool_call", rows_of(USER, call("[1]"), reply(), ASSISTANT), None),
        ("invalid_tool_call", rows_of(USER, call("Paris"), reply(), ASSISTANT), None),
        ("invalid_tool_call", rows_of(USER, call(), {"role": "tool", "content": "x"}, ASSISTANT),
         rows_of(USER, call(), {"role": "tool", "content": "x", "tool_call_id": "c1"}, ASSISTANT)),
        ("invalid_tool_call", rows_of(USER, call(), reply(None), ASSISTANT), rows_of(USER, call(), reply(), ASSISTANT)),
        ("invalid_tool_call", rows_of(USER, call(), reply("c2"), ASSISTANT), rows_of(USER, call(), reply(), ASSISTANT)),
        ("invalid_tool_call", rows_of(USER, reply(None), ASSISTANT), None),
        ("invalid_tool_call",
         rows_of(USER, {**call(), "tool_calls": [*call()["tool_calls"], *call(id="c2")["tool_calls"]]}, reply(None), ASSISTANT),
         None),
        ("invalid_tool_call", rows_of(USER, nameless(), reply("c1"), ASSISTANT),
         rows_of(USER, nameless(id="c1"), reply(), ASSISTANT)),
        ("invalid_tool_call", rows_of(USER, nameless(id=None), reply(None), ASSISTANT),
         rows_of(USER, nameless(id="call_1_0"), reply(None), ASSISTANT)),
        ("invalid_tool_call", rows_of(USER, nameless(id=5), reply(5), ASSISTANT),
         rows_of(USER, nameless(id="5"), reply(5), ASSISTANT)),
        ("invalid_tool_call", rows_of(USER, nameless(), reply("a"), reply("b"), ASSISTANT), None),
        ("invalid_tool_call", rows_of(USER, OLD_CALL, OLD_REPLY, ASSISTANT), rows_of(USER, NEW_CALL, NEW_REPLY, ASSISTANT)),
        ("invalid_role", rows_of(USER, OLD_CALL, OLD_REPLY, ASSISTANT), rows_of(USER, NEW_CALL, NEW_REPLY, ASSISTANT)),
        ("invalid_tool", rows_of(USER, OLD_CALL, OLD_REPLY, ASSISTANT, functions=[{"name": "f"}], function_call="auto"),
         rows_of(USER, NEW_CALL, NEW_REPLY, ASSISTANT, tools=[{"type": "function", "function": {"name": "f"}}])),
        ("invalid_role", rows_of(USER, {**OLD_REPLY, "name": "g"}, ASSISTANT), None),
        ("invalid_role", rows_of(USER, OLD_CALL, {**OLD_REPLY, "name": "g"}, ASSISTANT), None),
        ("invalid_tool", {**GOOD, "functions": [5]}, None),
        ("invalid_tool", {**GOOD, "tools": [TOOL["function"]]}, {**GOOD, "tools": [TOOL]}),
        ("invalid_tool", {**GOOD, "tools": [{"type": "function", **TOOL["function"]}]}, {**GOOD, "tools": [TOOL]}),
        ("invalid_tool", {**GOOD, "tools": [{"name": "f", "mood": 1}]}, None),
        ("invalid_type", {**GOOD, "tools": json.dumps([TOOL])}, {**GOOD, "tools": [TOOL]}),
        ("invalid_type", {**GOOD, "tools": ""}, GOOD),
        ("invalid_type", {**GOOD, "tools": TOOL}, {**GOOD, "tools": [TOOL]}),
        ("invalid_type", {**GOOD, "tools": "none"}, None),
        ("invalid_type", {"messages": [USER], **ANSWERS, "preferred_output": ASSISTANT}, {"messages": [USER], **ANSWERS}),
        ("invalid_type", {"messages": [USER], **ANSWERS, "preferred_output": "Paris."}, {"messages": [USER], **ANSWERS}),
        ("invalid_type", {"messages": [USER], **ANSWERS, "preferred_output": 5}, None),
        ("wrong_format", {"prompt": "a", "completion": "b"},
         rows_of({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})),
        ("wrong_format", {"instruction": "a", "input": "", "output": "b"},
         rows_of({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})),
        ("wrong_format", {"text": "a"}, None),
        ("missing_field", {"model": "x"}, None),
    ],
)  # fmt: skip
def test_the_mend_of_a_fault(code: str, row: object, mended: object, tmp_path: Path) -> None:
    problem, result = mend_of(tmp_path, row, code)
    assert result == mended
    assert (problem.patch is not None) == (mended is not None)


def test_a_report_counts_what_can_be_mended(tmp_path: Path) -> None:
    bad = rows_of({**USER, "role": "human"}, ASSISTANT)
    report = checked(tmp_path, b"\xef\xbb\xbf" + file(bad, bad, GOOD).replace(b"}\n{", b"}\r\n\n{"))
    mendable = {key: report.patchable.get(key) for key in ("byte_order_mark", "blank_line", "crlf", "invalid_role")}
    assert mendable == {"byte_order_mark": 1, "blank_line": 2, "crlf": 2, "invalid_role": 2}
