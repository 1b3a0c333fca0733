"""Not a test: run by one, as its own process. Saves a checkpoint again and again in children that die at their 1st, 2nd,
3rd ... file operation, until one gets through. Prints a line for each child: its exit code and what a resume would load.
"""

import os
import shutil
import sys
from pathlib import Path

import msgspec

from tunewright.jobs.spec import TrainingSpec
from tunewright.recipes import checkpoints

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.scandir", "os.listdir")
NEW_STEP = 4


def fill(folder: Path) -> None:
    """Contents of a checkpoint."""
    (folder / checkpoints.STATE).write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 4)
    (folder / "optimizer.safetensors").write_bytes(bytes(range(255, -1, -1)) * 4)


def save_and_die(spec: TrainingSpec, point: int) -> None:
    """Save `NEW_STEP`; the process ends with code 9 right before file operation number `point`."""
    left = point

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in OPERATIONS:
            left -= 1
            if left == 0:
                os._exit(9)

    sys.addaudithook(count)
    checkpoints.publish(spec, NEW_STEP, fill, before_rename=lambda: None)
    os._exit(0)


def main(folder: Path) -> None:
    """Go through all points."""
    spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=TrainingSpec)
    code, point = -1, 0
    while code != 0:
        point += 1
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for step in range(1, NEW_STEP):
            checkpoints.publish(spec, step, fill, before_rename=lambda: None)
        child = os.fork()
        if child == 0:
            save_and_die(spec, point)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        corrupt: list[int] = []
        found = checkpoints.newest_verified(spec, corrupt.append)
        kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
        print(code, found and found.name, len(corrupt), *kept, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
