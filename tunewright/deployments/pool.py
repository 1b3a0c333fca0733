"""The pool: one engine worker per base model, shared by the base and by every LoRA model tuned from it.

A worker is started by the first request that needs it, found again after a restart of the server, and replaced when it dies.
A keeper thread asks each one from time to time how it is: that keeps those that outlived an earlier server from ending
themselves, and tells the frozen from the busy.
The folder `workers/{base}` holds what is needed for that: `spec.json` (with the secret), `worker.json` and the log.
"""

import asyncio
import secrets
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tunewright.clock import mono_s
from tunewright.deployments.full_models import FullOrder, prove_full
from tunewright.deployments.ports import (
    Done,
    Embed,
    Generate,
    Prove,
    State,
    TokenText,
    Vector,
    WorkerProcess,
    WorkerSpec,
)
from tunewright.deployments.quarantine import Passenger, Quarantine, fingerprint_of
from tunewright.deployments.worker_client import WorkerClient, WorkerGone, WorkerSlow
from tunewright.errors import InvalidRequest, TunewrightError, Unavailable
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.jobs.ports import Runner
from tunewright.models.records import FULL, Base, TunedModel
from tunewright.rendering.canary import canaries
from tunewright.rendering.renderer import renderer_of
from tunewright.settings import HomeFolder, Settings

log = structlog.get_logger()

_WORKER_MODULE = "tunewright.engines.worker"
_MAX_BACKOFF_S = 30.0
_PING_EVERY_S = 2.0
_STATE_LIMIT_S = 1.0


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
        self._starting: dict[str, Future[_Worker]] = {}
        self._lock = threading.Lock()
        self._under_way: Counter[str] = Counter()
        """Base -> generations that its worker has or is about to get."""
        self._quarantine = Quarantine(settings.engine_silence_limit_s + _PING_EVERY_S)
        self._failures: dict[str, tuple[int, float]] = {}
        """Base -> (starts that failed in a row, monotonic second before which no other is tried)."""
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None

    # -- what others call ---------------------------------------------------------------------------------------------

    async def generate(
        self, base: Base, tuned: TunedModel | None, request: Generate
    ) -> AsyncGenerator[TokenText | Done, None]:
        """The answer piece by piece. A worker that dies before the first piece costs the caller nothing but time.

        Raises Unavailable (`engine_not_ready`, `engine_lost`, `engine_busy`, `engine_overloaded`), TunewrightError
        (`request_quarantined`) for a request that has killed two workers, or what the engine refuses.
        """
        if tuned is not None:
            request = msgspec.structs.replace(
                request,
                adapter_id=tuned.id,
                adapter_path=str(self._home.adapters / (tuned.adapter_path or tuned.id)),
                adapter_sha256=tuned.adapter_sha256,
            )
        fingerprint = fingerprint_of(base.code, request)
        request = msgspec.structs.replace(request, fingerprint=fingerprint)
        with self._counted(base.code):
            async with aclosing(self._tries(base, request)) as replies:
                async for reply in replies:
                    yield reply

    async def embed(self, base: Base, request: Embed) -> AsyncGenerator[Vector | Done, None]:
        """The vectors of texts as they come. Raises Unavailable as `generate` does, or what the engine refuses."""
        with self._counted(base.code):
            for last_try in (False, True):
                worker = self._workers.get(base.code) or await asyncio.wrap_future(self._ready(base))
                started = False
                try:
                    async with aclosing(worker.client.embed(request)) as replies:
                        async for reply in replies:
                            started = True
                            yield reply
                    return
                except WorkerSlow:
                    raise _busy() from None
                except WorkerGone:
                    await self._ask(base.code, worker)
                    if started or last_try:
                        raise _lost() from None

    def check_room(self, base: Base) -> None:
        """Raises Unavailable (`engine_overloaded`) if the worker of `base` would refuse one more request."""
        if self._under_way[base.code] >= self._settings.engine_slots + self._settings.engine_queue:
            raise Unavailable("engine_overloaded", mark("The engine has too many requests waiting; try again soon."))

    @contextmanager
    def _counted(self, base_code: str) -> Iterator[None]:
        with self._lock:
            self._under_way[base_code] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[base_code] -= 1

    async def _tries(self, base: Base, request: Generate) -> AsyncGenerator[TokenText | Done, None]:
        limit_s = None if request.priority else self._settings.first_token_limit_s or None
        for last_try in (False, True):
            passenger = await self._board(base, request, limit_s)
            worker, started, answered = None, False, False
            try:
                worker = self._workers.get(base.code) or await asyncio.wrap_future(self._ready(base))
                passenger.worker = worker.process.pid
                async with aclosing(worker.client.generate(request, limit_s)) as replies:
                    async for reply in replies:
                        started = True
                        if isinstance(reply, TokenText):
                            passenger.n_tokens = reply.n_tokens
                            if passenger.suspect:
                                self._quarantine.progress(passenger)
                        else:
                            answered = True  # whoever has the last piece may not ask for another
                        yield reply
                return
            except TunewrightError:
                answered = True
                raise
            except WorkerSlow:
                raise _busy() from None
            except WorkerGone:
                if worker is not None:
                    await self._ask(base.code, worker)
                if started or last_try:
                    self._quarantine.check(request.fingerprint)
                    raise _lost() from None
            finally:
                self._quarantine.leave(passenger, answered=answered)

    async def _board(self, base: Base, request: Generate, limit_s: float | None) -> Passenger:
        try:
            async with asyncio.timeout(limit_s):
                return await self._quarantine.board(base.code, request.fingerprint)
        except TimeoutError:
            raise _busy() from None

    def warm(self, base: Base) -> None:
        """Start the worker of `base` in the background, if it is not there. Whoever needs it learns how that went."""
        self._ready(base)

    def memory_bytes(self) -> int:
        """What the workers hold in memory now."""
        return sum(self._runner.memory_bytes(worker.process.pid) for worker in list(self._workers.values()))

    async def states(self) -> list[State]:
        """What the workers say of themselves now; one that does not answer within a second is left out."""
        asked = (worker.client.health(_STATE_LIMIT_S) for worker in list(self._workers.values()))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, State)]

    def prove(self, base: Base, model: TunedModel) -> dict[str, Any]:
        """Load the adapter of `model` into the pool and measure its effect on the canary prompts (see jobs/ports.py).

        A model with weights of its own is loaded once for that, in a process of its own.
        """
        if model.kind == FULL:
            return self._prove_full(base, model)
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
        except WorkerSlow:
            raise _busy() from None
        except WorkerGone:
            asyncio.run(self._ask(base.code, worker))
            raise _lost() from None
        return msgspec.to_builtins(proof)

    def _prove_full(self, base: Base, model: TunedModel) -> dict[str, Any]:
        path = _path_of(base)
        order = FullOrder(
            base_path=str(path),
            base_files=base.files,
            model_path=str(self._home.adapters / (model.adapter_path or model.id)),
            manifest_sha256=model.adapter_sha256 or "",
            prompts=canaries(renderer_of(path)),
            threads=self._settings.engine_threads,
        )
        limit_s = 2 * self._settings.engine_start_limit_s  # two models are loaded
        proof = prove_full(self._runner, self._home.temporary / f"prove-{model.id}", order, limit_s, self._stopping)
        return msgspec.to_builtins(proof)

    def forget(self, model: TunedModel) -> None:
        """Drop a deleted model's adapter from its worker. Returns at once and never raises: it is only about memory, and
        an adapter that nobody can name any more goes with time anyway."""
        worker = self._workers.get(model.base_code)
        if worker is None:
            return

        def unload() -> None:
            try:
                asyncio.run(worker.client.unload(model.id))
            except (WorkerGone, WorkerSlow, TunewrightError) as error:
                log.warning("adapter_not_unloaded", model_id=model.id, error=type(error).__name__)

        threading.Thread(target=unload, name=f"forget-{model.id}", daemon=True).start()

    def start(self) -> None:
        """Begin to look after the workers."""
        self._keeper = threading.Thread(target=self._keep, name="engine-keeper", daemon=True)
        self._keeper.start()

    def stop(self) -> None:
        """End all workers of this home, also those that an earlier server left (SIGTERM, then SIGKILL after 5 s).

        Takes no more than that. Safe to call twice.
        """
        self._stopping.set()
        pids = {pid for folder in self._home.workers.iterdir() for pid in self._runner.find(_WORKER_MODULE, folder)}
        for pid in pids:
            self._runner.terminate(pid)
        deadline = mono_s() + 5.0
        while (pids := {pid for pid in pids if not self._runner.group_empty(pid)}) and mono_s() < deadline:
            threading.Event().wait(0.05)
        for pid in pids:
            self._runner.kill(pid)
        if self._keeper is not None:
            self._keeper.join(1.0)
        self._workers.clear()

    def ensure(self, base: Base) -> _Worker:
        """The live worker of `base`, adopted or started if need be; blocks until it can answer.

        Raises Unavailable (`engine_not_ready`).
        """
        return self._ready(base).result()

    # -- starting and finding -----------------------------------------------------------------------------------------

    def _ready(self, base: Base) -> Future[_Worker]:
        """What `ensure` returns, as a future. One start at a time for each base, in a thread of its own: however long it
        takes, those who wait for it occupy no thread that requests for other bases need."""
        with self._lock:
            future = self._starting.get(base.code)
            if future is None or future.done():
                future = self._starting[base.code] = Future()
                future.set_running_or_notify_cancel()  # from now on a caller who leaves can't cancel it for the others
                threading.Thread(
                    target=self._fulfil, args=(future, base), name=f"start-{base.code}", daemon=True
                ).start()
        return future

    def _fulfil(self, future: Future[_Worker], base: Base) -> None:
        try:
            worker = self._workers.get(base.code)
            if worker is None or not self._alive(worker.process):
                if worker is not None:
                    self._quarantine.died(worker.process.pid)
                self._respect_backoff(base)
                worker = self._adopt(base) or self._start(base)
                self._workers[base.code] = worker
                self._failures.pop(base.code, None)
            future.set_result(worker)
        except BaseException as error:  # handed to those who wait
            future.set_exception(error)

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
            precision=settings.engine_precision,
            weights=settings.engine_weights,
            slots=settings.engine_slots,
            queue=settings.engine_queue,
            adapters=settings.engine_adapters,
            context_tokens=min(base.context_tokens, settings.engine_context_tokens),
            idle_exit_s=settings.engine_idle_exit_s,
        )

    def _adopt(self, base: Base) -> _Worker | None:
        """The worker that an earlier server started, if it answers and was started with what we would ask for now."""
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
            except (WorkerGone, WorkerSlow):
                pass
        return None

    def _start(self, base: Base) -> _Worker:
        folder = self._home.workers / base.code
        folder.mkdir(mode=0o700, exist_ok=True)
        for pid in self._runner.find(_WORKER_MODULE, folder):  # not adopted, or not ready yet when its server died
            self._runner.kill(pid)
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
        while mono_s() < deadline and not self._stopping.is_set():
            try:
                return msgspec.json.decode((folder / "worker.json").read_bytes(), type=WorkerProcess)
            except FileNotFoundError:
                if ticks is None or not self._runner.alive(pid, ticks):
                    return None
                self._stopping.wait(0.05)
        return None

    def _respect_backoff(self, base: Base) -> None:
        _, not_before = self._failures.get(base.code, (0, 0.0))
        if self._stopping.is_set() or mono_s() < not_before:
            raise _not_ready(base)

    def _alive(self, process: WorkerProcess) -> bool:
        return self._runner.alive(process.pid, process.start_ticks)

    # -- looking after --------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        settings = self._settings
        pause_s = min(_PING_EVERY_S, settings.engine_silence_limit_s / 4, settings.engine_idle_exit_s / 4)
        while not self._stopping.wait(pause_s):
            try:
                asyncio.run(self._look_after_all())
            except Exception:
                log.exception("engine_keeper_failed")

    async def _look_after_all(self) -> None:
        workers = list(self._workers.items())
        await asyncio.gather(*(self._ask(base_code, worker) for base_code, worker in workers))

    async def _ask(self, base_code: str, worker: _Worker) -> None:
        """Drop a worker that has died, is silent or is stuck in a step; it is killed, which ends what it had begun."""
        if self._workers.get(base_code) is not worker:
            return
        reason, running = "died", None
        if self._alive(worker.process):
            asked_s, limit_s = mono_s(), self._settings.engine_silence_limit_s
            try:
                state = await worker.client.health(limit_s)
                if state.step_s < self._settings.engine_step_limit_s:
                    return
                reason, running = "stuck", state.running
            except WorkerSlow:
                if mono_s() - asked_s < limit_s:  # it could not be asked
                    return
                reason = "silent"
            except (WorkerGone, TunewrightError):
                pass
        with self._lock:
            if self._workers.get(base_code) is not worker:
                return
            del self._workers[base_code]
        if not self._stopping.is_set():
            self._quarantine.died(worker.process.pid, running)
            log.error("engine_lost", base=base_code, pid=worker.process.pid, reason=reason)
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


def _lost() -> Unavailable:
    return Unavailable("engine_lost", mark("The engine stopped while it answered; try again."))


def _busy() -> Unavailable:
    return Unavailable("engine_busy", mark("The engine did not answer in time; try again in a moment."))
