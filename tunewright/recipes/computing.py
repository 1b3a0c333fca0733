"""How a training is computed: device, precision, products, attention, checkpointing, micro-batch. Measured and chosen at its
start.

What was chosen lies in `computing.json` of the job's folder and stays for the job's life, so that a resumed training makes the
same numbers. The job's hyperparameters win over every choice.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from tunewright.clock import thread_cpu_s
from tunewright.files_on_disk import write_atomically
from tunewright.jobs.memory_estimate import MICRO_BATCH_TOKENS, MemoryPlan, Sizes, choose_plan, sizes_of
from tunewright.jobs.spec import COMPUTING, TrainingSpec
from tunewright.recipes import products

PER_CONVERSATION, FLEX, FLASH = "per_conversation", "flex_attention", "flash_attention_2"
_WORTHWHILE = 1.3
"""By so much must bfloat16 be faster: what is not a matrix product gains nothing by it."""
_ROUNDS = 3
_PART_OF_FREE_MEMORY = 0.9


@dataclass(frozen=True)
class Capabilities:
    """What the machine has. `flash` and `flex` are ways to compute attention of conversations laid end to end."""

    cuda: bool = False
    cuda_bfloat16: bool = False
    flash: bool = False
    flex: bool = False


@dataclass(frozen=True)
class Computing:
    """What was chosen, and the figures that decided. `figures` are empty where nothing was measured."""

    device: str
    precision: str
    attention: str
    activation_checkpointing: bool
    micro_batch_tokens: int
    fits: bool
    figures: dict[str, float]
    products: str = products.TORCH
    """Whose matrix products layers by hand take in a training of one thread."""
    halved: bool = False
    """Whether memory ran out once, and the micro-batch is half of what was chosen."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that layers are computed in."""
        return getattr(torch, self.precision)

    def kept_in(self, folder: Path) -> "Computing":
        """Itself, once it lies in the job's folder."""
        write_atomically(folder / COMPUTING, msgspec.json.encode(self))
        return self

    def with_half_the_micro_batch(self) -> "Computing":
        """For when memory ran out."""
        return replace(self, micro_batch_tokens=max(1, self.micro_batch_tokens // 2), halved=True)


def capabilities() -> Capabilities:
    """Of this machine. FlashAttention is a package that an operator may add."""
    if not torch.cuda.is_available():
        return Capabilities()
    return Capabilities(
        cuda=True,
        cuda_bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        flash=importlib.util.find_spec("flash_attn") is not None,
        flex=torch.cuda.get_device_capability() >= (7, 5),
    )


def choose(spec: TrainingSpec, longest_row: int, machine: Capabilities) -> Computing:
    """What an earlier attempt of this job chose, if it ran on such a device, or a new choice, kept for the next.

    `longest_row` in tokens, of preference data both answers together.
    """
    folder, device = Path(spec.work_folder), "cuda" if machine.cuda else "cpu"
    try:
        kept = msgspec.json.decode((folder / COMPUTING).read_bytes(), type=Computing)
    except (FileNotFoundError, msgspec.DecodeError, msgspec.ValidationError):
        kept = None
    if kept is not None and kept.device == device:
        # The server asks for half once memory ended an earlier attempt that could not tell.
        return kept.with_half_the_micro_batch().kept_in(folder) if spec.halve_micro_batch and not kept.halved else kept
    config = json.loads((Path(spec.base_path) / "config.json").read_bytes())
    precision, figures = choose_precision(spec, config, machine)
    whose, of_products = choose_products(spec, config, precision, machine)
    plan, allowed_bytes = _plan(spec, config, precision, longest_row, machine)
    wanted = spec.hyperparameters
    chosen = Computing(
        device=device,
        precision=precision,
        attention=choose_attention(machine, precision),
        activation_checkpointing=plan.activation_checkpointing if plan else wanted.activation_checkpointing == "on",
        micro_batch_tokens=plan.micro_batch_tokens if plan else wanted.micro_batch_tokens or MICRO_BATCH_TOKENS,
        fits=plan is None or plan.fits,
        products=whose,
        figures=figures
        | of_products
        | ({"memory_estimate_gb": round(plan.estimate.total / 1e9, 2)} if plan else {})
        | {"memory_allowed_gb": round(allowed_bytes / 1e9, 2)},
    )
    return (chosen.with_half_the_micro_batch() if spec.halve_micro_batch else chosen).kept_in(folder)


def choose_attention(machine: Capabilities, precision: str) -> str:
    """FlashAttention where it is (it knows no float32), compiled flex attention on other GPUs, our own loop elsewhere."""
    if machine.cuda and machine.flash and precision == "bfloat16":
        return FLASH
    return FLEX if machine.cuda and machine.flex else PER_CONVERSATION


def choose_precision(
    spec: TrainingSpec,
    config: dict[str, Any],
    machine: Capabilities,
    speeds: Callable[[int, int], dict[str, float]] | None = None,
) -> tuple[str, dict[str, float]]:
    """(precision; GFLOP/s of a matrix product in each, where it was measured).

    bfloat16 is worth it on GPUs that have it, and on processors where the product of this model's sizes says so: on some it is
    twice as fast as float32, on others half. There it is only for architectures whose layers are computed by hand, which
    keep a young adapter's change from being lost in rounding.
    """
    wanted = spec.hyperparameters.precision
    sizes = _sizes(config)
    by_hand = sizes is not None and sizes.fast and not machine.cuda
    if spec.training_type == "full" and not by_hand:
        return "float32", {}  # weights of bfloat16 would lose small updates; only layers by hand keep them apart
    if wanted != "auto":
        return wanted, {}
    if machine.cuda:
        return "bfloat16" if machine.cuda_bfloat16 else "float32", {}
    if sizes is None or not by_hand:
        return "float32", {}
    found = (speeds or matmul_speeds)(sizes.hidden, sizes.mlp_width)
    faster = found["bfloat16"] >= _WORTHWHILE * found["float32"]
    figures = {f"{name}_gflop_per_s": round(speed, 1) for name, speed in found.items()}
    return "bfloat16" if faster else "float32", figures


def choose_products(
    spec: TrainingSpec,
    config: dict[str, Any],
    precision: str,
    machine: Capabilities,
    faster: Callable[[int, int], tuple[str, dict[str, float]]] | None = None,
) -> tuple[str, dict[str, float]]:
    """(whose matrix products; GFLOP/s of each, where they were measured): the faster ones for layers by hand in float32."""
    sizes = _sizes(config)
    if machine.cuda or precision != "float32" or sizes is None or not sizes.fast:
        return products.TORCH, {}
    if spec.products != "auto":
        return spec.products, {}
    return (faster or products.faster)(sizes.hidden, sizes.mlp_width)


def _sizes(config: dict[str, Any]) -> Sizes | None:
    """None if the config tells too little."""
    try:
        return sizes_of(config)
    except (KeyError, TypeError, ValueError):
        return None


def matmul_speeds(hidden: int, width: int) -> dict[str, float]:
    """Name of a precision -> GFLOP/s of a matrix product of a model's sizes, the best of a few rounds in turn (0.1 s).

    By the clock of this thread alone: on a busy machine every round may be interrupted, and the faster product look slower.
    """
    rows = 512
    best: dict[str, float] = {"float32": 0.0, "bfloat16": 0.0}
    operands = {
        name: (
            torch.ones(rows, hidden, dtype=getattr(torch, name)),
            torch.ones(width, hidden, dtype=getattr(torch, name)),
        )
        for name in best
    }
    for _ in range(_ROUNDS + 1):  # the first one prepares kernels
        for name, (left, right) in operands.items():
            began = thread_cpu_s()
            torch.mm(left, right.t())
            best[name] = max(best[name], 2e-9 * rows * hidden * width / max(thread_cpu_s() - began, 1e-9))
    return best


def _plan(
    spec: TrainingSpec, config: dict[str, Any], precision: str, longest_row: int, machine: Capabilities
) -> tuple[MemoryPlan | None, int]:
    """(the plan, None if the config tells too little; bytes that the training may take)."""
    wanted = spec.hyperparameters
    allowed = spec.memory_limit_bytes or int(_PART_OF_FREE_MEMORY * _free_bytes(machine.cuda))
    open_choice = wanted.activation_checkpointing == "auto"
    try:
        plan = choose_plan(
            config,
            training_type=spec.training_type,
            lora_rank=wanted.lora_rank,
            precision=precision,
            longest_row=longest_row,
            allowed_bytes=allowed,
            micro_batch_tokens=wanted.micro_batch_tokens,
            activation_checkpointing=None if open_choice else wanted.activation_checkpointing == "on",
        )
    except (KeyError, TypeError, ValueError):
        plan = None
    return plan, allowed


def _free_bytes(cuda: bool) -> int:
    """Memory that is free now, of the GPU or of the machine and the control group that this process is in."""
    if cuda:
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii")) for name in ("max", "current"))
    except (OSError, ValueError):  # no control group, or one without a limit
        return free
    return min(free, max(0, limit - used))
