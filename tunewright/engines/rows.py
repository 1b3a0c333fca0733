"""The sequences that run: their state, and their order in the cache."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from tunewright.deployments.ports import Done, Generate, TokenScore, TokenText
from tunewright.engines.adapter_files import Adapter
from tunewright.engines.answer_text import AnswerText
from tunewright.engines.batch import Part
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.prefixes import MIN_TOKENS, Owner, Prefixes, Source, common
from tunewright.engines.sampling import Sampler
from tunewright.engines.tickets import Ticket


@dataclass(eq=False)
class Row:
    """A running generation. `cached` counts tokens of prompt and answer whose keys and values are in the cache."""

    ticket: Ticket
    request: Generate
    adapter: Adapter | None
    sampler: Sampler
    text: AnswerText
    stop_ids: frozenset[int]
    cached: int = 0
    reused: int = 0
    """Tokens of the prompt that were cached before the row began."""
    answer: list[int] = field(default_factory=list)
    finished: bool = field(default=False)
    _hidden: list[tuple[int, int, TokenScore]] = field(default_factory=list)
    """Scores that wait for the text of their tokens, characters [begin, end) of the answer, to be shown."""

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.answer)

    @property
    def owner(self) -> Owner | None:
        """Who may go on with what this row computes; None: nobody."""
        return None if self.request.tenant is None else Owner(self.request.tenant, self.ticket.key)

    @property
    def sound_tokens(self) -> list[int]:
        """Those in the cache, once logits that depend on all of them were found to be finite; before that, none."""
        return (self.request.prompt_ids + self.answer)[: self.cached] if self.answer else []

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt is cached, so that each step gives a token."""
        return self.cached >= len(self.request.prompt_ids)

    def next_part(self, slot: int, budget: int) -> Part:
        """Its share of the next step: one token when decoding, else at most `budget` of the prompt."""
        prompt = self.request.prompt_ids
        if self.decoding:
            return Part(slot, self.cached, [self.answer[-1]], self.adapter, True, True)
        tokens = prompt[self.cached : self.cached + budget]
        return Part(slot, self.cached, tokens, self.adapter, self.cached + len(tokens) == len(prompt), False)

    def accept(self, token: int, score: TokenScore | None = None) -> None:
        """Take the next token of the answer; replies go out, and `finished` becomes true at the end."""
        self.answer.append(token)
        met = token in self.stop_ids
        full = self.generated >= self.request.max_tokens
        if not met:
            begins = self.text.taken
            text, met = self.text.push(token)
            if score is not None:
                self._hidden.append((begins, self.text.taken, score))
            self._show(text)
            if met:
                return self._finish("stop")
        if met or full:
            text, met_in_rest = self.text.finish()
            self._show(text)
            self._finish("stop" if met or met_in_rest else "length")
        return None

    def _show(self, text: str) -> None:
        scores = self._released()
        if text or scores:
            self.ticket.reply(TokenText(text=text, n_tokens=self.generated, scores=scores))

    def _released(self) -> list[TokenScore]:
        """Scores of tokens whose text has all been shown; of what a stop string cut off, those that were shown in part."""
        text = self.text
        out = [end <= text.shown or (text.stopped and begin < text.shown) for begin, end, _ in self._hidden]
        scores = [score for (_, _, score), is_out in zip(self._hidden, out, strict=True) if is_out]
        self._hidden = [hidden for hidden, is_out in zip(self._hidden, out, strict=True) if not is_out]
        return scores

    def _finish(self, reason: str) -> None:
        self.finished = True
        self.ticket.reply(
            Done(
                reason=reason,
                prompt_tokens=len(self.request.prompt_ids),
                completion_tokens=self.generated,
                cached_tokens=self.reused,
            )
        )
        self.ticket.closed = True


class RunningRows:
    """Rows by slot: first those that decode, side by side, then those whose prompts are still being read, oldest first."""

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self.rows: list[Row] = []
        self.n_decoding = 0
        self.prefixes = Prefixes(cache)

    def add(self, row: Row) -> None:
        """Append a row; what is known of its prompt is in the cache then."""
        row.reused = self.prefixes.begin(len(self.rows), row.owner, row.request.prompt_ids, self._sources())
        row.cached = row.reused
        self.rows.append(row)

    def _sources(self) -> Iterator[Source]:
        for slot, row in enumerate(self.rows):
            if row.owner is not None:
                yield Source(slot, row.owner, row.sound_tokens)

    def remove(self, row: Row, *, poisoned: bool = False) -> None:
        """Take a row out and close the gap; what it computed is kept behind the others while there is room.

        Memory of a `poisoned` row (numbers not finite), or of one that may be, is wiped.
        """
        hole = self.rows.index(row)
        sound = [] if poisoned else row.sound_tokens
        if poisoned or (row.cached and not sound):
            self._cache.clear(hole, None if poisoned else row.cached)
        kept = sound if row.owner is not None else []
        path = [hole]
        if hole < self.n_decoding:
            self.n_decoding -= 1
            path += [self.n_decoding] if hole < self.n_decoding else []
            path += range(self.n_decoding + 1, len(self.rows))
        else:
            path += range(hole + 1, len(self.rows))
        if len(path) > 1:
            self._cache.cycle(path, [len(kept), *(self.rows[slot].cached for slot in path[1:])])
        for target, source in pairwise(path):
            self.rows[target] = self.rows[source]
        self.rows.pop()
        if row.owner is not None:
            self.prefixes.keep(len(self.rows), row.owner, kept)

    def advance(self, row: Row, n_tokens: int) -> None:
        """Note that `n_tokens` more of a row are cached. Prompts end in the order of their slots."""
        was_decoding = row.decoding
        row.cached += n_tokens
        if row.decoding and not was_decoding:
            self.n_decoding += 1

    def parts(self, beside_decode: int, alone: int) -> list[tuple[Row, Part]]:
        """The next step: a token of each decoding row, and prompt tokens up to a budget. While a prompt that somebody waits
        for is read, answers pause that nobody waits for, as far as the others' slots lie side by side without them.

        The budget is `alone` while more rows wait for their first token than would wait for their next one: a long step is
        shorter than as many short ones, so all of them together wait less."""
        decoding = range(self.n_decoding)
        if any(not row.ticket.priority for row in self.rows[self.n_decoding :]):
            urgent = [slot for slot in decoding if not self.rows[slot].ticket.priority]
            decoding = range(urgent[0], urgent[-1] + 1) if urgent else range(0)
        chosen = [(self.rows[slot], self.rows[slot].next_part(slot, 1)) for slot in decoding]
        budget = alone if len(self.rows) - self.n_decoding > len(chosen) else beside_decode
        for slot in range(self.n_decoding, len(self.rows)):
            if budget <= 0 or self._waits(slot):
                break
            part = self.rows[slot].next_part(slot, budget)
            budget -= len(part.tokens)
            chosen.append((self.rows[slot], part))
        return chosen

    def _waits(self, slot: int) -> bool:
        """Whether a row in front is about to read what this one's prompt begins with, too, so that it need not be read twice.

        Then those behind wait as well, for prompts end in the order of their slots; it is for one prompt at most.
        """
        row = self.rows[slot]
        prompt = row.request.prompt_ids
        if row.owner is None or row.cached > row.reused:
            return False
        row.reused = self.prefixes.go_on(slot, row.owner, prompt, row.reused, self._sources())
        row.cached = row.reused
        return any(
            other.owner == row.owner and common(other.request.prompt_ids, prompt[:-1]) >= row.cached + MIN_TOKENS
            for other in self.rows[self.n_decoding : slot]
        )

    def to_put_back(self) -> list[Row]:
        """Rows of low priority that have not answered yet."""
        return [row for row in self.rows[self.n_decoding :] if row.ticket.priority]

    def to_give_up(self, count: int) -> list[Row]:
        """At most `count` rows of low priority, the lowest and newest first."""
        found = [row for row in self.rows if row.ticket.priority]
        return sorted(found, key=lambda row: (row.ticket.priority, row.ticket.number), reverse=True)[:count]

    def reserve(self, chosen: list[tuple[Row, Part]]) -> None:
        """Make room in the cache for a step."""
        self._cache.reserve(len(self.rows), max(part.offset + len(part.tokens) for _, part in chosen))
