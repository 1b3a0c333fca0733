"""Attention of decoding rows, a query of each head over the row's own cached tokens: by torch's kernel or by numpy's BLAS.

For each row and key head there are two products with a handful of queries. torch has MKL for them, which is at home on Intel's
processors; numpy has OpenBLAS, which for so small matrices is up to twice as fast on others. Both see the same memory.

Shape legend: B rows, H key/value heads, G query heads of each, L cached tokens, D head size, N blocks of S tokens.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as functional

from tunewright.clock import thread_cpu_s
from tunewright.worker_environment import numpy_has_one_thread

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None], torch.Tensor]
"""Queries [B, H, G, D], keys and values [B, H, L, D], what to add to their products [B, 1, 1, L], scale -> [B, H, G, D]."""
_SMALL = 1024
"""Numbers that come out of a product up to which OpenBLAS takes matrices as they are (1,200 in fact). For larger ones it packs
them first, which takes longer than to multiply by a few queries."""
_MOST_TOKENS, _LEAST_TOKENS = 128, 32
"""Of a block."""
_ROWS, _TOKENS, _ROUNDS = 8, 320, 3
_BEYOND_CACHES = 2**23
_WORTHWHILE = 1.1


def by_torch(
    query_BHGD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    added_B11L: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """torch's own kernel."""
    return functional.scaled_dot_product_attention(query_BHGD, key_BHLD, value_BHLD, attn_mask=added_B11L, scale=scale)


def by_numpy(
    query_BHGD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    added_B11L: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """The same in float32 on a processor, on the thread that asks."""
    rows, heads, queries, size = query_BHGD.shape
    length = key_BHLD.shape[2]
    weight_BHGL = torch.empty(rows, heads, queries, length)
    found_BHGD = torch.empty(rows, heads, queries, value_BHLD.shape[3])
    blocks, tokens = _blocks(queries, length)
    with np.errstate(all="ignore"):  # what is not finite is found in the logits
        query = (query_BHGD * (size**-0.5 if scale is None else scale)).numpy()
        _multiply_keys(query, key_BHLD.numpy(), weight_BHGL.numpy(), blocks, tokens)
        if added_B11L is not None:
            weight_BHGL.add_(added_B11L)
        _multiply_values(weight_BHGL.softmax(-1).numpy(), value_BHLD.numpy(), found_BHGD.numpy(), blocks, tokens)
    return found_BHGD


def _blocks(queries: int, length: int) -> tuple[int, int]:
    """(blocks in which the first tokens are multiplied, tokens of each); the rest is multiplied at once, and all of them if
    that is little. A single query is not a matrix."""
    if queries == 1 or queries * length <= _SMALL:
        return 0, 0
    tokens = max(_LEAST_TOKENS, min(_MOST_TOKENS, _SMALL // queries))
    return length // tokens, tokens


def _multiply_keys(query: np.ndarray, key: np.ndarray, weight: np.ndarray, blocks: int, tokens: int) -> None:
    rows, heads, queries, size = query.shape
    cut = blocks * tokens
    if blocks:
        key_BHNDS = key[:, :, :cut].reshape(rows, heads, blocks, tokens, size).swapaxes(3, 4)
        weight_BHNGS = weight[..., :cut].reshape(rows, heads, queries, blocks, tokens).swapaxes(2, 3)
        np.matmul(query[:, :, None], key_BHNDS, out=weight_BHNGS)
    if cut < key.shape[2]:
        np.matmul(query, key[:, :, cut:].swapaxes(2, 3), out=weight[..., cut:])


def _multiply_values(weight: np.ndarray, value: np.ndarray, found: np.ndarray, blocks: int, tokens: int) -> None:
    if not blocks:
        np.matmul(weight, value, out=found)
        return
    rows, heads, queries, length = weight.shape
    cut = blocks * tokens
    weight_BHNGS = weight[..., :cut].reshape(rows, heads, queries, blocks, tokens).swapaxes(2, 3)
    value_BHNSD = value[:, :, :cut].reshape(rows, heads, blocks, tokens, value.shape[3])
    np.matmul(weight_BHNGS, value_BHNSD).sum(axis=2, out=found)
    if cut < length:
        found += np.matmul(weight[..., cut:], value[:, :, cut:])


def fastest_attention(q_heads: int, kv_heads: int, head_size: int) -> Attention:
    """`by_numpy` if it is faster by a tenth here, by the clock of this thread (0.1 s); always `by_torch` where the engine or
    numpy's BLAS computes with several threads."""
    if torch.get_num_threads() > 1 or not numpy_has_one_thread():
        return by_torch
    row = 2 * kv_heads * _TOKENS * head_size
    rows = max(1, min(_ROWS, _BEYOND_CACHES // row))
    query_BHGD = torch.ones(rows, kv_heads, q_heads // kv_heads, head_size)
    stored = torch.ones(max(1, _BEYOND_CACHES // (rows * row)), 2, rows, kv_heads, _TOKENS, head_size)
    best_s = {by_torch: math.inf, by_numpy: math.inf}
    for _ in range(_ROUNDS):
        for attend in best_s:
            began = thread_cpu_s()
            for key_BHLD, value_BHLD in stored:
                attend(query_BHGD, key_BHLD, value_BHLD, None, None)
            best_s[attend] = min(best_s[attend], thread_cpu_s() - began)
    return by_numpy if best_s[by_numpy] * _WORTHWHILE < best_s[by_torch] else by_torch
