"""Keys and values of all rows in preallocated memory, and attention over them.

Shape legend: R slots, H key/value heads, Q query heads, C tokens of capacity, D head size, T tokens of a step,
B decoding rows, L cached tokens.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as functional

from tunewright.engines.batch import Batch, Chunk, Group
from tunewright.engines.decode_attention import Attention, by_torch
from tunewright.engines.gpu_attention import attend_on_gpu

BLOCK_TOKENS = 256
_ALIGNMENT_BYTES = 64
_allocations = itertools.count()
KEEP_IDLE_BYTES = 256 * 2**20
"""So much memory stays when no row runs."""


class SlotCache:
    """One row of memory per running sequence; grows in rows and in blocks of tokens, up to both limits.

    A slot holds the tokens 0..length-1 of its row from the left; the engine knows the lengths. Memory beyond them is zero
    or finite leftovers: attention reads padding with weight 0, and 0 times NaN would be NaN (see `clear`).
    """

    def __init__(self, *, slots: int, context_tokens: int) -> None:
        self.max_slots = slots
        self.max_tokens = context_tokens
        self.slots = 0
        self.tokens = 0
        self.allocation = next(_allocations)
        """A number that no other memory had: while it is the same, nothing has moved."""
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for `slots` rows of `tokens` tokens; contents stay. Layers are allocated when they first write."""
        if slots > self.max_slots or tokens > self.max_tokens:
            raise ValueError("the cache cannot hold that many rows or tokens")
        if slots <= self.slots and tokens <= self.tokens:
            return
        if slots > self.slots:
            slots = min(self.max_slots, max(slots, 2 * self.slots))
        if tokens > self.tokens:
            tokens = self.rounded(max(tokens, math.ceil(1.5 * self.tokens)))
        slots, tokens = max(slots, self.slots), max(tokens, self.tokens)
        self.allocation = next(_allocations)
        for store in (self._keys, self._values):
            for layer, old_RHCD in store.items():
                new_RHCD = _zeros(slots, old_RHCD.shape[1], tokens, old_RHCD.shape[3], old_RHCD)
                new_RHCD[: self.slots, :, : self.tokens] = old_RHCD
                store[layer] = new_RHCD
        self.slots, self.tokens = slots, tokens

    def rounded(self, tokens: int) -> int:
        """Whole blocks for so many tokens, at most what a row may have."""
        return min(self.max_tokens, math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS)

    def size_bytes(self, slots: int, tokens: int) -> int:
        """What so many rows of so many tokens take; 0 before anything was written."""
        one_token = sum(m.numel() * m.element_size() for m in self._memories()) // max(1, self.slots * self.tokens)
        return slots * tokens * one_token

    def _memories(self) -> list[torch.Tensor]:
        return [*self._keys.values(), *self._values.values()]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row to another slot."""
        for memory_RHCD in self._memories():
            memory_RHCD[target, :, :length] = memory_RHCD[source, :, :length]

    def cycle(self, slots: list[int], lengths: list[int]) -> None:
        """Each of the slots gets what the next one holds, the last what the first held; lengths are of what they hold now."""
        for memory_RHCD in self._memories():
            first_HLD = memory_RHCD[slots[0], :, : lengths[0]].clone()
            for target, source, length in zip(slots, slots[1:], lengths[1:], strict=False):
                memory_RHCD[target, :, :length] = memory_RHCD[source, :, :length]
            memory_RHCD[slots[-1], :, : lengths[0]] = first_HLD

    def shrink(self, rows: list[tuple[int, int]]) -> None:
        """Keep only these rows, (slot, tokens) each, in slots 0, 1, ... of this order, and no more room than they need."""
        slots, tokens = len(rows), self.rounded(max((length for _, length in rows), default=0))
        self.allocation = next(_allocations)
        for store in (self._keys, self._values) if rows else ():
            for layer, old_RHCD in store.items():
                new_RHCD = _zeros(slots, old_RHCD.shape[1], tokens, old_RHCD.shape[3], old_RHCD)
                for target, (source, length) in enumerate(rows):
                    new_RHCD[target, :, :length] = old_RHCD[source, :, :length]
                store[layer] = new_RHCD
        if not rows:
            self._keys.clear()
            self._values.clear()
        self.slots, self.tokens = slots, tokens

    def clear(self, slot: int, length: int | None = None) -> None:
        """Zero a row, or its first `length` tokens, whose numbers may not be finite: nothing of it reaches the next row there."""
        for memory_RHCD in self._memories():
            memory_RHCD[slot, :, :length].zero_()

    def write(self, layer: int, key_THD: torch.Tensor, value_THD: torch.Tensor, batch: Batch) -> None:
        """Store the step's new keys and values of one layer."""
        if layer not in self._keys:
            self.allocation = next(_allocations)
            self._keys[layer] = _zeros(self.slots, key_THD.shape[1], self.tokens, key_THD.shape[2], key_THD)
            self._values[layer] = _zeros(self.slots, value_THD.shape[1], self.tokens, value_THD.shape[2], value_THD)
        for memory_RHCD, new_THD in ((self._keys[layer], key_THD), (self._values[layer], value_THD)):
            if batch.lengths:
                memory_RHCD[batch.decode_slots_B, :, batch.decode_positions_B] = _decoding(new_THD, batch)
            for start, end, slot, offset in batch.chunks:
                memory_RHCD[slot, :, offset : offset + end - start] = new_THD[start:end].transpose(0, 1)

    def attend(
        self,
        layer: int,
        query_TQD: torch.Tensor,
        batch: Batch,
        scale: float | None = None,
        window: int | None = None,
        decoding: Attention = by_torch,
    ) -> torch.Tensor:
        """Attention of the step's tokens over their own rows, after `write`.

        `window` limits how far back a token sees; `decoding` computes it for decoding rows. Returns [T, Q, D of the values].
        """
        keys_RHCD, values_RHCD = self._keys[layer], self._values[layer]
        if query_TQD.is_cuda:
            found_TQD = attend_on_gpu(query_TQD, keys_RHCD, values_RHCD, batch, scale, window)
            if found_TQD is not None:
                return found_TQD
        decoded_BQD = None
        if batch.lengths:
            decoded_BQD = self._attend_decoding(query_TQD, keys_RHCD, values_RHCD, batch, scale, window, decoding)
            if batch.in_order and not batch.chunks:
                return decoded_BQD
        out_TQD = query_TQD.new_empty(*query_TQD.shape[:2], values_RHCD.shape[3])
        if decoded_BQD is not None:
            out_TQD.index_copy_(0, batch.decode_tokens_B, decoded_BQD)
        for chunk in batch.chunks:
            self._attend_chunk(out_TQD, query_TQD, keys_RHCD, values_RHCD, chunk, batch, scale, window)
        return out_TQD

    def _attend_decoding(
        self,
        query_TQD: torch.Tensor,
        keys_RHCD: torch.Tensor,
        values_RHCD: torch.Tensor,
        batch: Batch,
        scale: float | None,
        window: int | None,
        attend: Attention,
    ) -> torch.Tensor:
        """[B, Q, D] in the order of their slots."""
        count, first = len(batch.lengths), batch.groups[0].start
        # Query heads of one key head side by side: nothing is repeated.
        query_BHGD = _decoding(query_TQD, batch).unflatten(1, (keys_RHCD.shape[1], -1))
        parts = [
            attend(
                query_BHGD[group.start - first : group.end - first],
                keys_RHCD[group.start : group.end, :, : group.length],
                values_RHCD[group.start : group.end, :, : group.length],
                _decode_mask(batch, group, window, query_TQD),
                scale,
            )
            for group in batch.groups
        ]
        joined_BHGD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined_BHGD.reshape(count, query_TQD.shape[1], -1)

    def _attend_chunk(
        self,
        out_TQD: torch.Tensor,
        query_TQD: torch.Tensor,
        keys_RHCD: torch.Tensor,
        values_RHCD: torch.Tensor,
        chunk: Chunk,
        batch: Batch,
        scale: float | None,
        window: int | None,
    ) -> None:
        start, end, slot, offset = chunk
        length = offset + end - start
        plain = offset == 0 and (window is None or length <= window)
        result_1QTD = functional.scaled_dot_product_attention(
            query_TQD[start:end].transpose(0, 1)[None],
            keys_RHCD[slot : slot + 1, :, :length],
            values_RHCD[slot : slot + 1, :, :length],
            attn_mask=None if plain else _chunk_mask(batch, chunk, window, query_TQD),
            is_causal=plain,
            scale=scale,
            enable_gqa=query_TQD.shape[1] != keys_RHCD.shape[1],
        )
        out_TQD[start:end] = result_1QTD[0].transpose(0, 1)


def _decoding(new_TAD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Those of the decoding rows in the order of their slots; a view where they lie so."""
    return new_TAD[: len(batch.lengths)] if batch.in_order else new_TAD.index_select(0, batch.decode_tokens_B)


def _zeros(slots: int, heads: int, tokens: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Zeros whose memory the operating system hands out only when it is touched (on the processor)."""
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return torch.zeros(slots, heads, tokens, size, dtype=like.dtype, device=like.device)
    count = slots * heads * tokens * size
    spare = _ALIGNMENT_BYTES // 4
    flat = np.zeros(count + spare, dtype=np.float32)
    skip = (-flat.ctypes.data % _ALIGNMENT_BYTES) // 4
    return torch.from_numpy(flat[skip : skip + count]).view(slots, heads, tokens, size)


def _decode_mask(batch: Batch, group: Group, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """Additive [B, 1, 1, L]; None where every row sees all of it."""
    if group.same and (window is None or group.length <= window):
        return None
    key = ("decode", group.start, window)
    if key not in batch.masks:
        first = batch.groups[0].start
        lengths = batch.lengths[group.start - first : group.end - first]
        length_B1 = torch.tensor(lengths, device=like.device)[:, None]
        position_1L = torch.arange(group.length, device=like.device)[None]
        visible_BL = position_1L < length_B1
        if window is not None:
            visible_BL &= position_1L >= length_B1 - window
        batch.masks[key] = _additive(visible_BL, like)[:, None, None]
    return batch.masks[key]


def _chunk_mask(batch: Batch, chunk: Chunk, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Additive [1, 1, T of the chunk, L]."""
    key = ("chunk", chunk.start, window)
    if key not in batch.masks:
        n = chunk.end - chunk.start
        query_T1 = torch.arange(chunk.offset, chunk.offset + n, device=like.device)[:, None]
        key_1L = torch.arange(chunk.offset + n, device=like.device)[None]
        visible_TL = key_1L <= query_T1
        if window is not None:
            visible_TL &= key_1L > query_T1 - window
        batch.masks[key] = _additive(visible_TL, like)[None, None]
    return batch.masks[key]


def _additive(visible: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    hidden = torch.finfo(like.dtype).min
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, hidden)
