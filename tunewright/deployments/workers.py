"""Engine workers as processes: started in a folder, found again there after a restart of the server, asked how they are.

The pool and private instances share this. A worker's folder holds `spec.json` (with the secret), `worker.json`, which the
worker writes once it can answer, and the log of its last start.
"""

import asyncio
import secrets
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec
import structlog

from tunewright.clock import mono_s
from tunewright.deployments.ports import Generate, State, WorkerProcess, WorkerSpec
from tunewright.deployments.worker_client import WorkerClient, WorkerGone, WorkerSlow
from tunewright.errors import TunewrightError, Unavailable
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.jobs.ports import Runner
from tunewright.models.records import Base, TunedModel
from tunewright.rendering.renderer import renderer_of
from tunewright.settings import HomeFolder, Settings

log = structlog.get_logger()

_MODULE = "tunewright.engines.worker"
_END_S = 5.0
"""From SIGTERM to SIGKILL."""
_REAP_S = 2.0
_STATE_LIMIT_S = 1.0
MISCONFIGURED = 78
"""Exit code of a worker that the operator must help."""


class Worker(msgspec.Struct, frozen=True):
    """A process that could answer when this was made."""

    process: WorkerProcess
    client: WorkerClient


class Trouble(msgspec.Struct, frozen=True):
    """`died`; `silent`: it does not say within the limit how it is; or `stuck` in one step, with the fingerprints of the
    generations that it is `running`."""

    reason: str
    running: list[str] | None = None


class StartFailed(Exception):
    """The process could not answer in time (`slow`), or ended before, with an exit code where that is known."""

    def __init__(self, *, slow: bool, exit_code: int | None) -> None:
        super().__init__(slow, exit_code)
        self.slow = slow
        self.exit_code = exit_code


class Workers:
    """Thread-safe as long as one folder is one caller's. `stopping` ends every wait."""

    def __init__(self, runner: Runner, settings: Settings, stopping: threading.Event) -> None:
        self._runner = runner
        self._settings = settings
        self._stopping = stopping

    def alive(self, worker: Worker) -> bool:
        """Whether that very process still runs."""
        return self._runner.alive(worker.process.pid, worker.process.start_ticks)

    def memory_bytes(self, worker: Worker) -> int:
        """What it holds in memory now."""
        return self._runner.memory_bytes(worker.process.pid)

    def memory_in(self, notes: Iterable[Path], known: Collection[int]) -> int:
        """What the live workers that these `worker.json` tell of hold in memory, but for those whose pid is `known`."""
        total = 0
        for note in notes:
            try:
                process = msgspec.json.decode(note.read_bytes(), type=WorkerProcess)
            except (OSError, msgspec.MsgspecError):
                continue
            if process.pid not in known and self._runner.alive(process.pid, process.start_ticks):
                total += self._runner.memory_bytes(process.pid)
        return total

    def kill(self, worker: Worker) -> None:
        """End it at once; no error if it is gone."""
        if self.alive(worker):
            self._runner.kill(worker.process.pid)

    def kill_in(self, folder: Path) -> None:
        """End whatever runs in a folder, whoever started it."""
        for pid in self._runner.find(_MODULE, folder):
            self._runner.kill(pid)

    def find(self, folder: Path) -> tuple[Worker, WorkerSpec] | None:
        """The worker that was started in this folder, by this server or an earlier one, if it lives and answers."""
        try:
            process = msgspec.json.decode((folder / "worker.json").read_bytes(), type=WorkerProcess)
            spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=WorkerSpec)
        except (OSError, msgspec.MsgspecError):
            return None
        worker = Worker(process, WorkerClient(process.port, spec.secret))
        if not self.alive(worker):
            return None
        try:
            asyncio.run(worker.client.health())
        except (WorkerGone, WorkerSlow, TunewrightError):
            return None
        return worker, spec

    def start(self, folder: Path, spec: WorkerSpec) -> Worker:
        """A new worker with a new secret; blocks until it can answer. Whatever runs in the folder is ended first.

        Raises StartFailed, OSError.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.kill_in(folder)  # not wanted any more, or not ready yet when its server died
        (folder / "worker.json").unlink(missing_ok=True)
        spec = msgspec.structs.replace(spec, secret=secrets.token_hex(32))
        write_atomically(folder / "spec.json", msgspec.json.encode(spec))
        log_path = folder / "log.txt"
        log_path.unlink(missing_ok=True)
        pid = self._runner.start(_MODULE, folder, log_path)
        begun_s = mono_s()
        process = self._wait_until_ready(folder, pid)
        if process is None:
            slow = self._runner.start_ticks(pid) is not None
            self._runner.kill(pid)
            raise StartFailed(slow=slow, exit_code=None if slow else self._exit_code(pid))
        log.info("engine_ready", worker=spec.worker_id, pid=pid, seconds=round(mono_s() - begun_s, 2))
        return Worker(process, WorkerClient(process.port, spec.secret))

    def _wait_until_ready(self, folder: Path, pid: int) -> WorkerProcess | None:
        deadline_s = mono_s() + self._settings.engine_start_limit_s
        ticks = self._runner.start_ticks(pid)
        while mono_s() < deadline_s and not self._stopping.is_set():
            try:
                return msgspec.json.decode((folder / "worker.json").read_bytes(), type=WorkerProcess)
            except FileNotFoundError:
                if ticks is None or not self._runner.alive(pid, ticks):
                    return None
                self._stopping.wait(0.05)
        return None

    def _exit_code(self, pid: int) -> int | None:
        """Known once the last thread of the process is gone, which is a moment after the process is."""
        deadline_s = mono_s() + _REAP_S
        while (code := self._runner.exit_code(pid)) is None and mono_s() < deadline_s:
            self._stopping.wait(0.02)
            self._runner.group_empty(pid)  # which reaps
        return code

    async def trouble(self, worker: Worker) -> Trouble | None:
        """What is wrong with a worker. None if it answers and gets on, or could not be asked."""
        if not self.alive(worker):
            return Trouble("died")
        asked_s, limit_s = mono_s(), self._settings.engine_silence_limit_s
        try:
            state = await worker.client.health(limit_s)
        except WorkerSlow:
            return Trouble("silent") if mono_s() - asked_s >= limit_s else None
        except (WorkerGone, TunewrightError):
            return Trouble("died")
        return None if state.step_s < self._settings.engine_step_limit_s else Trouble("stuck", state.running)

    def calls(self, worker: Worker) -> int:
        """How many calls it is at, of whomever; 1 if it does not say so in time. Blocks."""
        try:
            state = asyncio.run(worker.client.health(_STATE_LIMIT_S))
        except (WorkerGone, TunewrightError):
            return 0
        except WorkerSlow:
            return 1
        return state.active + state.waiting

    def end_in(self, folders: Iterable[Path]) -> None:
        """End everything that runs in these folders: SIGTERM, and SIGKILL after 5 s. Takes no more than that."""
        pids = {pid for folder in folders for pid in self._runner.find(_MODULE, folder)}
        for pid in pids:
            self._runner.terminate(pid)
        deadline_s = mono_s() + _END_S
        while (pids := {pid for pid in pids if not self._runner.group_empty(pid)}) and mono_s() < deadline_s:
            threading.Event().wait(0.05)
        for pid in pids:
            self._runner.kill(pid)


async def states_of(workers: Iterable[Worker]) -> list[State]:
    """What each says of itself now; who does not answer within a second is left out."""
    asked = [worker.client.health(_STATE_LIMIT_S) for worker in workers]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, State)]


def base_spec(base: Base, settings: Settings, worker_id: str) -> WorkerSpec:
    """What a worker that serves `base` is started with; its secret is given at the start. The base's weights are here."""
    path = Path(base.path or "")
    return WorkerSpec(
        worker_id=worker_id,
        base_code=base.code,
        base_path=str(path),
        base_files=base.files,
        renderer_hash=renderer_of(path).hash,
        secret="",
        threads=settings.engine_threads,
        precision=settings.engine_precision,
        weights=settings.engine_weights,
        slots=settings.engine_slots,
        queue=settings.engine_queue,
        adapters=settings.engine_adapters,
        context_tokens=min(base.context_tokens, settings.engine_context_tokens),
        idle_exit_s=settings.engine_idle_exit_s,
        store_path=str(HomeFolder(settings.home).adapters),
        references_path=str(HomeFolder(settings.home).references),
        engine=settings.engine,
        python=settings.vllm_python and str(settings.vllm_python),
    )


def asks_for(spec: WorkerSpec, wanted: WorkerSpec) -> bool:
    """Whether a worker that was started with `spec` is what `wanted` asks for; each start has a secret of its own."""
    return msgspec.structs.replace(spec, secret=wanted.secret) == wanted


def with_adapter(request: Generate, home: HomeFolder, tuned: TunedModel | None) -> Generate:
    """`request` for the model `tuned` of the worker's base; None is the base itself."""
    if tuned is None:
        return request
    return msgspec.structs.replace(
        request,
        adapter_id=tuned.id,
        adapter_path=str(home.adapters / (tuned.adapter_path or tuned.id)),
        adapter_sha256=tuned.adapter_sha256,
    )


def engine_lost() -> Unavailable:
    """For an answer that ended before its end."""
    return Unavailable("engine_lost", mark("The engine stopped while it answered; try again."))


def engine_overloaded() -> Unavailable:
    """For an engine whose queue is full."""
    return Unavailable("engine_overloaded", mark("The engine has too many requests waiting; try again soon."))


def engine_busy() -> Unavailable:
    """For an engine that could not be asked in time."""
    return Unavailable("engine_busy", mark("The engine did not answer in time; try again in a moment."))
