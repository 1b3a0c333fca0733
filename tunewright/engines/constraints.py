"""Constrained decoding through llguidance: at each step only tokens that can still lead to an answer of the grammar."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import llguidance.numpy
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from tunewright.engines.answer_text import StreamDecoder
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark


class Constraint:
    """The state of one answer. Until `after` has been said the answer is free, the reasoning before it for example."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, after: str, decoder: StreamDecoder) -> None:
        self._matcher = matcher
        self._after = after
        self._decoder = decoder
        self._said = ""
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocabulary)

    def forbid(self, logits_V: np.ndarray) -> None:
        """Set the logits of tokens that can't come next to minus infinity. Raises InvalidRequest if the grammar turned out to
        be too much work."""
        if self._after:
            return
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        if self._matcher.is_error():
            raise InvalidRequest("schema_too_complex", TOO_COMPLEX)
        allowed_V = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits_V)]
        logits_V[allowed_V == 0] = -np.inf

    def take(self, token: int) -> None:
        """Note the token that was chosen."""
        if not self._after:
            self._matcher.consume_token(token)
            return
        self._said = (self._said + self._decoder.push(token))[-2 * len(self._after) - 256 :]
        if self._after in self._said:
            self._after = ""


class Constraints:
    """Makes constraints for one base. Its vocabulary is read when the first is made, which takes a second or two."""

    def __init__(
        self, tokenizer: Path, stop_ids: frozenset[int], vocabulary: int, decoder: Callable[[], StreamDecoder]
    ) -> None:
        self._path = tokenizer
        self._stop_ids = sorted(stop_ids)
        self._vocabulary = vocabulary
        self._decoder = decoder
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def begin(self, grammar: str, after: str = "", begun: Sequence[int] = ()) -> Constraint:
        """The constraint of an answer whose tokens `begun` are there already. May be called from any thread.

        Raises InvalidRequest(`invalid_schema`).
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._path.read_text("utf-8"), n_vocab=self._vocabulary, eos_token=self._stop_ids
                )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error() or not matcher.consume_tokens(list(begun)):
            raise InvalidRequest("invalid_schema", TOO_COMPLEX)
        return Constraint(matcher, self._vocabulary, "" if begun else after, self._decoder())


TOO_COMPLEX = mark("Answers can't be held to this schema: it is too complex.")
