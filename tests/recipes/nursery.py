"""Trainer processes without the wait for their imports: a process that has the libraries forks one for each job.

Everything else of a trainer is real: its own session, its log, its signals, its exit code. The process never computes
anything itself, so that what it forks starts like a fresh interpreter.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any


class Nursery:
    """The parent of all trainers of a test session; `start` it once."""

    def __init__(self) -> None:
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.recipes.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | threads,
            cwd=Path(__file__).parents[2],
        )
        self._news = threading.Condition()
        self._born: list[int] = []
        self._ended: dict[int, int] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, folder: Path, log: Path, death: tuple[str, int] | None = None) -> "Child":
        """Fork a trainer for the work folder, to die by `death`: the name of a function of `deaths.py` and its argument."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(folder), str(log), death]) + "\n")
        with self._news:
            assert self._news.wait_for(lambda: self._born, 120), "the libraries could not be imported"
            return Child(self._born.pop(), self)

    def returncode(self, pid: int, timeout_s: float) -> int | None:
        """Of a trainer; None if it lives on. Negative: the signal that killed it."""
        with self._news:
            self._news.wait_for(lambda: pid in self._ended, timeout_s)
            return self._ended.get(pid)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            pid, code = json.loads(line)
            with self._news:
                if code is None:
                    self._born.append(pid)
                else:
                    self._ended[pid] = code
                self._news.notify_all()


class Child:
    """As much of `subprocess.Popen` as tests of trainers use."""

    def __init__(self, pid: int, nursery: Nursery) -> None:
        self.pid = pid
        self._nursery = nursery

    def poll(self) -> int | None:
        return self._nursery.returncode(self.pid, 0)

    def wait(self, timeout_s: float) -> int:
        code = self._nursery.returncode(self.pid, timeout_s)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired("trainer", timeout_s)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _become_trainer(folder: str, log: str, death: list[Any] | None, woken: int) -> None:
    from tests.recipes import deaths
    from tunewright.recipes import run

    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.close(woken)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    if death is not None:
        getattr(deaths, death[0])(death[1])
    try:
        code = run.main([folder])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # taking the interpreter down costs as much as a short training


def _warm(folder: str) -> None:
    """Have what the libraries make when a first model is loaded: a second of processor time for each trainer else."""
    import torch

    from tunewright.recipes.base_model import load_model

    base = json.loads((Path(folder) / "spec.json").read_bytes())["base_path"]
    load_model(Path(base), torch.float32)


def _tell(pid: int, code: int | None) -> None:
    os.write(1, (json.dumps([pid, code]) + "\n").encode())


def main() -> None:
    """Lines of [folder, log, death] come in; [pid, null] and [pid, exit code] go out."""
    import tunewright.recipes.preference  # noqa: F401

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    warm = False
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                _tell(pid, os.waitstatus_to_exitcode(status))
        if 0 in ready:
            line = sys.stdin.readline()
            if not line:
                return
            if not warm:
                warm = True
                _warm(json.loads(line)[0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # libraries may have threads that wait
                pid = os.fork()
            if pid == 0:
                folder, log, death = json.loads(line)
                _become_trainer(folder, log, death, woken)
            _tell(pid, None)


if __name__ == "__main__":
    main()
