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
from tunewright.datasets.rows import read_conversations
from tunewright.errors import InvalidRequest
from tunewright.rendering.conversation import Conversation, Message, ToolCall

MAX_LINE_BYTES = 4 * 2**20


def read(tmp_path: Path, data: bytes) -> list[tuple[int, Conversation]]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    return list(read_conversations(path, MAX_LINE_BYTES))


def test_chat_rows_are_read_with_their_lines(tmp_path: Path) -> None:
    weighted = {"messages": [SYSTEM, USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]}
    data = b"\xef\xbb\xbf" + file(GOOD) + b"\r\n\n" + file(weighted).replace(b"\n", b"\r\n")
    user = Message(role="user", content=USER["content"])
    paris = Message(role="assistant", content="Paris.")
    unpaid = Message(role="assistant", content="Paris.", trained=False)
    assert read(tmp_path, data) == [
        (1, Conversation(messages=(user, paris))),
        (4, Conversation(messages=(Message(role="system", content=SYSTEM["content"]), user, unpaid, user, paris))),
    ]


def test_function_rows_keep_arguments_as_text_and_lose_what_follows_the_last_answer(tmp_path: Path) -> None:
    data = function(USER, call('{ "city":"Paris"}'), reply(), {**ASSISTANT, "reasoning_content": "hm"}, USER)
    conversation = read(tmp_path, data)[1][1]
    assert conversation.tools == (TOOL,)
    assert conversation.messages[1:] == (
        Message(role="assistant", tool_calls=(ToolCall(id="c1", name="get_weather", arguments='{ "city":"Paris"}'),)),
        Message(role="tool", content="sunny", tool_call_id="c1"),
        Message(role="assistant", content="Paris.", reasoning_content="hm"),
    )


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]}
    assert read(tmp_path, file({"messages": [parts, ASSISTANT]}))[0][1].messages[0].content == "What now?"


@pytest.mark.parametrize("data", [preference(), image("x"), b"[1]\n", b'{"messages": [{"role": "user"}]}\n', file({})])
def test_other_rows_are_refused_with_their_line(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(tmp_path, file(GOOD) + data)
    assert (caught.value.code, caught.value.values["line"]) == ("wrong_format", 2)


def test_a_long_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="line_too_long"):
        read(tmp_path, b"x" * (MAX_LINE_BYTES + 1))


@pytest.mark.parametrize("case", [case for case in CASES if case.purpose == "fine-tune"], ids=lambda case: case.id)
def test_what_the_check_accepts_can_be_read_and_learned(tmp_path: Path, case: object) -> None:
    data = case.data  # type: ignore[attr-defined]
    report = checked(tmp_path, data)
    if not report.ok or report.kind not in ("chat", "function"):
        return
    conversations = read(tmp_path, data)
    assert len(conversations) == report.rows
    for _, conversation in conversations:
        assert conversation.messages[-1].role == "assistant"
        assert any(message.role == "assistant" and message.trained for message in conversation.messages)
        assert all(message.content is not None or message.tool_calls for message in conversation.messages)
