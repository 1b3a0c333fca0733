"""Where a model runs and in which number format."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger(__name__)
FLASH, FLEX, PLAIN = "flash", "flex", "plain"
_FLASH_FROM, _FLEX_FROM = (8, 0), (7, 5)
"""Compute capability of CUDA devices."""


class Placement(NamedTuple):
    """A torch device name, a torch dtype name, how many prompt tokens one step may take in, and the number format of matrix
    products (`products.py`), which may differ from the dtype on processors."""

    device: str
    dtype: str
    prompt_tokens_beside_decode: int
    prompt_tokens_alone: int
    precision: str = "float32"


def choose_placement(*, cuda: bool, cuda_bfloat16: bool) -> Placement:
    """CUDA in bfloat16 (float16 on cards without it), else the processor in float32.

    The prompt budgets keep the pause that a newcomer's prompt causes to its decoding neighbours at a fraction of a second.
    """
    if cuda:
        dtype = "bfloat16" if cuda_bfloat16 else "float16"
        return Placement("cuda", dtype, 2048, 8192, dtype)
    return Placement("cpu", "float32", 128, 512)


def choose_attention(*, capability: tuple[int, int], dtype: str, head_size: int, flash: bool) -> str:
    """How attention is computed on a CUDA device: by FlashAttention, if the package is there and knows format and size of the
    heads, else by compiled flex attention on devices that Triton knows, else by torch's own."""
    if (
        flash
        and capability >= _FLASH_FROM
        and dtype in ("bfloat16", "float16")
        and head_size % 8 == 0
        and head_size <= 256
    ):
        return FLASH
    return FLEX if capability >= _FLEX_FROM else PLAIN


def detect_placement() -> Placement:
    """`choose_placement` for this machine."""
    import torch

    cuda = torch.cuda.is_available()
    return choose_placement(cuda=cuda, cuda_bfloat16=cuda and torch.cuda.is_bf16_supported())


def placement_of(folder: Path, precision: str, weights: str) -> Placement:
    """`detect_placement` for a model, with products in the format that is asked for.

    On a processor auto is float32 whatever the speed: rows are rounded the same alone and in company nearly always, which in
    bfloat16 they are not, and a seed is to give the same text in both. `fastest` is measured (0.1 s).
    """
    placement = detect_placement()
    if placement.device != "cpu":
        return placement if precision != "float32" else placement._replace(dtype="float32", precision="float32")
    if weights != "exact" or precision != "fastest":
        chosen = precision.replace("auto", "float32") if weights == "exact" else weights
        return placement._replace(precision=chosen)
    from tunewright.engines.measuring import choose_precision

    config = json.loads((folder / "config.json").read_text())
    hidden, width = (config.get(key) or 1024 for key in ("hidden_size", "intermediate_size"))
    chosen, speeds = choose_precision(hidden, width)
    _log.info("fastest is %s: %s", chosen, ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in speeds.items()))
    return placement._replace(precision=chosen)


def use_threads(threads: int) -> int:
    """Compute with so many threads from now on, for 0 with as many as are fastest here; returns their number."""
    import torch

    from tunewright.engines.measuring import choose_threads

    torch.set_num_interop_threads(1)
    chosen = choose_threads(threads)
    torch.set_num_threads(chosen)
    return chosen
