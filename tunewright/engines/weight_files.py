"""The tensors of a model folder by their names, read from its safetensors files one at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class WeightFiles:
    """Reads tensors in the format and to the device that are asked for. What it gives may be mapped from the file, so it must
    be copied, which packing does, to outlive a change there. Raises OSError if the folder has no safetensors files."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self._file_of: dict[str, Any] = {}
        for path in _paths(folder):
            opened = safe_open(path, framework="pt", device="cpu")
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> list[int]:
        """Of the tensor `name`, which exists."""
        return self._file_of[name].get_slice(name).get_shape()

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor `name`, which exists."""
        tensor = self._file_of[name].get_tensor(name).to(self.device, self.dtype)
        return tensor if torch.backends.mkldnn.is_available() else tensor.clone()  # else nothing packs it

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor `name` if there is one."""
        return self(name) if name in self._file_of else None


def _paths(folder: Path) -> list[Path]:
    """As transformers looks for them."""
    if (folder / _ONE_FILE).exists():
        return [folder / _ONE_FILE]
    parts = set(json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values())
    if any(Path(part).name != part for part in parts):
        raise OSError(f"{_INDEX} names files outside the folder")
    return [folder / part for part in sorted(parts)]
