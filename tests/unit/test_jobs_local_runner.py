"""Processes and their groups on this machine."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunewright.runners import local
from tunewright.runners.local import LocalRunner

SLEEPER = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if (folder / "stubborn").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if (folder / "own_group").exists():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], process_group=0)
if (folder / "leader_leaves").exists():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    while not (folder / "leaves_now").exists():
        time.sleep(0.01)
    sys.exit(3)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalRunner]:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "a_sleeper_for_tests.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    runner = LocalRunner()
    yield runner
    for pid in runner.find("a_sleeper_for_tests", tmp_path):
        runner.kill(pid)
        wait(lambda pid=pid: runner.group_empty(pid))
    runner.reap()


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(runner: LocalRunner, folder: Path, *flags: str) -> tuple[int, int]:
    for flag in flags:
        (folder / flag).touch()
    log = folder / "log.txt"
    pid = runner.start("a_sleeper_for_tests", folder, log)
    ticks = runner.start_ticks(pid)
    assert ticks is not None
    if "leader_leaves" in flags:
        (folder / "leaves_now").touch()
    else:
        wait(lambda: log.read_text() == "ready\n")
    return pid, ticks


def test_a_process_lives_and_ends(runner: LocalRunner, tmp_path: Path) -> None:
    pid, ticks = start(runner, tmp_path)
    assert runner.alive(pid, ticks) and not runner.alive(pid, ticks + 1)
    assert not runner.group_empty(pid)
    assert os.getpgid(pid) == os.getsid(pid) == pid
    assert LocalRunner().find("a_sleeper_for_tests", tmp_path) == [pid]
    assert runner.find("a_sleeper_for_tests", tmp_path / "other") == []
    runner.terminate(pid)
    wait(lambda: not runner.alive(pid, ticks))
    assert runner.group_empty(pid) and runner.start_ticks(pid) is None
    assert not Path(f"/proc/{pid}").exists(), "no zombie is left"
    runner.terminate(pid)
    runner.kill(pid)
    assert not runner.died_of_memory(pid)
    assert runner.exit_code(pid) == -signal.SIGTERM and LocalRunner().exit_code(pid) is None


@pytest.mark.parametrize(
    ("group", "events", "kills"),
    [
        ("0::/box/server\n", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n", 2),  # others of the machine do not count
        ("4:memory:/old\n0::/box/server\n", None, 7),
        ("4:memory:/old\n", "oom_kill 2\n", 7),
        (None, None, 7),
    ],
)
def test_the_kernels_count_of_kills(tmp_path: Path, group: str | None, events: str | None, kills: int) -> None:
    ours = tmp_path / "sys/fs/cgroup/box/server"
    ours.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 1\noom_kill 7\n")
    if group is not None:
        (tmp_path / "proc/self/cgroup").write_text(group)
    if events is not None:
        (ours / "memory.events").write_text(events)
    assert local._memory_kills(tmp_path) == kills


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        runner = LocalRunner()
        assert Path(f"/proc/{pid}").exists()
        assert runner.start_ticks(pid) is None and runner.group_empty(pid)
    finally:
        os.waitpid(pid, 0)


def test_a_stubborn_process_is_killed(runner: LocalRunner, tmp_path: Path) -> None:
    pid, ticks = start(runner, tmp_path, "stubborn")
    runner.terminate(pid)
    time.sleep(0.1)
    assert runner.alive(pid, ticks)
    runner.kill(pid)
    wait(lambda: runner.group_empty(pid))


def test_a_child_in_a_group_of_its_own_is_found_and_killed(runner: LocalRunner, tmp_path: Path) -> None:
    pid, _ = start(runner, tmp_path, "own_group")
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not Path(f"/proc/{pid}").exists() or runner.start_ticks(pid) is None)
    assert not runner.group_empty(pid)
    runner.kill(pid)
    wait(lambda: runner.group_empty(pid))


def test_a_group_without_its_leader(runner: LocalRunner, tmp_path: Path) -> None:
    pid, ticks = start(runner, tmp_path, "leader_leaves")
    wait(lambda: not runner.alive(pid, ticks))
    assert not runner.group_empty(pid)
    runner.terminate(pid)
    wait(lambda: runner.group_empty(pid))


def test_the_log_is_appended_to_and_private(runner: LocalRunner, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    log.chmod(0o600)
    pid = runner.start("no_such_module_anywhere", tmp_path, log)
    wait(lambda: runner.group_empty(pid))
    text = log.read_text()
    assert text.startswith("before\n") and "no_such_module_anywhere" in text
    assert log.stat().st_mode & 0o777 == 0o600


def test_engines_alone_hold_their_memory_in_large_pages(runner: LocalRunner, tmp_path: Path) -> None:
    found = {}
    for module in ("tunewright.engines.worker", "a_sleeper_for_tests"):
        pid = runner.start(module, tmp_path, tmp_path / "log.txt")
        found[module] = b"GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in Path(f"/proc/{pid}/environ").read_bytes()
        runner.kill(pid)
        wait(lambda pid=pid: runner.group_empty(pid))
    assert found == {"tunewright.engines.worker": True, "a_sleeper_for_tests": False}


def test_nothing_is_imported_from_the_work_folder(runner: LocalRunner, tmp_path: Path) -> None:
    (tmp_path / "planted_module_for_tests.py").write_text("print('owned')")
    log = tmp_path / "log.txt"
    pid = runner.start("planted_module_for_tests", tmp_path, log)
    wait(lambda: runner.group_empty(pid))
    assert "owned" not in log.read_text()
