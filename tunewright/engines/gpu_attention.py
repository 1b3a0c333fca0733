"""Attention over the slotted cache on GPUs: by FlashAttention where that package is, else by torch's compiled flex attention.

Both do what `SlotCache.attend` does with torch's plain attention, without masks as large as a rectangle of all rows. Written for
CUDA; on processors the tests run flex attention uncompiled and FlashAttention's calls against a stand-in of the same meaning.

Shape legend: as in kv_cache.py.
"""

import importlib
import importlib.util
import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from tunewright.engines.batch import Batch, Chunk
from tunewright.engines.placement import FLASH, PLAIN, choose_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_log = logging.getLogger(__name__)
_failed: set[str] = set()


def attend_on_gpu(
    query_TQD: torch.Tensor,
    keys_RHCD: torch.Tensor,
    values_RHCD: torch.Tensor,
    batch: Batch,
    scale: float | None,
    window: int | None,
) -> torch.Tensor | None:
    """Attention [T, Q, D] by the best way that there is for these tensors; None where that is torch's plain attention."""
    kind = attention_of(query_TQD.device, query_TQD.dtype, values_RHCD.shape[3])
    if kind in _failed or kind == PLAIN or query_TQD.shape[2] != values_RHCD.shape[3]:
        return None
    try:
        attend = attend_flash if kind == FLASH else attend_flex
        return attend(query_TQD, keys_RHCD, values_RHCD, batch, scale, window)
    except Exception:
        _log.exception("%s attention does not work here; torch's plain attention is used instead", kind)
        _failed.add(kind)
        return None


@lru_cache
def attention_of(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """FLASH, FLEX or PLAIN, by what the device, the format and the packages that are there allow."""
    if device.type != "cuda":
        return PLAIN
    return choose_attention(
        capability=torch.cuda.get_device_capability(device),
        dtype=str(dtype).removeprefix("torch."),
        head_size=head_size,
        flash=importlib.util.find_spec("flash_attn") is not None,
    )


def attend_flash(
    query_TQD: torch.Tensor,
    keys_RHCD: torch.Tensor,
    values_RHCD: torch.Tensor,
    batch: Batch,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """FlashAttention 2: the causal triangle of a chunk ends at its last key, and each decoding row has a length of its own."""
    flash: Any = importlib.import_module("flash_attn")
    common: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
    }
    out_TQD = torch.empty_like(query_TQD)
    for start, end, slot, offset in batch.chunks:
        known = offset + end - start
        key, value = (memory[slot : slot + 1, :, :known].transpose(1, 2) for memory in (keys_RHCD, values_RHCD))
        out_TQD[start:end] = flash.flash_attn_func(query_TQD[None, start:end], key, value, **common)[0]
    if batch.lengths:
        first, count = batch.groups[0].start, len(batch.lengths)
        key, value = (memory[first : first + count].transpose(1, 2) for memory in (keys_RHCD, values_RHCD))
        lengths_B = (batch.decode_positions_B + 1).int()
        found_B1QD = flash.flash_attn_with_kvcache(
            query_TQD[batch.decode_tokens_B][:, None], key, value, cache_seqlens=lengths_B, **common
        )
        out_TQD[batch.decode_tokens_B] = found_B1QD[:, 0]
    return out_TQD


def attend_flex(
    query_TQD: torch.Tensor,
    keys_RHCD: torch.Tensor,
    values_RHCD: torch.Tensor,
    batch: Batch,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Flex attention: blocks of keys that no query of theirs may see are skipped."""
    flex = _flex(query_TQD.is_cuda)
    grouped = query_TQD.shape[1] != keys_RHCD.shape[1]
    out_TQD = torch.empty_like(query_TQD)
    for chunk in batch.chunks:
        start, end, slot, offset = chunk
        known = offset + end - start
        out_1QTD = flex(
            query_TQD[None, start:end].transpose(1, 2),
            keys_RHCD[slot : slot + 1, :, :known],
            values_RHCD[slot : slot + 1, :, :known],
            block_mask=_chunk_mask(batch, chunk, window, query_TQD.device),
            scale=scale,
            enable_gqa=grouped,
        )
        out_TQD[start:end] = out_1QTD[0].transpose(0, 1)
    if batch.lengths:
        first, count = batch.groups[0].start, len(batch.lengths)
        longest = max(batch.lengths)
        out_BQ1D = flex(
            query_TQD[batch.decode_tokens_B][:, :, None],
            keys_RHCD[first : first + count, :, :longest],
            values_RHCD[first : first + count, :, :longest],
            block_mask=_decode_mask(batch, longest, window, query_TQD.device),
            scale=scale,
            enable_gqa=grouped,
        )
        out_TQD[batch.decode_tokens_B] = out_BQ1D[:, :, 0]
    return out_TQD


def _chunk_mask(batch: Batch, chunk: Chunk, window: int | None, device: torch.device) -> "BlockMask":
    def seen(row: Any, head: Any, query: Any, key: Any) -> Any:
        own = key <= query + chunk.offset
        return own if window is None else own & (key > query + chunk.offset - window)

    count = chunk.end - chunk.start
    known = ("flex chunk", chunk.start, window)
    if known not in batch.masks:
        batch.masks[known] = _flex_module().create_block_mask(
            seen, None, None, count, chunk.offset + count, device=device
        )
    return batch.masks[known]


def _decode_mask(batch: Batch, longest: int, window: int | None, device: torch.device) -> "BlockMask":
    position_B = batch.decode_positions_B

    def seen(row: Any, head: Any, query: Any, key: Any) -> Any:
        own = key <= position_B[row]
        return own if window is None else own & (key > position_B[row] - window)

    known = ("flex decode", window)
    if known not in batch.masks:
        batch.masks[known] = _flex_module().create_block_mask(seen, len(batch.lengths), None, 1, longest, device=device)
    return batch.masks[known]


@lru_cache(2)
def _flex(cuda: bool) -> Any:
    attend = _flex_module().flex_attention
    return torch.compile(attend, dynamic=True) if cuda else attend


def _flex_module() -> Any:
    """Imported where it is used: it imports torch's compiler, which takes longer than the rest of torch."""
    return importlib.import_module("torch.nn.attention.flex_attention")
