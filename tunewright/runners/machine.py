"""What this machine has for workers: memory, processors, GPUs. Without torch, and looked at afresh each time."""

import os
from contextlib import suppress
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_GPUS = Path("/proc/driver/nvidia/gpus")
_NO_LIMIT_BYTES = 2**60


class LocalMachine:
    """Implements `jobs.ports.Machine`."""

    def memory_bytes(self) -> int:
        """Of the machine, or less where a container's control group allows less."""
        return min([psutil.virtual_memory().total, *_limits()])

    def cores(self) -> int:
        """Those that this process may use."""
        return len(os.sched_getaffinity(0))

    def gpus(self) -> int:
        """NVIDIA GPUs that the driver shows."""
        try:
            return len(os.listdir(_GPUS))
        except OSError:
            return 0


def _limits() -> list[int]:
    """Memory limits of the control groups that this process is in, from the innermost to the root (versions 1 and 2)."""
    found: list[int] = []
    with suppress(OSError, ValueError):
        for line in _OWN_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                found += _limits_above(_CGROUPS, path, "memory.max")
            elif "memory" in controllers.split(","):
                found += _limits_above(_CGROUPS / "memory", path, "memory.limit_in_bytes")
    return found


def _limits_above(root: Path, path: str, name: str) -> list[int]:
    found: list[int] = []
    folder = root / path.lstrip("/")
    for place in (folder, *folder.parents):
        with suppress(OSError, ValueError):
            limit = int((place / name).read_text())
            if 0 < limit < _NO_LIMIT_BYTES:
                found.append(limit)
        if place == root:
            break
    return found
