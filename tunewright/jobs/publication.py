"""From a trainer's `finished` record to a model that callers can use. Every step can be repeated after a kill."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tunewright.clock import wall_s, wall_s_after
from tunewright.datasets.records import File
from tunewright.errors import Conflict, InvalidRequest
from tunewright.files_on_disk import link_or_copy, publish_folder, sha256_of, write_atomically
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.jobs import events
from tunewright.jobs.journal_reader import Batch, first_record
from tunewright.jobs.ports import OnEnd, Prover
from tunewright.jobs.progress import all_events, kept_steps
from tunewright.jobs.records import SUCCEEDED, Job
from tunewright.jobs.spec import RECEIPTS, Checkpoint, Finished
from tunewright.models.checkpoint_files import CheckpointFiles
from tunewright.models.manifest import MANIFEST
from tunewright.models.records import FULL, Base, TunedModel
from tunewright.settings import HomeFolder

if TYPE_CHECKING:
    from tunewright.models.service import ModelService
    from tunewright.storage import Blobs, Storage

RESULT_PURPOSE = "fine-tune-results"
_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Proven:
    """An adapter in its place, with what the engine measured."""

    model: TunedModel
    proof: dict[str, Any]


class Publication:
    def __init__(
        self,
        storage: "Storage",
        blobs: "Blobs",
        models: "ModelService",
        home: HomeFolder,
        prover: Prover,
        on_end: OnEnd,
    ) -> None:
        self._storage = storage
        self._blobs = blobs
        self._models = models
        self._home = home
        self._checkpoints = CheckpointFiles(home)
        self._prover = prover
        self._on_end = on_end

    def take_checkpoints(self, job: Job, batch: Batch) -> list[Checkpoint]:
        """Bring the adapters of the batch's checkpoints to where they outlive the work folder; those that are there."""
        kept = kept_steps(batch)
        found = [record for record in batch.records if isinstance(record, Checkpoint)]
        return [record for record in found if (kept is None or record.step in kept) and self._take(job, record)]

    def _take(self, job: Job, record: Checkpoint) -> bool:
        if record.adapter_sha256 is None:
            return True
        source = self._home.jobs / job.id / record.path
        return self._checkpoints.add(source, job.tuned_model_id, record.step, job.base_code)

    def drop_checkpoints(self, job: Job) -> None:
        """Remove the adapters of checkpoints that the database does not know any more."""
        with self._storage.read() as tx:
            rows = tx.jobs.list_checkpoints(job.project_id, job.id, after=None, limit=1000)
        self._checkpoints.keep_only(job.tuned_model_id, {row.step for row in rows})

    def prove(self, job: Job, base: Base, finished: Finished) -> Proven:
        """Move the adapter to its place and have its effect measured. Slow: an engine may have to start.

        Raises InvalidRequest(`adapter_invalid`, `no_effect`), Unavailable if the engine can't be asked now.
        """
        work = self._home.jobs / job.id
        folder = self._home.adapters / job.tuned_model_id
        if not folder.is_dir() and (work / "result").is_dir():
            self._home.adapters.mkdir(mode=0o700, exist_ok=True)
            publish_folder(work / "result", folder)
        started = first_record(work / f"journal-{job.attempt}.jsonl")
        full = job.training_type == FULL
        weights = folder / (MANIFEST if full else _ADAPTER)
        if started is None or not weights.is_file() or sha256_of(weights) != finished.adapter_sha256:
            raise InvalidRequest(
                "adapter_invalid",
                mark("The trained adapter is not what the trainer said it wrote. Create the job again."),
            )
        with self._storage.read() as tx:
            reserved = tx.models.get(job.project_id, job.tuned_model_id)
        if reserved is None or reserved.status == "deleted":
            raise Conflict("model_deleted", mark("The model was deleted before its training ended."))
        model = msgspec.structs.replace(
            reserved,
            adapter_path=folder.name,
            adapter_sha256=finished.adapter_sha256,
            renderer_hash=started.renderer_hash,
            checkpoint_step=job.step if finished.step is None else finished.step,
            proof={"kind": FULL} if full else {},
        )
        return Proven(model, self._prover.prove(base, model) | model.proof)

    def commit(self, job: Job, finished: Finished, proven: Proven) -> Job | None:
        """One transaction: the model is ready, the metrics are a file, the job has succeeded. None if the job was
        cancelled first. Raises Conflict if the model can't be published any more."""
        files = self._store_results(job, finished)
        model = proven.model
        with self._storage.write() as tx:
            changed = tx.jobs.change(
                job,
                status=SUCCEEDED,
                finished_at=wall_s_after(job.created_at, job.running_at),
                estimated_finish=None,
                trained_tokens=finished.trained_tokens,
                result_files=tuple(file.id for file in files),
                receipts=_receipts(finished, files),
                checkpoint_step=model.checkpoint_step,
            )
            if changed is None:
                return None
            self._models.publish(
                tx,
                model,
                adapter_path=model.adapter_path or "",
                adapter_sha256=model.adapter_sha256 or "",
                renderer_hash=model.renderer_hash or "",
                checkpoint_step=model.checkpoint_step,
                proof=proven.proof,
            )
            for file in files:
                tx.files.insert(file)
            ready = mark("The model {model} is ready: {applied} of {tensors} adapter tensors applied")
            if model.kind == FULL:
                ready = mark(
                    "The model {model} is ready: {applied} of {tensors} tensors changed it. To call it, deploy it"
                )
            tx.jobs.add_events(
                [
                    events.message(
                        changed,
                        "model_ready",
                        ready,
                        model=job.tuned_model_name,
                        applied=proven.proof.get("tensors_applied"),
                        tensors=proven.proof.get("tensors"),
                    ),
                    events.succeeded(changed),
                ]
            )
            self._on_end(tx, changed)
        return changed

    def withdraw(self, job: Job) -> None:
        """Remove the adapter of a job that ended without a model. Only after the job's end is committed."""
        shutil.rmtree(self._home.adapters / job.tuned_model_id, ignore_errors=True)

    def _store_results(self, job: Job, finished: Finished) -> list[File]:
        """Metrics and receipts as stored blobs, and the rows that will name them. Ids are kept in the work folder, so that a
        second try overwrites the blobs of the first."""
        work = self._home.jobs / job.id
        with self._storage.read() as tx:
            table = events.result_table(all_events(tx, job))
        write_atomically(work / "results.csv", table)
        files = [self._store(job, work / "results.csv", f"{job.id}-metrics.csv")]
        if finished.receipts is not None and (work / RECEIPTS).is_file():
            link_or_copy(work / RECEIPTS, _without(work / "receipts.stored"))  # a second try finds the file again
            files.append(self._store(job, work / "receipts.stored", f"{job.id}-receipts.jsonl"))
        return files

    def _store(self, job: Job, path: Path, filename: str) -> File:
        """`path` is consumed."""
        sha256, size_bytes = sha256_of(path), path.stat().st_size
        file_id = _kept_id(path.with_suffix(".id"))
        self._blobs.put_file(f"files/{job.project_id}/{file_id}", path)
        return File(
            id=file_id,
            project_id=job.project_id,
            filename=filename,
            purpose=RESULT_PURPOSE,
            size_bytes=size_bytes,
            sha256=sha256,
            created_at=wall_s(),
        )


def _receipts(finished: Finished, files: list[File]) -> dict[str, Any]:
    if finished.receipts is None or len(files) < 2:
        return {}
    return {"file": files[1].id} | msgspec.to_builtins(finished.receipts)


def _without(path: Path) -> Path:
    """`path`, where nothing is any more."""
    path.unlink(missing_ok=True)
    return path


def _kept_id(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except FileNotFoundError:
        file_id = new_id("file")
        write_atomically(path, os.fsencode(file_id))
        return file_id
