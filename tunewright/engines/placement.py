"""Where a model runs and in which number format."""

from typing import NamedTuple

FLASH, FLEX, PLAIN = "flash", "flex", "plain"
_FLASH_FROM, _FLEX_FROM = (8, 0), (7, 5)
"""Compute capability of CUDA devices."""


class Placement(NamedTuple):
    """A torch device name, a torch dtype name, and how many prompt tokens one step may take in."""

    device: str
    dtype: str
    prompt_tokens_beside_decode: int
    prompt_tokens_alone: int


def choose_placement(*, cuda: bool, cuda_bfloat16: bool) -> Placement:
    """CUDA in bfloat16 (float16 on cards without it), else the processor in float32.

    float32 because bfloat16 products run at half the speed on processors without matrix units. The prompt budgets keep
    the pause that a newcomer's prompt causes to its decoding neighbours at a fraction of a second.
    """
    if cuda:
        return Placement("cuda", "bfloat16" if cuda_bfloat16 else "float16", 2048, 8192)
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


def use_threads(threads: int) -> None:
    """Compute with so many threads from now on; 0 leaves the choice to torch (all cores)."""
    import torch

    torch.set_num_interop_threads(1)
    if threads:
        torch.set_num_threads(threads)
