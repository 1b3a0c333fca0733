"""How many threads a trainer computes with, measured where it runs.

On an idle machine all cores win. On a busy one every parallel region waits for the slowest core, and one thread can be ten
times as fast as two; no count of cores tells which it is.
"""

import os

import torch

from tunewright.clock import mono_s

_ROUNDS = 5
_PRODUCTS = 20
"""Matrix products of a small training step in one timing: 10-30 ms on one core."""
_WORTHWHILE = 1.2


def choose_threads(wanted: int) -> int:
    """`wanted`, or for 0 the better of one thread and one for each core that this process may use (0.3 s)."""
    cores = len(os.sched_getaffinity(0))
    if wanted or cores == 1:
        return wanted or 1
    left, right = torch.ones(256, 576), torch.ones(576, 1536)
    times: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(_ROUNDS):  # in turn, so that both meet the same neighbours
        for threads, seconds in times.items():
            torch.set_num_threads(threads)
            began = mono_s()
            for _ in range(_PRODUCTS):
                torch.mm(left, right)
            seconds.append(mono_s() - began)
        if sum(times[cores]) > sum(times[1]):
            break  # a busy machine has spoken, and each further round would be slow
    return better(sum(times[1]), sum(times[cores]), cores)


def better(one_s: float, all_s: float, cores: int) -> int:
    """All cores only if that gains a fifth at least: they take time from neighbours, and a busy spell costs more."""
    return cores if one_s >= _WORTHWHILE * all_s else 1
