"""CUDA graphs: a step in which only rows of the base decode is recorded once and then replayed as a whole.

That saves launching kernels one by one. Only with FlashAttention, whose call is the same for all lengths; steps with prompts or
adapters are different each time and run as they are. Written for CUDA; the tests run the same buffers again on a processor.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from tunewright.engines.batch import Batch
from tunewright.engines.kv_cache import SlotCache

_log = logging.getLogger(__name__)
_SEEN_BEFORE = 3
"""So often must steps of a kind have come before it is worth recording."""
_MOST = 32

Run = Callable[[], torch.Tensor]
Key = tuple[int, int, int]


class DecodeGraphs:
    """Recordings of a decoder's steps, by cache, first slot and number of rows. Used by the engine's thread."""

    def __init__(self, step: Callable[[Batch, SlotCache], torch.Tensor], record: Callable[[Run], Run]) -> None:
        self._step = step
        self._record = record
        self._seen: Counter[Key] = Counter()
        self._recorded: dict[Key, tuple[Batch, Run]] = {}
        self._works = True

    def logits(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        """What the step gives; the tensor is overwritten by the next step of its kind."""
        if not self._works or batch.chunks or batch.segments or not batch.lengths:
            return self._step(batch, cache)
        key = (cache.allocation, batch.groups[0].start, len(batch.lengths))
        if any(known[0] != cache.allocation for known in self._seen):  # they write where the cache once was
            self._recorded.clear()
            self._seen.clear()
        if key not in self._recorded:
            self._seen[key] += 1
            if self._seen[key] <= _SEEN_BEFORE or not self._try_to_record(key, batch, cache):
                return self._step(batch, cache)
        fixed, replay = self._recorded[key]
        _copy(batch, fixed)
        return replay()

    def _try_to_record(self, key: Key, batch: Batch, cache: SlotCache) -> bool:
        """Whether steps of this kind can be replayed now: what the recording says must be what the step says."""
        if len(self._recorded) >= _MOST:
            self._recorded.clear()
            self._seen.clear()
        fixed = replace(batch, masks={}, **{name: getattr(batch, name).clone() for name in _TENSORS})
        try:
            replay = self._record(lambda: self._step(fixed, cache))
            expected, found = self._step(batch, cache), replay()
            if not torch.allclose(found, expected, rtol=1e-2, atol=0.05 * float(expected.abs().max())):
                raise RuntimeError("a replayed step gives other logits")
        except RuntimeError:
            _log.exception("steps are not recorded: CUDA graphs do not work here")
            self._works = False
            self._recorded.clear()
            return False
        self._recorded[key] = fixed, replay
        return True


_TENSORS = [field.name for field in fields(Batch) if field.type is torch.Tensor]


def _copy(batch: Batch, fixed: Batch) -> None:
    for name in _TENSORS:
        getattr(fixed, name).copy_(getattr(batch, name))


def record_on_cuda(run: Run) -> Run:
    """A CUDA graph of what `run` does; everything that it reads or writes must stay where it is."""
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries take their work space at the first call
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay
