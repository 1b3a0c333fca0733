"""What a trainer takes of the machine: measured by the dress rehearsal, else estimated from the base's config.json."""

from typing import Any

import msgspec

from tunewright.jobs.creation import DPO
from tunewright.jobs.memory_estimate import choose_plan
from tunewright.jobs.records import Job
from tunewright.jobs.spec import Hyperparameters
from tunewright.models.records import FULL, Base

MARGIN = 1.15
"""Between what was measured or estimated and what is set aside."""
_OVERHEAD_BYTES = 600 * 2**20
_WEIGHTS_TIMES = {"lora": 4, FULL: 10}
"""Peak of a training in sizes of the weights' files, where config.json says nothing that we know."""


def needs(job: Job, base: Base, rows: int, most_bytes: int, gpus: int) -> dict[str, Any]:
    """`memory_bytes` to set aside and the `source` of that number (`rehearsal`, `estimate` or `weights`); `limit_bytes`, what
    the trainer may plan with; `gpus`; `rows` of the training file.

    The estimate is that of the fastest way of computing that fits into `most_bytes`, or of the leanest if none does. Raises
    OSError if the base's folder can't be read.
    """
    source, estimated = _estimated(job, base, int(most_bytes / MARGIN))
    measured = job.rehearsal.get("memory_peak_bytes")
    found = {"memory_bytes": round(estimated * MARGIN), "source": source}
    if isinstance(measured, int):
        found = {"memory_bytes": round(measured * MARGIN), "source": "rehearsal"}
    limit = max(found["memory_bytes"], round(estimated * MARGIN))
    return found | {"limit_bytes": limit, "gpus": min(1, gpus), "rows": rows}


def _estimated(job: Job, base: Base, allowed_bytes: int) -> tuple[str, int]:
    path = base.path
    if path is None:
        return "weights", _OVERHEAD_BYTES
    run = msgspec.convert(job.hyperparameters, Hyperparameters)
    checkpointing = {"on": True, "off": False}.get(run.activation_checkpointing)
    try:
        plan = choose_plan(
            msgspec.json.decode((path / "config.json").read_bytes()),
            training_type=job.training_type,
            lora_rank=run.lora_rank,
            precision=run.precision,
            longest_row=run.max_length * (2 if job.method == DPO else 1),
            allowed_bytes=allowed_bytes,
            micro_batch_tokens=run.micro_batch_tokens,
            activation_checkpointing=checkpointing,
        )
    except (FileNotFoundError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return "weights", _OVERHEAD_BYTES + weights * _WEIGHTS_TIMES[job.training_type]
    return "estimate", plan.estimate.total
