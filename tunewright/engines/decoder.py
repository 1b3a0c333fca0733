"""What the engine asks of a model, whichever code runs it."""

from typing import Protocol

import torch

from tunewright.engines.adapter_files import Pair
from tunewright.engines.batch import Batch
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.stacks import Seat


class Decoder(Protocol):
    """A causal model over flattened batches and a slotted cache. Used by one thread, except `prepare`."""

    device: str
    precision: str
    """The number format of matrix products."""
    n_embeddings: int
    """Token ids below this can be read."""
    linears: dict[str, tuple[int, int]]
    """Module name, as in PEFT's tensor names, -> (in, out) features of every layer that an adapter may change."""

    def prepare(self, pairs: dict[str, Pair]) -> Seat:
        """Put an adapter's pairs where `logits` finds them. May run on another thread, once at a time."""
        ...

    def logits(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        """Run one step and store its keys and values; returns float32 logits [wanted tokens, vocabulary].

        What a row gets does not depend on the adapters of other rows.
        """
        ...

    def states(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        """The same step, but returns float32 hidden states [T, E] of all tokens after the last norm, where the head begins."""
        ...
