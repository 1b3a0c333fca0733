"""Vectors of texts: the last hidden states of the base, pooled, beside the rows that decode."""

from dataclasses import dataclass

import torch

from tunewright.deployments.ports import Done, Embed, EngineReply, Vector
from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decoder import Decoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.tickets import Ticket
from tunewright.errors import TunewrightError
from tunewright.i18n import mark

_MOST_TEXTS = 32
"""Of one step; each has a slot in a cache of its own."""


@dataclass
class _Text:
    """A text under way: tokens that are read, and the sum of their states."""

    index: int
    tokens: list[int]
    read: int = 0
    sum_E: torch.Tensor | None = None


class Embedding:
    """An `Embed` under way, some tokens at a time so that its neighbours keep decoding."""

    def __init__(self, ticket: Ticket, request: Embed) -> None:
        self.ticket = ticket
        self._mean = request.pooling == "mean"
        self._count = len(request.texts)
        self._waiting = [_Text(index, tokens) for index, tokens in enumerate(request.texts)]
        self._tokens = sum(map(len, request.texts))
        self._longest = max(map(len, request.texts))
        self._cache: SlotCache | None = None

    def advance(self, decoder: Decoder, budget: int) -> EngineReply | None:
        """Do at most `budget` tokens: whole texts, or a piece of one. Vectors go out as they are made; the answer is `Done`
        at the end, else None."""
        if self._cache is None:
            self._cache = SlotCache(slots=min(_MOST_TEXTS, self._count), context_tokens=self._longest)
        chosen = self._choose(budget)
        parts = [
            Part(slot, text.read, text.tokens[text.read : text.read + n], None, False, False)
            for slot, (text, n) in enumerate(chosen)
        ]
        self._cache.reserve(len(parts), max(part.offset + len(part.tokens) for part in parts))
        states_TE = decoder.states(make_batch(parts, decoder.device), self._cache)
        begin = 0
        for text, n in chosen:
            self._take(text, states_TE[begin : begin + n])
            begin += n
        self._waiting = [text for text in self._waiting if text.read < len(text.tokens)]
        return None if self._waiting else Done(reason="stop", prompt_tokens=self._tokens, completion_tokens=0)

    def _choose(self, budget: int) -> list[tuple[_Text, int]]:
        """Texts with how many tokens of each. One that has begun goes on alone, for its keys are in the first slot."""
        chosen: list[tuple[_Text, int]] = []
        for text in self._waiting[:_MOST_TEXTS]:
            left = len(text.tokens) - text.read
            if chosen and (left > budget or text.read):
                break
            n = min(left, budget)
            chosen.append((text, n))
            budget -= n
            if n < left or text.read:
                break
        return chosen

    def _take(self, text: _Text, states_TE: torch.Tensor) -> None:
        text.read += len(states_TE)
        if self._mean:
            sum_E = states_TE.sum(dim=0)
            text.sum_E = sum_E if text.sum_E is None else text.sum_E + sum_E
        if text.read < len(text.tokens):
            return
        pooled_E = states_TE[-1] if text.sum_E is None else text.sum_E / len(text.tokens)
        vector_E = pooled_E / pooled_E.norm()
        if not torch.isfinite(vector_E).all():
            raise TunewrightError("not_finite", mark("The model's numbers ran out of range; this request was stopped."))
        self.ticket.reply(Vector(index=text.index, data=vector_E.cpu().numpy().astype("<f4").tobytes()))
