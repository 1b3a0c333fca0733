"""Prompts and examples: prefix, labels, injection, equality with Hugging Face's text."""

import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.tiny_models import CHATML
from tests.unit.rendering_folders import TEMPLATES, edit_json, styled_folder
from tunewright.errors import InvalidRequest, Misconfigured
from tunewright.rendering.canary import canaries
from tunewright.rendering.conversation import Conversation, Message, ToolCall
from tunewright.rendering.renderer import Renderer, renderer_of

FAST = settings(max_examples=40)
CONTROL = ("<|im_start|>assistant\n", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|eot_id|>", "</s>", "<s>", "[gMASK]")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气 <|im_end|>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

texts = st.lists(
    st.one_of(
        st.sampled_from([*CONTROL, "你好", "hello", "😀", " ", "\n", '"', "\\", "\ue000", "<tool_call>"]),
        st.text(st.characters(codec="utf-8"), max_size=8),
    ),
    min_size=1,
    max_size=5,
).map("".join)
calls = st.lists(
    st.builds(
        ToolCall,
        id=st.just("call_1"),
        name=st.sampled_from(["get_weather", "f"]),
        arguments=st.sampled_from(
            ['{"city": "北京"}', "{}", '{"a":[1,2.5,null],"b":"</tool_call>"}', '{"x":"<|im_end|>"}']
        ),
    ),
    min_size=1,
    max_size=2,
).map(tuple)


@st.composite
def conversations(draw: st.DrawFn, *, system: bool = True, tools: bool = True) -> Conversation:
    messages = [Message(role="system", content=draw(texts))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message(role="user", content=draw(texts)))
        if tools and draw(st.booleans()):
            made = draw(calls)
            messages.append(Message(role="assistant", content=draw(st.none() | texts), tool_calls=made))
            messages += [Message(role="tool", content=draw(texts), tool_call_id="call_1") for _ in made]
        messages.append(Message(role="assistant", content=draw(texts), trained=draw(st.booleans())))
    return Conversation(messages=tuple(messages), tools=(TOOL,) if tools and draw(st.booleans()) else ())


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Renderer]:
    return {style: Renderer(styled_folder(tmp_path_factory.mktemp(style), style)) for style in TEMPLATES}


def raw_text(renderer: Renderer, ids: list[int]) -> str:
    return renderer._tokens._first.decode(ids, skip_special_tokens=False)


def trained_runs(renderer: Renderer, conversation: Conversation) -> list[str]:
    """The trained text of each answer."""
    example = renderer.example(conversation)
    runs: list[list[int]] = []
    previous = False
    for token, trained in zip(example.tokens, example.trained, strict=True):
        if trained:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = trained
    return [raw_text(renderer, run) for run in runs]


def chat(*contents: str, **more: Any) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(messages=tuple(Message(role=roles[i % 2], content=c) for i, c in enumerate(contents)), **more)


def upto(conversation: Conversation, index: int) -> Conversation:
    return msgspec.structs.replace(conversation, messages=conversation.messages[:index])


@pytest.mark.parametrize("style", TEMPLATES)
@FAST
@given(data=st.data())
def test_every_prompt_is_a_token_prefix_of_the_example(renderers: dict[str, Renderer], style: str, data: Any) -> None:
    renderer = renderers[style]
    plain = style in ("instruct", "glm4")
    conversation = data.draw(conversations(system=style != "instruct", tools=not plain))
    example = renderer.example(conversation)
    assert example.skipped == ()
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant":
            prompt = renderer.prompt(upto(conversation, index))
            assert example.tokens[: len(prompt)] == prompt
            if message.trained:
                assert not example.trained[len(prompt) - 1]
                assert example.trained[len(prompt)]


@pytest.mark.parametrize("style", TEMPLATES)
@FAST
@given(data=st.data())
def test_texts_never_add_control_tokens(renderers: dict[str, Renderer], style: str, data: Any) -> None:
    """With every text replaced by a harmless one, the same control tokens stand in the same order."""
    renderer = renderers[style]
    conversation = data.draw(conversations(system=style != "instruct", tools=style not in ("instruct", "glm4")))
    harmless = msgspec.structs.replace(
        conversation,
        messages=tuple(
            msgspec.structs.replace(
                m,
                content="x" if m.content and m.content.strip() else m.content,
                tool_calls=tuple(msgspec.structs.replace(c, arguments="{}") for c in m.tool_calls),
            )
            for m in conversation.messages
        ),
        tools=({**TOOL, "function": {"name": "get_weather"}},) if conversation.tools else (),
    )
    control = renderer._tokens._control_ids

    def of(c: Conversation) -> list[int]:
        return [i for i in renderer.example(c).tokens if i in control]

    assert of(conversation) == of(harmless)


@pytest.mark.parametrize(
    ("style", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("instruct", "</s>"), ("native", "<|im_end|>")],
)
def test_labels_are_answers_and_their_stop_tokens(renderers: dict[str, Renderer], style: str, end: str) -> None:
    lead = " " if style == "instruct" else ""
    runs = trained_runs(renderers[style], chat("hi", "hello you", "你好", "再见"))
    assert runs == [f"{lead}hello you{end}", f"{lead}再见{end}"]


def test_roles_as_stop_tokens_and_eos_after_the_last_answer(renderers: dict[str, Renderer]) -> None:
    runs = trained_runs(renderers["glm4"], chat("hi", "one", "again", "two"))
    assert runs == ["one<|user|>", "two<|endoftext|>"]


def test_untrained_answers_have_no_labels(renderers: dict[str, Renderer]) -> None:
    conversation = chat("hi", "one", "again", "two")
    first = msgspec.structs.replace(conversation.messages[1], trained=False)
    changed = msgspec.structs.replace(
        conversation, messages=(conversation.messages[0], first, *conversation.messages[2:])
    )
    for renderer in renderers.values():
        assert [run.strip()[:3] for run in trained_runs(renderer, changed)] == ["two"]


def test_an_answer_that_nothing_prompts_is_skipped_and_named(renderers: dict[str, Renderer]) -> None:
    example = renderers["chatml"].example(Conversation(messages=(Message(role="assistant", content="hi"),)))
    assert example.skipped == (0,)
    assert not any(example.trained)


def test_a_stop_less_template_never_trains_the_next_question(tmp_path: Path) -> None:
    """Without an end token between turns the labels end with the answer; eos follows the last one."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    renderer = Renderer(styled_folder(tmp_path, "chatml", template=template))
    assert trained_runs(renderer, chat("q1", "a1", "q2", "a2")) == ["a1", "a2\n<|im_end|>"]


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("generate", [True, False])
def test_text_equals_hugging_face(tmp_path: Path, style: str, generate: bool) -> None:
    from transformers import AutoTokenizer

    folder = styled_folder(tmp_path, style)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoTokenizer.from_pretrained(folder)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "  你好, who are you?\n"},
        {"role": "assistant", "content": "  A 模型. "},
        {"role": "user", "content": "Weather?"},
    ]
    ours = [Message(**m) for m in messages]
    tools = None
    if style == "native":
        call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
        messages.append({"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]})
        messages.append({"role": "tool", "content": "21", "tool_call_id": "c1"})
        made = ToolCall(id="c1", name="get_weather", arguments='{"city":"北京"}')
        ours.append(Message(role="assistant", reasoning_content="hm", tool_calls=(made,)))
        ours.append(Message(role="tool", content="21", tool_call_id="c1"))
        tools = [TOOL]
    conversation = Conversation(messages=tuple(ours), tools=tuple(tools or ()))
    renderer = Renderer(folder)
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate)
    ids = renderer.prompt(conversation) if generate else renderer.example(conversation).tokens
    assert raw_text(renderer, ids) == expected


def test_reasoning_goes_where_the_template_has_a_place(renderers: dict[str, Renderer]) -> None:
    answer = Message(role="assistant", content="Four.", reasoning_content="2+2")
    conversation = Conversation(messages=(Message(role="user", content="2+2?"), answer))
    for style in ("native", "chatml"):
        assert trained_runs(renderers[style], conversation) == ["<think>\n2+2\n</think>\n\nFour.<|im_end|>"]
    inline = Message(role="assistant", content="<think>\n2+2\n</think>\n\nFour.")
    same = Conversation(messages=(conversation.messages[0], inline))
    assert renderers["native"].example(same) == renderers["native"].example(conversation)


def test_a_refused_conversation_is_the_callers_error(renderers: dict[str, Renderer]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        renderers["instruct"].prompt(Conversation(messages=(Message(role="system", content="x"),)))
    assert caught.value.code == "conversation_not_supported"
    assert "Only user and assistant" in caught.value.text()
    assert "Only user and assistant" in caught.value.text("zh")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content[:4] }}{% endfor %}",
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
        "{{ messages[7].content }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
    ids=["changes texts", "prompt is no prefix", "fails", "does not compile", "leaves the sandbox"],
)
def test_templates_that_cannot_keep_the_promise_are_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        Renderer(styled_folder(tmp_path, "chatml", template=template))
    assert caught.value.code == "template_unsupported"
    assert caught.value.text("zh") != caught.value.text()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured) as caught:
        Renderer(tmp_path)
    assert caught.value.code == "model_folder_incomplete"
    styled_folder(tmp_path, "chatml")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Misconfigured) as caught:
        Renderer(tmp_path)
    assert "tokenizer.json" in caught.value.text("zh")


def test_stop_ids_come_from_all_files_and_the_template(tmp_path: Path) -> None:
    folder = styled_folder(tmp_path, "chatml")
    assert Renderer(folder).stop_ids == {0, 2}
    edit_json(folder / "generation_config.json", eos_token_id=0)
    edit_json(folder / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    assert Renderer(folder).stop_ids == {0, 2}  # 2: the template ends answers with it


def test_hash_and_cache_follow_the_files(tmp_path: Path) -> None:
    first = renderer_of(styled_folder(tmp_path / "a", "chatml"))
    assert renderer_of(tmp_path / "a") is first
    assert Renderer(styled_folder(tmp_path / "b", "chatml")).hash == first.hash
    (tmp_path / "a" / "chat_template.jinja").write_text(CHATML + "{# changed #}")
    changed = renderer_of(tmp_path / "a")
    assert changed.hash != first.hash
    edit_json(tmp_path / "b" / "generation_config.json", eos_token_id=[2, 0, 5])
    assert Renderer(tmp_path / "b").hash != first.hash


def test_a_vocabulary_that_spells_control_tokens_still_gives_none(tmp_path: Path) -> None:
    folder = styled_folder(tmp_path, "chatml")
    path = folder / "tokenizer.json"
    edit_json(
        path, pre_tokenizer=None, model={**msgspec.json.decode(path.read_bytes())["model"], "ignore_merges": True}
    )
    assert Tokenizer.from_file(str(path)).encode("<|im_end|>").ids == [2]
    renderer = Renderer(folder)
    ids = renderer.prompt(chat("<|im_end|>"))
    assert ids.count(2) == renderer.prompt(chat("x")).count(2)


def test_canaries_are_three_different_prompts(renderers: dict[str, Renderer]) -> None:
    for renderer in renderers.values():
        prompts = canaries(renderer)
        assert len({tuple(p) for p in prompts}) == 3
        assert all(0 < len(p) < 150 and max(p) < renderer.vocabulary_size for p in prompts)


def test_a_long_history_is_rendered_a_fixed_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving must not cost the square of the history: only examples look at each answer's own prompt."""
    renderer = Renderer(styled_folder(tmp_path, "chatml"))
    rendered: list[int] = []
    true_render = renderer._template.render
    monkeypatch.setattr(renderer._template, "render", lambda *a, **k: rendered.append(1) or true_render(*a, **k))
    renderer.prompt(chat(*["hi"] * 101))
    assert len(rendered) == 2


def test_a_prompt_may_open_the_reasoning(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n'", "assistant\n<think>\n'").replace(
        "message['role'] + '\n' +",
        "message['role'] + '\n' + ('<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' "
        "if message.role == 'assistant' else '') +",
    )
    renderer = Renderer(styled_folder(tmp_path, "chatml", template=template + "{# needs reasoning #}"))
    assert renderer.opens_reasoning
    answer = Message(role="assistant", content="4", reasoning_content="2+2")
    conversation = Conversation(messages=(Message(role="user", content="?"), answer))
    assert trained_runs(renderer, conversation) == ["2+2\n</think>\n\n4<|im_end|>"]


def test_named_templates_and_the_tools_hugging_face_offers(tmp_path: Path) -> None:
    plain = "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}" + CHATML
    named = [{"name": "default", "template": plain}, {"name": "tool_use", "template": TEMPLATES["native"]}]
    renderer = Renderer(styled_folder(tmp_path, "chatml"))
    assert not renderer.native_tools
    edit_json(tmp_path / "tokenizer_config.json", chat_template=named)
    renderer = Renderer(tmp_path)
    assert renderer.native_tools
    assert raw_text(renderer, renderer.prompt(chat("hi"))).startswith("20")
    assert "# Tools\n<tools>" in raw_text(renderer, renderer.prompt(chat("hi", tools=(TOOL,))))


def test_all_private_use_characters_in_a_text_are_kept(renderers: dict[str, Renderer]) -> None:
    text = "".join(map(chr, range(0xE000, 0xF900)))
    assert renderers["chatml"].decode(renderers["chatml"].prompt(chat(text))).count(text) == 1
    text += "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    with pytest.raises(InvalidRequest):
        renderers["chatml"].prompt(chat(text))


def test_texts_are_encoded_as_the_model_writes_them(renderers: dict[str, Renderer]) -> None:
    """White space before an answer joins its first word, and a control token's text beside a word leaves the word whole."""
    renderer = renderers["chatml"]
    tokens = renderer._tokens
    example = renderer.example(chat("hi", " the assistant"))
    labels = [t for t, trained in zip(example.tokens, example.trained, strict=True) if trained]
    assert labels[:-1] == list(tokens.template_ids(" the assistant"))
    apart = [*tokens.plain_ids("assistant "), *tokens.plain_ids("<|im_end|>")]
    assert tokens.plain_ids("assistant <|im_end|>") == apart
    assert len(tokens.plain_ids("assistant ")) < len("assistant ")
