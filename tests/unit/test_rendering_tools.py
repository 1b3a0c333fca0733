"""Calls of tools: written, read back, whatever the portions."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import tiny_tokenizer
from tunewright.rendering.conversation import Conversation, Message, ToolCall
from tunewright.rendering.renderer import Renderer
from tunewright.rendering.tool_format import our_turns, written_call
from tunewright.rendering.tools import AnswerParser, CallPiece, Piece, ReasoningPiece, TextPiece

FAST = settings(max_examples=60)


def mixed(parts: str | list[str], most: int = 12) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(parts), max_size=most).map("".join)


words = mixed([*'ab {}"\\</>\n你😀', "<tool_call>", "</tool_call>", "<think>", "</think>"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(words, values, max_size=3).map(json.dumps) | st.sampled_from(
    ["broken {", "[1]", '"a"', "7"]
)
CALL = written_call(ToolCall(id="", name="g", arguments="{}"))
calls = st.lists(
    st.builds(ToolCall, id=st.just("c"), name=st.text(min_size=1, max_size=8), arguments=arguments), max_size=3
)
plain = mixed("ab 你好\n.<>{")
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}, "n": {"type": "integer"}}},
    },
}


def portions(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def read(
    parts: list[str], *, offered: bool = True, bare_calls: bool = False, reasoning_open: bool = False
) -> tuple[str, str, list[CallPiece]]:
    """Reasoning, text and calls of an answer that comes in `parts`."""
    tools = (TOOL,) if offered else ()
    parser = AnswerParser(tools, bare_calls=bare_calls, reasoning_open=reasoning_open)
    pieces: list[Piece] = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    reasoning = "".join(p.text for p in pieces if isinstance(p, ReasoningPiece))
    text = "".join(p.text for p in pieces if isinstance(p, TextPiece))
    return reasoning, text, [p for p in pieces if isinstance(p, CallPiece)]


def same_arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


@FAST
@given(content=plain, reasoning=plain, made=calls, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_written_calls_are_read_back(content: str, reasoning: str, made: list[ToolCall], cuts: list[int]) -> None:
    message = Message(
        role="assistant", content=content or None, reasoning_content=reasoning.strip() or None, tool_calls=tuple(made)
    )
    conversation = Conversation(messages=(Message(role="user", content="q"), message))
    written = our_turns(conversation, takes_reasoning=False)[1].message["content"]
    thought, text, found = read(portions(written, cuts))
    assert thought == reasoning.strip()
    assert text.strip() == content.strip()
    assert [(p.index, p.name, same_arguments(p.arguments)) for p in found] == [
        (i, call.name, same_arguments(call.arguments)) for i, call in enumerate(made)
    ]
    ids = [p.id for p in found]
    assert all(ids) and len(set(ids)) == len(ids)


def test_calls_survive_tokens_and_stream_decoder(tmp_path: Path) -> None:
    renderer = Renderer(tiny_tokenizer(tmp_path))
    call = ToolCall(id="c", name="get_weather", arguments='{"city":"北京","note":"</tool_call> <|im_end|>"}')
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    conversation = Conversation(
        messages=(
            Message(role="user", content="天气?"),
            Message(role="assistant", content="好的", tool_calls=(call, call)),
            Message(role="tool", content="21", tool_call_id="c"),
            Message(role="tool", content="22", tool_call_id="c"),
            Message(role="assistant", content="21度"),
        ),
        tools=(tool,),
    )
    example = renderer.example(conversation)
    decoder = renderer.stream_decoder()
    answer = [t for t, trained in zip(example.tokens, example.trained, strict=True) if trained]
    first = answer[: answer.index(2)]
    _, text, found = read([*(decoder.push(t) for t in first), decoder.flush()])
    assert text == "好的"
    assert [json.loads(p.arguments) for p in found] == [json.loads(call.arguments)] * 2
    whole = renderer.decode(example.tokens)
    assert '<tools>\n{"type": "function"' in whole
    assert "user\n<tool_response>\n21\n</tool_response>\n<tool_response>\n22\n</tool_response>\n" in whole


@FAST
@given(text=mixed([*'ab \n<{"', "<tool_call>", "</tool_call>", '{"name": 1}', "<think>"]))
def test_nothing_but_border_space_is_lost(text: str) -> None:
    """Blocks here are never calls, so all characters come out, as text or as reasoning."""
    thought, shown, found = read([text])
    assert found == []
    lost = text.replace("<think>", "").split()
    assert "".join((thought + shown).replace("<think>", "").split()) == "".join(lost)
    if not text.lstrip().startswith("<think>"):
        assert shown == text


@FAST
@given(
    text=mixed([*"ab \n<{", "<tool_call>", "</tool_call>", '{"name": "f"}', "<think>", "</think>", CALL]),
    cuts=st.lists(st.integers(0, 150), max_size=10),
    offered=st.booleans(),
    reasoning_open=st.booleans(),
)
def test_portions_do_not_matter(text: str, cuts: list[int], offered: bool, reasoning_open: bool) -> None:
    def bare(parts: list[str]) -> tuple[str, str, list[tuple[int, str | None, str]]]:
        thought, shown, found = read(parts, offered=offered, reasoning_open=reasoning_open)
        return thought, shown, [(p.index, p.name, p.arguments) for p in found]

    assert bare(portions(text, cuts)) == bare([text]) == bare(list(text))


@pytest.mark.parametrize(
    "body",
    [
        "",
        "no json",
        "{",
        "[]",
        '{"name": 3}',
        '{"name": ""}',
        '{"name": "f", "arguments": 3}',
        "[" * 100_000,
        '{"a":' * 50_000,
    ],
)
def test_malformed_calls_come_out_as_text(body: str) -> None:
    text = f"see <tool_call>{body}</tool_call>."
    assert read([text]) == ("", text, [])
    assert read([text[:-12]]) == ("", text[:-12], [])


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', "f", {"a": 1}),
        ('{"name": "f", "parameters": {"a": 1}}', "f", {"a": 1}),
        ('{"name": "f"}', "f", {}),
        ('{"arguments": "{\\"a\\": 1}", "name": "f"}', "f", {"a": 1}),
        (
            "f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>城市</arg_key>\n<arg_value>北京</arg_value>\n",
            "f",
            {"a": 1, "城市": "北京"},
        ),
    ],
)
def test_forms_of_calls(body: str, name: str, value: Any) -> None:
    for end in ("</tool_call>", ""):  # some models stop without the closing tag
        _, text, found = read([f"<tool_call>\n{body}\n{end}"])
        assert text == ""
        assert [(p.name, json.loads(p.arguments)) for p in found] == [(name, value)]


def test_without_tools_a_call_is_text() -> None:
    text = written_call(ToolCall(id="", name="f", arguments="{}"))
    assert read([text], offered=False) == ("", text, [])


def test_text_streams_at_once() -> None:
    parser = AnswerParser((TOOL,))
    assert parser.push("Hello") == [TextPiece("Hello")]
    assert parser.push(" <too") == []
    assert parser.push(" late") == [TextPiece(" <too late")]
    assert parser.push("\n") == []
    assert parser.finish() == [TextPiece("\n")]


def test_reasoning_streams_and_an_open_one_ends_with_the_answer() -> None:
    parser = AnswerParser(())
    assert parser.push("<think>\nI ") == [ReasoningPiece("I")]
    assert parser.push("see.\n</think>\n\nYes") == [ReasoningPiece(" see."), TextPiece("Yes")]
    assert read(["thinking</think>Yes"], reasoning_open=True) == ("thinking", "Yes", [])
    assert read(["<think>cut"]) == ("cut", "", [])


def cut(text: str, *, bare_calls: bool = False) -> tuple[str, list[tuple[str | None, str]]]:
    """Text and calls of an answer that ended at max_tokens."""
    parser = AnswerParser((TOOL,), bare_calls=bare_calls)
    pieces = [*parser.push(text), *parser.finish(cut=True)]
    shown = "".join(p.text for p in pieces if isinstance(p, TextPiece))
    return shown, [(p.name, p.arguments) for p in pieces if isinstance(p, CallPiece)]


@pytest.mark.parametrize("before", ["", "<tool_call>\nf\n</tool_call>\n", "See:\n"])
@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("<to", None),
        ("<tool_call>", None),
        ('<tool_call>\n{ "na', None),
        ('<tool_call>\n{"name": "f', None),
        ('<tool_call>\n{"name": "f"', ""),
        ('<tool_call>\n{"name": "f", "argum', ""),
        ('<tool_call>\n{"name": "f", "arguments": {"text": "a}', '{"text": "a}'),
        ('<tool_call>\n{"name": "f", "parameters": {"n": 1}', '{"n": 1}'),
        ('<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool', '{"n": 1}'),
        ("<tool_call>f", ""),
        ("<tool_call>f\n<arg_key>n</arg_key>\n<arg_va", ""),
        ("<tool_call>f\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>\n<arg_key>te", '{"n": 1'),
    ],
)
def test_a_call_at_which_the_answer_was_cut_off_is_no_text(before: str, body: str, arguments: str | None) -> None:
    """As far as it was written it is a call, and what is not whole is not JSON; without a name nothing is to be seen of it."""
    text, calls = cut(before + body)
    assert text.strip() == ("See:" if before.startswith("See") else "")
    expected = [] if arguments is None else [("f", arguments)]
    assert calls == ([("f", "{}")] if "f\n</" in before else []) + expected


@pytest.mark.parametrize(
    "text", ["a <", "<tool_call>no call", '<tool_call>{"title": "f', '<tool_call>{"name": "other", "arguments": {']
)
def test_what_is_no_call_stays_text_when_it_is_cut_off(text: str) -> None:
    assert cut(text) == (text, [])


def test_a_bare_call_is_told_from_an_answer_in_json_by_its_arguments() -> None:
    assert cut('{"name": "f", "arguments": {"n', bare_calls=True) == ("", [("f", '{"n')])
    for text in ('{"name": "f", "born": 19', '{"name": "f"', '{"name": "other", "arguments": {'):
        assert cut(text, bare_calls=True) == (text, [])
