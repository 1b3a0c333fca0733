"""The pool: one engine worker per base model, shared by the base and by every LoRA model tuned from it.

A worker is started by the first request that needs it, found again after a restart of the server, and replaced when it dies.
The folder `workers/{base}` holds what is needed for that: `spec.json` (with the secret), `worker.json` and the log.
"""

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tunewright.clock import mono_s
from tunewright.deployments.ports import Done, Generate, Prove, TokenText, WorkerProcess, WorkerSpec
from tunewright.deployments.worker_client import WorkerClient, WorkerGone
from tunewright.errors import InvalidRequest, Unavailable
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.jobs.ports import Runner
from tunewright.models.records import Base, TunedModel
from tunewright.rendering.canary import canaries
from tunewright.rendering.renderer import renderer_of
from tunewright.settings import HomeFolder, Settings

log = structlog.get_logger()

_WORKER_MODULE = "tunewright.engines.worker"
_MAX_BACKOFF_S = 30.0


class _Worker(msgspec.Struct, frozen=True):
    process: WorkerProcess
    client: WorkerClient


class Pool:
    """Owns all engine workers of this server. Thread-safe; the `async` methods may run on any event loop."""

    def __init__(self, home: HomeFolder, settings: Settings, runner: Runner) -> None:
        self._home = home
        self._settings = settings
        self._runner = runner
        self._workers: dict[str, _Worker] = {}
        self._starting: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._failures: dict[str, tuple[int, float]] = {}
        """Base -> (starts that failed in a row, monotonic second before which no other is tried)."""
        self._stopping = False

    # -- what others call ---------------------------------------------------------------------------------------------

    async def generate(
        self, base: Base, tuned: TunedModel | None, request: Generate
    ) -> AsyncGenerator[TokenText | Done, None]:
        """The answer piece by piece. A worker that dies before the first piece costs the caller nothing but time.

        Raises Unavailable (`engine_not_ready`, `engine_lost`, `engine_overloaded`) or what the engine refuses.
        """
        if tuned is not None:
            request = msgspec.structs.replace(
                request,
                adapter_id=tuned.id,
                adapter_path=str(self._home.adapters / (tuned.adapter_path or tuned.id)),
                adapter_sha256=tuned.adapter_sha256,
            )
        for last_try in (False, True):
            worker = self._workers.get(base.code) or await asyncio.to_thread(self.ensure, base)
            started = False
            try:
                async with aclosing(worker.client.generate(request)) as replies:
                    async for reply in replies:
                        started = True
                        yield reply
                return
            except WorkerGone:
                self._drop(base.code, worker)
                if started or last_try:
                    raise Unavailable("engine_lost", mark("The engine stopped while it answered; try again.")) from None

    def warm(self, base: Base) -> None:
        """Start the worker of `base` in the background, if it is not there."""

        def start() -> None:
            try:
                self.ensure(base)
            except Unavailable as error:
                log.warning("engine_warm_up_failed", base=base.code, code=error.code)

        threading.Thread(target=start, name=f"warm-{base.code}", daemon=True).start()

    def prove(self, base: Base, model: TunedModel) -> dict[str, Any]:
        """Load the adapter of `model` into the pool and measure its effect on the canary prompts (see jobs/ports.py)."""
        worker = self.ensure(base)
        request = Prove(
            secret="",
            adapter_id=model.id,
            adapter_path=str(self._home.adapters / (model.adapter_path or model.id)),
            adapter_sha256=model.adapter_sha256 or "",
            prompts=canaries(renderer_of(_path_of(base))),
        )
        try:
            proof = asyncio.run(worker.client.prove(request))
        except WorkerGone:
            self._drop(base.code, worker)
            raise Unavailable("engine_lost", mark("The engine stopped while it answered; try again.")) from None
        return msgspec.to_builtins(proof)

    def forget(self, model: TunedModel) -> None:
        """Drop a deleted model's adapter from its worker; no error if there is none."""
        worker = self._workers.get(model.base_code)
        if worker is None:
            return
        try:
            asyncio.run(worker.client.unload(model.id))
        except WorkerGone:
            self._drop(model.base_code, worker)

    def stop(self) -> None:
        """End all workers (SIGTERM, then SIGKILL after 5 s)."""
        self._stopping = True
        workers = list(self._workers.values())
        for worker in workers:
            self._runner.terminate(worker.process.pid)
        deadline = mono_s() + 5.0
        while mono_s() < deadline and any(self._alive(worker.process) for worker in workers):
            threading.Event().wait(0.05)
        for worker in workers:
            if self._alive(worker.process):
                self._runner.kill(worker.process.pid)
        self._workers.clear()

    def ensure(self, base: Base) -> _Worker:
        """The live worker of `base`, adopted or started if need be; blocks until it can answer."""
        with self._lock:
            starting = self._starting.setdefault(base.code, threading.Lock())
        with starting:
            worker = self._workers.get(base.code)
            if worker is not None and self._alive(worker.process):
                return worker
            self._respect_backoff(base)
            worker = self._adopt(base) or self._start(base)
            self._workers[base.code] = worker
            self._failures.pop(base.code, None)
            return worker

    # -- starting and finding -----------------------------------------------------------------------------------------

    def _spec(self, base: Base, secret: str) -> WorkerSpec:
        settings = self._settings
        return WorkerSpec(
            worker_id=f"pool-{base.code}",
            base_code=base.code,
            base_path=str(_path_of(base)),
            base_files=base.files,
            renderer_hash=renderer_of(_path_of(base)).hash,
            secret=secret,
            threads=settings.engine_threads,
            slots=settings.engine_slots,
            queue=settings.engine_queue,
            adapters=settings.engine_adapters,
            context_tokens=min(base.context_tokens, settings.engine_context_tokens),
            idle_exit_s=settings.engine_idle_exit_s,
        )

    def _adopt(self, base: Base) -> _Worker | None:
        """The worker that an earlier server started, if it lives and was started with what we would ask for now."""
        folder = self._home.workers / base.code
        try:
            process = msgspec.json.decode((folder / "worker.json").read_bytes(), type=WorkerProcess)
            spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=WorkerSpec)
        except (OSError, msgspec.MsgspecError):
            return None
        if not self._alive(process):
            return None
        client = WorkerClient(process.port, spec.secret)
        if spec == self._spec(base, spec.secret):
            try:
                asyncio.run(client.health())
                log.info("engine_adopted", base=base.code, pid=process.pid)
                return _Worker(process, client)
            except WorkerGone:
                pass
        self._runner.kill(process.pid)
        return None

    def _start(self, base: Base) -> _Worker:
        folder = self._home.workers / base.code
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "worker.json").unlink(missing_ok=True)
        spec = self._spec(base, secrets.token_hex(32))
        write_atomically(folder / "spec.json", msgspec.json.encode(spec))
        log_path = folder / "log.txt"
        log_path.unlink(missing_ok=True)
        pid = self._runner.start(_WORKER_MODULE, folder, log_path)
        begun = mono_s()
        process = self._wait_until_ready(folder, pid)
        if process is None:
            self._runner.kill(pid)
            failures, _ = self._failures.get(base.code, (0, 0.0))
            self._failures[base.code] = (failures + 1, mono_s() + min(2.0**failures, _MAX_BACKOFF_S))
            log.error("engine_start_failed", base=base.code, log=str(log_path), failures=failures + 1)
            raise _not_ready(base)
        log.info("engine_ready", base=base.code, pid=pid, seconds=round(mono_s() - begun, 2))
        return _Worker(process, WorkerClient(process.port, spec.secret))

    def _wait_until_ready(self, folder: Path, pid: int) -> WorkerProcess | None:
        deadline = mono_s() + self._settings.engine_start_limit_s
        ticks = self._runner.start_ticks(pid)
        while mono_s() < deadline and not self._stopping:
            try:
                return msgspec.json.decode((folder / "worker.json").read_bytes(), type=WorkerProcess)
            except FileNotFoundError:
                if ticks is None or not self._runner.alive(pid, ticks):
                    return None
                threading.Event().wait(0.05)
        return None

    def _respect_backoff(self, base: Base) -> None:
        _, not_before = self._failures.get(base.code, (0, 0.0))
        if self._stopping or mono_s() < not_before:
            raise _not_ready(base)

    def _alive(self, process: WorkerProcess) -> bool:
        return self._runner.alive(process.pid, process.start_ticks)

    def _drop(self, base_code: str, worker: _Worker) -> None:
        """Forget a worker that did not answer; a frozen one is killed so that its successor gets the memory."""
        with self._lock:
            if self._workers.get(base_code) is worker:
                del self._workers[base_code]
        if self._alive(worker.process):
            self._runner.kill(worker.process.pid)


def _path_of(base: Base) -> Path:
    if base.path is None:
        raise InvalidRequest(
            "model_not_pulled",
            mark('The weights of "{base}" are not on this machine; run: tunewright models pull {base}'),
            param="model",
            base=base.code,
        )
    return base.path


def _not_ready(base: Base) -> Unavailable:
    return Unavailable(
        "engine_not_ready", mark('The engine of "{base}" is not ready; try again in a moment.'), base=base.code
    )
