"""The learning rate of each step. Pure."""

import math

FINAL_LEARNING_RATE = 0.1
"""Part of the peak learning rate at which the cosine ends."""


def learning_rate(peak: float, steps_done: int, total_steps: int, warmup_ratio: float) -> float:
    """Rate of the step that follows `steps_done`: up in a line over the warm-up, then a cosine to a tenth of the peak."""
    warmup = math.ceil(total_steps * warmup_ratio)
    if steps_done < warmup:
        return peak * (steps_done + 1) / warmup
    way = (steps_done - warmup) / max(1, total_steps - warmup - 1)
    return peak * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * (1 + math.cos(math.pi * min(1.0, way))) / 2)
