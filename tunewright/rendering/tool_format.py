"""Messages in the shape that chat templates expect, and our own way to write tools for templates that have none.

The format is described in docs/tool-format.md; `tools.AnswerParser` reads what this file writes.
"""

import json
import math
from typing import Any

import msgspec

from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.rendering.call_style import CallStyle
from tunewright.rendering.conversation import Conversation, Message, ToolCall


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One message as a template gets it. `source` is its index in the conversation, None for a system turn of ours."""

    message: dict[str, Any]
    source: int | None
    answer: bool
    trained: bool


def native_turns(conversation: Conversation, *, takes_reasoning: bool) -> list[Turn]:
    """Turns for a template that knows tools: calls in Hugging Face's shape, arguments as objects."""
    names = {call.id: call.name for message in conversation.messages for call in message.tool_calls}
    turns = []
    for index, message in enumerate(conversation.messages):
        shaped = _plain(message, takes_reasoning=takes_reasoning)
        if message.tool_calls:
            shaped["tool_calls"] = [_native_call(call) for call in message.tool_calls]
        if message.role == "tool":
            shaped["tool_call_id"] = message.tool_call_id or ""
            shaped["name"] = names.get(message.tool_call_id or "", "")
        turns.append(_turn(shaped, message, index))
    return turns


def refuse_calls(conversation: Conversation, style: CallStyle) -> None:
    """Raises InvalidRequest(`conversation_not_supported`) for what a template of this style would leave out or fail on."""
    for index, message in enumerate(conversation.messages):
        if len(message.tool_calls) > 1 and not style.several:
            sentence = mark(
                "The chat template of this model takes one call of a function in a message; {field} has {count}."
            )
        elif message.tool_calls and (message.content or "").strip() and not style.beside_text:
            sentence = mark(
                "The chat template of this model has no place for text beside a call of a function; {field} has both."
            )
        elif not style.any_arguments and any(
            isinstance(_arguments(call.arguments), str) for call in message.tool_calls
        ):
            sentence = mark(
                "The chat template of this model takes arguments that are a JSON object; those of a call in {field} are not."
            )
        else:
            continue
        field, count = f"messages[{index}]", len(message.tool_calls)
        raise InvalidRequest("conversation_not_supported", sentence, param=field, field=field, count=count)


def our_turns(conversation: Conversation, *, takes_reasoning: bool, takes_system: bool = True) -> list[Turn]:
    """Turns for a template without tools: schemas in the system turn (or before the first question, where the template has no
    place for a system turn), calls and results as text.

    Results that follow each other share one user turn, because many templates want turns to alternate.
    """
    turns: list[Turn] = []
    for index, message in enumerate(conversation.messages):
        shaped = _plain(message, takes_reasoning=takes_reasoning)
        if message.role == "tool":
            shaped = {"role": "user", "content": f"<tool_response>\n{shaped['content']}\n</tool_response>"}
            before = conversation.messages[index - 1].role if index else ""
            if before == "tool":
                earlier = turns.pop().message["content"]
                shaped["content"] = f"{earlier}\n{shaped['content']}"
        elif message.tool_calls:
            shaped["content"] = "\n".join(
                part for part in (shaped["content"].rstrip(), *map(written_call, message.tool_calls)) if part
            )
        turns.append(_turn(shaped, message, index))
    if not conversation.tools:
        return turns
    text = _INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools))
    return _with_tools(turns, text, "system" if takes_system else "user")


def written_call(call: ToolCall) -> str:
    """One call as the model writes it."""
    value = _arguments(call.arguments)
    name = json.dumps(call.name, ensure_ascii=False)
    arguments = json.dumps(value, ensure_ascii=False)
    # `<\/` is the same JSON, and no text inside a call can end it.
    body = f'{{"name": {name}, "arguments": {arguments}}}'.replace("</", "<\\/")
    return f"<tool_call>\n{body}\n</tool_call>"


def _with_tools(turns: list[Turn], text: str, role: str) -> list[Turn]:
    """The schemas behind the system message, or before the first question."""
    if turns and turns[0].message["role"] == role:
        first = turns[0]
        parts = (first.message["content"], text) if role == "system" else (text, first.message["content"])
        joined = "\n\n".join(parts).lstrip()
        return [msgspec.structs.replace(first, message=first.message | {"content": joined}), *turns[1:]]
    added = Turn(message={"role": role, "content": text}, source=None, answer=False, trained=False)
    return [added, *turns]


def _turn(shaped: dict[str, Any], message: Message, index: int) -> Turn:
    answer = message.role == "assistant"
    return Turn(message=shaped, source=index, answer=answer, trained=answer and message.trained)


def _plain(message: Message, *, takes_reasoning: bool) -> dict[str, Any]:
    """Role, content and reasoning. Templates that take reasoning get it as a field, the others inside the content."""
    content, reasoning = message.content or "", message.reasoning_content
    if message.role != "assistant":
        return {"role": message.role, "content": content}
    if takes_reasoning:
        if not reasoning and "</think>" in content:
            # Such templates cut reasoning out of the content themselves; cut first, so that both see the same.
            thought, _, content = content.rpartition("</think>")
            reasoning = thought.rpartition("<think>")[2].strip("\n")
            content = content.lstrip("\n")
        if reasoning:
            return {"role": "assistant", "content": content, "reasoning_content": reasoning, "thinking": reasoning}
    elif reasoning:
        content = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"
    return {"role": "assistant", "content": content}


def _native_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": _arguments(call.arguments)},
    }


def _arguments(text: str) -> dict[str, Any] | str:
    """The object in `text`; the text itself when it holds no object that JSON can write again."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_INTRODUCTION = """\
# Tools

You can call these functions, one JSON schema per line:
<tools>
{tools}
</tools>

To call functions, answer with one block for each call:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>"""
