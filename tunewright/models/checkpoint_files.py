"""Adapters of a job's checkpoints, where they outlive its work folder: below the home's `adapters/`, beside the models.

    adapters/checkpoints/{model_id}/step-{n}/
      adapter_model.safetensors, adapter_config.json   loadable by PEFT as they are
      MANIFEST.json                                    step, base, sha256 of both

They are links of what the trainer published, so they take no room while it keeps them too. A folder that is there never
changes.
"""

import json
import shutil
from pathlib import Path

from tunewright.files_on_disk import link_or_copy, publish_folder, sha256_of
from tunewright.settings import HomeFolder

FOLDER = "checkpoints"
_WEIGHTS, _CONFIG, _MANIFEST = "adapter_model.safetensors", "adapter_config.json", "MANIFEST.json"


def relative_path(model_id: str, step: int) -> str:
    """Where a checkpoint's adapter lies below the home's `adapters/`."""
    return f"{FOLDER}/{model_id}/step-{step}"


class CheckpointFiles:
    """Everything here can be repeated, and finished after a kill at any line."""

    def __init__(self, home: HomeFolder) -> None:
        self._adapters = home.adapters

    def add(self, source: Path, model_id: str, step: int, base_code: str) -> bool:
        """Take the adapter out of a trainer's checkpoint; False if that is gone, as one that had its day is."""
        final = self._adapters / relative_path(model_id, step)
        if final.is_dir():
            return True
        prepared = final.with_name(f".prepare-{step}")
        shutil.rmtree(prepared, ignore_errors=True)
        prepared.mkdir(mode=0o700, parents=True)
        try:
            for name in (_WEIGHTS, _CONFIG):
                link_or_copy(source / name, prepared / name)
            files = {name: sha256_of(prepared / name) for name in (_CONFIG, _WEIGHTS)}
        except FileNotFoundError:
            shutil.rmtree(prepared)
            return False
        manifest = {"format": 1, "step": step, "base": base_code, "files": files}
        (prepared / _MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        publish_folder(prepared, final)
        return True

    def keep_only(self, model_id: str, steps: set[int]) -> None:
        """Remove the adapters of all other steps."""
        for folder in (self._adapters / FOLDER / model_id).glob("step-*"):
            if folder.name.removeprefix("step-") not in map(str, steps):
                shutil.rmtree(folder, ignore_errors=True)

    def remove_all(self, model_id: str) -> None:
        """Remove what lies there of a model that is no more."""
        shutil.rmtree(self._adapters / FOLDER / model_id, ignore_errors=True)

    def owners(self) -> list[str]:
        """Ids of the models with folders here."""
        folder = self._adapters / FOLDER
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
