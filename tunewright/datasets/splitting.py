"""Which rows are for validation: decided by the row's own bytes, so that it is the same whatever stands around them."""

import xxhash

_SEEDS = 2**64


def side(row_bytes: bytes, ratio: float, seed: int) -> bool:
    """Whether the row (its line, line end or not) belongs to the validation rows, about `ratio` (0 to 1) of all.

    The same bytes always land on the same side, so a repeated row never stands on both; any int is a `seed`.
    """
    return xxhash.xxh3_64_intdigest(row_bytes.strip(), seed % _SEEDS) < ratio * _SEEDS
