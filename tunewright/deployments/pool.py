"""The pool: one engine worker per base model, shared by the base and by every LoRA model tuned from it.

A worker is started by the first request that needs it, found again after a restart of the server, and replaced when it dies.
A keeper thread asks each one from time to time how it is: that keeps those that outlived an earlier server from ending
themselves, and tells the frozen from the busy.
The process lives in the folder `workers/{base}` (see `workers.py`).
"""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tunewright.clock import mono_s
from tunewright.deployments.attempts import attempts
from tunewright.deployments.full_models import FullOrder, prove_full
from tunewright.deployments.ports import Done, Embed, Generate, Prove, State, TokenText, Vector, WorkerSpec
from tunewright.deployments.quarantine import Quarantine
from tunewright.deployments.worker_client import WorkerGone, WorkerSlow
from tunewright.deployments.workers import (
    StartFailed,
    Worker,
    Workers,
    asks_for,
    base_spec,
    engine_busy,
    engine_lost,
    engine_overloaded,
    states_of,
    with_adapter,
)
from tunewright.errors import InvalidRequest, TunewrightError, Unavailable
from tunewright.i18n import mark
from tunewright.jobs.ports import Runner
from tunewright.models.file_lock import held
from tunewright.models.records import FULL, Base, TunedModel
from tunewright.rendering.canary import canaries
from tunewright.rendering.renderer import renderer_of
from tunewright.settings import HomeFolder, Settings

log = structlog.get_logger()

_MAX_BACKOFF_S = 30.0
_PING_EVERY_S = 2.0


class Pool:
    """Owns all engine workers of this server. Thread-safe; the `async` methods may run on any event loop."""

    def __init__(self, home: HomeFolder, settings: Settings, runner: Runner, *, shared: bool = False) -> None:
        """`shared`: other servers of the home may use the same workers."""
        self._home = home
        self._shared = shared
        self._settings = settings
        self._runner = runner
        self._workers: dict[str, Worker] = {}
        self._starting: dict[str, Future[Worker]] = {}
        self._lock = threading.Lock()
        self._under_way: Counter[str] = Counter()
        """Base -> generations that its worker has or is about to get."""
        self._quarantine = Quarantine(settings.engine_silence_limit_s + _PING_EVERY_S)
        self._failures: dict[str, tuple[int, float]] = {}
        """Base -> (starts that failed in a row, monotonic second before which no other is tried)."""
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None
        self._processes = Workers(runner, settings, self._stopping)

    # -- what others call ---------------------------------------------------------------------------------------------

    async def generate(
        self, base: Base, tuned: TunedModel | None, request: Generate
    ) -> AsyncGenerator[TokenText | Done, None]:
        """The answer piece by piece. A worker that dies before the first piece costs the caller nothing but time.

        Raises Unavailable (`engine_not_ready`, `engine_lost`, `engine_busy`, `engine_overloaded`), TunewrightError
        (`request_quarantined`) for a request that has killed two workers, or what the engine refuses.
        """
        request = with_adapter(request, self._home, tuned)
        limit_s = None if request.priority else self._settings.first_token_limit_s or None
        with self._counted(base.code):
            tries = attempts(self._quarantine, base.code, request, limit_s, lambda: self._place(base))
            async with aclosing(tries) as replies:
                async for reply in replies:
                    yield reply

    async def embed(self, base: Base, request: Embed) -> AsyncGenerator[Vector | Done, None]:
        """The vectors of texts as they come. Raises Unavailable as `generate` does, or what the engine refuses."""
        with self._counted(base.code):
            for last_try in (False, True):
                started = False
                try:
                    async with self._place(base) as worker, aclosing(worker.client.embed(request)) as replies:
                        async for reply in replies:
                            started = True
                            yield reply
                    return
                except WorkerSlow:
                    raise engine_busy() from None
                except WorkerGone:
                    if started or last_try:
                        raise engine_lost() from None

    def check_room(self, base: Base) -> None:
        """Raises Unavailable (`engine_overloaded`) if the worker of `base` would refuse one more request."""
        if self._under_way[base.code] >= self._settings.engine_slots + self._settings.engine_queue:
            raise engine_overloaded()

    @contextmanager
    def _counted(self, base_code: str) -> Iterator[None]:
        with self._lock:
            self._under_way[base_code] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[base_code] -= 1

    @asynccontextmanager
    async def _place(self, base: Base) -> AsyncIterator[Worker]:
        worker = self._workers.get(base.code) or await asyncio.wrap_future(self._ready(base))
        try:
            yield worker
        except WorkerGone:
            await self._ask(base.code, worker)
            raise

    def warm(self, base: Base) -> None:
        """Start the worker of `base` in the background, if it is not there. Whoever needs it learns how that went."""
        self._ready(base)

    def memory_bytes(self) -> int:
        """What the workers hold in memory now."""
        workers = list(self._workers.values())
        total = sum(map(self._processes.memory_bytes, workers))
        if self._shared:
            known = {worker.process.pid for worker in workers}
            total += self._processes.memory_in(self._home.workers.glob("*/worker.json"), known)
        return total

    async def states(self) -> list[State]:
        """What the workers say of themselves now; one that does not answer within a second is left out."""
        return await states_of(list(self._workers.values()))

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
            raise engine_busy() from None
        except WorkerGone:
            asyncio.run(self._ask(base.code, worker))
            raise engine_lost() from None
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

    def stop(self, *, others_stay: bool = False) -> None:
        """End all workers of this home, also those that an earlier server left (SIGTERM, then SIGKILL after 5 s); none if
        other servers stay, which use them.

        Takes no more than that. Safe to call twice.
        """
        self._stopping.set()
        if not others_stay:
            self._processes.end_in(self._home.workers.iterdir())
        if self._keeper is not None:
            self._keeper.join(1.0)
        self._workers.clear()

    def ensure(self, base: Base) -> Worker:
        """The live worker of `base`, adopted or started if need be; blocks until it can answer.

        Raises Unavailable (`engine_not_ready`).
        """
        return self._ready(base).result()

    # -- starting and finding -----------------------------------------------------------------------------------------

    def _ready(self, base: Base) -> Future[Worker]:
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

    def _fulfil(self, future: Future[Worker], base: Base) -> None:
        try:
            worker = self._workers.get(base.code)
            if worker is None or not self._processes.alive(worker):
                if worker is not None:
                    self._quarantine.died(worker.process.pid)
                self._respect_backoff(base)
                with self._alone_at(base):
                    worker = self._adopt(base) or self._start(base)
                self._workers[base.code] = worker
                self._failures.pop(base.code, None)
            future.set_result(worker)
        except BaseException as error:  # handed to those who wait
            future.set_exception(error)

    @contextmanager
    def _alone_at(self, base: Base) -> Iterator[None]:
        """While no other server of the home looks for a worker of `base`, or starts one."""
        if not self._shared:
            yield
            return
        with held(self._home.temporary / f"start-{base.code}.lock"):
            yield

    def _folders(self, base: Base) -> list[Path]:
        """Where a worker of `base` may be. There are two while servers of one home ask for different ones, being restarted
        one after another with new settings."""
        own = self._home.workers / base.code
        return [own, own.with_name(f"{base.code}@2")] if self._shared else [own]

    def _adopt(self, base: Base) -> Worker | None:
        """The worker that another server started, if it answers and was started with what we would ask for now."""
        for folder in self._folders(base):
            found = self._processes.find(folder)
            if found is not None and asks_for(found[1], self._spec(base)):
                log.info("engine_adopted", base=base.code, pid=found[0].process.pid)
                return found[0]
        return None

    def _start(self, base: Base) -> Worker:
        folders = self._folders(base)
        folder = next((each for each in folders if self._processes.find(each) is None), folders[0])
        try:
            return self._processes.start(folder, self._spec(base))
        except StartFailed:
            failures, _ = self._failures.get(base.code, (0, 0.0))
            self._failures[base.code] = (failures + 1, mono_s() + min(2.0**failures, _MAX_BACKOFF_S))
            log.error("engine_start_failed", base=base.code, log=str(folder / "log.txt"), failures=failures + 1)
            raise _not_ready(base) from None

    def _spec(self, base: Base) -> WorkerSpec:
        return base_spec(_pulled(base), self._settings, f"pool-{base.code}")

    def _respect_backoff(self, base: Base) -> None:
        _, not_before = self._failures.get(base.code, (0, 0.0))
        if self._stopping.is_set() or mono_s() < not_before:
            raise _not_ready(base)

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

    async def _ask(self, base_code: str, worker: Worker) -> None:
        """Drop a worker that has died, is silent or is stuck in a step; it is killed, which ends what it had begun."""
        if self._workers.get(base_code) is not worker:
            return
        trouble = await self._processes.trouble(worker)
        if trouble is None:
            return
        with self._lock:
            if self._workers.get(base_code) is not worker:
                return
            if not self._stopping.is_set():  # first of all: whoever sees it gone boards the next one
                self._quarantine.died(worker.process.pid, trouble.running)
                log.error("engine_lost", base=base_code, pid=worker.process.pid, reason=trouble.reason)
            del self._workers[base_code]
        self._processes.kill(worker)


def _pulled(base: Base) -> Base:
    if base.path is None:
        raise InvalidRequest(
            "model_not_pulled",
            mark('The weights of "{base}" are not on this machine; run: tunewright models pull {base}'),
            param="model",
            base=base.code,
        )
    return base


def _path_of(base: Base) -> Path:
    return Path(_pulled(base).path or "")


def _not_ready(base: Base) -> Unavailable:
    return Unavailable(
        "engine_not_ready", mark('The engine of "{base}" is not ready; try again in a moment.'), base=base.code
    )
