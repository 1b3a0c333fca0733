"""What answers are held to: grammars that let through what the parser of answers reads, and nothing else."""

import json
from pathlib import Path
from typing import Any

import llguidance
import pytest

from tests.tiny_models import tiny_tokenizer
from tests.unit.rendering_folders import styled_folder
from tunewright.completions.answer_formats import answer_grammar
from tunewright.completions.vocabulary import ChatRequest, Sampling
from tunewright.errors import InvalidRequest
from tunewright.rendering.conversation import Conversation, Message
from tunewright.rendering.renderer import Renderer
from tunewright.rendering.tools import CallPiece

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "weather", "arguments": {"town": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def request_with(tools: tuple[dict[str, Any], ...] = (), **more: Any) -> ChatRequest:
    conversation = Conversation(messages=(Message(role="user", content="hello"),), tools=tools)
    return ChatRequest(model="m", conversation=conversation, sampling=Sampling(), **more)


TOOLS = (tool("weather", WEATHER), tool("time"))
STRICT = (tool("weather", WEATHER, strict=True), tool("time"))


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(tiny_tokenizer(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def vocabulary(renderer: Renderer) -> llguidance.LLTokenizer:
    text = (renderer.folder / "tokenizer.json").read_text("utf-8")
    return llguidance.LLTokenizer(text, n_vocab=renderer.vocabulary_size, eos_token=sorted(renderer.stop_ids))


def lets_through(vocabulary: llguidance.LLTokenizer, grammar: str, text: str) -> bool:
    """Whether `text` can be said, and the answer end there."""
    matcher = llguidance.LLMatcher(vocabulary, grammar)
    ids = vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("asked", "text", "right"),
    [
        ({"answer_schema": {"type": "object"}}, '{"a": [1, {"b": null}]}', True),
        ({"answer_schema": {"type": "object"}}, '{\n  "a": 1\n}', True),
        ({"answer_schema": {"type": "object"}}, "[]", False),
        ({"answer_schema": {"type": "object"}}, "Sure: {}", False),
        ({"answer_schema": {"type": "object"}}, '{"a": ' + " " * 40 + "1}", False),
        ({"answer_schema": WEATHER}, '{"city": "Paris", "days": 3}', True),
        ({"answer_schema": WEATHER}, '{"city": "Paris", "days": "3"}', False),
        ({"answer_schema": WEATHER}, '{"days": 3}', False),
        ({"tools": TOOLS, "tool_choice": "required"}, CALL, True),
        ({"tools": TOOLS, "tool_choice": "required"}, f"{CALL}\n{TIME}", True),
        ({"tools": TOOLS, "tool_choice": "required"}, "It is sunny.", False),
        ({"tools": TOOLS, "tool_choice": "required"}, WRONG, False),
        ({"tools": TOOLS, "tool_choice": "required", "one_call": True}, f"{CALL}\n{TIME}", False),
        ({"tools": TOOLS, "tool_choice": "required", "function": "time"}, TIME, True),
        ({"tools": TOOLS, "tool_choice": "required", "function": "time"}, CALL, False),
        ({"tools": TOOLS, "answer_schema": WEATHER}, CALL, True),
        ({"tools": TOOLS, "answer_schema": WEATHER}, '{"city": "Paris"}', True),
        ({"tools": TOOLS, "answer_schema": WEATHER}, "It is sunny.", False),
        ({"tools": TOOLS, "tool_choice": "none", "answer_schema": WEATHER}, CALL, False),
        ({"tools": STRICT}, "It is sunny.", True),
        ({"tools": STRICT}, f"Let me look.\n{CALL}\n{TIME}", True),
        ({"tools": STRICT}, WRONG, False),
        ({"tools": STRICT, "one_call": True}, f"Let me look. {CALL}", True),
        ({"tools": STRICT, "one_call": True}, f"{CALL}\n{TIME}", False),
    ],
)
def test_what_is_let_through(
    vocabulary: llguidance.LLTokenizer, renderer: Renderer, asked: dict[str, Any], text: str, right: bool
) -> None:
    grammar = answer_grammar(request_with(**asked), renderer)
    assert grammar is not None
    assert lets_through(vocabulary, grammar, text) == right
    if right and "<tool_call>" in text:
        parser = renderer.answer_parser(asked["tools"])
        pieces = [*parser.push(text), *parser.finish()]
        calls = [piece for piece in pieces if isinstance(piece, CallPiece)]
        assert len(calls) == text.count("<tool_call>")
        assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


@pytest.mark.parametrize("asked", [{}, {"tools": TOOLS}, {"tools": STRICT, "tool_choice": "none"}])
def test_an_answer_of_which_nothing_is_asked_is_free(asked: dict[str, Any], renderer: Renderer) -> None:
    assert answer_grammar(request_with(**asked), renderer) is None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "nonsense"}, "type"),
        ({"$ref": "http://127.0.0.1/x"}, "References"),
        ({"$ref": "#/$defs/nowhere"}, "References"),
        ({"type": "string", "pattern": "(?=x)y"}, "look"),
        (nested(100), "nested"),
    ],
)
def test_schemas_that_nothing_can_be_held_to(schema: dict[str, Any], words: str, renderer: Renderer) -> None:
    with pytest.raises(InvalidRequest) as caught:
        answer_grammar(request_with(answer_schema=schema), renderer)
    assert caught.value.code == "invalid_schema" and words in str(caught.value)
    assert caught.value.param == "response_format.json_schema.schema"


def test_schemas_of_tools(renderer: Renderer) -> None:
    """Only a strict tool has to be enforceable to the last word; definitions move along with the parameters."""
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    assert answer_grammar(request_with((tool("f", odd),), tool_choice="required"), renderer) is not None
    with pytest.raises(InvalidRequest) as caught:
        answer_grammar(request_with((tool("f", odd, strict=True),)), renderer)
    assert (caught.value.code, caught.value.param) == ("invalid_schema", "tools")
    linked = {"$defs": {"x": {"type": "integer"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}}
    assert answer_grammar(request_with((tool("f", linked, strict=True),)), renderer) is not None


def test_a_recursive_schema_and_a_pattern_that_backtracks_are_no_trouble(
    vocabulary: llguidance.LLTokenizer, renderer: Renderer
) -> None:
    tree = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["v"]}
    grammar = answer_grammar(request_with(answer_schema=tree), renderer) or ""
    assert lets_through(vocabulary, grammar, '{"v": 1, "next": {"v": 2}}')
    evil = answer_grammar(request_with(answer_schema={"type": "string", "pattern": "^(a+)+b$"}), renderer) or ""
    assert not lets_through(vocabulary, evil, '"' + "a" * 5000 + 'c"')


def test_a_style_that_no_grammar_is_made_for(tmp_path: Path) -> None:
    """Calls are begun for such a base all the same (rendering/call_style.py), but a value beside them can't be."""
    renderer = Renderer(styled_folder(tmp_path / "glm", "glm45"))
    assert renderer.native_tools and not renderer.calls_in_json
    assert answer_grammar(request_with(STRICT, tool_choice="required"), renderer) is None
    with pytest.raises(InvalidRequest) as caught:
        answer_grammar(request_with(STRICT, answer_schema=WEATHER), renderer)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "response_format")
