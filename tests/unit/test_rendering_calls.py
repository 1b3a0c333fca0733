"""Calls of functions in the style of each family: rendered to tokens, decoded one by one, read back, accumulated by the SDK."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from tests.unit.rendering_folders import TEMPLATES, styled_folder
from tunewright.api.chat import ChunkWriter
from tunewright.completions.vocabulary import Finish, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from tunewright.errors import InvalidRequest
from tunewright.rendering.conversation import Conversation, Message, ToolCall
from tunewright.rendering.renderer import Renderer
from tunewright.rendering.tools import CallPiece, Piece, TextPiece

FAST = settings(max_examples=25)
OURS = ("chatml", "llama3", "glm4", "glm4 with tools", "instruct")
NATIVE = ("native", "glm45", "llama31")
MARKS = (
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    '{"name": "f"}',
    "<|im_end|>",
    "<|user|>",
    "</",
    "\\",
    '"',
)
TAGS = ("<arg_key>", "</arg_key>", "<arg_value>")


def function(name: str) -> dict[str, Any]:
    kinds = {
        "text": "string",
        "n": "integer",
        "ratio": "number",
        "flag": "boolean",
        "list": "array",
        "object": "object",
    }
    properties = {name: {"type": kind} for name, kind in kinds.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = (function("get_weather"), function("f"))


def texts(parts: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.lists(
        st.one_of(st.sampled_from(("a ", "你好", "😀", "\n", *parts)), st.text(max_size=4)), max_size=5
    ).map(lambda found: "".join(found).encode("utf-8", "ignore").decode())


def values(parts: tuple[str, ...]) -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts(parts)
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(parts), inner, max_size=3),
        max_leaves=5,
    )


@st.composite
def answers(draw: st.DrawFn, style: str) -> Message:
    """An answer with calls that the style can hold. GLM's tags are written as they are, so there no text may hold them."""
    parts = ("{", "}", "<|user|>", "</") if style == "glm45" else (*MARKS, *TAGS)
    arguments = st.fixed_dictionaries(
        {},
        optional={
            "text": texts(parts),
            "n": st.integers(),
            "ratio": st.floats(allow_nan=False, allow_infinity=False),
            "flag": st.booleans(),
            "list": st.lists(values(parts), max_size=3),
            "object": st.dictionaries(texts(parts), values(parts), max_size=3),
        },
    )
    call = st.builds(
        ToolCall,
        id=st.just("call00001"),
        name=st.sampled_from(["get_weather", "f"]),
        arguments=arguments.map(json.dumps),
    )
    several = draw(st.lists(call, min_size=1, max_size=1 if style == "llama31" else 3))
    content = "" if style == "llama31" else draw(texts(("{", "好的。", "<"))).strip()
    return Message(role="assistant", content=content or None, tool_calls=tuple(several))


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Renderer]:
    return {style: Renderer(styled_folder(tmp_path_factory.mktemp("style"), style)) for style in (*OURS, *NATIVE)}


def conversation(answer: Message, *rest: Message) -> Conversation:
    return Conversation(messages=(Message(role="user", content="天气?"), answer, *rest), tools=TOOLS)


def streamed(renderer: Renderer, ids: list[int], cuts: list[int]) -> list[Piece]:
    """What a server sends for `ids`: decoded token by token, then cut anywhere."""
    decoder = renderer.stream_decoder()
    text = "".join([*(decoder.push(i) for i in ids if i not in renderer.stop_ids), decoder.flush()])
    parser = renderer.answer_parser(TOOLS)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [piece for a, b in pairwise(edges) for piece in parser.push(text[a:b])] + parser.finish()


def accumulated(pieces: list[Piece]) -> Any:
    """The message that the SDK makes of the stream."""
    writer = ChunkWriter("m", {}, usage_with_finish=False, usage_chunk=False, role_once=True)
    state = ChatCompletionStreamState()
    for piece in pieces:
        if isinstance(piece, CallPiece):
            delta: Any = ToolCallDelta(index=piece.index, id=piece.id, name=piece.name, arguments=piece.arguments)
        else:
            delta = (TextDelta if isinstance(piece, TextPiece) else ReasoningDelta)(text=piece.text)
        feed(state, writer.frames(delta))
    feed(state, writer.frames(Finish(reason="tool_calls", usage=Usage(prompt_tokens=1, completion_tokens=1))))
    message = state.get_final_completion().choices[0].message
    assert message.role == "assistant", "the SDK adds up texts, roles too"
    return message


def feed(state: Any, frames: bytes) -> None:
    for block in frames.decode().removesuffix("\n\n").split("\n\n"):
        if block != "data: [DONE]":
            state.handle_chunk(ChatCompletionChunk.model_validate_json(block.removeprefix("data: ")))


@pytest.mark.parametrize("style", [*OURS, *NATIVE])
@FAST
@given(data=st.data(), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_what_is_trained_is_what_the_sdk_gets(
    renderers: dict[str, Renderer], style: str, data: Any, cuts: list[int]
) -> None:
    renderer = renderers[style]
    answer = data.draw(answers(style))
    message = accumulated(streamed(renderer, renderer.answer(conversation(answer)), cuts))
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [
        (call.name, json.loads(call.arguments)) for call in answer.tool_calls
    ]
    assert all(call.id and call.type == "function" for call in message.tool_calls)
    assert len({call.id for call in message.tool_calls}) == len(answer.tool_calls)
    assert (message.content or "").strip() == (answer.content or "")


def test_a_template_whose_calls_are_lost_gets_ours(renderers: dict[str, Renderer]) -> None:
    assert {style for style, renderer in renderers.items() if renderer.native_tools} == set(NATIVE)
    call = ToolCall(id="c", name="f", arguments='{"n": 1}')
    rows = conversation(
        Message(role="assistant", tool_calls=(call,)), Message(role="tool", content="42", tool_call_id="c")
    )
    written = renderers["glm4 with tools"].decode(renderers["glm4 with tools"].prompt(rows))
    assert '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>' in written
    assert "<tool_response>\n42\n</tool_response>" in written


def test_schemas_stand_where_the_template_has_a_place(renderers: dict[str, Renderer]) -> None:
    call = ToolCall(id="c", name="f", arguments="{}")
    for style, before in (("chatml", "system\n# Tools"), ("instruct", "[INST] # Tools")):
        prompt = renderers[style].prompt(conversation(Message(role="assistant", tool_calls=(call,))))
        text = renderers[style].decode(prompt)
        assert before in text and text.index("</tools>") < text.index("天气?")


def test_special_tokens_around_calls_are_no_form_that_can_be_read(tmp_path: Path) -> None:
    """Control tokens of an answer are not in its text, so what only they tell is lost: here whether an object is a call."""
    template = TEMPLATES["native"].replace("\\n<tool_call>\\n", "<|im_start|>").replace("\\n</tool_call>", "")
    renderer = Renderer(styled_folder(tmp_path, "native", template=template.replace('{"name"', '[{"name"')))
    assert not renderer.native_tools


def with_call(n: int = 1, content: str | None = None, arguments: str = "{}") -> Message:
    call = ToolCall(id="c", name="f", arguments=arguments)
    return Message(role="assistant", content=content, tool_calls=(call,) * n)


@pytest.mark.parametrize(
    ("style", "answer", "says"),
    [
        ("llama31", with_call(2), "one call"),
        ("llama31", with_call(content="See."), "no place for text"),
        ("glm45", with_call(arguments="[1]"), "JSON object"),
        ("glm45", with_call(arguments='{"n": '), "JSON object"),
    ],
)
def test_what_a_template_would_drop_or_fail_on_is_refused(
    renderers: dict[str, Renderer], style: str, answer: Message, says: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        renderers[style].example(conversation(answer))
    assert caught.value.code == "conversation_not_supported" and caught.value.param == "messages[1]"
    assert says in caught.value.text() and caught.value.text("zh") != caught.value.text()
    for other in ("native", *OURS):
        renderers[other].example(conversation(answer))


@pytest.mark.parametrize("style", [*OURS, *NATIVE])
@pytest.mark.parametrize("named", ["get_weather", None])
def test_a_required_call_begins_as_it_was_trained(
    renderers: dict[str, Renderer], style: str, named: str | None
) -> None:
    renderer = renderers[style]
    answer = Message(role="assistant", tool_calls=(ToolCall(id="c", name="get_weather", arguments='{"text": "北京"}'),))
    whole = conversation(answer)
    asked = msgspec.structs.replace(whole, messages=whole.messages[:1])
    ids, text = renderer.call_opening(named)
    prompt = [*renderer.prompt(asked), *ids]
    assert renderer.example(whole).tokens[: len(prompt)] == prompt
    assert text.endswith("get_weather") == bool(named)
    parser = renderer.answer_parser(TOOLS)
    assert not any(isinstance(piece, TextPiece) for piece in parser.push(text))
    rest = renderer.decode(i for i in renderer.answer(whole)[len(ids) :] if i not in renderer.stop_ids)
    pieces = parser.push(rest) + parser.finish()
    assert [(p.name, json.loads(p.arguments)) for p in pieces if isinstance(p, CallPiece)] == [
        ("get_weather", {"text": "北京"})
    ]


def test_an_answer_in_json_is_no_call(renderers: dict[str, Renderer]) -> None:
    for text in (
        '{"name": "Ann", "age": 3}',
        '{"name": "Ann", "parameters": {}}',
        '{"name": "f"}',
        '{"name": "f", "parameters": 3}',
        '{"name": "f", "parameters": {"n": 1}',
        "{ is a brace",
    ):
        parser = renderers["llama31"].answer_parser(TOOLS)
        assert parser.push(text) + parser.finish() == [TextPiece(text)]


def test_arguments_of_pairs_are_read_by_the_schema(renderers: dict[str, Renderer]) -> None:
    body = "f\n<arg_key>text</arg_key>\n<arg_value>3</arg_value>\n<arg_key>n</arg_key>\n<arg_value>3</arg_value>"
    body += "\n<arg_key>other</arg_key>\n<arg_value>3</arg_value>"
    parser = renderers["glm45"].answer_parser(TOOLS)
    found = parser.push(
        f"<think></think>\n<tool_call>{body}\n</tool_call>\n<tool_call>f</tool_call><tool_call>g</tool_call>"
    )
    found += parser.finish()
    calls = [json.loads(piece.arguments) for piece in found if isinstance(piece, CallPiece)]
    assert calls == [{"text": "3", "n": 3, "other": 3}, {}]
    assert found[-1] == TextPiece("<tool_call>g</tool_call>")
