"""Choosing the next token of one row."""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import numpy as np

_LOOKS = (256, 4096)
"""So many of the likeliest tokens are looked at before all are sorted."""
_SOONEST = 1e-300
"""Not 0, which would win whatever its weight."""


class Constraint(Protocol):
    """Which tokens may come next. Used by one thread, a `take` after each `forbid`."""

    def forbid(self, logits_V: np.ndarray) -> None:
        """Set the logits of tokens that can't come next to minus infinity. Raises TunewrightError if that can't be told."""
        ...

    def take(self, token: int) -> None:
        """Note the token that was chosen."""
        ...


class Sampler:
    """Temperature, nucleus and top-k sampling with a random stream of its own.

    The stream belongs to the request and each token of the answer takes one number from it for each token of the vocabulary, so
    the same seed gives the same answer whoever else is being served. Without a seed the stream starts from fresh entropy.
    """

    def __init__(
        self,
        *,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int | None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self._greedy = temperature < 1e-4  # below this, rounding decides anyway
        self._temperature = temperature
        self._top_p = top_p
        self._top_k = top_k
        self._random = np.random.default_rng(None if seed is None else seed % 2**64)
        self._presence, self._frequency = presence_penalty, frequency_penalty
        self._counts: Counter[int] = Counter()
        bias = dict(logit_bias or {})
        self._biased = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        self._constraint = constraint
        self.takes_likeliest = self._greedy and not (bias or presence_penalty or frequency_penalty or constraint)
        """Whether the next token is just the one with the largest logit, whatever came before."""

    def choose(self, logits_V: np.ndarray) -> int:
        """The id of the next token from finite float32 logits, which stay as they are. Raises what the constraint raises."""
        token = self._drawn(self._shaped(logits_V))
        if self._presence or self._frequency:
            self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.take(token)
        return token

    def _shaped(self, logits_V: np.ndarray) -> np.ndarray:
        """Bias added; taken from each token of the answer so far: the presence penalty once, the frequency penalty as often as
        it occurs. The prompt does not count."""
        if not (len(self._biased) or self._counts or self._constraint):
            return logits_V
        shaped_V = logits_V.copy()
        shaped_V[self._biased] += self._bias
        if self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            shaped_V[ids] -= np.float32(self._presence) + np.float32(self._frequency) * counts
        if self._constraint is not None:
            self._constraint.forbid(shaped_V)
        return shaped_V

    def _drawn(self, logits_V: np.ndarray) -> int:
        if self._greedy:
            return int(logits_V.argmax())
        weights_V = np.exp((logits_V - logits_V.max()) / np.float32(self._temperature)).astype(np.float64)
        ids = self._kept(weights_V)
        # A race: each token ends after an exponential time of its own, the likelier the sooner. Rounding decides only if the
        # first two end together; along a running sum it did for most draws among the thousands of unlikely tokens.
        times_V = np.maximum(self._random.standard_exponential(len(weights_V)), _SOONEST)
        if ids is None:
            return int(np.divide(weights_V, times_V, out=times_V).argmax())
        return int(ids[(weights_V[ids] / times_V[ids]).argmax()])

    def _kept(self, weights_V: np.ndarray) -> np.ndarray | None:
        """Ids that top_k and top_p leave, ascending; None for all. At least the likeliest token stays."""
        ids = None
        if 0 < self._top_k < len(weights_V):
            ids = _largest(weights_V, self._top_k)
        if self._top_p < 1:
            ids = _nucleus(weights_V, ids, self._top_p)
        return None if ids is None else np.sort(ids)


def _largest(weights_V: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest, largest first."""
    ids = np.argpartition(-weights_V, k - 1)[:k] if k < len(weights_V) else np.arange(len(weights_V))
    return ids[np.argsort(-weights_V[ids], kind="stable")]


def _nucleus(weights_V: np.ndarray, among: np.ndarray | None, top_p: float) -> np.ndarray:
    """The fewest likeliest ids whose share reaches `top_p`. Looks at some first: sorting a whole vocabulary is slow."""
    if among is not None:
        return _cut(weights_V, among, top_p * weights_V[among].sum())
    goal = top_p * weights_V.sum()
    for look in _LOOKS:
        ids = _largest(weights_V, min(look, len(weights_V)))
        if weights_V[ids].sum() >= goal:
            return _cut(weights_V, ids, goal)
    return _cut(weights_V, _largest(weights_V, len(weights_V)), goal)


def _cut(weights_V: np.ndarray, descending: np.ndarray, goal: float) -> np.ndarray:
    count = int(np.searchsorted(np.cumsum(weights_V[descending]), goal, side="left")) + 1
    return descending[:count]
