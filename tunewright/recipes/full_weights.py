"""All parameters of a model: made trainable, kept in checkpoints, and written as a model folder of their own."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.models.whole_models import LARGEST_PART, seal
from tunewright.recipes.checkpoints import KEPT

CHECKPOINT_WEIGHTS = "model.safetensors"
_BYTES_OF_CHECKPOINT = 12
"""Of each parameter: its value and AdamW's two moments, in float32."""
_BYTES_OF_RESULT = 4


def train_all(model: Any) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter, each trained; one that stands in two places (a tied output head) is there once."""
    model.requires_grad_(True)
    return dict(model.named_parameters())


def require_room(folder: Path, parameters: dict[str, torch.nn.Parameter], *, evaluated: bool) -> None:
    """Raises InvalidRequest(`insufficient_storage`) unless checkpoints and result fit on the disk of `folder`.

    One checkpoint more than are kept, because the oldest goes after the newest has come; and the best one, where validation
    rows tell it (`evaluated`). Those that lie there count as room.
    """
    numbers = sum(parameter.numel() for parameter in parameters.values())
    needed = numbers * (_BYTES_OF_CHECKPOINT * (KEPT + 1 + evaluated) + _BYTES_OF_RESULT)
    there = sum(path.stat().st_size for path in (folder / "checkpoints").glob("step-*/*"))
    free = shutil.disk_usage(folder).free + there
    if free < needed:
        raise InvalidRequest(
            "insufficient_storage",
            mark(
                "Full-parameter training needs {needed} GB of free disk for checkpoints and result; there are {free} GB."
            ),
            param="training_type",
            needed=round(needed / 1e9, 1),
            free=round(free / 1e9, 1),
        )


def write_checkpoint(folder: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """The parameters as they are, under the names that they have in the model."""
    save_file(
        {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()},
        folder / CHECKPOINT_WEIGHTS,
    )


def write_result(folder: Path, model: Any, base: Path, base_code: str) -> str:
    """Fill an existing folder; returns the sha256 of its manifest. The same weights give the same bytes."""
    model.save_pretrained(folder, max_shard_size=LARGEST_PART)
    return seal(folder, base, base_code)
