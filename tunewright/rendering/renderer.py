"""The one renderer: conversations to token ids and loss mask, for validator, trainer, server and evaluator alike.

What serving sends is what training saw, by construction: a prompt is cut out of the same rendering, at the same places, as
the training example, so its ids are an exact prefix of the example's.
"""

import hashlib
import json
import re
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tunewright.errors import Misconfigured, TunewrightError
from tunewright.i18n import mark
from tunewright.rendering.call_style import CallStyle, find_style, opening_ids
from tunewright.rendering.conversation import Conversation, Message
from tunewright.rendering.model_folder import FILES, ModelFolder, read_model_folder
from tunewright.rendering.segments import Marks, Segment
from tunewright.rendering.template import ChatTemplate, now_s, template_unsupported
from tunewright.rendering.tokens import StreamDecoder, Tokens
from tunewright.rendering.tool_format import Turn, native_turns, our_turns, refuse_calls
from tunewright.rendering.tools import AnswerParser

VERSION = 1
"""Part of every renderer's hash. Raise it with any change that can change an id or a label."""


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A training example. `trained[i]`: token i is a label. `skipped` are the indexes of messages that asked to be trained
    but can't be, because the template never prompts the model at their place (an answer before any question, say)."""

    tokens: list[int]
    trained: list[bool]
    skipped: tuple[int, ...] = ()


class _Rendering(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation as marked text, with what it was rendered from."""

    text: str
    segments: list[Segment]
    marks: Marks
    marked: list[dict[str, Any]]
    tools: Any
    moment: int


class Renderer:
    """Reads a model folder once; afterwards it only computes, from any thread.

    Raises Misconfigured: `model_folder_incomplete`, `template_unsupported`, `no_stop_token`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = read_model_folder(folder)
        self._template = ChatTemplate(files.template, files.tokens)
        self._tool_template = ChatTemplate(files.tool_template, files.tokens) if files.tool_template else self._template
        self._tokens = Tokens(files.tokenizer, files.template + (files.tool_template or ""))
        alternatives = "|".join(re.escape(text) for text in sorted(self._tokens.control, key=len, reverse=True))
        self._control = re.compile(alternatives) if alternatives else None
        self.vocabulary_size: int = self._tokens.vocabulary_size
        """One more than the largest token id."""
        self.longest_token: int = self._tokens.longest
        """Characters of the longest token: a text of n characters makes n / longest_token tokens at least."""
        eos = self._tokens.id_of(files.tokens.get("eos_token", ""))
        self._eos = eos if eos is not None else next(iter(files.eos_ids), None)
        self._opening = self._opening_of(_PROBE[:1])
        self.stop_ids: frozenset[int] = self._stop_ids(files)
        """Any of them ends an answer and is not shown."""
        self.opens_reasoning: bool = self._opening.rstrip().endswith("<think>")
        """Whether the generation prompt itself starts the reasoning."""
        self._calls = CallStyle()
        self._takes_system = True
        self.native_tools: bool = self._tool_template.takes_tools
        """Whether the template itself writes tools, in a way that is read back; else ours are used (docs/tool-format.md)."""
        native = find_style(self) if self.native_tools else None
        self.native_tools = native is not None
        self._calls = native or self._our_style()
        self.hash: str = _hash(files, self.stop_ids, ours=self._tool_template.takes_tools and not self.native_tools)
        """Hex sha256 of everything that can change a rendering."""

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids of the conversation and the generation prompt: what the engine continues.

        Raises InvalidRequest `conversation_not_supported` when the template refuses the conversation or has no place for a part
        of it.
        """
        turns, template, tools = self._shaped(conversation)
        rendering = self._rendering(template, turns, tools, generate=True)
        return [i for segment in rendering.segments for i in self._ids(segment)]

    def example(self, conversation: Conversation) -> Example:
        """Ids of the whole conversation and which of them are labels: of each trained answer all that the model has to
        write itself, from the end of the generation prompt to the first stop token, which is included.

        Raises as `prompt` does.
        """
        turns, template, tools = self._shaped(conversation)
        rendering = self._rendering(template, turns, tools, generate=False)
        tokens: list[int] = []
        starts: list[int] = []
        stops: list[tuple[int, int]] = []
        for segment in rendering.segments:
            starts.append(len(tokens))
            ids = self._ids(segment)
            if not segment.plain:
                stops += [(segment.start, len(tokens) + n) for n, i in enumerate(ids) if i in self.stop_ids]
            tokens += ids
        cuts = _cuts(template, turns, rendering)
        return self._labelled(turns, rendering, cuts, tokens, starts, stops)

    def answer(self, conversation: Conversation) -> list[int]:
        """Ids of what the model is taught to write as the last message, from the generation prompt on; raises as `prompt`."""
        example = self.example(conversation)
        start = len(self.prompt(msgspec.structs.replace(conversation, messages=conversation.messages[:-1])))
        return [i for i, trained in zip(example.tokens[start:], example.trained[start:], strict=True) if trained]

    @property
    def calls_in_json(self) -> bool:
        """Whether calls are JSON objects in tags, so that an answer can be held to them."""
        return self._calls.in_json

    def call_opening(self, function: str | None) -> tuple[list[int], str]:
        """What to put behind a prompt so that the answer is a call of `function`, or of any for None: ids and their text."""
        ids, rest = opening_ids(self, self._calls, function)
        return [*ids, *self._tokens.plain_ids(rest)], self.decode(ids) + rest

    def answer_parser(self, tools: Sequence[Mapping[str, Any]]) -> AnswerParser:
        """A parser for one answer to a request that offers `tools`."""
        return AnswerParser(tools, bare_calls=self._calls.bare, reasoning_open=self.opens_reasoning)

    def plain(self, text: str) -> list[int]:
        """Ids of a text that is no part of a conversation; no control token is among them."""
        return self._tokens.plain_ids(text)

    def token_ids(self, token: str | None) -> list[int]:
        """The id of a token's text in a list, which is empty for None. Raises Misconfigured(`template_unsupported`)."""
        if token is None:
            return []
        token_id = self._tokens.id_of(token)
        if token_id is None:
            raise template_unsupported(mark("The tokenizer of this base does not have the token that its entry names."))
        return [token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without special tokens."""
        return self._tokens.decode(ids)

    def written(self, token_id: int) -> bytes:
        """The bytes of one token as `Tokens.written` has them; a part of a character may be all it has."""
        return self._tokens.written(token_id)

    def pieces(self, ids: Iterable[int]) -> list[str | None]:
        """The text of each token as `Tokens.pieces` has it."""
        return self._tokens.pieces(ids)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one stream of ids: `push(id)` gives whole characters only, `flush()` the rest."""
        return self._tokens.stream_decoder()

    def _shaped(self, conversation: Conversation) -> tuple[list[Turn], ChatTemplate, Sequence[Any]]:
        takes_reasoning = self._template.takes_reasoning
        if not self.native_tools:
            turns = our_turns(conversation, takes_reasoning=takes_reasoning, takes_system=self._takes_system)
            return turns, self._template, ()
        refuse_calls(conversation, self._calls)
        template = self._tool_template if conversation.tools else self._template
        return native_turns(conversation, takes_reasoning=takes_reasoning), template, conversation.tools

    def _rendering(
        self, template: ChatTemplate, turns: list[Turn], tools: Sequence[Any], *, generate: bool
    ) -> _Rendering:
        """Render with marks and split at them.

        The marked text without its marks must be the template's true text, else the template changes its texts in a way
        that the marks don't survive.
        """
        moment = now_s()
        messages = [turn.message for turn in turns]
        marks = Marks([json.dumps([messages, tools], ensure_ascii=False), template.text])
        marked = [self._marked(turn, marks) for turn in turns]
        marked_tools = marks.guard(tools, self._control, answer=False)
        text = template.render(marked, marked_tools, generate=generate, now_s=moment)
        if marks.removed(text) != template.render(messages, tools, generate=generate, now_s=moment):
            raise template_unsupported(
                mark("The chat template of this base can't be used: it changes the texts of messages.")
            )
        segments = marks.segments(text, self._opening)
        if segments is None:
            raise template_unsupported(
                mark("The chat template of this base can't be used: it takes the texts of messages apart.")
            )
        return _Rendering(text=text, segments=segments, marks=marks, marked=marked, tools=marked_tools, moment=moment)

    def _marked(self, turn: Turn, marks: Marks) -> dict[str, Any]:
        marked: dict[str, Any] = {}
        for key, value in turn.message.items():
            if key in ("content", "reasoning_content", "thinking"):
                marked[key] = marks.wrap(value, answer=turn.answer)
            else:
                marked[key] = marks.guard(value, self._control, answer=turn.answer)
        return marked

    def _ids(self, segment: Segment) -> Sequence[int]:
        if segment.plain:
            return self._tokens.plain_ids(segment.text)
        return self._tokens.template_ids(segment.text, first=segment.start == 0)

    def _labelled(
        self,
        turns: list[Turn],
        rendering: _Rendering,
        cuts: list[int | None],
        tokens: list[int],
        starts: list[int],
        stops: list[tuple[int, int]],
    ) -> Example:
        """Label the answers, whose prompts end at `cuts`.

        `starts` are the segments' first tokens, `stops` the stop tokens that the template wrote, each with the place of
        its segment.
        """

        def token_at(place: int) -> int:
            segment = bisect_left(rendering.segments, place, key=lambda segment: segment.start)
            return starts[segment] if segment < len(starts) else starts_end

        starts_end = len(tokens)
        answers = [turn for turn in turns if turn.answer]
        trained = [False] * len(tokens)
        skipped = []
        for n, (turn, cut) in enumerate(zip(answers, cuts, strict=True)):
            if not turn.trained:
                continue
            if cut is None:
                skipped.append(turn.source or 0)
                continue
            first = token_at(cut)
            end = _end_of_answer(rendering, cut, cuts[n + 1 :])
            stop = next((token for place, token in stops if token >= first and place < end), None)
            if stop is not None:
                last = stop + 1
            elif turn is turns[-1] and self._eos is not None:
                # This template ends an answer with the next role's token, and here nobody is next.
                tokens, last = [*tokens, self._eos], len(tokens) + 1
                trained.append(False)
            else:
                own_end = rendering.text.rfind(rendering.marks.answer[1], cut, end) + 1
                last = max(first, token_at(own_end))
            trained[first:last] = [True] * (last - first)
        return Example(tokens=tokens, trained=trained, skipped=tuple(skipped))

    def _our_style(self) -> CallStyle:
        """Of calls in our format. Also finds out where the template leaves the schemas a place."""
        style = find_style(self)
        self._takes_system = style is not None
        style = style or find_style(self)
        # Neither place: then the schemas stay in the system turn, and the template's refusal says why.
        self._takes_system = self._takes_system or style is None
        return style or CallStyle()

    def _stop_ids(self, files: ModelFolder) -> frozenset[int]:
        """What the configurations call the end, and the special token that the template writes right after an answer.

        Also checks, on a small conversation, that an answer can be trained at all.
        """
        ids = {i for i in (*files.eos_ids, self._eos) if i is not None}
        rendering = self._rendering(self._template, _PROBE, (), generate=False)
        if None in _cuts(self._template, _PROBE, rendering):
            raise template_unsupported(
                mark(
                    "The chat template of this base can't be used: its generation prompt is not the beginning of an answer."
                )
            )
        end = rendering.text.rfind(rendering.marks.answer[1]) + 1
        after = [i for s in rendering.segments if s.start >= end for i in self._ids(s)]
        following = next((i for i in after if self._tokens.decode([i]).strip() or self._tokens.is_special(i)), None)
        if following is not None and self._tokens.is_special(following):
            ids.add(following)
        if not ids:
            raise Misconfigured("no_stop_token", mark("No file of this base says which token ends an answer."))
        return frozenset(ids)

    def _opening_of(self, turns: list[Turn]) -> str:
        """What the template writes before every answer: the generation prompt, or without one what follows the question."""
        marks = Marks([self._template.text])
        marked = [self._marked(turn, marks) for turn in turns]
        prompt = self._template.render(marked, (), generate=True, now_s=now_s())
        asked = self._template.render(marked, (), generate=False, now_s=now_s())
        opening = prompt[len(asked) :] if prompt.startswith(asked) else ""
        return opening if opening.strip() else prompt[prompt.rfind(marks.other[1]) + 1 :]


def renderer_of(folder: Path) -> Renderer:
    """The renderer of `folder`, read again only when one of its files changes. Safe to call from any thread."""
    return _RENDERERS.of(folder)


class _Renderers:
    """The renderers used last, by folder and by the times and sizes of its files."""

    _MOST = 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, Renderer] = OrderedDict()

    def of(self, folder: Path) -> Renderer:
        key = (folder.resolve(), tuple(_stamp(folder / name) for name in FILES))
        with self._lock:
            renderer = self._kept.pop(key, None) or Renderer(folder)
            self._kept[key] = renderer
            if len(self._kept) > self._MOST:
                self._kept.popitem(last=False)
            return renderer


_RENDERERS = _Renderers()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


def _cuts(template: ChatTemplate, turns: list[Turn], rendering: _Rendering) -> list[int | None]:
    """Where each answer's prompt ends in the rendering; None for an answer whose prompt is not exactly its beginning."""
    return [_cut(template, index, rendering) for index, turn in enumerate(turns) if turn.answer]


def _cut(template: ChatTemplate, index: int, rendering: _Rendering) -> int | None:
    try:
        prompt = template.render(rendering.marked[:index], rendering.tools, generate=True, now_s=rendering.moment)
    except TunewrightError:
        # Templates may fail on an empty conversation; what the whole conversation does was checked before.
        return None
    place = len(prompt)
    exact = rendering.text.startswith(prompt) and rendering.marks.is_border(rendering.text, place, rendering.segments)
    return place if exact else None


def _end_of_answer(rendering: _Rendering, cut: int, later: Sequence[int | None]) -> int:
    """The latest place where the stop token of the answer at `cut` may begin: before the next text of anybody else."""
    ends = [place for place in later if place is not None][:1]
    other = rendering.text.find(rendering.marks.other[0], cut)
    return min([*ends, *([other] if other >= 0 else []), len(rendering.text)])


def _hash(files: ModelFolder, stop_ids: frozenset[int], *, ours: bool) -> str:
    """`ours`: the template knows tools, and yet our format is used."""
    parts = [VERSION, files.template, files.tool_template, files.tokens, sorted(stop_ids), *["ours"] * ours]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(hashlib.sha256(files.tokenizer.encode()).digest())
    return digest.hexdigest()


_PROBE = our_turns(
    Conversation(messages=(Message(role="user", content="Hello"), Message(role="assistant", content="Good day"))),
    takes_reasoning=False,
)
