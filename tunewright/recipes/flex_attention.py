"""Attention inside each of some conversations laid end to end, by torch's flex attention: for GPUs without FlashAttention.

Written for CUDA, where it is compiled; tested on CPUs, where it is not.
"""

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def attend_flex(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    lengths: list[int] | None = None,
    after: list[int] | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The same as `flattened.attend_per_conversation`. Shapes: (1, H, T, D) and twice (1, K, T, D) -> (1, T, H, D)."""
    lengths = [query.shape[2]] if lengths is None else lengths
    mask = _mask(tuple(lengths), tuple(after or [-1] * len(lengths)), sliding_window, query.device)
    grouped = query.shape[1] != key.shape[1]
    out = _flex(query.is_cuda)(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2), None


@lru_cache(4)  # all layers of a micro-batch ask for the same one
def _mask(lengths: tuple[int, ...], after: tuple[int, ...], window: int | None, device: torch.device) -> BlockMask:
    visible = torch.eye(len(lengths), dtype=torch.bool)
    ends: list[int] = []
    for one, (length, earlier) in enumerate(zip(lengths, after, strict=True)):
        if earlier >= 0:
            visible[one] |= visible[earlier]
        ends.append(length + (ends[earlier] if earlier >= 0 else 0))
    places = [torch.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    stretch = torch.repeat_interleave(torch.tensor(lengths)).to(device)
    position, visible = torch.cat(places).to(device), visible.to(device)

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        own = visible[stretch[query], stretch[key]] & (query >= key)  # what is continued stands before
        return own if window is None else own & (position[query] - position[key] < window)

    n_tokens = sum(lengths)
    return create_block_mask(seen, None, None, n_tokens, n_tokens, device=device)


@lru_cache(2)
def _flex(cuda: bool) -> Any:
    return torch.compile(flex_attention, dynamic=True) if cuda else flex_attention
