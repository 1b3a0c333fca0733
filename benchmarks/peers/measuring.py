"""What the runs of all trainers have in common: what they are asked for, what is counted, and the one line they print.

Runs in the environments of the peers: nothing but the standard library here.
"""

import json
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """What a run is asked for: `warmup` optimizer steps that are not timed and `steps` that are, of 8 rows each.

    `settings` are the peer's own, or empty for its defaults. `method` is lora (rank 8, alpha 16, all linear layers) or full.
    """

    base: str
    data: str
    work: str
    threads: int
    steps: int
    warmup: int
    method: str
    settings: dict[str, Any]
    learning_rate: float = 1e-4
    rows_per_step: int = 8
    max_length: int = 1024

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the data file."""
        return [json.loads(line) for line in Path(self.data).read_text("utf-8").splitlines()]


def request() -> Request:
    """What the driver asks this process for; the limit of threads is set."""
    import torch

    asked = Request(**json.loads(sys.argv[1]))

    torch.set_num_threads(asked.threads)
    return asked


@dataclass
class Meter:
    """Counts tokens that are not padding, and notes the clocks at the end of every optimizer step.

    `checkpointing`: whether a layer of the model said while it trained that it checkpoints; None if nobody looked.
    """

    asked: Request
    tokens: int = 0
    checkpointing: bool | None = None
    marks: list[tuple[int, float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step_ended(self) -> None:
        """An optimizer step is complete."""
        self.marks.append((self.tokens, time.process_time(), time.perf_counter()))

    def print_line(self) -> None:
        """The measurement of the timed steps as one line of JSON, the last one on standard output."""
        (first, first_cpu, first_wall), (last, last_cpu, last_wall) = self.marks[self.asked.warmup - 1], self.marks[-1]
        figures = {
            "steps": len(self.marks) - self.asked.warmup,
            "tokens": last - first,
            "cpu_s": round(last_cpu - first_cpu, 3),
            "wall_s": round(last_wall - first_wall, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "losses": self.losses,
            "checkpointing": self.checkpointing,
        }
        print("\n" + json.dumps(figures), flush=True)


def peak_rss_bytes() -> int:
    """The most memory this process ever had. Not ru_maxrss where there is better: it counts what was there before exec."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def watch(asked: Request) -> Meter:
    """A meter of whatever trainer of the transformers family this process makes from now on."""
    from transformers import Trainer, TrainerCallback
    from transformers.trainer import DEFAULT_CALLBACKS

    meter = Meter(asked)
    train_on: Any = Trainer.training_step

    def counted(self: Any, model: Any, inputs: Any, *others: Any, **more: Any) -> Any:
        mask = inputs.get("attention_mask")
        padded = mask is not None and mask.dim() == 2
        meter.tokens += int((mask != 0).sum()) if padded else inputs["input_ids"].numel()
        if meter.checkpointing is None:  # what it does, not what it was asked for
            meter.checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
        return train_on(self, model, inputs, *others, **more)

    class Notes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.step_ended()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                meter.losses.append(float(logs["loss"]))

    Trainer.training_step = counted
    DEFAULT_CALLBACKS.append(Notes)  # pyright: ignore[reportArgumentType]
    return meter


def training_arguments(asked: Request) -> dict[str, Any]:
    """Arguments of transformers' trainer that every peer gets, whatever its other settings."""
    return {
        "output_dir": str(Path(asked.work) / "out"),
        "max_steps": asked.steps + asked.warmup,
        "learning_rate": asked.learning_rate,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def quiet() -> None:
    """No hub, no telemetry. Before any import of a peer."""
    os.environ.update(
        HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_DISABLED="true",
        TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
