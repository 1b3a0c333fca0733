"""The loop that works off batches and late answers: an event loop of its own in a thread of its own.

The engines put everything here behind requests that somebody waits for (`Generate.priority`), so the loop may keep them full.
Of several servers on one database the one with the lease does it.
"""

import asyncio
import shutil
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from tunewright.accounts.records import Caller
from tunewright.batches.answering import Answer, answered
from tunewright.batches.ports import ASYNC_PRIORITY, CHAT, ENDPOINTS, Speech
from tunewright.batches.records import CANCELLING, FAIL, SUCCESS, AsyncTask, Batch
from tunewright.batches.run import BatchRun, Superseded
from tunewright.clock import mono_s, wall_s
from tunewright.datasets.service import DatasetService
from tunewright.errors import Conflict, NotFound, TunewrightError
from tunewright.jobs.lease import Lease, holder_of
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.storage import Storage

log = structlog.get_logger()

LEDGER_ENDPOINT = "/async/chat/completions"
_PAUSE_S = 1.0
_TROUBLE_PAUSE_S = 5.0
_FORGET_EVERY_S = 600.0
_LAST_WAIT_S = 5.0


class BatchController:
    """`start()` runs it until `stop()`."""

    def __init__(
        self,
        storage: "Storage",
        datasets: DatasetService,
        home: HomeFolder,
        settings: Settings,
        speeches: dict[tuple[str, str], Speech],
    ) -> None:
        self._storage = storage
        self._datasets = datasets
        self._home = home
        self._settings = settings
        self._speeches = speeches
        places = settings.batch_concurrency or settings.engine_slots
        self._batch_places, self._async_places = asyncio.Semaphore(places), asyncio.Semaphore(places)
        self._lease = Lease(storage, "batches", lambda: holder_of(home))
        self._runs: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._troubled: dict[str, float] = {}
        """Batch id -> monotonic second before which it is left alone."""
        self._forgot_s = float("-inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take up what an earlier server left, and whatever comes."""
        self._sweep()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="batches", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more and let go of what is under way; the next start takes it up again. Safe to call twice."""
        self._stopping = True
        self.wake()
        if self._thread is not None:
            self._thread.join(_LAST_WAIT_S)
            self._thread = None

    def wake(self) -> None:
        """Something has changed: look now. From any thread."""
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._woken.set)
            except RuntimeError:  # the loop has just ended
                pass

    def _sweep(self) -> None:
        """Folders of batches that have ended go."""
        folders = list(self._home.batches.iterdir())  # before the look, for others may be at it
        with self._storage.read() as tx:
            unfinished = {batch.id for batch in tx.batches.unfinished()}
        for folder in folders:
            if folder.name not in unfinished:
                shutil.rmtree(folder, ignore_errors=True)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        while not self._stopping:
            self._woken.clear()
            try:
                await self._look()
            except TunewrightError as error:
                log.warning("batches_pass_failed", code=error.code)
            except Exception:
                log.exception("batches_pass_failed")
            try:
                await asyncio.wait_for(self._woken.wait(), _PAUSE_S)
            except TimeoutError:
                pass
        await self._let_go()
        await asyncio.to_thread(self._release)

    def _release(self) -> None:
        try:
            self._lease.release()
        except TunewrightError as error:
            log.warning("batches_lease_kept", code=error.code)

    async def _let_go(self) -> None:
        under_way = [task for _, task in self._runs.values()] + list(self._tasks.values())
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _look(self) -> None:
        batches, tasks = await asyncio.to_thread(self._unfinished)
        if (batches or tasks or self._runs or self._tasks) and not await asyncio.to_thread(self._lease.held):
            await self._let_go()
            return
        for project_id, task_id in tasks:
            if task_id not in self._tasks:
                self._tasks[task_id] = asyncio.ensure_future(self._answer(project_id, task_id))
        for batch in batches:
            if batch.id not in self._runs:
                self._begin(batch)
            elif batch.status == CANCELLING:
                self._runs[batch.id][0].ending.set()
        await asyncio.to_thread(self._clean)

    def _unfinished(self) -> tuple[list[Batch], list[tuple[str, str]]]:
        with self._storage.read() as tx:
            return tx.batches.unfinished(), tx.async_tasks.unfinished(self._settings.max_async_requests)

    def _clean(self) -> None:
        with self._storage.read() as tx:
            with_input = tx.batches.with_input_to_delete()
        for batch in with_input:
            try:
                self._datasets.delete(batch.project_id, batch.input_file_id)
            except NotFound:
                pass
            except Conflict:  # another batch reads it
                continue
            with self._storage.write() as tx:
                tx.batches.change(batch, delete_input=False)
        if mono_s() - self._forgot_s > _FORGET_EVERY_S:
            self._forgot_s = mono_s()
            with self._storage.write() as tx:
                tx.async_tasks.forget_before(wall_s() - self._settings.async_kept_s)

    def _begin(self, batch: Batch) -> None:
        if mono_s() < self._troubled.get(batch.id, 0.0):
            return
        run = BatchRun(
            batch,
            self._home.batches / batch.id,
            self._storage,
            self._datasets,
            self._speeches[batch.dialect, ENDPOINTS[batch.endpoint]],
            self._batch_places,
            self._settings,
        )
        self._runs[batch.id] = (run, asyncio.ensure_future(self._drive(batch.id, run)))

    async def _drive(self, batch_id: str, run: BatchRun) -> None:
        try:
            await run.run()
            self._troubled.pop(batch_id, None)
        except Superseded:
            pass
        except Exception as error:
            self._troubled[batch_id] = mono_s() + _TROUBLE_PAUSE_S
            if isinstance(error, TunewrightError):
                log.warning("batch_troubled", batch=batch_id, code=error.code)
            else:
                log.exception("batch_troubled", batch=batch_id)
        finally:
            del self._runs[batch_id]
            self._woken.set()

    async def _answer(self, project_id: str, task_id: str) -> None:
        """Answer one late request and keep what came of it."""
        try:
            async with self._async_places:
                task = await asyncio.to_thread(self._task, project_id, task_id)
                if task is None:
                    return
                answer = await answered(
                    self._speeches[task.dialect, CHAT],
                    Caller(project_id=project_id, key_id=task.key_id),
                    msgspec.json.decode(task.body, type=dict[str, Any]),
                    task.request_id,
                    priority=ASYNC_PRIORITY,
                    endpoint=LEDGER_ENDPOINT,
                )
            await asyncio.to_thread(self._end, task, answer)
        except TunewrightError as error:  # the database: the task is taken up again
            log.warning("async_answer_not_kept", task=task_id, code=error.code)
            await asyncio.sleep(_PAUSE_S)
        except Exception:
            log.exception("async_answer_not_kept", task=task_id)
            await asyncio.sleep(_TROUBLE_PAUSE_S)
        finally:
            del self._tasks[task_id]

    def _task(self, project_id: str, task_id: str) -> AsyncTask | None:
        with self._storage.read() as tx:
            return tx.async_tasks.get(project_id, task_id)

    def _end(self, task: AsyncTask, answer: Answer) -> None:
        changes = {"status": SUCCESS, "answer": answer.body} if answer.ok else _failure(answer)
        with self._storage.write() as tx:
            tx.async_tasks.end(task, ended_at=wall_s(), **changes)


def _failure(answer: Answer) -> dict[str, Any]:
    return {"status": FAIL, "error": answer.body["error"]}
