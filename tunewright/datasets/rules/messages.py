"""The rules of a conversation row: roles, contents, weights, and their order."""

import difflib
from typing import Any

from tunewright.datasets.mending import row_mends
from tunewright.datasets.mending.row_mends import RowMends
from tunewright.datasets.report import Patch, Path, Row, shown
from tunewright.datasets.rules import media, tools
from tunewright.i18n import mark

ROLES = ("system", "user", "assistant", "tool")
_FIELDS = {
    "system": frozenset({"role", "content", "name"}),
    "user": frozenset({"role", "content", "name"}),
    "assistant": frozenset({"role", "content", "name", "weight", "tool_calls", "reasoning_content", "refusal"}),
    "tool": frozenset({"role", "content", "name", "tool_call_id"}),
}
_OTHER_NAMES = {
    "human": "user",
    "customer": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "developer": "system",
}
_ROW_FIELDS = frozenset({"messages", "tools", "parallel_tool_calls"})

CHAT = "chat"
FUNCTION = "function"
IMAGE_UNDERSTANDING = "image_understanding"
IMAGE_GENERATION = "image_generation"


def kind_of(value: dict[str, Any]) -> str:
    """The kind of a row that has `messages`, from its structure alone; never fails on odd values."""
    kind = FUNCTION if value.get("tools") else CHAT
    messages = value.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        if isinstance(message.get("content"), list) and media.has_image(message["content"]):
            return IMAGE_GENERATION if message.get("role") == "assistant" else IMAGE_UNDERSTANDING
        if message.get("tool_calls") or message.get("role") == "tool":
            kind = FUNCTION
    return kind


def check_row(row: Row, value: dict[str, Any]) -> str:
    """Complain about one chat, function or image row; the answer is its kind."""
    kind = kind_of(value)
    mends = RowMends(value)
    if len(value) > 1 and value.keys() - _ROW_FIELDS:
        tools.check_old_functions(row, value, mends)
        row.unknown_fields(value, _ROW_FIELDS | {"functions", "function_call"}, ())
    offered = tools.check_tools(row, value.get("tools"), ("tools",))
    messages = value["messages"]
    roles = check_messages(row, messages, ("messages",), mends)
    if roles is None:
        return kind
    _check_order(row, roles, kind)
    _check_answers(row, messages, roles, kind)
    if kind == FUNCTION:
        tools.check_exchange(row, messages, offered, ("messages",))
    elif kind == IMAGE_GENERATION and "user" not in roles:
        row.missing(("messages", len(messages), "content"))
    if kind in (IMAGE_UNDERSTANDING, IMAGE_GENERATION):
        media.check_images(row, messages, generated=kind == IMAGE_GENERATION)
    return kind


def check_messages(row: Row, messages: object, path: Path, mends: RowMends | None = None) -> list[str] | None:
    """The roles of all messages, or None if one of them is so wrong that their order says nothing.

    `mends` knows the whole row, if `messages` are all of it.
    """
    if not isinstance(messages, list):
        row.wrong_type(path, "array", messages)
        return None
    if not messages:
        row.error("messages_empty", mark("line {line}, {field} is an empty list; a conversation is expected"), path)
        return None
    roles: list[str] = []
    sound = True
    for i, message in enumerate(messages):
        role = _check_message(row, message, (*path, i), mends)
        if role is None:
            sound = False
        else:
            roles.append(role)
    return roles if sound else None


def _check_message(row: Row, message: object, path: Path, mends: RowMends | None) -> str | None:
    """The message's role, or None if it has no valid one."""
    if not isinstance(message, dict):
        row.wrong_type(path, "object", message)
        return None
    role = message.get("role")
    if role is None:
        if "role" in message:
            row.wrong_type((*path, "role"), "string", None)
        else:
            row.missing((*path, "role"))
        return None
    if role not in ROLES:
        _refuse_role(row, role, (*path, "role"), mends)
        return None
    content = message.get("content")
    if type(content) is str and content and not content.isspace():
        if len(message) == 2:
            return role  # by far the most messages end here
    else:
        _check_content(row, message, role, path)
    row.unknown_fields(message, _FIELDS[role] | {"function_call"}, path)
    if role == "assistant":
        _check_weight(row, message.get("weight", 1), (*path, "weight"))
        tools.check_calls(row, message, path, mends)
        _check_text_or_null(row, message, "reasoning_content", path)
    _check_text_or_null(row, message, "name", path)
    return role


def _refuse_role(row: Row, role: object, path: Path, mends: RowMends | None) -> None:
    suggestion: str | None = None
    patch: Patch | None = None
    if isinstance(role, str):
        plain = role[:40].strip().lower()
        name = plain if plain in ROLES else _OTHER_NAMES.get(plain)
        if plain == "function":
            patch = mends.old_form if mends else None
        elif name is not None:
            patch = row_mends.replaced(path, name)
        close = difflib.get_close_matches(plain, ROLES, 1, 0.6)
        suggestion = name or (close[0] if close else None)
    allowed = ", ".join(ROLES)
    if suggestion is None:
        sentence = mark("line {line}, {field} is {found}; allowed: {allowed}")
        row.error("invalid_role", sentence, path, found=shown(role), allowed=allowed)
    else:
        sentence = mark('line {line}, {field} is {found}; allowed: {allowed}. Did you mean "{suggestion}"?')
        row.error(
            "invalid_role", sentence, path, patch=patch, found=shown(role), allowed=allowed, suggestion=suggestion
        )


def _check_content(row: Row, message: dict[str, Any], role: str, path: Path) -> None:
    """Everything but a text with something in it."""
    content = message.get("content")
    place = (*path, "content")
    if content is None or content == "":
        if role == "assistant" and (message.get("tool_calls") or message.get("function_call")):
            return
        if "content" not in message:
            row.missing(place)
            return
    if isinstance(content, list):
        media.check_parts(row, content, role, place)
    elif not isinstance(content, str):
        row.wrong_type(place, "string | array", content, patch=row_mends.content(content, place))
    elif role == "tool" or (role == "user" and content):
        row.warn("content_empty", mark("line {line}, {field} holds no text"), place)
    else:
        row.error("content_empty", mark("line {line}, {field} holds no text"), place)


def _check_text_or_null(row: Row, message: dict[str, Any], name: str, path: Path) -> None:
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        row.wrong_type((*path, name), "string", value)


def _check_weight(row: Row, weight: object, path: Path) -> None:
    # bool is an int to Python and 1.0 equals 1: neither is a weight.
    if weight is not None and (type(weight) is not int or weight not in (0, 1)):
        sentence = mark("line {line}, {field} is {found}; allowed: 0, 1")
        row.error("invalid_weight", sentence, path, patch=row_mends.weight(weight, path), found=shown(weight))


def _check_order(row: Row, roles: list[str], kind: str) -> None:
    for i in range(1, len(roles)):
        if roles[i] == "system":
            sentence = mark("line {line}, {field} is system; only the first message may be")
            patch = row_mends.system_first(roles, i, ("messages",))
            row.error("system_not_first", sentence, ("messages", i, "role"), patch=patch)
        elif roles[i] == roles[i - 1] and roles[i] in ("user", "assistant"):
            if kind in (IMAGE_UNDERSTANDING, IMAGE_GENERATION) and roles[i] == "user":
                continue  # a text and an image, each in a turn of its own: the usual form of image rows
            row.warn(
                "roles_not_alternating",
                mark("line {line}, {field} is {role} like the message before; user and assistant should take turns"),
                ("messages", i, "role"),
                role=roles[i],
            )
    first = 1 if roles[0] == "system" else 0
    if first < len(roles) and roles[first] == "assistant":
        row.error(
            "first_message_invalid",
            mark("line {line}, {field} is assistant; a conversation begins with a user's message"),
            ("messages", first, "role"),
        )


def _check_answers(row: Row, messages: list[dict[str, Any]], roles: list[str], kind: str) -> None:
    """There must be an answer to learn, and it must be the end."""
    if "assistant" not in roles:
        row.error(
            "no_assistant_message",
            mark("line {line}, {field} has no assistant message: nothing to learn"),
            ("messages",),
        )
        return
    if roles[-1] != "assistant":
        place: Path = ("messages", len(roles) - 1, "role")
        patch = _without_the_rest(roles)
        if kind == FUNCTION:
            row.warn(
                "trailing_messages_ignored",
                mark("line {line}, {field} is {role}: what follows the last assistant message is ignored"),
                place,
                patch=patch,
                role=roles[-1],
            )
        else:
            row.error(
                "last_message_not_assistant",
                mark("line {line}, {field} is {role}; the last message must be the assistant's"),
                place,
                patch=patch,
                role=roles[-1],
            )
    if not any(role == "assistant" and _teaches(message) for message, role in zip(messages, roles, strict=True)):
        row.error(
            "nothing_to_train",
            mark("line {line}: every assistant message has weight 0, so {field} teach nothing"),
            ("messages",),
        )


def _without_the_rest(roles: list[str]) -> Patch | None:
    """Without what follows the last assistant message: it would teach nothing."""
    last = len(roles) - 1 - roles[::-1].index("assistant")
    rest = range(len(roles) - 1, last, -1)
    return row_mends.removed(*(("messages", i) for i in rest)) if len(rest) <= 100 else None


def _teaches(message: dict[str, Any]) -> bool:
    weight = message.get("weight", 1)
    return type(weight) is not int or weight != 0
