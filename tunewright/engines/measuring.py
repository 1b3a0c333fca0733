"""What this machine computes fastest with, measured where the engine runs: number format and threads."""

import math
import os

import torch

from tunewright.clock import mono_s, thread_cpu_s
from tunewright.engines.products import (
    BFLOAT16,
    FLOAT32,
    Products,
    half_product,
    has_half,
    packed_product,
    plain_product,
)

_ROUNDS = 5
_FEW_ROUNDS = 3
_TOKENS = 128
_ROWS = 32
_BEYOND_CACHES = 2**25
_MOST_WEIGHTS = 24
_WORTH_CHOOSING = 1.05
_WORTHWHILE = 1.2
_WORTH_ROUNDING = 1.3
"""How much faster bfloat16 must be: its answers are a little less exact."""


def choose_precision(hidden: int, width: int) -> tuple[str, dict[str, float]]:
    """(number format in which the processor multiplies fastest; GFLOP/s of each format)."""
    speeds = product_speeds(hidden, width)
    faster = speeds[BFLOAT16] >= _WORTH_ROUNDING * speeds[FLOAT32]
    return BFLOAT16 if faster else FLOAT32, speeds


def product_speeds(hidden: int, width: int) -> dict[str, float]:
    """GFLOP/s of a product of a model's sizes, the best of a few rounds in turn (0.1 s), by the clock of this thread alone: on
    a busy machine every round may be interrupted."""
    x_TI = torch.ones(_TOKENS, hidden)
    products = {name: Products(name).of("", torch.ones(width, hidden)) for name in (FLOAT32, BFLOAT16)}
    best = dict.fromkeys(products, 0.0)
    for _ in range(_ROUNDS + 1):  # the first one prepares kernels
        for name, product in products.items():
            began = thread_cpu_s()
            product(x_TI)
            best[name] = max(best[name], 2e-9 * _TOKENS * hidden * width / max(thread_cpu_s() - began, 1e-9))
    return best


def fastest_exact(hidden: int) -> tuple[bool, bool]:
    """Whether exact weights with few outputs are multiplied faster as they are than packed, and whether weights that 2 bytes
    hold are multiplied faster so than either way, by the clock of this thread (0.1 s).

    Both depend on the maker of the processor. The weights are more than its caches hold, as a model's are. Fewer rows would
    gain more from 2 bytes, many more nothing.
    """
    count = max(1, min(_MOST_WEIGHTS, _BEYOND_CACHES // (4 * hidden * hidden)))
    weights = list(torch.ones(count, hidden, hidden))
    x_TI = torch.ones(_ROWS, hidden)
    makes = [packed_product, plain_product, *([half_product] if has_half() else [])]
    kinds = [[make(weight, None) for weight in weights] for make in makes]
    seconds = [math.inf] * len(kinds)
    for _ in range(_FEW_ROUNDS):
        for i, products in enumerate(kinds):
            began = thread_cpu_s()
            for product in products:
                product(x_TI)
            seconds[i] = min(seconds[i], thread_cpu_s() - began)
    packed_s, plain_s = seconds[:2]
    return plain_s * _WORTH_CHOOSING < packed_s, min(seconds) * _WORTH_CHOOSING < min(packed_s, plain_s)


def choose_threads(wanted: int) -> int:
    """`wanted`, or for 0 the better of one thread and one for each core that this process may use (0.2 s).

    On an idle machine all cores win. On a busy one every parallel region waits for the slowest core, and one thread can be ten
    times as fast as two.
    """
    cores = len(os.sched_getaffinity(0))
    if wanted or cores == 1:
        return wanted or 1
    product, x_TI = Products().of("", torch.ones(1536, 576)), torch.ones(32, 576)
    seconds = {1: 0.0, cores: 0.0}
    for _ in range(_ROUNDS):  # in turn, so that both meet the same neighbours
        for threads in seconds:
            torch.set_num_threads(threads)
            began = mono_s()
            for _ in range(20):
                product(x_TI)
            seconds[threads] += mono_s() - began
        if seconds[cores] > seconds[1]:
            break  # a busy machine has spoken, and each further round would be slow
    return better(seconds[1], seconds[cores], cores)


def better(one_s: float, all_s: float, cores: int) -> int:
    """All cores only if that gains a fifth at least: they take time from neighbours, and a busy spell costs more."""
    return cores if one_s >= _WORTHWHILE * all_s else 1
