"""Causal attention of conversations laid end to end, forward and backward, as batched matrix products.

The heads that share a key-value head are laid under each other as rows of one product, so keys and values are never
repeated, and their gradients come out summed. Queries go in blocks, each with the keys up to its own end.

Shapes: T tokens, H heads, K key-value heads, G heads of each (H = K * G), D head size.
"""

import torch

_QUERIES_AT_ONCE = 192
"""Rows of a block, per head: fewer waste less above the diagonal, more keep a matrix product busy."""

Probabilities = list[torch.Tensor]
"""Of each block of each conversation: (K, G * queries, keys)."""


def rotate(heads_HTD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Positions into heads, as Llama turns them (first half against second); the same with -sin turns back.

    Returns a contiguous (H, T, D).
    """
    half = heads_HTD.shape[-1] // 2
    turned = torch.empty(heads_HTD.shape, dtype=heads_HTD.dtype, device=heads_HTD.device)
    torch.mul(heads_HTD, cos_TD, out=turned)
    turned[..., :half].addcmul_(heads_HTD[..., half:], sin_TD[:, :half], value=-1)
    turned[..., half:].addcmul_(heads_HTD[..., :half], sin_TD[:, half:])
    return turned


def attend(
    query_HTD: torch.Tensor, key_KTD: torch.Tensor, value_KTD: torch.Tensor, lengths: list[int]
) -> tuple[torch.Tensor, Probabilities]:
    """(what each token takes from its conversation, (T, H * D); the probabilities, for `attend_backward`).

    Queries are scaled beforehand. Softmax is computed in float32 whatever the inputs are.
    """
    n_heads, n_tokens, size = query_HTD.shape
    n_kv = len(key_KTD)
    out_TKGD = query_HTD.new_empty(n_tokens, n_kv, n_heads // n_kv, size)
    kept = []
    for start, begin, end in _blocks(lengths):
        rows = _rows(query_HTD[:, begin:end], n_kv)
        scores = torch.bmm(rows, key_KTD[:, start:end].transpose(1, 2))
        _hide_later(scores, end - begin)
        probabilities = torch.softmax(scores, -1)
        taken = torch.bmm(probabilities, value_KTD[:, start:end])
        out_TKGD[begin:end] = taken.view(n_kv, -1, end - begin, size).permute(2, 0, 1, 3)
        kept.append(probabilities)
    return out_TKGD.view(n_tokens, n_heads * size), kept


def attend_backward(
    gradient_TC: torch.Tensor,
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    lengths: list[int],
    kept: Probabilities,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (query, key, value), in their shapes; those of key and value in float32."""
    n_heads, n_tokens, size = query_HTD.shape
    n_kv = len(key_KTD)
    gradient_HTD = gradient_TC.view(n_tokens, n_heads, size).transpose(0, 1)
    query_gradient = torch.empty_like(query_HTD)
    key_gradient = torch.zeros(key_KTD.shape, dtype=torch.float32, device=key_KTD.device)
    value_gradient = torch.zeros_like(key_gradient)
    for (start, begin, end), probabilities in zip(_blocks(lengths), kept, strict=True):
        keys, values = key_KTD[:, start:end], value_KTD[:, start:end]
        rows, row_gradient = _rows(query_HTD[:, begin:end], n_kv), _rows(gradient_HTD[:, begin:end], n_kv)
        value_gradient[:, start:end] += torch.bmm(probabilities.transpose(1, 2), row_gradient)
        scores = torch.bmm(row_gradient, values.transpose(1, 2))
        scores = torch.ops.aten._softmax_backward_data(scores, probabilities, -1, scores.dtype)
        query_gradient[:, begin:end] = torch.bmm(scores, keys).view(n_heads, end - begin, size)
        key_gradient[:, start:end] += torch.bmm(scores.transpose(1, 2), rows)
    return query_gradient, key_gradient, value_gradient


def _blocks(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(start of the conversation, begin and end of a block of its queries)."""
    blocks, start = [], 0
    for length in lengths:
        pieces = -(-length // _QUERIES_AT_ONCE)
        for piece in range(pieces):
            blocks.append((start, start + length * piece // pieces, start + length * (piece + 1) // pieces))
        start += length
    return blocks


def _rows(heads_HTD: torch.Tensor, n_kv: int) -> torch.Tensor:
    """(K, G * T, D): under each other what shares a key-value head."""
    return heads_HTD.reshape(n_kv, -1, heads_HTD.shape[-1])


def _hide_later(scores: torch.Tensor, n_queries: int) -> None:
    """Minus infinity where a key comes after the query. The last `n_queries` keys are those of the queries themselves."""
    own = scores.view(len(scores), -1, n_queries, scores.shape[-1])[..., -n_queries:]
    own += torch.full((n_queries, n_queries), -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)
