"""What the machine has, as far as a control group allows."""

from pathlib import Path

import psutil
import pytest

from tunewright.runners import machine
from tunewright.runners.machine import LocalMachine

HAS = psutil.virtual_memory().total


def in_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str, files: dict[str, str]) -> LocalMachine:
    own = tmp_path / "cgroup"
    own.write_text(lines)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(machine, "_OWN_CGROUP", own)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "fs")
    return LocalMachine()


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "1000000\n"}, 1_000_000),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "2000000\n"}, 2_000_000),
        ("0::/a/b\n", {"a/b/memory.max": "3000000\n", "a/memory.max": "9000000\n"}, 3_000_000),
        ("9:cpu,memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "5000000\n"}, 5_000_000),
        ("9:memory:/x\n", {"memory/x/memory.limit_in_bytes": str(2**63 - 4096)}, HAS),
        ("0::/\n", {}, HAS),
        ("nonsense", {}, HAS),
    ],
)
def test_the_least_limit_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str, files: dict[str, str], expected: int
) -> None:
    assert in_group(monkeypatch, tmp_path, lines, files).memory_bytes() == expected


def test_gpus_are_those_that_the_driver_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_GPUS", tmp_path / "gpus")
    assert LocalMachine().gpus() == 0
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert LocalMachine().gpus() == 2
    assert LocalMachine().cores() >= 1
