"""One step's work, flattened: the tokens of all rows end to end, so that nothing is padded.

Shape legend: T tokens of the step, B decoding rows, L cached tokens of a row, W tokens whose logits are wanted.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from tunewright.engines.adapter_files import Adapter


class Part(NamedTuple):
    """What one row gives to a step: its next `tokens` at `offset` (tokens of it already cached) in cache slot `slot`.

    A `decoding` part has one token, and the slots of all decoding parts of a step lie side by side.
    """

    slot: int
    offset: int
    tokens: list[int]
    adapter: "Adapter | None"
    wants_logits: bool
    decoding: bool


class Chunk(NamedTuple):
    """Tokens [start, end) of the step are positions offset.. of the row in `slot`."""

    start: int
    end: int
    slot: int
    offset: int


class Segment(NamedTuple):
    """Tokens [start, end) of the step go through `adapter`."""

    start: int
    end: int
    adapter: "Adapter"


class Group(NamedTuple):
    """Decoding rows [start, end) attend together over `length` cached tokens; `same` if all rows have just that many."""

    start: int
    end: int
    length: int
    same: bool


@dataclass
class Batch:
    """All that a forward pass needs to know. Decoding rows come first: those of the base, then those of each adapter together,
    adapters that are neighbours in memory side by side. Then prompts in the same order.

    `decode_tokens_B` are the indices of the decoding rows' tokens, in the order of `decode_slots_B`.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    decode_tokens_B: torch.Tensor
    decode_slots_B: torch.Tensor
    decode_positions_B: torch.Tensor
    lengths: list[int]
    groups: list[Group]
    chunks: list[Chunk]
    segments: list[Segment]
    in_order: bool
    """Whether the first tokens are those of the decoding rows, by their slots: then nothing has to be gathered."""
    wanted_W: torch.Tensor
    wanted_order: list[int]
    """Which part each wanted token belongs to, in the order of the logits."""
    wanted_segments: list[Segment]
    """`segments` of the wanted tokens alone, by their order."""
    masks: dict[tuple[object, ...], Any] = field(default_factory=dict)
    """Attention masks of this step, made once and used by all layers."""


def make_batch(parts: list[Part], device: str) -> Batch:
    """Lay out one step. Raises ValueError if the slots of decoding parts do not lie side by side."""
    order = sorted(range(len(parts)), key=lambda i: (*_place(parts[i]), i))
    ids: list[int] = []
    positions: list[int] = []
    decode: list[tuple[int, int, int]] = []
    chunks: list[Chunk] = []
    segments: list[Segment] = []
    wanted_segments: list[Segment] = []
    wanted: list[int] = []
    wanted_order: list[int] = []
    for index in order:
        part = parts[index]
        start = len(ids)
        ids += part.tokens
        end = len(ids)
        positions += range(part.offset, part.offset + len(part.tokens))
        if part.decoding:
            decode.append((part.slot, start, part.offset))
        else:
            chunks.append(Chunk(start, end, part.slot, part.offset))
        if part.wants_logits:
            wanted.append(end - 1)
            wanted_order.append(index)
        if part.adapter is not None:
            _extend(segments, start, end, part.adapter)
            if part.wants_logits:
                _extend(wanted_segments, len(wanted) - 1, len(wanted), part.adapter)
    decode.sort()
    if decode and [slot for slot, _, _ in decode] != list(range(decode[0][0], decode[0][0] + len(decode))):
        raise ValueError("decoding rows must lie side by side in the cache")
    lengths = [position + 1 for _, _, position in decode]
    whole = torch.tensor([ids, positions], device=device)
    index_3B = torch.tensor(decode, dtype=torch.long, device=device).reshape(-1, 3).t()
    return Batch(
        input_ids_T=whole[0],
        positions_T=whole[1],
        decode_slots_B=index_3B[0],
        decode_tokens_B=index_3B[1],
        decode_positions_B=index_3B[2],
        lengths=lengths,
        groups=_groups(lengths, decode[0][0] if decode else 0),
        chunks=chunks,
        segments=segments,
        in_order=all(token == place for place, (_, token, _) in enumerate(decode)),
        wanted_W=torch.tensor(wanted, dtype=torch.long, device=device),
        wanted_order=wanted_order,
        wanted_segments=wanted_segments,
    )


def _extend(segments: list[Segment], start: int, end: int, adapter: "Adapter") -> None:
    """Add tokens to the last segment if they are of its adapter, else as a segment of their own."""
    if segments and segments[-1].adapter is adapter and segments[-1].end == start:
        start = segments.pop().start
    segments.append(Segment(start, end, adapter))


def _place(part: Part) -> tuple[bool, tuple[int, int]]:
    return not part.decoding, (0, 0) if part.adapter is None else part.adapter.seat.order


def _groups(lengths: list[int], first: int) -> list[Group]:
    """One group for all rows, unless their lengths differ so much that most of a joint rectangle would be padding."""
    if not lengths:
        return []
    longest = max(lengths)
    if longest * len(lengths) > 2 * sum(lengths) + 512:
        return [Group(first + i, first + i + 1, n, True) for i, n in enumerate(lengths)]
    return [Group(first, first + len(lengths), longest, min(lengths) == longest)]
