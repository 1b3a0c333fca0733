"""Rows of other projects become rows of the guide, or are left alone where that is not certain."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.datasets.importing.importers import STYLES, detect, import_row, row_of
from tunewright.datasets.report import Reporter, Row
from tunewright.datasets.rules import messages, preferences
from tunewright.datasets.splitting import side
from tunewright.errors import InvalidRequest

Json = dict[str, Any]

Q = {"role": "user", "content": "What is the capital of France?"}
A = {"role": "assistant", "content": "Paris."}
BAD = {"role": "assistant", "content": "Lyon."}
CHAT: Json = {"messages": [Q, A]}
PREFERENCE: Json = {"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [BAD]}
PARAMETERS: Json = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: Json = {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS}


def system(text: str) -> Json:
    return {"role": "system", "content": text}


def turns(*pairs: tuple[str, object]) -> list[Json]:
    return [{"from": speaker, "value": value} for speaker, value in pairs]


HUMAN, GPT = ("human", Q["content"]), ("gpt", A["content"])
CALL = ("function_call", '{"name": "get_weather", "arguments": {"city": "北京"}}')
TWO_CALLS = ("function_call", json.dumps([{"name": "get_weather", "arguments": {"city": c}} for c in "ab"]))


def call(number: int, arguments: str) -> Json:
    return {"id": f"call_{number}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


CONVERTED = {
    "sharegpt": ({"conversations": turns(HUMAN, GPT)}, CHAT),
    "sharegpt, several turns": ({"conversations": turns(HUMAN, GPT, HUMAN, GPT)}, {"messages": [Q, A, Q, A]}),
    "sharegpt, other names of roles": ({"conversations": turns(("user", Q["content"]), ("ChatGPT", "Paris."))}, CHAT),
    "sharegpt, system first": (
        {"conversations": turns(("system", "Be brief."), HUMAN, GPT)},
        {"messages": [system("Be brief."), Q, A]},
    ),
    "sharegpt, system beside": (
        {"conversations": turns(HUMAN, GPT), "system": "Be brief.", "tools": ""},
        {"messages": [system("Be brief."), Q, A]},
    ),
    "sharegpt, the same system twice": (
        {"conversations": turns(("system", "Be brief."), HUMAN, GPT), "system": "Be brief."},
        {"messages": [system("Be brief."), Q, A]},
    ),
    "sharegpt, weights": (
        {"conversations": [{**turns(HUMAN)[0], "weight": None}, {**turns(GPT)[0], "weight": 0}, *turns(HUMAN, GPT)]},
        {"messages": [Q, {**A, "weight": 0}, Q, A]},
    ),
    "sharegpt, a call": (
        {"conversations": turns(HUMAN, CALL, ("observation", '{"t": 3}'), GPT), "tools": json.dumps([WEATHER])},
        {
            "messages": [
                Q,
                {"role": "assistant", "tool_calls": [call(1, '{"city": "北京"}')]},
                {"role": "tool", "tool_call_id": "call_1", "content": '{"t": 3}'},
                A,
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
    ),
    "sharegpt, two calls in one turn": (
        {
            "conversations": turns(HUMAN, TWO_CALLS, ("observation", {"t": 3}), ("observation", "4"), GPT),
            "tools": [{"type": "function", "function": WEATHER}],
        },
        {
            "messages": [
                Q,
                {"role": "assistant", "tool_calls": [call(1, '{"city": "a"}'), call(2, '{"city": "b"}')]},
                {"role": "tool", "tool_call_id": "call_1", "content": '{"t": 3}'},
                {"role": "tool", "tool_call_id": "call_2", "content": "4"},
                A,
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
    ),
    "conversations": ({"conversations": [Q, {**A, "tool_calls": None}]}, CHAT),
    "conversation, other names of roles": ({"conversation": [{**Q, "role": "human"}, A]}, CHAT),
    "alpaca": ({"instruction": "Add.", "input": "1 + 1", "output": "2"}, "Add.\n1 + 1"),
    "alpaca, no input": ({"instruction": Q["content"], "input": "", "output": "Paris."}, CHAT),
    "alpaca, the question in input": ({"instruction": "", "input": Q["content"], "output": "Paris."}, CHAT),
    "alpaca, the original with its frame": (
        {"instruction": Q["content"], "input": "", "output": "Paris.", "text": f"### {Q['content']}\n### Paris."},
        CHAT,
    ),
    "alpaca, Dolly's names": (
        {"instruction": "Add.", "context": "1 + 1", "response": "2", "category": "x"},
        "Add.\n1 + 1",
    ),
    "alpaca, history and system": (
        {"instruction": Q["content"], "output": "Paris.", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        {
            "messages": [
                system("Be brief."),
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                Q,
                A,
            ]
        },
    ),
    "prompt, completion": ({"prompt": Q["content"], "completion": "Paris."}, CHAT),
    "prompt, response": ({"prompt": Q["content"], "response": "Paris.", "id": 7}, CHAT),
    "question, answer": ({"question": Q["content"], "answer": "Paris.", "options": [], "hint": None}, CHAT),
    "query, response": ({"query": Q["content"], "response": "Paris."}, CHAT),
    "input, output": ({"input": Q["content"], "output": "Paris."}, CHAT),
    "prompt, completion as messages": ({"prompt": [Q], "completion": [A]}, CHAT),
    "reasoning": (
        {"question": Q["content"], "answer": "Paris.", "reasoning_content": "Easy."},
        {"messages": [Q, {**A, "reasoning_content": "Easy."}]},
    ),
    "preference, texts": ({"prompt": Q["content"], "chosen": "Paris.", "rejected": "Lyon."}, PREFERENCE),
    "preference, messages": ({"prompt": [Q], "chosen": [A], "rejected": [BAD]}, PREFERENCE),
    "preference, no prompt": ({"chosen": [Q, A], "rejected": [Q, BAD]}, PREFERENCE),
    "preference, prompt and whole conversations": (
        {"prompt": Q["content"], "prompt_id": "x", "chosen": [Q, A], "rejected": [Q, BAD]},
        PREFERENCE,
    ),
    "preference, beside conversations": (
        {"conversations": turns(HUMAN), "chosen": turns(GPT)[0], "rejected": turns(("gpt", "Lyon."))[0]},
        PREFERENCE,
    ),
    "preference, alpaca": (
        {"instruction": "Add.", "input": "1 + 1", "chosen": "2", "rejected": "3", "system": "Be brief."},
        {
            "input": {"messages": [system("Be brief."), {"role": "user", "content": "Add.\n1 + 1"}]},
            "preferred_output": [{"role": "assistant", "content": "2"}],
            "non_preferred_output": [{"role": "assistant", "content": "3"}],
        },
    ),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_known_style_becomes_a_row_of_the_guide_that_passes_the_check(name: str) -> None:
    value, expected = CONVERTED[name]
    if isinstance(expected, str):
        expected = {"messages": [{"role": "user", "content": expected}, {"role": "assistant", "content": "2"}]}
    assert detect(value) in STYLES
    assert row_of(value) == expected
    reporter = Reporter()
    row = Row(reporter, 1, 0)
    if "messages" in expected:
        messages.check_row(row, expected)
    else:
        preferences.check_row(row, expected)
    assert reporter.counts == {}


REFUSED = {
    "text alone": ({"text": "Once upon a time"}, "text alone does not say what is question and what is answer"),
    "unknown": ({"a": "b", "c": "d"}, "no known style has these fields: a, c"),
    "nothing": ({}, "no known style has these fields: -"),
    "already ours": (CHAT, "no known style has these fields: messages"),
    "a field with a meaning": (
        {"question": "q", "answer": "a", "options": ["a", "b"]},
        "the field options has no place in the row",
    ),
    "false says something": (
        {"prompt": "p", "completion": "c", "label": False},
        "the field label has no place in the row",
    ),
    "pictures": (
        {"conversations": turns(HUMAN, GPT), "images": ["1.jpg"]},
        "the field images has no place in the row",
    ),
    "two answers": (
        {"prompt": "p", "response": "a", "output": "b"},
        "no known style has these fields: prompt, response, output",
    ),
    "no answer": ({"prompt": "p", "completion": ""}, "no known style has these fields: prompt, completion"),
    "blank answer": ({"prompt": "p", "completion": " \n"}, "completion is missing or empty"),
    "a number": ({"prompt": "2 + 2", "completion": 4}, "completion must be a text"),
    "unknown speaker": ({"conversations": turns(HUMAN, ("narrator", "x"))}, "narrator is not a role that is known"),
    "unknown role": ({"conversations": [Q, {"role": 5, "content": "x"}]}, "5 is not a role that is known"),
    "no texts": ({"conversations": turns(HUMAN, ("gpt", 5))}, "value must be a text"),
    "not messages": ({"conversations": [*turns(HUMAN), "gpt"]}, "a message of the conversation is not an object"),
    "more in a message": (
        {"conversations": [*turns(HUMAN), {**turns(GPT)[0], "loss": True}]},
        "the field loss has no place in a message",
    ),
    "weight of a question": (
        {"conversations": [{**turns(HUMAN)[0], "weight": 1}, *turns(GPT)]},
        "the field weight has no place in a message",
    ),
    "two systems": (
        {"conversations": turns(("system", "a"), HUMAN, GPT), "system": "b"},
        "two different system texts: one in the conversation, one beside it",
    ),
    "a reply to nothing": (
        {"conversations": turns(HUMAN, ("observation", "3"), GPT)},
        "a function's reply without a call before it",
    ),
    "one reply to two calls": (
        {"conversations": turns(HUMAN, TWO_CALLS, ("observation", "[3, 4]"), GPT)},
        "fewer replies than function calls: which is whose is not certain",
    ),
    "a call in words": (
        {"conversations": turns(HUMAN, ("function_call", "get_weather(city)"), GPT)},
        "function_call is a text that does not hold JSON",
    ),
    "a call with more": (
        {"conversations": turns(HUMAN, ("function_call", '{"name": "f", "arguments": {}, "thought": "x"}'), GPT)},
        "a function call must be JSON with name and arguments",
    ),
    "odd tools": ({"conversations": turns(HUMAN, GPT), "tools": ["f"]}, "tools holds something that is not a tool"),
    "odd history": (
        {"instruction": "a", "output": "b", "history": [["only a question"]]},
        "history must be a list of pairs: question and answer",
    ),
    "no question": ({"chosen": "a", "rejected": "b"}, "prompt is missing or empty"),
    "other conversations": (
        {"chosen": [Q, A], "rejected": [{**Q, "content": "?"}, BAD]},
        "chosen and rejected differ before their last message",
    ),
    "another prompt": (
        {"prompt": "?", "chosen": [Q, A], "rejected": [Q, BAD]},
        "prompt is not the beginning of chosen and rejected",
    ),
    "no answer at the end": (
        {"chosen": [Q, A, Q], "rejected": [Q, A, Q]},
        "chosen / rejected must end in one message of the assistant",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_with_the_reason(name: str) -> None:
    value, reason = REFUSED[name]
    assert row_of(value) is None
    with pytest.raises(InvalidRequest) as refusal:
        import_row(value)
    assert refusal.value.code == "not_convertible"
    assert refusal.value.text() == reason
    assert refusal.value.text("zh") != reason


def test_bookkeeping_is_dropped_by_name_and_other_fields_on_request() -> None:
    value = {"id": 1, "question": Q["content"], "answer": "Paris.", "source": "x", "options": ["a"]}
    assert import_row(value, drop=["options"]).dropped == ("id", "source")
    assert import_row({"question": "q", "answer": "a", "id": None}).dropped == ()


def test_the_value_itself_is_not_changed() -> None:
    for value, _ in CONVERTED.values():
        before = json.dumps(value)
        row_of(value)
        assert json.dumps(value) == before


_names = st.sampled_from(
    [
        "conversations",
        "from",
        "value",
        "role",
        "content",
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "tools",
        "history",
        "x",
    ]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_names, _json, max_size=6))
def test_any_object_gives_a_row_or_none(value: Json) -> None:
    row = row_of(value)
    assert row is None or "messages" in row or "preferred_output" in row
    assert row is None or detect(value) is not None


def test_rows_are_split_by_their_bytes_and_the_seed() -> None:
    rows = [json.dumps({"messages": [i]}).encode() for i in range(4000)]
    chosen = [row for row in rows if side(row, 0.05, 0)]
    assert 120 < len(chosen) < 280
    assert all(side(row + b"\r\n", 0.05, 0) for row in chosen)
    assert set(chosen) <= {row for row in rows if side(row, 0.2, 0)}
    assert set(chosen) != {row for row in rows if side(row, 0.05, -1)}
    assert not any(side(row, 0.0, 0) for row in rows)
    assert all(side(row, 1.0, 0) for row in rows)
