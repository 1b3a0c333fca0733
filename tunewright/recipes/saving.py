"""What a training writes and reads back: the whole state of a checkpoint, and the result that becomes a model."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tunewright.files_on_disk import publish_folder, sha256_of
from tunewright.jobs.spec import TrainingSpec
from tunewright.models.manifest import MANIFEST
from tunewright.recipes import adapters, full_weights
from tunewright.recipes.adapters import Lora
from tunewright.recipes.attempt import UNFINISHED_RESULT

OPTIMIZER = "optimizer.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Trained:
    """What is trained. `lora` is None where all weights are."""

    spec: TrainingSpec
    model: Any
    parameters: dict[str, torch.nn.Parameter]
    lora: Lora | None

    def is_finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters.values())

    def write_weights(self, folder: Path) -> None:
        """Those of a checkpoint: an adapter in PEFT's format, or all weights in one file."""
        if self.lora is None:
            full_weights.write_checkpoint(folder, self.parameters)
        else:
            self._write_adapter(folder, self.lora)

    def read_weights(self, folder: Path) -> None:
        """Take the weights of a verified checkpoint."""
        name = full_weights.CHECKPOINT_WEIGHTS if self.lora is None else adapters.WEIGHTS
        adapters.load_adapter(self.parameters, load_file(folder / name))

    def publish_result(self, before_rename: Callable[[], None]) -> str:
        """Publish `result/`; returns the sha256 of the adapter's weights, or of the manifest of a whole model.

        `before_rename` may raise to forbid it.
        """
        work = Path(self.spec.work_folder)
        final, prepared = work / "result", work / UNFINISHED_RESULT
        shutil.rmtree(prepared, ignore_errors=True)
        prepared.mkdir()
        if self.lora is None:
            full_weights.write_result(prepared, self.model, Path(self.spec.base_path), self.spec.base_code)
        else:
            self._write_adapter(prepared, self.lora)
        before_rename()
        if final.exists():  # of an attempt that died before its last record
            shutil.rmtree(final)
        publish_folder(prepared, final)
        return sha256_of(final / (MANIFEST if self.lora is None else adapters.WEIGHTS))

    def _write_adapter(self, folder: Path, lora: Lora) -> None:
        adapters.write_adapter(folder, self.parameters, base_code=self.spec.base_code, **asdict(lora))


def write_moments(folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """AdamW's moments, as `exp_avg.{name}` and `exp_avg_sq.{name}`."""
    moments = {
        f"{moment}.{name}": optimizer.state[parameter][moment].cpu()
        for name, parameter in parameters.items()
        for moment in _MOMENTS
    }
    save_file(moments, folder / OPTIMIZER)


def read_moments(
    folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Put back what `write_moments` wrote after `step` steps."""
    moments = load_file(folder / OPTIMIZER)
    for name, parameter in parameters.items():
        state = {moment: moments[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **state}
