"""The rules of preference rows: a conversation, an answer that is preferred and one that is not.

Both ways of writing them in the wild are taken: `{"input": {"messages": ...}, ...}` and `messages` beside the answers;
`preferred_output` or `preferred_completion`.
"""

from typing import Any

from tunewright.datasets.mending import row_mends
from tunewright.datasets.report import Path, Row
from tunewright.datasets.rules import tools
from tunewright.datasets.rules.messages import check_messages
from tunewright.i18n import mark

PREFERENCE = "preference"
PREFERRED = ("preferred_output", "preferred_completion")
NON_PREFERRED = ("non_preferred_output", "non_preferred_completion")
_ANSWERS = frozenset((*PREFERRED, *NON_PREFERRED))
_INPUT_FIELDS = frozenset({"messages", "tools", "parallel_tool_calls"})


def is_preference(value: dict[str, Any]) -> bool:
    """Whether a row means to be a preference row."""
    return not value.keys().isdisjoint(_ANSWERS) or (isinstance(value.get("input"), dict) and "messages" not in value)


def check_row(row: Row, value: dict[str, Any]) -> None:
    """Complain about one preference row."""
    if "input" in value:
        holder, path = value["input"], ("input",)
        row.unknown_fields(value, _ANSWERS | {"input"}, ())
        if not isinstance(holder, dict):
            row.wrong_type(path, "object", holder)
            return
        row.unknown_fields(holder, _INPUT_FIELDS, path)
    else:
        holder, path = value, ()
        row.unknown_fields(value, _ANSWERS | _INPUT_FIELDS, ())
    roles = None
    if "messages" not in holder:
        row.missing((*path, "messages"))
    else:
        roles = _check_input(row, holder, path)
    preferred = _check_answer(row, value, PREFERRED)
    other = _check_answer(row, value, NON_PREFERRED)
    if preferred is not None and preferred == other:
        sentence = mark("line {line}: the preferred and the other answer are the same, so {field} teaches nothing")
        row.error("preference_identical", sentence, (PREFERRED[0],))
    if roles and roles[-1] == "assistant":
        sentence = mark("line {line}, {field} ends with an assistant's message; the two answers should follow a user's")
        row.warn("roles_not_alternating", sentence, (*path, "messages"))


def _check_input(row: Row, holder: dict[str, Any], path: Path) -> list[str] | None:
    """The roles, or None if they can't be told."""
    place = (*path, "messages")
    offered = tools.check_tools(row, holder.get("tools"), (*path, "tools"))
    roles = check_messages(row, holder["messages"], place)
    if roles is None:
        return None
    for i, role in enumerate(roles[1:], 1):
        if role == "system":
            sentence = mark("line {line}, {field} is system; only the first message may be")
            patch = row_mends.system_first(roles, i, place)
            row.error("system_not_first", sentence, (*place, i, "role"), patch=patch)
    if roles == ["system"]:
        row.missing((*place, 1))
    tools.check_exchange(row, holder["messages"], offered, place)
    return roles


def _check_answer(row: Row, value: dict[str, Any], names: tuple[str, str]) -> object:
    """The answer's message without its weight, or None if it is not one assistant message."""
    name = names[1] if names[0] not in value and names[1] in value else names[0]
    if name not in value:
        row.missing((name,))
        return None
    if not isinstance(value[name], list):
        row.wrong_type((name,), "array", value[name], patch=row_mends.answer(value[name], (name,)))
        return None
    roles = check_messages(row, value[name], (name,))
    if roles is None:
        return None
    if roles != ["assistant"]:
        row.error(
            "invalid_preference",
            mark("line {line}, {field} must hold one assistant message"),
            (name,),
        )
        return None
    return {key: item for key, item in value[name][0].items() if key != "weight"}
