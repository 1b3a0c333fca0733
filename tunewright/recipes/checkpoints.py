"""Checkpoints: whole, verified, or not there.

    checkpoints/step-{n}/       n padded with zeros nowhere: step-7, step-40
      adapter_model.safetensors, adapter_config.json   the adapter, loadable by PEFT as it is
      optimizer.safetensors     AdamW's moments, `exp_avg.{name}` and `exp_avg_sq.{name}`
      state.json                counters, metrics, random number states
      MANIFEST.json             step, identity of the training, its standing, sha256 of every other file

A checkpoint is prepared in a hidden folder and becomes visible by one rename. No pickle anywhere. Kept are the newest three,
the one with the lowest validation loss and, of adapters, the ends of the last three epochs.
"""

import errno
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError

from tunewright.files_on_disk import publish_folder, sha256_of
from tunewright.jobs.spec import TrainingSpec

MANIFEST = "MANIFEST.json"
STATE = "state.json"
KEPT = 3
"""So many of the newest stay, in case the last one is damaged."""
_EPOCHS_KEPT = {"lora": 3, "full": 0}
_FORMAT = 1
_HIDDEN = ".prepare-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Standing(msgspec.Struct, frozen=True):
    """What decides how long a checkpoint stays. `validation_loss` is None where it was not measured at this step."""

    validation_loss: float | None = None
    ends_epoch: bool = False


def newest_step(folder: Path) -> int:
    """The highest step with a published checkpoint in the job's folder; 0, the start, needs none."""
    return max(steps(folder), default=0)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies once published."""
    return folder / "checkpoints" / f"step-{step}"


def publish(
    spec: TrainingSpec,
    step: int,
    write: Callable[[Path], None],
    before_rename: Callable[[], None],
    standing: Standing | None = None,
) -> None:
    """Let `write` fill a folder, seal it with a manifest and publish it as `step`; then drop those that have had their day.

    `before_rename` may raise to forbid it. Nothing is left behind on any error. `is_disk_full` knows those of a full disk.
    """
    folder = Path(spec.work_folder)
    final = checkpoint_path(folder, step)
    prepared = final.with_name(f"{_HIDDEN}{spec.attempt}-{step}")
    final.parent.mkdir(exist_ok=True)
    shutil.rmtree(prepared, ignore_errors=True)
    try:
        prepared.mkdir()
        write(prepared)
        manifest = {
            "format": _FORMAT,
            "step": step,
            "training": _identity(spec),
            "standing": msgspec.to_builtins(standing or Standing()),
            "files": {path.name: sha256_of(path) for path in sorted(prepared.iterdir())},
        }
        (prepared / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        before_rename()
        publish_folder(prepared, final)
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
    for old in set(steps(folder)) - kept({n: _standing(folder, n) for n in steps(folder)}, spec.training_type):
        shutil.rmtree(checkpoint_path(folder, old), ignore_errors=True)


def kept(standings: dict[int, Standing], training_type: str) -> set[int]:
    """Of these steps, those whose checkpoints stay. The newest is always among them, and so is the best."""
    newest_first = sorted(standings, reverse=True)
    epochs = [step for step in newest_first if standings[step].ends_epoch]
    stay = set(newest_first[:KEPT]) | set(epochs[: _EPOCHS_KEPT.get(training_type, 0)])
    losses = [(standing.validation_loss, step) for step, standing in standings.items()]
    best = min(((loss, step) for loss, step in losses if loss is not None), default=None)
    return stay if best is None else stay | {best[1]}


def newest_verified(spec: TrainingSpec, on_corrupt: Callable[[int], None]) -> Path | None:
    """The newest checkpoint that is complete, unchanged and of this very training; None if there is none.

    Newer ones that fail are renamed to `corrupt-step-{n}-{attempt}`, kept, and told to `on_corrupt`. Leftovers of a
    crash while saving are removed.
    """
    folder = Path(spec.work_folder)
    for leftover in (folder / "checkpoints").glob(_HIDDEN + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for step in reversed(steps(folder)):
        path = checkpoint_path(folder, step)
        if _is_whole(path, step, spec):
            return path
        aside = path.with_name(f"corrupt-step-{step}-{spec.attempt}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        on_corrupt(step)
    return None


def verified(spec: TrainingSpec, step: int) -> Path | None:
    """The checkpoint of `step` if it is complete, unchanged and of this very training."""
    path = checkpoint_path(Path(spec.work_folder), step)
    return path if _is_whole(path, step, spec) else None


def sha256_in(folder: Path, step: int, name: str) -> str:
    """What the manifest of a published checkpoint says of one of its files."""
    return json.loads((checkpoint_path(folder, step) / MANIFEST).read_text("utf-8"))["files"][name]


def damaged(folder: Path) -> list[str]:
    """Names of checkpoints of the job's folder that were put aside, by this attempt or by an earlier one."""
    return sorted(path.name for path in (folder / "checkpoints").glob("corrupt-step-*"))


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of writing means that there is no room, or no more that this user may take."""
    if isinstance(error, SafetensorError):  # which has the number in its text only
        return any(f"(os error {number})" in str(error) for number in _NO_ROOM)
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state.json`: the given values and all random number states of this process."""
    (folder / STATE).write_text(json.dumps(state | {"random": _random_states()}), "utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Read `state.json` and put the random number states back."""
    state = json.loads((folder / STATE).read_text("utf-8"))
    _restore_random_states(state.pop("random"))
    return state


def steps(folder: Path) -> list[int]:
    """The steps with a published checkpoint in the job's folder, ascending."""
    names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _standing(folder: Path, step: int) -> Standing:
    try:
        manifest = json.loads((checkpoint_path(folder, step) / MANIFEST).read_text("utf-8"))
        return msgspec.convert(manifest["standing"], Standing)
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or of an earlier release
        return Standing()


def _identity(spec: TrainingSpec) -> str:
    """A hash of everything that decides what the training computes: a checkpoint of anything else is not ours."""
    parts = [
        spec.job_id,
        spec.base_code,
        spec.base_files,
        spec.method,
        spec.training_type,
        spec.training_sha256,
        spec.hyperparameters,
        spec.seed,
    ]
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def _is_whole(path: Path, step: int, spec: TrainingSpec) -> bool:
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        expected = dict(manifest["files"])
        found = {file.name for file in path.iterdir()} - {MANIFEST}
        return (
            manifest["format"] == _FORMAT
            and manifest["step"] == step
            and manifest["training"] == _identity(spec)
            and STATE in found
            and found == set(expected)
            and all(sha256_of(path / name) == expected[name] for name in found)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _random_states() -> dict[str, Any]:
    import torch

    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    cuda = [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()]
    return {
        "python": [version, list(numbers), gauss],
        "numpy": legacy | {"state": {"key": legacy["state"]["key"].tolist(), "pos": legacy["state"]["pos"]}},
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": cuda,
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    import torch

    def bytes_of(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    legacy = states["numpy"]
    key = np.array(legacy["state"]["key"], dtype=np.uint32)
    np.random.set_state(legacy | {"state": {"key": key, "pos": legacy["state"]["pos"]}})
    torch.set_rng_state(bytes_of(states["torch"]))
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([bytes_of(text) for text in states["cuda"]])
