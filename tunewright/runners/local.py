"""Workers as processes of this machine, found again through /proc."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tunewright.worker_environment import LARGE_PAGES, worker_environment

_PROC = Path("/proc")
_CHILDREN_REMEMBERED = 64
_ENGINES = "tunewright.engines."
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _Stat(NamedTuple):
    """What is used of /proc/{pid}/stat."""

    pid: int
    dead: bool
    group: int
    session: int
    start_ticks: int


class LocalRunner:
    """Implements `jobs.ports.Runner`. Thread-safe as far as the callers use it: one pid is one caller's."""

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._memory_kills_before: dict[int, int] = {}
        self._memory_kills_at_start = _memory_kills()

    def start(self, module: str, work_folder: Path, log: Path) -> int:
        """Raises OSError if the machine can't start a process now."""
        self.reap()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            child = subprocess.Popen(
                # -P: the folder a worker runs in is never a place to import from.
                [sys.executable, "-P", "-m", module, str(work_folder)],
                cwd=work_folder,
                env=worker_environment() | (LARGE_PAGES if module.startswith(_ENGINES) else {}),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
                umask=0o077,
            )
        finally:
            os.close(descriptor)
        self._children[child.pid] = child
        self._memory_kills_before[child.pid] = _memory_kills()
        return child.pid

    def alive(self, pid: int, start_ticks: int) -> bool:
        alive = self.start_ticks(pid) == start_ticks
        self._reap(pid)
        return alive

    def start_ticks(self, pid: int) -> int | None:
        stat = _stat(pid)
        return None if stat is None or stat.dead else stat.start_ticks

    def find(self, module: str, work_folder: Path) -> list[int]:
        ending = ["-m", module, str(work_folder)]
        return sorted({stat.session for stat in _live_processes() if _arguments(stat.pid)[-3:] == ending})

    def exit_code(self, pid: int) -> int | None:
        child = self._children.get(pid)
        return None if child is None else child.returncode

    def died_of_memory(self, pid: int) -> bool:
        child = self._children.get(pid)
        if child is not None and child.returncode not in (None, -signal.SIGKILL):
            return False
        return _memory_kills() > self._memory_kills_before.get(pid, self._memory_kills_at_start)

    def memory_bytes(self, pid: int) -> int:
        return sum(_resident_bytes(stat.pid) for stat in _members(pid))

    def terminate(self, pid: int) -> None:
        _signal_group(pid, signal.SIGTERM)

    def kill(self, pid: int) -> None:
        _signal_group(pid, signal.SIGKILL)

    def group_empty(self, pid: int) -> bool:
        empty = not any(_members(pid))
        self._reap(pid)  # after the look, which takes zombies for what they are
        return empty

    def reap(self) -> None:
        """Collect children that have ended, so that none stays a zombie. Done with each start too."""
        for pid in list(self._children):
            self._reap(pid)
        ended = [pid for pid, child in self._children.items() if child.returncode is not None]
        for pid in ended[:-_CHILDREN_REMEMBERED]:
            del self._children[pid], self._memory_kills_before[pid]

    def _reap(self, pid: int) -> None:
        child = self._children.get(pid)
        if child is not None and child.returncode is None:
            child.poll()


def _signal_group(leader: int, number: signal.Signals) -> None:
    """The group at once, then stragglers of the session that made groups of their own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)
    for stat in _members(leader):
        if stat.group != leader:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(stat.pid, number)


def _members(leader: int) -> Iterator[_Stat]:
    return (stat for stat in _live_processes() if leader in (stat.group, stat.session))


def _live_processes() -> Iterator[_Stat]:
    for entry in os.listdir(_PROC):
        if entry.isdecimal():
            stat = _stat(int(entry))
            if stat is not None and not stat.dead:
                yield stat


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:  # gone between listing and reading
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return _Stat(
        pid=pid,
        dead=fields[0] in "ZXx",
        group=int(fields[2]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
    )


def _resident_bytes(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):  # gone, or a zombie
        return 0


def _arguments(pid: int) -> list[str]:
    try:
        data = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(part) for part in data.split(b"\0")[:-1]]


def _memory_kills(root: Path = Path("/")) -> int:
    """Processes killed by the kernel for want of memory: of our control group, or where it does not count them, on the whole
    machine since boot."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):  # the unified hierarchy; trainers are in the group of the server
                count = _count_of("oom_kill", root / "sys/fs/cgroup" / line[len("0::/") :] / "memory.events")
                if count is not None:
                    return count
    return _count_of("oom_kill", root / "proc/vmstat") or 0


def _count_of(wanted: str, path: Path) -> int | None:
    with suppress(OSError), path.open() as stream:
        for line in stream:
            name, _, count = line.partition(" ")
            if name == wanted:
                return int(count)
    return None
