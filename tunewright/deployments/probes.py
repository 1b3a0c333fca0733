"""Asks every replica from time to time how it is: that tells the frozen from the busy, and keeps those that outlived an
earlier server from ending themselves."""

import asyncio
import threading
from collections.abc import Callable

import structlog

from tunewright.deployments.replicas import Replica
from tunewright.deployments.workers import Worker, Workers
from tunewright.settings import Settings

log = structlog.get_logger()

_LONGEST_PAUSE_S = 1.0
_LOOK_EVERY_S = 0.1


class Probes:
    """One task for each replica, so that a frozen one delays nobody's probe. `found` is called when one is in trouble."""

    def __init__(
        self,
        workers: Workers,
        settings: Settings,
        replicas: Callable[[], list[Replica]],
        stopping: threading.Event,
        found: Callable[[], None],
    ) -> None:
        self._workers = workers
        self._pause_s = min(_LONGEST_PAUSE_S, settings.engine_silence_limit_s / 8, settings.engine_idle_exit_s / 4)
        self._replicas = replicas
        self._stopping = stopping
        self._found = found

    def start(self) -> None:
        """Begin, on a thread of its own, until `stopping` is set."""
        threading.Thread(target=lambda: asyncio.run(self._run()), name="replica-probes", daemon=True).start()

    async def _run(self) -> None:
        tasks: dict[Worker, asyncio.Task[None]] = {}
        while not self._stopping.is_set():
            for replica in self._replicas():
                worker = replica.worker
                if worker is not None and worker not in tasks:
                    tasks[worker] = asyncio.create_task(self._watch(replica, worker))
            for worker in [worker for worker, task in tasks.items() if task.done()]:
                del tasks[worker]
            await asyncio.sleep(_LOOK_EVERY_S)
        for task in tasks.values():
            task.cancel()

    async def _watch(self, replica: Replica, worker: Worker) -> None:
        while replica.worker is worker and not replica.ended:
            try:
                trouble = await self._workers.trouble(worker)
            except Exception:
                log.exception("replica_probe_failed")
                trouble = None
            if replica.worker is not worker:
                return
            replica.heard(trouble)
            if trouble is not None:
                self._found()
            await asyncio.sleep(self._pause_s)
