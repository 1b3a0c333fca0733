"""The loss of every step is TRL's, on the same batches from the same initial adapter.

TRL's figures lie in `trl_curve/`; `benchmarks/peers/trl_curve.py --tiny` records them anew.
"""

import json
from pathlib import Path
from typing import Any

from tests.recipes.job_folder import losses, train_here, write_job
from tunewright.files_on_disk import sha256_of
from tunewright.recipes import adapters

RECORDED = Path(__file__).parent / "trl_curve"


def trained(folder: Path, base: Path, curve: dict[str, Any], **changes: Any) -> list[float]:
    """The losses of our trainer on the recorded rows, from the recorded adapter."""
    spec = write_job(
        folder,
        base,
        base_code="benchmark",
        training_data=str(RECORDED / "rows.jsonl"),
        training_sha256=sha256_of(RECORDED / "rows.jsonl"),
        start_adapter_path=str(RECORDED / "adapter"),
        start_adapter_sha256=sha256_of(RECORDED / "adapter" / adapters.WEIGHTS),
        seed=curve["seed"],
        precision="float32",
        **curve["hyperparameters"] | changes,
    )
    return [loss for loss in losses(train_here(spec)).values() if loss is not None]


def test_twenty_losses_are_those_of_trl(tmp_path: Path, base: Path) -> None:
    curve = json.loads((RECORDED / "curve.json").read_text("utf-8"))
    assert sha256_of(base / "model.safetensors") == curve["base_sha256"], "the tiny model is another: record anew"
    ours = trained(tmp_path / "job", base, curve)
    assert len(ours) == len(curve["losses"]) == 20
    assert max(abs(one - other) for one, other in zip(ours, curve["losses"], strict=True)) <= 1e-4

    # What would be wrong by little is seen: a rate that is off by a hundredth.
    rate = curve["hyperparameters"]["learning_rate"]
    off = trained(tmp_path / "off", base, curve, learning_rate=1.01 * rate)
    assert max(abs(one - other) for one, other in zip(off, curve["losses"], strict=True)) > 1e-4
