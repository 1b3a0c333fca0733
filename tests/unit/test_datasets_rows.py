"""Rows as the trainer takes them."""

from pathlib import Path

import pytest

from tests.unit.bad_rows import (
    ASSISTANT,
    CASES,
    GOOD,
    SYSTEM,
    TOOL,
    USER,
    call,
    file,
    function,
    image,
    preference,
    reply,
)
from tests.unit.test_datasets_check import checked
from tunewright import strict_json
from tunewright.datasets.rows import conversation_of
from tunewright.errors import InvalidRequest
from tunewright.rendering.conversation import Conversation, Message, ToolCall


def read(data: bytes) -> list[tuple[int, Conversation]]:
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    return [(number, conversation_of(strict_json.loads(line), number)) for number, line in lines if line.strip()]


def test_chat_rows_are_read_with_their_lines() -> None:
    weighted = {"messages": [SYSTEM, USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]}
    data = file(GOOD) + b"\n\n" + file(weighted)
    user = Message(role="user", content=USER["content"])
    paris = Message(role="assistant", content="Paris.")
    unpaid = Message(role="assistant", content="Paris.", trained=False)
    assert read(data) == [
        (1, Conversation(messages=(user, paris))),
        (4, Conversation(messages=(Message(role="system", content=SYSTEM["content"]), user, unpaid, user, paris))),
    ]


def test_function_rows_keep_arguments_as_text_and_lose_what_follows_the_last_answer() -> None:
    data = function(USER, call('{ "city":"Paris"}'), reply(), {**ASSISTANT, "reasoning_content": "hm"}, USER)
    conversation = read(data)[1][1]
    assert conversation.tools == (TOOL,)
    assert conversation.messages[1:] == (
        Message(role="assistant", tool_calls=(ToolCall(id="c1", name="get_weather", arguments='{ "city":"Paris"}'),)),
        Message(role="tool", content="sunny", tool_call_id="c1"),
        Message(role="assistant", content="Paris.", reasoning_content="hm"),
    )


def test_text_parts_are_joined() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]}
    assert read(file({"messages": [parts, ASSISTANT]}))[0][1].messages[0].content == "What now?"


@pytest.mark.parametrize("data", [preference(), image("x"), b"[1]\n", b'{"messages": [{"role": "user"}]}\n', file({})])
def test_other_rows_are_refused_with_their_line(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(file(GOOD) + data)
    assert (caught.value.code, caught.value.values["line"]) == ("wrong_format", 2)


@pytest.mark.parametrize("case", [case for case in CASES if case.purpose == "fine-tune"], ids=lambda case: case.id)
def test_what_the_check_accepts_can_be_read_and_learned(tmp_path: Path, case: object) -> None:
    data = case.data  # type: ignore[attr-defined]
    report = checked(tmp_path, data)
    if not report.ok or report.kind not in ("chat", "function"):
        return
    conversations = read(data)
    assert len(conversations) == report.rows
    for _, conversation in conversations:
        assert conversation.messages[-1].role == "assistant"
        assert any(message.role == "assistant" and message.trained for message in conversation.messages)
        assert all(message.content is not None or message.tool_calls for message in conversation.messages)
