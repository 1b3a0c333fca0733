"""The trainer processes of this machine: start one, know whether it lives, make it end.

What is remembered here can be lost at any time: `trainer.json`, the list of processes and the fence file bring it back.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tunewright.clock import mono_s
from tunewright.files_on_disk import write_atomically
from tunewright.jobs.last_words import Death
from tunewright.jobs.ports import Runner
from tunewright.jobs.records import Job
from tunewright.jobs.spec import TrainerProcess, TrainingSpec

_APPEAR_S = 2.0
"""A process that an earlier server started just before its death shows itself within this time."""
_TAIL_BYTES = 32 * 1024


@dataclass
class _Watch:
    """What is known of the trainer of one attempt. Times are monotonic seconds."""

    attempt: int
    pid: int | None = None
    start_ticks: int | None = None
    since_s: float = field(default_factory=mono_s)
    heartbeat_ns: int = -1
    heartbeat_seen_s: float = field(default_factory=mono_s)
    asked_s: float | None = None
    """When it was asked to end, or found to be ending by itself."""
    killed: bool = False


class Trainers:
    """At most one live trainer for each job; `job.attempt` says which."""

    def __init__(
        self, jobs_folder: Path, runner: Runner, module: str, heartbeat_limit_s: float, subfolder: str = ""
    ) -> None:
        """`subfolder` of a job's folder is where they work; empty: in the job's folder itself."""
        self._folder = jobs_folder
        self._subfolder = subfolder
        self._runner = runner
        self._module = module
        self._heartbeat_limit_s = heartbeat_limit_s
        self._watches: dict[str, _Watch] = {}

    def folder(self, job: Job) -> Path:
        return self._folder / job.id / self._subfolder

    def journal(self, job: Job) -> Path:
        return self.folder(job) / f"journal-{job.attempt}.jsonl"

    def launch(self, job: Job, spec: TrainingSpec) -> None:
        """Start the trainer of `job.attempt`. No earlier one may be left (`end` said so). Raises OSError."""
        folder = self.folder(job)
        shutil.rmtree(folder / "result", ignore_errors=True)  # of an attempt that died before it said so
        self._fence(job, job.attempt)
        write_atomically(folder / "spec.json", msgspec.json.encode(spec))
        watch = _Watch(job.attempt)
        watch.pid = self._runner.start(self._module, folder, folder / f"log-{job.attempt}.txt")
        watch.start_ticks = self._runner.start_ticks(watch.pid)
        self._watches[job.id] = watch

    def known(self, job: Job) -> bool:
        """Whether any process of this attempt was ever seen by this server."""
        return self._watch(job).pid is not None

    def alive(self, job: Job) -> bool:
        """Whether the trainer of this attempt runs, or may be about to."""
        watch = self._watch(job)
        if watch.pid is None:
            return mono_s() - watch.since_s < _APPEAR_S
        return watch.start_ticks is not None and self._runner.alive(watch.pid, watch.start_ticks)

    def silent(self, job: Job) -> bool:
        """Whether the heartbeat of a live trainer has stood still for too long. Judged by the monotonic clock alone."""
        watch = self._watch(job)
        try:
            beat_ns = (self.folder(job) / "heartbeat").stat().st_mtime_ns
        except FileNotFoundError:
            beat_ns = -1
        if beat_ns != watch.heartbeat_ns:
            watch.heartbeat_ns = beat_ns
            watch.heartbeat_seen_s = mono_s()
        return mono_s() - watch.heartbeat_seen_s > self._heartbeat_limit_s

    def kill(self, job: Job) -> bool:
        """End the whole group at once. False if that was done before."""
        watch = self._watch(job)
        first = not watch.killed
        watch.killed = True
        if watch.pid is not None and not self._group_gone(watch, watch.pid):
            self._runner.kill(watch.pid)
        return first

    def end(self, job: Job, grace_s: float, *, ask: bool = True) -> bool:
        """True once no process of the job is left. Call again until then.

        Asks politely first (unless `ask` is False: it is ending by itself); kills the group `grace_s` after that.
        """
        watch = self._watch(job)
        if watch.pid is None:
            if mono_s() - watch.since_s < _APPEAR_S:
                return False
            self._fence(job, job.attempt + 1)
            return True
        if self._group_gone(watch, watch.pid):
            return True
        if watch.asked_s is None:
            watch.asked_s = mono_s()
            if ask:
                self._runner.terminate(watch.pid)
        if mono_s() - watch.asked_s >= grace_s:
            self._runner.kill(watch.pid)
        return False

    def memory_bytes(self, job: Job) -> int:
        """What the trainer and its children hold in memory now; 0 if there is none."""
        watch = self._watch(job)
        return 0 if watch.pid is None else self._runner.memory_bytes(watch.pid)

    def forget_others(self, job_ids: set[str]) -> None:
        """Keep what is known of these jobs only."""
        self._watches = {job_id: watch for job_id, watch in self._watches.items() if job_id in job_ids}

    def death(self, job: Job) -> Death:
        """What is known of the end of a trainer that is gone: its last lines, its exit code, whether we or the kernel killed
        it."""
        watch = self._watch(job)
        text = _tail(self.folder(job) / f"log-{job.attempt}.txt")
        if watch.killed or watch.pid is None:
            return Death(text, silent=watch.killed)
        return Death(text, self._runner.exit_code(watch.pid), starved=self._runner.died_of_memory(watch.pid))

    def _watch(self, job: Job) -> _Watch:
        watch = self._watches.get(job.id)
        if watch is None or watch.attempt != job.attempt:
            watch = self._watches[job.id] = _Watch(job.attempt)
        if watch.pid is None and job.attempt > 0:
            self._look(job, watch)
        return watch

    def _look(self, job: Job, watch: _Watch) -> None:
        """Find the trainer that an earlier server started."""
        try:
            process = msgspec.json.decode((self.folder(job) / "trainer.json").read_bytes(), type=TrainerProcess)
        except (FileNotFoundError, msgspec.DecodeError):
            process = None
        if process is not None and process.attempt == job.attempt:
            watch.pid, watch.start_ticks = process.pid, process.start_ticks
            return
        for pid in self._runner.find(self._module, self.folder(job)):
            watch.pid, watch.start_ticks = pid, self._runner.start_ticks(pid)

    def _group_gone(self, watch: _Watch, pid: int) -> bool:
        ticks = self._runner.start_ticks(pid)
        if ticks is not None and ticks != watch.start_ticks:
            return True  # the number is another process's by now, which can only be once the group was empty
        return self._runner.group_empty(pid)

    def _fence(self, job: Job, attempt: int) -> None:
        self.folder(job).mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(self.folder(job) / "attempt", str(attempt).encode())


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
