"""What is counted and compared of a row without errors, whatever way it was read."""

from typing import Any

import msgspec
import xxhash

from tunewright.datasets.rules.preferences import NON_PREFERRED, PREFERENCE, PREFERRED

MAX_MESSAGES = 200
"""Longer rows are not remembered by their roles."""
_MAX_KNOWN = 2000

# Texts hold no NUL, so these tell apart what a text can't.
_REASONING = "\0\1r"
_CALL = "\0\1c"
_IMAGE = "\0\1#"
_UNTRAINED = "\0\1w"


_ROLES = (("s", "system"), ("u", "user"), ("ac", "assistant"), ("t", "tool"))


class Shape:
    """What the roles of a row say: the same for all rows with these roles."""

    __slots__ = ("answers", "code", "has_system", "head", "last", "regular", "roles", "single", "size", "turns")

    def __init__(self, code: str) -> None:
        """`code` has a letter for each message: s, u, a, c (an assistant with calls), t."""
        self.code = code
        self.size = len(code)
        self.has_system = code.startswith("s")
        self.roles = {role: number for letters, role in _ROLES if (number := sum(map(code.count, letters)))}
        starts = zip(" " + code, code, strict=False)
        self.turns = sum(before != "u" and letter == "u" for before, letter in starts)  # "uu" is one turn
        self.answers = [i for i, letter in enumerate(code) if letter in "ac"]
        self.last = self.answers[-1] if self.answers else -1
        self.head = f"{code[: max(0, self.last)]}\0\0"
        """The roles before the last answer, as `fingerprints.py` wants them of a row without tools."""
        self.single = len(self.answers) == 1
        self.regular = _is_regular(code)


def _is_regular(code: str) -> bool:
    """Whether the order of the roles leaves nothing to say: a user begins, turns alternate, an answer is the end."""
    turns = code.removeprefix("s")
    if not turns or len(code) > MAX_MESSAGES or "s" in turns or turns[0] in "ac" or turns[-1] not in "ac":
        return False
    alike = turns.replace("c", "a")
    return "uu" not in alike and "aa" not in alike


_shapes: dict[str, Shape] = {}


def shape_of(code: str) -> Shape:
    """The shape of a row whose messages have these letters."""
    shape = _shapes.get(code)
    if shape is None:
        shape = Shape(code)
        if len(code) <= MAX_MESSAGES:
            if len(_shapes) >= _MAX_KNOWN:
                _shapes.clear()
            _shapes[code] = shape
    return shape


class Facts(msgspec.Struct, gc=False):
    """One row. `texts` has an entry for each message of `shape` (for preference rows: of the input)."""

    kind: str
    shape: Shape
    texts: list[str]
    """All that a message holds, as one text: two messages are the same if role and text are."""
    characters: int
    """Of contents, reasoning, and of names and arguments of calls."""
    answer: str = ""
    """The last answer; of a preference row both of them."""
    trained: int = 0
    """Characters of the answers that are trained on."""
    tools: str = ""
    """A digest of the row's `tools`, empty if there are none."""
    calls: list[str] = []
    """Names of the tools called, in order."""
    reasoning: bool = False
    weights: bool = False
    images: int = 0
    pair: str = ""
    """Preference rows: both answers in an order of their own, so that rows that differ only in which is preferred agree."""


def answer_text(
    content: str, calls: list[tuple[str, str]], reasoning: str | None, *, trained: bool, images: str = ""
) -> tuple[str, int]:
    """(all that an assistant's message holds, as one text; its characters). `calls` are names and arguments."""
    size = len(content)
    content += images
    for name, arguments in calls:
        size += len(name) + len(arguments)
        content = f"{content}{_CALL}{name}\0{arguments}"
    if reasoning:
        size += len(reasoning)
        content = f"{content}{_REASONING}{reasoning}"
    return content if trained else content + _UNTRAINED, size


class Texts:
    """Goes over the messages of a row and collects what `Facts` need."""

    __slots__ = ("calls", "characters", "images", "letters", "reasoning", "texts", "trained", "weights")

    def __init__(self) -> None:
        self.letters: list[str] = []
        self.texts: list[str] = []
        self.characters = 0
        self.trained = 0
        self.calls: list[str] = []
        self.reasoning = False
        self.weights = False
        self.images = 0

    def add_message(self, role: str, content: str, images: str = "") -> None:
        """A message that is no answer; `images` stands for its images, which have no characters."""
        self.letters.append(role)
        self.texts.append(content + images)
        self.characters += len(content)

    def add_answer(
        self,
        content: str,
        calls: list[tuple[str, str]],
        reasoning: str | None,
        *,
        trained: bool,
        weights: bool,
        images: str = "",
    ) -> None:
        """An assistant's message; `calls` are names and arguments, `images` as of `add_message`."""
        text, size = answer_text(content, calls, reasoning, trained=trained, images=images)
        self.calls += [name for name, _ in calls]
        self.reasoning |= bool(reasoning)
        self.weights |= weights
        if trained:
            self.trained += size
        self.letters.append("c" if calls else "a")
        self.texts.append(text)
        self.characters += size

    def facts(self, kind: str, tools: str) -> Facts:
        """The facts of a row of these messages."""
        shape = shape_of("".join(self.letters))
        return Facts(
            kind,
            shape,
            self.texts,
            self.characters,
            self.texts[shape.last] if shape.last >= 0 else "",
            self.trained,
            tools,
            self.calls,
            self.reasoning,
            self.weights,
            self.images,
        )

    def add(self, message: dict[str, Any]) -> None:
        """A message of a row that passed the check."""
        content, images = self._content(message.get("content"))
        if message["role"] != "assistant":
            self.add_message(message["role"][0], content, images)
            return
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
        self.add_answer(
            content,
            calls,
            message.get("reasoning_content"),
            trained=message.get("weight", 1) != 0,
            weights="weight" in message,
            images=images,
        )

    def _content(self, content: str | list[dict[str, Any]] | None) -> tuple[str, str]:
        """What the parts say, and what stands for the images among them: digits, which belong to no language."""
        if content is None or isinstance(content, str):
            return content or "", ""
        text = "".join(part["text"] for part in content if part["type"] == "text")
        images = [part["image_url"] for part in content if part["type"] == "image_url"]
        self.images += len(images)
        return text, "".join(f"{_IMAGE}{_image_key(image)}" for image in images)


def _image_key(image: Any) -> int:
    return xxhash.xxh3_64_intdigest(msgspec.json.encode(image, order="sorted"))


def tools_digest(tools: list[Any]) -> str:
    """The same for lists that say the same, whatever the order of keys."""
    return digest_of(msgspec.json.encode(tools, order="sorted")) if tools else ""


def digest_of(encoded: bytes) -> str:
    """`tools_digest` of a list that is not empty, from its JSON with sorted keys."""
    return xxhash.xxh3_64_hexdigest(encoded)


def facts_of(value: dict[str, Any], kind: str) -> Facts:
    """The facts of a row that passed the check as a row of `kind`."""
    holder = value.get("input", value) if kind == PREFERENCE else value
    texts = Texts()
    for message in holder["messages"]:
        texts.add(message)
    tools = tools_digest(holder.get("tools") or [])
    if kind != PREFERENCE:
        return texts.facts(kind, tools)
    answers = []
    of_answers = Texts()
    for names in (PREFERRED, NON_PREFERRED):
        answer = value[names[0] if names[0] in value else names[1]][0]
        of_answers.add({**answer, "weight": 1})
        answers.append(of_answers.texts[-1])
    facts = texts.facts(kind, tools)
    facts.answer = answers[0]
    facts.pair = "\0".join(sorted(answers))
    facts.trained = of_answers.trained
    facts.characters += of_answers.characters
    facts.calls += of_answers.calls
    facts.reasoning |= of_answers.reasoning
    return facts
