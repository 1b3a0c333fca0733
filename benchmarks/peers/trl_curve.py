"""Our losses beside TRL's on the same batches from the same initial adapter, in float32.

    python benchmarks/peers/trl_curve.py FOLDER --base BASE_FOLDER [--rows 16] [--rows-per-step 4] [--max-length 256]
    python benchmarks/peers/trl_curve.py tests/recipes/trl_curve --tiny     (records the figures of the test anew)

Makes rows and an adapter that is random on both sides, trains 20 steps here, hands the same batches to TRL in its own
environment (`bench_train.py --install-only` makes it) and prints the largest difference. FOLDER keeps `rows.jsonl`,
`adapter/` and `curve.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measuring
import torch
from run_tunewright import spec_of, train

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from long_tailed_chat import conversations  # noqa: E402

from tests.tiny_models import tiny_llama  # noqa: E402
from tunewright.files_on_disk import sha256_of  # noqa: E402
from tunewright.jobs.spec import Hyperparameters  # noqa: E402
from tunewright.recipes import adapters, base_model, packing, schedule  # noqa: E402
from tunewright.rendering.renderer import Renderer  # noqa: E402

STEPS = 20
SEED = 7


def short_rows(path: Path, n_rows: int) -> Path:
    """The shortest conversations of many, so that none loses all its labels to the limit of length; returns `path`."""
    lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations(8 * n_rows)]
    path.write_text("".join(sorted(lines, key=len)[:n_rows]), "utf-8")
    return path


def initial_adapter(folder: Path, base: Path, wanted: Hyperparameters) -> None:
    """Write an adapter whose B is random too, so that every gradient counts from the first step on."""
    model = base_model.load_model(base, torch.float32)
    targets = adapters.linear_names(model)
    adapters.add_lora(model, rank=wanted.lora_rank, alpha=wanted.lora_alpha, targets=targets, seed=SEED)
    parameters = adapters.adapter_parameters(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    folder.mkdir(parents=True, exist_ok=True)
    adapters.write_adapter(
        folder, parameters, rank=wanted.lora_rank, alpha=wanted.lora_alpha, targets=targets, base_code="benchmark"
    )


def batches(data: Path, base: Path, wanted: Hyperparameters) -> dict[str, Any]:
    """What TRL is given: the rows as our trainer will take them, step after step, and the rate of each step."""
    rows = packing.read_rows(
        data,
        Renderer(base),
        max_length=wanted.max_length,
        max_line_bytes=2**24,
        between_rows=lambda: None,
        param="training_file",
    )
    order = [int(row) for epoch in range(wanted.n_epochs) for row in packing.epoch_order(len(rows), SEED, epoch)]
    made = []
    for row in order:
        tokens, trained = rows.tokens_of(row).tolist(), rows.trained_of(row).tolist()
        made.append(
            {"input_ids": tokens, "labels": [t if label else -100 for t, label in zip(tokens, trained, strict=True)]}
        )
    rates = [schedule.learning_rate(wanted.learning_rate, step, STEPS, wanted.warmup_ratio) for step in range(STEPS)]
    return {"rows": made, "rates": rates, "rows_per_step": wanted.batch_size}


def compare(folder: Path, base: Path, asked: measuring.Request) -> float:
    """Train here and there; returns the largest difference of a step's loss, and writes `curve.json`."""
    adapter = folder / "adapter"
    wanted = spec_of(asked).hyperparameters
    initial_adapter(adapter, base, wanted)
    weights = sha256_of(adapter / adapters.WEIGHTS)
    meter = measuring.Meter(asked)
    train(spec_of(asked, SEED, start_adapter_path=str(adapter), start_adapter_sha256=weights), meter)
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "batches.json").write_text(json.dumps(batches(Path(asked.data), base, wanted)), "utf-8")
        (Path(work) / "adapter").symlink_to(adapter.resolve())
        python = ROOT / ".venvs" / "trl" / "bin" / "python"
        script = Path(__file__).parent / "record_trl_curve.py"
        subprocess.run([python, script, work, base], check=True, stdout=subprocess.DEVNULL)
        recorded = json.loads((Path(work) / "trl_losses.json").read_text("utf-8"))
    curve = {
        **recorded,
        "base_sha256": sha256_of(base / "model.safetensors"),
        "seed": SEED,
        "hyperparameters": {
            name: getattr(wanted, name)
            for name in (
                "n_epochs", "batch_size", "learning_rate", "lora_rank", "lora_alpha", "max_length", "warmup_ratio",
                "weight_decay",
            )
        },
    }  # fmt: skip
    (folder / "curve.json").write_text(json.dumps(curve, indent=1) + "\n", "utf-8")
    return max(abs(ours - theirs) for ours, theirs in zip(meter.losses, recorded["losses"], strict=True))


def main() -> None:
    """Record and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--base", type=Path)
    which.add_argument("--tiny", action="store_true", help="the tiny model of the tests")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--rank", type=int, default=4)
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = short_rows(folder / "rows.jsonl", given.rows)
    with tempfile.TemporaryDirectory() as work:
        base = tiny_llama(Path(work) / "base") if given.tiny else given.base.resolve()
        settings = {
            "n_epochs": STEPS * given.rows_per_step // given.rows,
            "lora_rank": given.rank,
            "lora_alpha": 2 * given.rank,
            "precision": "float32",
        }
        asked = measuring.Request(
            base=str(base),
            data=str(data),
            work=work,
            threads=1,
            steps=STEPS,
            warmup=0,
            method="lora",
            settings=settings,
            learning_rate=given.learning_rate,
            rows_per_step=given.rows_per_step,
            max_length=given.max_length,
        )
        print(f"largest difference of {STEPS} losses: {compare(folder, base, asked):.1e}")


if __name__ == "__main__":
    main()
