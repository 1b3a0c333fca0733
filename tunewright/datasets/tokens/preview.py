"""The tokens of one row as the trainer sees them: the same parsing, the same renderer, the same cut."""

from typing import Any

import msgspec

from tunewright import strict_json
from tunewright.datasets.tokens.examples import examples_of, refuse_problems
from tunewright.rendering.renderer import Renderer

MOST_TOKENS = 32_768
"""A preview shows no more tokens of one conversation."""


class ShownToken(msgspec.Struct, frozen=True, omit_defaults=True):
    """`text` None: the token goes on with the character that an earlier one began."""

    id: int
    text: str | None
    trained: bool


class ShownExample(msgspec.Struct, frozen=True, kw_only=True):
    """One conversation. `cut_at`: tokens from here on are never seen (None: all are), so none of them is trained.

    `n_tokens` counts all, `n_trained` those that are trained; `tokens` holds at most `MOST_TOKENS` of them and `text` is
    theirs. `untrained_messages` are the indexes of answers that the base's template has no place to train.
    """

    side: str | None
    n_tokens: int
    n_trained: int
    cut_at: int | None
    text: str
    tokens: list[ShownToken]
    truncated: bool
    untrained_messages: tuple[int, ...]


def preview(data: bytes, line: int, renderer: Renderer, max_length: int) -> list[ShownExample]:
    """The conversations of a row: one, or the two of a preference row. `data` is its line, without the line end.

    Raises InvalidRequest with the code of the row's first problem, or what the renderer raises.
    """
    value = strict_json.loads(data)
    refuse_problems(value, line)
    found = examples_of(value, line)
    sides = found.sides or (None,)
    return [
        _shown(renderer, conversation, side, max_length)
        for conversation, side in zip(found.conversations, sides, strict=True)
    ]


def _shown(renderer: Renderer, conversation: Any, side: str | None, max_length: int) -> ShownExample:
    example = renderer.example(conversation)
    n_tokens = len(example.tokens)
    # Nothing predicts the first token, so it is never trained.
    trained = [label and 0 < place < max_length for place, label in enumerate(example.trained)]
    ids = example.tokens[:MOST_TOKENS]
    pieces = renderer.pieces(ids)
    return ShownExample(
        side=side,
        n_tokens=n_tokens,
        n_trained=sum(trained),
        cut_at=max_length if n_tokens > max_length else None,
        text="".join(piece or "" for piece in pieces),
        tokens=[ShownToken(*token) for token in zip(ids, pieces, trained, strict=False)],
        truncated=n_tokens > len(ids),
        untrained_messages=example.skipped,
    )
