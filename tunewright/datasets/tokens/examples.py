"""What of a row goes through the renderer: the same for the trainer, the counts and the preview.

Raise `VERSION` with any change that can change a conversation made here or in rows.py: tokenised data is kept by it.
"""

from typing import Any

import msgspec

from tunewright.datasets.report import Report, Reporter, Row
from tunewright.datasets.rows import conversation_of
from tunewright.datasets.rules import messages, preferences
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.rendering.conversation import Conversation

VERSION = 1


class Examples(msgspec.Struct, frozen=True):
    """One conversation, or two of a preference row (the preferred one first), and the images of the row.

    Images are left out of the conversations. `sides` names each conversation; it is empty for the usual single one.
    """

    conversations: tuple[Conversation, ...]
    images: int = 0
    sides: tuple[str, ...] = ()


def examples_of(value: Any, line: int = 1) -> Examples:
    """Raises InvalidRequest(`wrong_format`) for what is no row of the guide's formats."""
    if not isinstance(value, dict):
        return Examples((conversation_of(value, line),))  # raises
    if preferences.is_preference(value):
        return _preference(value, line)
    turns = value.get("messages")
    images = 0
    if isinstance(turns, list) and (images := sum(map(_count_images, turns))):
        value = value | {"messages": [_without_images(message) for message in turns]}
    return Examples((conversation_of(value, line),), images)


def _preference(value: dict[str, Any], line: int) -> Examples:
    holder = value.get("input", value)
    if not isinstance(holder, dict) or not isinstance(holder.get("messages"), list):
        return Examples((conversation_of(holder, line),))  # raises
    asked = holder["messages"]
    found = []
    for names in (preferences.PREFERRED, preferences.NON_PREFERRED):
        answer = next((value[name] for name in names if name in value), None)
        whole = {"messages": [*asked, *answer] if isinstance(answer, list) else None, "tools": holder.get("tools")}
        conversation = conversation_of(whole, line)
        # Only the answers are compared, so only they are trained.
        turns = [msgspec.structs.replace(message, trained=False) for message in conversation.messages[: len(asked)]]
        turns += conversation.messages[len(asked) :]
        found.append(msgspec.structs.replace(conversation, messages=tuple(turns)))
    return Examples(tuple(found), sides=("preferred", "non_preferred"))


def _count_images(message: Any) -> int:
    parts = _parts(message)
    return len(parts) - len(_texts(parts))


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


def _texts(parts: list[Any]) -> list[Any]:
    return [part for part in parts if not (isinstance(part, dict) and part.get("type") == "image_url")]


def _without_images(message: Any) -> Any:
    parts = _parts(message)
    return message | {"content": _texts(parts)} if parts else message


def refuse_problems(value: Any, line: int) -> None:
    """Raises InvalidRequest: the first error that the check of the data file has for the row, if it has one."""
    preference = isinstance(value, dict) and preferences.is_preference(value)
    if not isinstance(value, dict) or not (preference or "messages" in value):
        raise InvalidRequest("wrong_format", mark("line {line} is not a chat or function row"), line=line)
    reporter = Reporter()
    row = Row(reporter, line, 0)
    if preference:
        preferences.check_row(row, value)
    else:
        messages.check_row(row, value)
    report: Report = reporter.report(None, 1, 0)
    for problem in report.problems:
        if problem.severity == "error":
            raise InvalidRequest(problem.code, problem.message, param=problem.pointer, **problem.values)
