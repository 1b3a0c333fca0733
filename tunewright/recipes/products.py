"""Matrix products of layers computed by hand, by the BLAS that is faster where the training runs: torch's or numpy's.

torch comes with MKL, which is at home on Intel's processors; numpy comes with OpenBLAS, which on others is up to a fifth faster
in float32. Nothing is copied: both see the same memory.
"""

import numpy as np
import torch

from tunewright.clock import thread_cpu_s
from tunewright.worker_environment import numpy_has_one_thread

TORCH, NUMPY = "torch", "numpy"
_WORTHWHILE = 1.03
_ROUNDS = 5
_ROWS = 512
_LEAST = 2**18
"""Weights of a layer: with fewer, products are not what takes the time."""

_by_numpy = False


def use(name: str) -> None:
    """Compute by `TORCH` or `NUMPY` from now on in this process. numpy's products run on the thread that asks, so they are
    for trainings of one thread."""
    global _by_numpy
    _by_numpy = name == NUMPY


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """left @ right (into `out`) of two matrices or two batches of them, of which no gradient is kept.

    Rows or columns of each must be in one piece, or numpy takes a hundred times as long.
    """
    if not (_by_numpy and left.dtype == right.dtype == torch.float32 and left.device.type == "cpu"):
        return torch.matmul(left, right, out=out)
    if out is None:
        out = torch.empty(*left.shape[:-1], right.shape[-1])
    with np.errstate(all="ignore"):  # what is not finite is found by the loss
        np.matmul(left.detach().numpy(), right.detach().numpy(), out=out.numpy())
    return out


def faster(hidden: int, width: int) -> tuple[str, dict[str, float]]:
    """(`NUMPY` where it is faster by `_WORTHWHILE`, else `TORCH`; GFLOP/s of each in float32, on one thread), by products of a
    model's sizes in both directions, the best of a few rounds in turn (0.2 s of this thread's clock).

    Without a measurement it is `TORCH` for tiny models, and where numpy's BLAS may use more threads than the one that asks.
    """
    if not numpy_has_one_thread() or hidden * width < _LEAST:
        return TORCH, {}
    inputs, weight, outputs = torch.ones(_ROWS, hidden), torch.ones(width, hidden), torch.empty(_ROWS, width)
    best = dict.fromkeys((TORCH, NUMPY), 0.0)
    threads, before = torch.get_num_threads(), NUMPY if _by_numpy else TORCH
    torch.set_num_threads(1)
    for _ in range(_ROUNDS + 1):  # the first one prepares kernels
        for name in best:
            use(name)
            began = thread_cpu_s()
            product(inputs, weight.t(), out=outputs)
            product(outputs, weight)
            best[name] = max(best[name], 4e-9 * _ROWS * hidden * width / max(thread_cpu_s() - began, 1e-9))
    torch.set_num_threads(threads)
    use(before)
    figures = {f"{name}_products_gflop_per_s": round(speed, 1) for name, speed in best.items()}
    return NUMPY if best[NUMPY] >= _WORTHWHILE * best[TORCH] else TORCH, figures
