"""One batch from its file to its results. Whatever dies on the way, the next server goes on where the journal ends."""

import asyncio
import shutil
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from tunewright.accounts.records import Caller
from tunewright.batches.answering import answered
from tunewright.batches.input_lines import InputLine, check_lines, input_lines
from tunewright.batches.ports import BATCH_PRIORITY, Speech
from tunewright.batches.records import (
    CANCELLED,
    CANCELLING,
    COMPLETED,
    EXPIRED,
    FAILED,
    FINALIZING,
    IN_PROGRESS,
    OUTPUT_PURPOSE,
    VALIDATING,
    Batch,
    BatchError,
)
from tunewright.batches.results import Journal
from tunewright.clock import wall_s
from tunewright.datasets.service import DatasetService
from tunewright.errors import NotFound
from tunewright.i18n import mark, translate
from tunewright.ids import new_id
from tunewright.settings import Settings

if TYPE_CHECKING:
    from tunewright.storage import Storage, Transaction

log = structlog.get_logger()

LEDGER_ENDPOINT = "/batches"
_COUNTS_EVERY_S = 1.0
_TIMES = {COMPLETED: "completed_at", EXPIRED: "expired_at", CANCELLED: "cancelled_at"}


class Superseded(Exception):
    """The batch is in another state than it was thought to be: look again."""


class BatchRun:
    """Drives one batch. `ending` is set when nothing new is to be begun: it was cancelled."""

    def __init__(
        self,
        batch: Batch,
        folder: Path,
        storage: "Storage",
        datasets: DatasetService,
        speech: Speech,
        places: asyncio.Semaphore,
        settings: Settings,
    ) -> None:
        self._batch = batch
        self._folder = folder
        self._storage = storage
        self._datasets = datasets
        self._speech = speech
        self._places = places
        self._settings = settings
        self.ending = asyncio.Event()
        self._broken: Exception | None = None

    async def run(self) -> None:
        """Go through to the end. Raises Superseded, and what storage, blobs and disks raise: try again later."""
        if self._batch.status == VALIDATING and not await asyncio.to_thread(self._validated):
            return
        journal = await asyncio.to_thread(Journal, self._folder_made() / "journal.jsonl")
        try:
            if self._batch.status == IN_PROGRESS:
                await self._answer_all(journal)
            if self._broken is not None:
                raise self._broken
            await asyncio.to_thread(self._publish, journal)
        except NotFound as error:  # the bytes of the input are gone, and nothing brings them back
            await asyncio.to_thread(self._fail, [_about_file(error)])
        finally:
            journal.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- what is done in threads --------------------------------------------------------------------------------------

    def _folder_made(self) -> Path:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._folder

    def _input(self) -> Path:
        """The input on this disk. Raises NotFound if its bytes are gone."""
        path = self._folder_made() / "input.jsonl"
        if not path.exists():
            partial = path.with_suffix(".part")
            _, chunks = self._datasets.content(self._batch.project_id, self._batch.input_file_id)
            with partial.open("wb") as stream:
                for chunk in chunks:
                    stream.write(chunk)
            partial.replace(path)
        return path

    def _validated(self) -> bool:
        """Whether the lines are good; if not, the batch has failed."""
        batch, settings = self._batch, self._settings
        try:
            total, errors = check_lines(
                self._input(), batch.endpoint, settings.max_batch_requests, settings.max_line_bytes
            )
        except NotFound as error:
            total, errors = 0, [_about_file(error)]
        if errors:
            self._fail(errors, total=total)
            shutil.rmtree(self._folder, ignore_errors=True)
            return False
        self._change(status=IN_PROGRESS, in_progress_at=wall_s(), total=total)
        return True

    def _fail(self, errors: list[BatchError], **changes: Any) -> None:
        self._change(status=FAILED, failed_at=wall_s(), errors=tuple(errors), delete_input=False, **changes)

    def _change(self, **changes: Any) -> None:
        with self._storage.write() as tx:
            self._apply(tx, **changes)

    def _apply(self, tx: "Transaction", **changes: Any) -> None:
        batch = tx.batches.change(self._batch, **changes)
        if batch is None:
            raise Superseded
        self._batch = batch

    def _publish(self, journal: Journal) -> None:
        """Both files and the last state become visible in one transaction."""
        last = CANCELLED if self._batch.status == CANCELLING else COMPLETED
        if last == COMPLETED and self._expire_rest(journal):
            last = EXPIRED
        if self._batch.status == IN_PROGRESS:
            self._change(status=FINALIZING, finalizing_at=wall_s())
        output, errors = self._folder_made() / "output.jsonl", self._folder / "errors.jsonl"
        journal.write_files(output, errors)
        made = [path for path in (output, errors) if path.stat().st_size]

        def end(tx: "Transaction", ids: dict[str, str]) -> None:
            self._apply(
                tx,
                status=last,
                completed=journal.completed,
                failed=journal.failed,
                output_file_id=ids.get("output"),
                error_file_id=ids.get("errors"),
                **{_TIMES[last]: wall_s()},
            )

        files = [(path, f"{self._batch.id}_{path.name}", OUTPUT_PURPOSE) for path in made]
        self._datasets.publish(
            self._batch.project_id,
            files,
            also=lambda tx, ids: end(tx, dict(zip((path.stem for path in made), ids, strict=True))),
        )
        log.info("batch_ended", batch=self._batch.id, status=last, completed=journal.completed, failed=journal.failed)

    def _expire_rest(self, journal: Journal) -> bool:
        """Whether requests were left over when the time was up; each gets a line that says so. Raises Superseded if requests
        are left over for another reason."""
        if journal.completed + journal.failed >= self._batch.total:
            return False
        if not self._is_over():
            raise Superseded
        message = translate(mark("The completion window ended before this request was begun."), self._settings.language)
        for line in input_lines(self._input(), self._settings.max_line_bytes):
            if line.number not in journal:
                error = {"code": "batch_expired", "message": message}
                journal.add(line.number, False, self._record(line, None, error))
        return True

    def _is_over(self) -> bool:
        return wall_s() >= self._batch.expires_at

    # -- what is done in the loop -------------------------------------------------------------------------------------

    async def _answer_all(self, journal: Journal) -> None:
        under_way: set[asyncio.Task[None]] = set()
        counting = asyncio.ensure_future(self._keep_counts(journal))
        try:
            path = await asyncio.to_thread(self._input)
            with closing(input_lines(path, self._settings.max_line_bytes)) as lines:
                for line in lines:
                    if line.number in journal:
                        continue
                    await self._places.acquire()
                    if self.ending.is_set() or self._broken is not None or self._is_over():
                        self._places.release()
                        break
                    task = asyncio.ensure_future(self._answer(line, journal))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
            if under_way:
                await asyncio.wait(under_way)
        finally:
            counting.cancel()
            for task in under_way:
                task.cancel()
            await asyncio.gather(counting, *under_way, return_exceptions=True)
        with self._storage.read() as tx:
            self._batch = tx.batches.get(self._batch.project_id, self._batch.id) or self._batch

    async def _answer(self, line: InputLine, journal: Journal) -> None:
        batch = self._batch
        caller = Caller(project_id=batch.project_id, key_id=batch.key_id)
        try:
            answer = await answered(
                self._speech, caller, line.body, line.custom_id, priority=BATCH_PRIORITY, endpoint=LEDGER_ENDPOINT
            )
            response = {"status_code": answer.status, "request_id": new_id("req"), "body": answer.body}
            journal.add(line.number, answer.ok, self._record(line, response, None))
        except OSError as error:  # a full disk: the batch stops and is taken up again
            self._broken = error
        finally:
            self._places.release()

    def _record(self, line: InputLine, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
        record_id = self._batch.id if self._batch.dialect == "zhipu" else f"batch_req-{line.number}-{self._batch.id}"
        return {"id": record_id, "custom_id": line.custom_id, "response": response, "error": error}

    async def _keep_counts(self, journal: Journal) -> None:
        """So that whoever looks sees how far it is."""
        shown = (-1, -1)
        while True:
            counts = (journal.completed, journal.failed)
            if counts != shown:
                await asyncio.to_thread(self._show_counts, *counts)
                shown = counts
            await asyncio.sleep(_COUNTS_EVERY_S)

    def _show_counts(self, completed: int, failed: int) -> None:
        with self._storage.write() as tx:
            batch = tx.batches.change(self._batch, completed=completed, failed=failed)
        if batch is None:
            self.ending.set()  # cancelled meanwhile


def _about_file(error: NotFound) -> BatchError:
    return BatchError(code=error.code, message=error.message, values=error.values, param="input_file_id")
