"""Rows as other projects write them -> rows of the guide, one at a time and only where nothing is guessed or lost.

- `sharegpt`: `conversations` of `from` and `value`, with `system` and `tools`
- `conversations`: the same key, but `role` and `content`
- `alpaca`: `instruction`, `input`, `output`, `system`, `history`
- `pairs`: a question (`prompt`, `question`, `query`, `input`, `user`) and an answer (`completion`, `response`, `answer`,
  `output`, `assistant`)
- `preference`: `chosen` and `rejected`, as texts or messages, with or without `prompt` (TRL)

A field that no rule knows makes a row unconvertible, unless it is bookkeeping (`id`, `source`, ...) or holds nothing.
"""

import json
from collections.abc import Collection
from typing import Any, NamedTuple, NoReturn

from tunewright import strict_json
from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark

STYLES = ("sharegpt", "conversations", "alpaca", "pairs", "preference")

_CONVERSATIONS = ("conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_QUESTIONS = ("prompt", "question", "query", "instruction", "user")
_ANSWERS = ("completion", "response", "answer", "output", "assistant")
_CONTEXT = ("input", "context")
_OWN = ("messages", "preferred_output", "preferred_completion", "non_preferred_output", "non_preferred_completion")
KNOWN_FIELDS = frozenset({
    *_CONVERSATIONS, *_SYSTEM, *_QUESTIONS, *_ANSWERS, *_CONTEXT, *_OWN,
    "chosen", "rejected", "history", "tools", "reasoning_content", "parallel_tool_calls",
})  # fmt: skip
"""Every field that one of the styles (or the guide's own rows) has a use for."""

BOOKKEEPING = frozenset({
    "id", "ids", "_id", "uid", "uuid", "idx", "index", "row", "row_id", "prompt_id", "question_id", "conversation_id", "conv_id",
    "chat_id", "message_id", "item_id", "task_id", "task_type", "source", "sources", "origin", "dataset", "dataset_name",
    "data_source", "subset", "split", "category", "categories", "topic", "topics", "subject", "domain", "tag", "tags", "lang",
    "language", "locale", "license", "url", "link", "author", "annotator", "created", "created_at", "updated_at", "date",
    "timestamp", "version", "hash", "md5", "sha256", "meta", "metadata", "__index_level_0__",
    "unnamed: 0",
})  # fmt: skip
"""Fields that say where a row is from, not what it teaches."""

_ROLE_OF = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "tool": "tool",
}
_CALLS = frozenset({"function_call", "tool_call"})
_REPLIES = frozenset({"observation", "tool", "tool_response", "function_response"})


class Imported(NamedTuple):
    """A row of the guide's formats, the style that `value` was in, and the fields of it that were left out."""

    style: str
    row: dict[str, Any]
    dropped: tuple[str, ...]


def row_of(value: dict[str, Any]) -> dict[str, Any] | None:
    """The row that says the same as `value` in the guide's format, or None where that is not certain."""
    try:
        return import_row(value).row
    except InvalidRequest:
        return None


def detect(value: object) -> str | None:
    """The style of `value` by its keys (one of STYLES), or None: unknown, or in the guide's own format already."""
    if not isinstance(value, dict) or any(name in value for name in _OWN):
        return None
    if "chosen" in value and "rejected" in value:
        return "preference"
    for name in _CONVERSATIONS:
        turns = value.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return "sharegpt" if "from" in turns[0] else "conversations" if "role" in turns[0] else None
    if _present(value, _ANSWERS) != 1:
        return None
    questions = _present(value, _QUESTIONS)
    if not _is_empty(value.get("instruction")) or (questions == 0 and "instruction" in value):
        return "alpaca"
    plain_input = questions == 0 and isinstance(value.get("input"), str)
    return "pairs" if questions == 1 or plain_input else None


def import_row(value: dict[str, Any], drop: Collection[str] = ()) -> Imported:
    """The row that says the same as `value`. Fields named in `drop` are left out whatever they hold.

    Raises InvalidRequest(`not_convertible`) with the reason.
    """
    value = {name: item for name, item in value.items() if name not in drop} if drop else value
    style = detect(value)
    if style is None:
        _refuse_style(value)
    fields = _Fields(value)
    row = _READERS[style](fields)
    return Imported(style, row, fields.left_out())


def _refuse_style(value: dict[str, Any]) -> NoReturn:
    if "text" in value and not _present(value, (*_QUESTIONS, *_ANSWERS)):
        raise _refused(mark("text alone does not say what is question and what is answer"))
    names = ", ".join(quote(name) for name in list(value)[:8])
    raise _refused(mark("no known style has these fields: {names}"), names=names or "-")


def _refused(sentence: str, **values: str) -> InvalidRequest:
    return InvalidRequest("not_convertible", sentence, **values)  # type: ignore[arg-type]


def _is_empty(item: object) -> bool:
    """Null, and what forms and tables write for it. Zero and false say something."""
    return item is None or (isinstance(item, (str, list, dict)) and not item)


def _present(value: dict[str, Any], names: tuple[str, ...]) -> int:
    return sum(not _is_empty(value.get(name)) for name in names)


class _Fields:
    """The fields of one row, and which of them were used."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value
        self._used: set[str] = set()

    def take(self, *names: str) -> tuple[str, Any]:
        """(name, what it holds) of the one among `names` that holds something; (first name, None) if none does."""
        self._used.update(names)
        held = [name for name in names if not _is_empty(self.value.get(name))]
        if len(held) > 1:
            raise _refused(
                mark("{field} and {other} are both there; only one can be used"), field=held[0], other=held[1]
            )
        return (held[0], self.value[held[0]]) if held else (names[0], None)

    def text(self, *names: str) -> str:
        """A text that must be there."""
        name, item = self.take(*names)
        return _text(name, item)

    def optional_text(self, *names: str) -> str | None:
        """A text, or None."""
        name, item = self.take(*names)
        return None if item is None else _text(name, item)

    def items(self, *names: str) -> list[Any]:
        """A list, also one written as JSON inside a text; empty if absent."""
        name, item = self.take(*names)
        if isinstance(item, str):
            item = _json(name, item) if item.strip() else []
        if item is None:
            return []
        if not isinstance(item, list):
            raise _refused(mark("{field} must be a list"), field=name)
        return item

    def left_out(self) -> tuple[str, ...]:
        """The names of fields that were not used and hold something. Raises for those that may carry meaning."""
        names = [name for name, item in self.value.items() if name not in self._used and not _is_empty(item)]
        for name in names:
            if name.lower() not in BOOKKEEPING:
                raise _refused(mark("the field {field} has no place in the row"), field=quote(name))
        return tuple(names)


def _json(name: str, text: str) -> Any:
    try:
        return strict_json.loads(text.encode("utf-8", "replace"))
    except InvalidRequest:
        raise _refused(mark("{field} is a text that does not hold JSON"), field=name) from None


def _text(name: str, item: object) -> str:
    if not isinstance(item, str):
        if item is None:
            raise _refused(mark("{field} is missing or empty"), field=name)
        raise _refused(mark("{field} must be a text"), field=name)
    if not item.strip():
        raise _refused(mark("{field} is missing or empty"), field=name)
    return item


def _row(fields: _Fields, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The conversation with the row's `system` at its head and its `tools` beside it."""
    messages = _with_system(fields.optional_text(*_SYSTEM), messages)
    row: dict[str, Any] = {"messages": messages}
    if tools := _tools(fields):
        row["tools"] = tools
    return row


def _with_system(system: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if system is None:
        return messages
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0].get("content") != system:
        raise _refused(mark("two different system texts: one in the conversation, one beside it"))
    return messages


def _tools(fields: _Fields) -> list[Any]:
    """Tools in the guide's form; functions that stand bare get their wrapping."""
    tools = []
    for tool in fields.items("tools"):
        if not isinstance(tool, dict) or ("function" not in tool and "name" not in tool):
            raise _refused(mark("{field} holds something that is not a tool"), field="tools")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


# conversations of all kinds


def _read_conversations(fields: _Fields) -> dict[str, Any]:
    return _row(fields, _turns(fields.items(*_CONVERSATIONS)))


def _turns(items: list[Any]) -> list[dict[str, Any]]:
    """Messages of the guide from messages with `from` and `value`, or `role` and `content`."""
    talk = _Talk()
    for item in items:
        if not isinstance(item, dict):
            raise _refused(mark("a message of the conversation is not an object"))
        if "from" in item and "role" not in item:
            talk.add_sharegpt(item)
        else:
            talk.messages.append(_renamed(item))
    talk.close_replies()
    return talk.messages


def _renamed(item: dict[str, Any]) -> dict[str, Any]:
    """A message with `role`: as it is, but for nulls and another word for the role."""
    role = item.get("role")
    known = _ROLE_OF.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise _refused(mark("{found} is not a role that is known"), found=quote(role))
    return {name: part for name, part in item.items() if part is not None} | {"role": known}


class _Talk:
    """A ShareGPT conversation being read: calls and replies stand in an order there, the guide joins them by ids."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._calls = 0
        self._waiting: list[str] = []
        self._replied = False

    def add_sharegpt(self, item: dict[str, Any]) -> None:
        """One message of `from` and `value`."""
        speaker = item["from"].strip().lower() if isinstance(item["from"], str) else ""
        text = item.get("value")
        for name, part in item.items():
            if name not in ("from", "value", "weight") and not _is_empty(part):
                raise _refused(mark("the field {field} has no place in a message"), field=quote(name))
        if speaker in _REPLIES:
            self._add_reply(text)
            return
        self.close_replies()
        if speaker in _CALLS:
            self._add_calls(text)
        elif speaker in _ROLE_OF:
            self.messages.append({"role": _ROLE_OF[speaker], "content": _value_text(text)})
        else:
            raise _refused(mark("{found} is not a role that is known"), found=quote(item["from"]))
        if item.get("weight") is not None:
            if self.messages[-1]["role"] != "assistant":
                raise _refused(mark("the field {field} has no place in a message"), field="weight")
            self.messages[-1]["weight"] = item["weight"]

    def _add_calls(self, value: object) -> None:
        found = _json("function_call", value) if isinstance(value, str) else value
        calls = found if isinstance(found, list) else [found]
        if not calls:
            raise _refused(mark("a function call must be JSON with name and arguments"))
        message: dict[str, Any] = {"role": "assistant", "tool_calls": [self._call(call) for call in calls]}
        self.messages.append(message)
        self._waiting = [call["id"] for call in message["tool_calls"]]
        self._replied = False

    def _call(self, call: object) -> dict[str, Any]:
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or not isinstance(call["name"], str):
            raise _refused(mark("a function call must be JSON with name and arguments"))
        arguments = call["arguments"]
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not isinstance(arguments, str):
            raise _refused(mark("a function call must be JSON with name and arguments"))
        self._calls += 1
        function = {"name": call["name"], "arguments": arguments}
        return {"id": f"call_{self._calls}", "type": "function", "function": function}

    def _add_reply(self, value: object) -> None:
        if not self._waiting:
            raise _refused(mark("a function's reply without a call before it"))
        if isinstance(value, (dict, list)):
            value = json.dumps(value, ensure_ascii=False)
        reply = {"role": "tool", "tool_call_id": self._waiting.pop(0), "content": _value_text(value)}
        self.messages.append(reply)
        self._replied = True

    def close_replies(self) -> None:
        """The run of replies has ended: some answered and some not leaves open which is whose."""
        if self._waiting and self._replied:
            raise _refused(mark("fewer replies than function calls: which is whose is not certain"))
        self._waiting = []
        self._replied = False


def _value_text(value: object) -> str:
    if not isinstance(value, str):
        raise _refused(mark("{field} must be a text"), field="value")
    return value


# one question, one answer


def _read_alpaca(fields: _Fields) -> dict[str, Any]:
    instruction = fields.optional_text("instruction")
    more = fields.optional_text(*_CONTEXT)
    question = "\n".join(part for part in (instruction, more) if part)
    answer_name, answer = fields.take(*_ANSWERS)
    copy, parts = fields.value.get("text"), (instruction or "", more or "", answer)
    if isinstance(copy, str) and isinstance(answer, str) and all(part in copy for part in parts):
        fields.take("text")  # the original Alpaca data repeats question and answer there, in a frame
    return _exchange(fields, _text("instruction", question), _text(answer_name, answer))


def _read_pairs(fields: _Fields) -> dict[str, Any]:
    name, question = fields.take(*_QUESTIONS)
    if question is None:
        name, question = fields.take("input")
    answer_name, answer = fields.take(*_ANSWERS)
    if isinstance(question, list) and isinstance(answer, list):
        return _row(fields, _turns([*question, *answer]))
    return _exchange(fields, _text(name, question), _text(answer_name, answer))


def _exchange(fields: _Fields, question: str, answer: str) -> dict[str, Any]:
    reply = {"role": "assistant", "content": answer}
    if reasoning := fields.optional_text("reasoning_content"):
        reply["reasoning_content"] = reasoning
    return _row(fields, [*_history(fields), {"role": "user", "content": question}, reply])


def _history(fields: _Fields) -> list[dict[str, Any]]:
    messages = []
    for pair in fields.items("history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _refused(mark("{field} must be a list of pairs: question and answer"), field="history")
        messages += [
            {"role": "user", "content": _text("history", pair[0])},
            {"role": "assistant", "content": _text("history", pair[1])},
        ]
    return messages


# a better and a worse answer


def _read_preference(fields: _Fields) -> dict[str, Any]:
    context = _asked(fields)
    chosen = _side("chosen", fields.take("chosen")[1])
    rejected = _side("rejected", fields.take("rejected")[1])
    if len(chosen) > 1 or len(rejected) > 1:
        context = _common_start(chosen, rejected, context)
    if not any(message["role"] == "user" for message in context):
        raise _refused(mark("{field} is missing or empty"), field="prompt")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise _refused(mark("{field} must end in one message of the assistant"), field="chosen / rejected")
    return {"input": _row(fields, context), "preferred_output": chosen[-1:], "non_preferred_output": rejected[-1:]}


def _asked(fields: _Fields) -> list[dict[str, Any]]:
    """The messages before the answers, as far as they stand beside them."""
    if turns := fields.items(*_CONVERSATIONS):
        return _turns(turns)
    name, prompt = fields.take(*_QUESTIONS)
    if isinstance(prompt, list):
        return _turns(prompt)
    if prompt is None:
        return []
    question = _text(name, prompt)
    if name == "instruction" and (more := fields.optional_text(*_CONTEXT)):
        question = f"{question}\n{more}"
    return [*_history(fields), {"role": "user", "content": question}]


def _side(name: str, answer: object) -> list[dict[str, Any]]:
    """One answer as messages: the answer alone, or the conversation with it."""
    if isinstance(answer, dict):
        return _turns([answer])
    if isinstance(answer, list) and answer:
        return _turns(answer)
    return [{"role": "assistant", "content": _text(name, answer)}]


def _common_start(
    chosen: list[dict[str, Any]], rejected: list[dict[str, Any]], context: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation that both sides repeat before their answers; it must hold what `context` says."""
    start = chosen[:-1]
    if start != rejected[:-1]:
        raise _refused(mark("chosen and rejected differ before their last message"))
    if context and context != start and not (len(context) == 1 and context[0] in start):
        raise _refused(mark("{field} is not the beginning of chosen and rejected"), field="prompt")
    return start


_READERS = {
    "sharegpt": _read_conversations,
    "conversations": _read_conversations,
    "alpaca": _read_alpaca,
    "pairs": _read_pairs,
    "preference": _read_preference,
}
