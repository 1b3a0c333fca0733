"""What a training run will take, by the guide's formulas.

text                 text tokens x epochs
image generation     images x 1024 x epochs
image understanding  (images x 1600 or 2304, by the base, + text tokens) x epochs
"""

from collections.abc import Sequence

import msgspec

from tunewright.datasets.rules.messages import IMAGE_GENERATION, IMAGE_UNDERSTANDING
from tunewright.datasets.tokens.token_counts import TokenStatistics

TOKENS_PER_GENERATED_IMAGE = 1024


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """`trained_tokens` is what a price is for: all tokens of all epochs. `price` is in the operator's currency, None if no
    price is set. `seconds` are the fewest and the most to expect, None until this machine has trained that base."""

    formula: str
    n_epochs: int
    tokens_per_epoch: int
    trained_tokens: int
    price: float | None = None
    seconds: tuple[int, int] | None = None


def estimate(
    kind: str | None,
    tokens: TokenStatistics,
    *,
    n_epochs: int,
    tokens_per_image: int,
    price_per_million_tokens: float | None,
    speeds: Sequence[float],
) -> Estimate:
    """The estimate for rows of `kind`. `speeds` are tokens a second of earlier jobs of the same base on this machine."""
    if kind == IMAGE_GENERATION:
        formula = f"images * {TOKENS_PER_GENERATED_IMAGE} * n_epochs"
        each = tokens.images * TOKENS_PER_GENERATED_IMAGE
    elif kind == IMAGE_UNDERSTANDING:
        formula = f"(images * {tokens_per_image} + text_tokens) * n_epochs"
        each = tokens.images * tokens_per_image + tokens.tokens_per_epoch
    else:
        formula = "text_tokens * n_epochs"
        each = tokens.tokens_per_epoch
    whole = each * n_epochs
    return Estimate(
        formula=formula,
        n_epochs=n_epochs,
        tokens_per_epoch=each,
        trained_tokens=whole,
        price=None if price_per_million_tokens is None else round(whole * price_per_million_tokens / 1e6, 6),
        seconds=(round(whole / max(speeds)), round(whole / min(speeds))) if speeds else None,
    )
