"""Messages and tools of a chat request as the neutral `Conversation`. Both dialects send the same shapes.

Every refusal names its place (`messages[2].content[0].type`). Explicit nulls are the same as absence.
"""

import re
from collections.abc import Sequence
from typing import Any

from tunewright.api.errors import invalid, missing
from tunewright.errors import InvalidRequest, as_sent, quote
from tunewright.i18n import mark
from tunewright.rendering.conversation import Conversation, Message, ToolCall

MOST_MESSAGES = 10_000
MOST_TOOLS = 128
MEDIA_PARTS = frozenset({"image_url", "video_url", "file_url", "input_audio", "file", "image", "input_image"})

_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_\-]{1,64}")
_OBJECT = mark("{field} must be an object, not {value}.")
_TEXT = mark("{field} must be text, not {value}.")
_LIST = mark("{field} must be a list, not {value}.")


def conversation_of(messages: Any, tools: Any, model: str, roles: dict[str, str]) -> Conversation:
    """The request's conversation. `roles` maps the dialect's words to ours; `model` is named when it can't take a part.

    Raises InvalidRequest: `invalid_value`, `missing_required_parameter`, `modality_not_supported`.
    """
    if messages is None:
        raise missing("messages")
    if not isinstance(messages, list):
        raise invalid("messages", _LIST, value=as_sent(messages))
    if not messages or len(messages) > MOST_MESSAGES:
        raise invalid("messages", mark("{field} must hold 1 to {limit} items."), limit=MOST_MESSAGES)
    read = tuple(_message(message, f"messages[{index}]", model, roles) for index, message in enumerate(messages))
    return Conversation(messages=read, tools=tools_of(tools))


def _message(message: Any, at: str, model: str, roles: dict[str, str]) -> Message:
    if not isinstance(message, dict):
        raise invalid(at, _OBJECT, value=as_sent(message))
    word = message.get("role")
    if word is None:
        raise missing(f"{at}.role")
    role = roles.get(word) if isinstance(word, str) else None
    if role is None:
        known = ", ".join(roles)
        raise invalid(
            f"{at}.role", mark("{field} must be one of {known}, not {value}."), known=known, value=as_sent(word)
        )
    if message.get("function_call") is not None:
        raise InvalidRequest(
            "unsupported_parameter",
            mark("{field} is the old form of a call; use tool_calls."),
            param=f"{at}.function_call",
            field=f"{at}.function_call",
        )
    calls = _tool_calls(message.get("tool_calls"), f"{at}.tool_calls") if role == "assistant" else ()
    content = _content(message.get("content"), f"{at}.content", model)
    if content is None and not calls:
        raise missing(f"{at}.content")
    reasoning = None
    if role == "assistant":
        reasoning = _optional_text(message.get("reasoning_content"), f"{at}.reasoning_content")
    return Message(
        role=role,
        content=content,
        reasoning_content=reasoning,
        tool_calls=calls,
        tool_call_id=_call_id(message.get("tool_call_id"), f"{at}.tool_call_id") if role == "tool" else None,
    )


def _content(content: Any, at: str, model: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(at, mark("{field} must be text or a list of parts, not {value}."), value=as_sent(content))
    if not content:
        raise invalid(at, mark("{field} must not be empty."))
    return "".join(_part(part, f"{at}[{index}]", model) for index, part in enumerate(content))


def _part(part: Any, at: str, model: str) -> str:
    if not isinstance(part, dict):
        raise invalid(at, _OBJECT, value=as_sent(part))
    kind = part.get("type")
    if kind is None:
        raise missing(f"{at}.type")
    if kind == "text":
        text = part.get("text")
        if text is None:
            raise missing(f"{at}.text")
        if not isinstance(text, str):
            raise invalid(f"{at}.text", _TEXT, value=as_sent(text))
        return text
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        raise InvalidRequest(
            "modality_not_supported",
            mark("The model {model} takes text only, not {kind}."),
            param=f"{at}.type",
            model=quote(model),
            kind=kind,
        )
    raise invalid(f"{at}.type", mark("{field} must be text, not {value}."), value=as_sent(kind))


def _tool_calls(calls: Any, at: str) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise invalid(at, _LIST, value=as_sent(calls))
    return tuple(_tool_call(call, f"{at}[{index}]") for index, call in enumerate(calls))


def _tool_call(call: Any, at: str) -> ToolCall:
    if not isinstance(call, dict):
        raise invalid(at, _OBJECT, value=as_sent(call))
    function = call.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{at}.function", _OBJECT, value=as_sent(function))
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise invalid(f"{at}.function.arguments", mark("{field} must be JSON as text."))
    return ToolCall(
        id=_call_id(call.get("id"), f"{at}.id"),
        name=_function_name(function.get("name"), f"{at}.function.name"),
        arguments=arguments,
    )


def _call_id(value: Any, at: str) -> str:
    if value is None:
        raise missing(at)
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise invalid(at, mark("{field} must be text of 1 to {limit} characters."), limit=256)
    return value


def _optional_text(value: Any, at: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise invalid(at, _TEXT, value=as_sent(value))


def _function_name(value: Any, at: str) -> str:
    if value is None:
        raise missing(at)
    if not isinstance(value, str) or not _FUNCTION_NAME.fullmatch(value):
        raise invalid(
            at, mark("{field} must be 1 to 64 letters, digits, '_' or '-', not {value}."), value=as_sent(value)
        )
    return value


def tools_of(tools: Any) -> tuple[dict[str, Any], ...]:
    """The function schemas in the OpenAI shape. Raises InvalidRequest (`invalid_value`)."""
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise invalid("tools", _LIST, value=as_sent(tools))
    if len(tools) > MOST_TOOLS:
        raise invalid("tools", mark("{field} may hold at most {limit} items."), limit=MOST_TOOLS)
    return tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))


def _tool(tool: Any, at: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise invalid(at, _OBJECT, value=as_sent(tool))
    if tool.get("type") != "function":
        raise invalid(f"{at}.type", mark("{field} must be function, not {value}."), value=as_sent(tool.get("type")))
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{at}.function", _OBJECT, value=as_sent(function))
    _function_name(function.get("name"), f"{at}.function.name")
    _optional_text(function.get("description"), f"{at}.function.description")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"{at}.function.parameters", _OBJECT, value=as_sent(parameters))
    return tool  # as it came, like the tools of a training row: both are rendered to the same tokens


def tool_choice_of(choice: Any, tools: Sequence[dict[str, Any]]) -> tuple[str, str | None]:
    """auto, none or required, and the one function of `tools` that is required, if one is. Raises InvalidRequest
    (`invalid_value`)."""
    if choice is None or choice == "auto" or choice == "none":
        return choice or "auto", None
    names = {tool["function"]["name"] for tool in tools}
    if choice == "required":
        if not names:
            raise invalid("tool_choice", mark("{field} demands a call, but tools holds no function."))
        return "required", None
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        if isinstance(name, str) and name in names:
            return "required", name
        raise invalid("tool_choice", mark("{field} names a function that tools does not hold."))
    sentence = mark("{field} must be auto, none, required or a function of tools, not {value}.")
    raise invalid("tool_choice", sentence, value=as_sent(choice))
