"""Causal attention of stretches laid end to end, forward and backward, as batched matrix products.

A stretch is a conversation, or a part of some that goes on where another one ends (sharing.py) and attends to that as well.

The heads that share a key-value head are laid under each other as rows of one product, so keys and values are never
repeated, and their gradients come out summed. Queries go in blocks, each with the keys up to its own end.

Shapes: T tokens, H heads, K key-value heads, G heads of each (H = K * G), D head size.
"""

from dataclasses import dataclass

import torch

from tunewright.recipes.products import product

_QUERIES_AT_ONCE = 96
"""Rows of a block, per head: fewer waste less above the diagonal, more keep a matrix product busy."""

Probabilities = list[torch.Tensor | None]
"""Of each block: (K, G * queries, keys); None for one that is made again."""


@dataclass(frozen=True)
class Block:
    """Queries from `begin` to `end`, and where the keys lie that they attend to: the last ones are their own."""

    begin: int
    end: int
    keys: list[slice]

    @property
    def n_keys(self) -> int:
        """How many those are."""
        return sum(part.stop - part.start for part in self.keys)


def blocks_of(lengths: list[int], after: list[int] | None) -> list[Block]:
    """Of stretches of so many tokens, each of which continues the one that `after` says (-1: none)."""
    blocks: list[Block] = []
    before: list[list[slice]] = []
    """Of each stretch, all that whoever continues it attends to."""
    start = 0
    for stretch, length in enumerate(lengths):
        earlier = before[after[stretch]] if after is not None and after[stretch] >= 0 else []
        pieces = -(-length // _QUERIES_AT_ONCE)
        for piece in range(pieces):
            begin, end = start + length * piece // pieces, start + length * (piece + 1) // pieces
            blocks.append(Block(begin, end, _joined(earlier, slice(start, end))))
        before.append(_joined(earlier, slice(start, start + length)))
        start += length
    return blocks


def _joined(parts: list[slice], part: slice) -> list[slice]:
    """One more part, in one piece with the last where they touch."""
    if parts and parts[-1].stop == part.start:
        return [*parts[:-1], slice(parts[-1].start, part.stop)]
    return [*parts, part]


def _take(heads_KTD: torch.Tensor, parts: list[slice]) -> torch.Tensor:
    """These parts of all tokens, one behind the other."""
    taken = [heads_KTD[:, part] for part in parts]
    return taken[0] if len(taken) == 1 else torch.cat(taken, 1)


def _add(heads_KTD: torch.Tensor, parts: list[slice], change: torch.Tensor) -> None:
    """Add to these parts of all tokens."""
    for part, change_of_part in zip(parts, change.split([part.stop - part.start for part in parts], 1), strict=True):
        heads_KTD[:, part] += change_of_part


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
    query_HTD: torch.Tensor, key_KTD: torch.Tensor, value_KTD: torch.Tensor, blocks: list[Block]
) -> tuple[torch.Tensor, Probabilities]:
    """(what each token takes from its conversation, (T, H * D); the probabilities, for `attend_backward`).

    Queries are scaled beforehand. Softmax is computed in float32 whatever the inputs are. No more probabilities are kept than
    if all tokens were those of conversations of the longest length, each for itself.
    """
    n_heads, n_tokens, size = query_HTD.shape
    n_kv = len(key_KTD)
    out_TKGD = query_HTD.new_empty(n_tokens, n_kv, n_heads // n_kv, size)
    kept: Probabilities = []
    room = n_tokens * (max(block.n_keys for block in blocks) + _QUERIES_AT_ONCE) // 2
    for block in blocks:
        begin, end = block.begin, block.end
        probabilities = _probabilities(query_HTD, key_KTD, block)
        taken = product(probabilities, _take(value_KTD, block.keys))
        out_TKGD[begin:end] = taken.view(n_kv, -1, end - begin, size).permute(2, 0, 1, 3)
        room -= (end - begin) * block.n_keys
        kept.append(probabilities if room >= 0 else None)
    return out_TKGD.view(n_tokens, n_heads * size), kept


def attend_backward(
    gradient_TC: torch.Tensor,
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    blocks: list[Block],
    kept: Probabilities,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (query, key, value), in their shapes; those of key and value in float32."""
    n_heads, n_tokens, size = query_HTD.shape
    n_kv = len(key_KTD)
    gradient_HTD = gradient_TC.view(n_tokens, n_heads, size).transpose(0, 1)
    query_gradient = torch.empty_like(query_HTD)
    key_gradient = torch.zeros(key_KTD.shape, dtype=torch.float32, device=key_KTD.device)
    value_gradient = torch.zeros_like(key_gradient)
    for block, found in zip(blocks, kept, strict=True):
        begin, end = block.begin, block.end
        probabilities = _probabilities(query_HTD, key_KTD, block) if found is None else found
        keys, values = _take(key_KTD, block.keys), _take(value_KTD, block.keys)
        rows, row_gradient = _rows(query_HTD[:, begin:end], n_kv), _rows(gradient_HTD[:, begin:end], n_kv)
        _add(value_gradient, block.keys, product(probabilities.transpose(1, 2), row_gradient))
        scores = product(row_gradient, values.transpose(1, 2))
        scores = torch.ops.aten._softmax_backward_data(scores, probabilities, -1, scores.dtype)
        query_gradient[:, begin:end] = product(scores, keys).view(n_heads, end - begin, size)
        _add(key_gradient, block.keys, product(scores.transpose(1, 2), rows))
    return query_gradient, key_gradient, value_gradient


def _probabilities(query_HTD: torch.Tensor, key_KTD: torch.Tensor, block: Block) -> torch.Tensor:
    rows = _rows(query_HTD[:, block.begin : block.end], len(key_KTD))
    scores = product(rows, _take(key_KTD, block.keys).transpose(1, 2))
    _hide_later(scores, block.end - block.begin)
    return torch.softmax(scores, -1)


def _rows(heads_HTD: torch.Tensor, n_kv: int) -> torch.Tensor:
    """(K, G * T, D): under each other what shares a key-value head."""
    return heads_HTD.reshape(n_kv, -1, heads_HTD.shape[-1])


def _hide_later(scores: torch.Tensor, n_queries: int) -> None:
    """Minus infinity where a key comes after the query. The last `n_queries` keys are those of the queries themselves."""
    own = scores.view(len(scores), -1, n_queries, scores.shape[-1])[..., -n_queries:]
    own += torch.full((n_queries, n_queries), -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)
