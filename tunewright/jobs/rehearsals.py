"""The dress rehearsal of a job: a process like a trainer's that tries the training out before the job is queued.

It works in `jobs/{job_id}/rehearsal/` and has attempts of its own. `Job.rehearsal` says how it stands: `status` is `waiting`
for a place, `running`, `done`, `failed` or `skipped`. What a dead server or a dead process left is found again or done again.
"""

import heapq
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import structlog

from tunewright.clock import mono_s
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.jobs import events, recovery
from tunewright.jobs.journal_reader import Terminal, read_batch
from tunewright.jobs.last_words import evidence_in, evidence_of, recognise
from tunewright.jobs.ports import Runner
from tunewright.jobs.preparation import Prepared
from tunewright.jobs.records import QUEUED, VALIDATING, Job
from tunewright.jobs.signatures import DISK_FULL, Signature
from tunewright.jobs.spec import COMPUTING, Failed, Hyperparameters, Rehearsed, TrainingSpec
from tunewright.jobs.trainers import Trainers
from tunewright.models.records import Base
from tunewright.settings import Settings

if TYPE_CHECKING:
    from tunewright.storage import Storage

log = structlog.get_logger()

WAITING, RUNNING, DONE, FAILED, SKIPPED = "waiting", "running", "done", "failed", "skipped"
FOLDER = "rehearsal"
SWITCHED_OFF, SMALL_JOB = "switched_off", "small_job"
_INTERNAL = ("wanted", "attempt", "failures")

_WORTHWHILE = 4.0
"""A training that takes no longer than so many rehearsals answers as soon itself."""
_START_S = 8.0
"""To start a process with its libraries and load a small base twice."""
_ROWS = 9
"""Rehearsed rows, with one for the time that a usual one takes."""
_BYTES_PER_TOKEN, _BYTES_PER_PARAMETER = 4, 4
_MULTIPLY_ADDS_PER_S = 5e10
_PASSES = 2
"""Forward and backward: multiply-adds of a parameter for each token."""
_LINGER_S = 5.0


def is_under_way(job: Job) -> bool:
    """Whether the job may have a process that rehearses."""
    return job.rehearsal.get("status") == RUNNING


def is_waiting(job: Job) -> bool:
    """Whether the job is prepared and waits for a place to rehearse."""
    return job.status == VALIDATING and job.rehearsal.get("status") == WAITING


def shown(job: Job) -> dict[str, Any] | None:
    """What callers see of it; None before it is decided."""
    found = {name: value for name, value in job.rehearsal.items() if name not in _INTERNAL}
    return found or None


class Broken(NamedTuple):
    """Why a rehearsal failed, and what its process died of if it died."""

    failed: Failed
    signature: Signature | None
    evidence: str


class Rehearsals:
    """The processes that rehearse. What is remembered here may be lost at any time."""

    def __init__(
        self, storage: "Storage", settings: Settings, jobs_folder: Path, runner: Runner, trainer_module: str
    ) -> None:
        self._storage = storage
        self._settings = settings
        self._jobs_folder = jobs_folder
        self._processes = Trainers(jobs_folder, runner, trainer_module, settings.heartbeat_limit_s, FOLDER)
        self._not_before_s: dict[str, float] = {}

    def reason_to_skip(self, job: Job, base: Base, prepared: Prepared) -> str | None:
        """Why a prepared job needs none; None: it needs one. Reads the training file."""
        wanted = job.rehearsal.get("wanted") or self._settings.rehearsal
        if wanted != "auto":
            return SWITCHED_OFF if wanted == "off" else None
        data = self._jobs_folder / job.id / "data" / "train.jsonl"
        return None if _pays(data, base.path, prepared.hyperparameters) else SMALL_JOB

    def is_due(self, job: Job) -> bool:
        """Whether the job waits for its rehearsal, and no longer because the last one died just now."""
        return is_waiting(job) and mono_s() >= self._not_before_s.get(job.id, 0.0)

    def start(self, job: Job, spec: TrainingSpec) -> None:
        """Start the process. `spec` is that of the job's first attempt. Raises OSError; the next pass then does it again."""
        attempt = job.rehearsal.get("attempt", 0) + 1
        with self._storage.write() as tx:
            started = tx.jobs.change(job, rehearsal=job.rehearsal | {"status": RUNNING, "attempt": attempt})
        if started is None:
            return
        folder = self._processes.folder(job)
        self._processes.launch(
            _process(started), msgspec.structs.replace(spec, attempt=attempt, work_folder=str(folder), rehearsal=True)
        )
        log.info("rehearsal_started", job=job.id, attempt=attempt)

    def follow(self, job: Job) -> Rehearsed | Broken | None:
        """What came of it once the process is gone; None until then, and if it must be done again."""
        process = _process(job)
        alive = self._processes.alive(process)  # before reading: what a dead process wrote is all there
        terminal = self._terminal(process)
        if terminal is None:
            if not alive:
                return self._died(job)
            if self._processes.silent(process):
                self._processes.kill(process)
            return None
        if not self._processes.end(process, _LINGER_S, ask=False):
            return None
        if isinstance(terminal, Failed):
            return Broken(terminal, None, evidence_in(self._processes.death(process).log))
        if isinstance(terminal, Rehearsed):
            return terminal
        self._again(job, job.rehearsal.get("failures", 0))
        return None

    def store(self, job: Job, record: Rehearsed, price_per_million_tokens: float | None) -> None:
        """The job goes into the queue with what was measured."""
        found = measured(record, price_per_million_tokens)
        chosen = self._processes.folder(job) / COMPUTING
        if chosen.exists():
            write_atomically(self._jobs_folder / job.id / COMPUTING, chosen.read_bytes())
        with self._storage.write() as tx:
            # What it needs is then told anew, from what was measured.
            changed = tx.jobs.change(job, status=QUEUED, rehearsal=job.rehearsal | found, resources={})
            if changed is not None:
                tx.jobs.add_events(events.rehearsed(changed, found))

    def end(self, job: Job, grace_s: float) -> bool:
        """True once no process is left. Call again until then."""
        return not is_under_way(job) or self._processes.end(_process(job), grace_s)

    def park(self, job: Job, grace_s: float) -> bool:
        """The same, for the next server to do it again; that finds the last record if there is one."""
        if not self.end(job, grace_s):
            return False
        if is_under_way(job) and self._terminal(_process(job)) is None:
            self._again(job, job.rehearsal.get("failures", 0))
        return True

    def kill(self, job: Job) -> None:
        """End the process at once, if there is one."""
        if is_under_way(job):
            self._processes.kill(_process(job))

    def forget_others(self, job_ids: set[str]) -> None:
        """Keep what is known of these jobs only."""
        self._processes.forget_others(job_ids)
        self._not_before_s = {job_id: at for job_id, at in self._not_before_s.items() if job_id in job_ids}

    def clean(self, job: Job) -> None:
        """Remove what it needed room for; log and journal stay."""
        for name in ("checkpoints", "result"):
            shutil.rmtree(self._processes.folder(job) / name, ignore_errors=True)

    def _terminal(self, process: Job) -> Terminal | None:
        path, offset = self._processes.journal(process), 0
        while True:
            batch = read_batch(path, offset)
            if batch.terminal is not None or not batch.more:
                return batch.terminal
            offset = batch.offset

    def _died(self, job: Job) -> Broken | None:
        """No last record, no process: done again, with half the micro-batch where memory ran out, but not for ever."""
        process = _process(job)
        if not self._processes.end(process, 0.0):
            return None
        failures = job.rehearsal.get("failures", 0)
        if not self._processes.known(process):  # the earlier server died before it could start one
            self._again(job, failures)
            return None
        death = self._processes.death(process)
        signature, evidence = recognise(death), evidence_of(death)
        with self._storage.read() as tx:
            halved = tx.jobs.has_event(job.project_id, job.id, recovery.MICRO_BATCH_HALVED)
        verdict = recovery.judge(
            signature,
            failures=failures,
            step=0,
            checkpoint_step=0,
            halved=halved,
            max_attempts=self._settings.max_attempts,
        )
        log.warning("rehearsal_died", job=job.id, cause=signature.name, evidence=evidence)
        if verdict.fatal or verdict.code == DISK_FULL:
            text = mark("The dress rehearsal ended unexpectedly, {failures} times in a row.")
            failed = Failed(code=verdict.code, message=text, values={"failures": max(1, verdict.failures)})
            return Broken(failed, signature, evidence)
        self._again(job, verdict.failures, verdict.delay_s, halved=verdict.code == recovery.MICRO_BATCH_HALVED)
        return None

    def _again(self, job: Job, failures: int, delay_s: float = 0.0, *, halved: bool = False) -> None:
        self._not_before_s[job.id] = mono_s() + delay_s
        with self._storage.write() as tx:
            changed = tx.jobs.change(job, rehearsal=job.rehearsal | {"status": WAITING, "failures": failures})
            if changed is not None and halved:
                text = mark(
                    "Memory ran out in the dress rehearsal. It is done again with half the micro-batch, and so is the "
                    "training; the batch size stays."
                )
                tx.jobs.add_events([events.message(changed, recovery.MICRO_BATCH_HALVED, text, level="warn")])


def measured(record: Rehearsed, price_per_million_tokens: float | None) -> dict[str, Any]:
    """What `Job.rehearsal` says of one that went well."""
    price = None if price_per_million_tokens is None else round(record.tokens * price_per_million_tokens / 1e6, 6)
    found = {
        "status": DONE,
        "memory_peak_bytes": record.memory_peak_bytes,
        "micro_batch_tokens": record.micro_batch_tokens,
        "seconds_per_step": record.seconds_per_step,
        "estimated_seconds": {"least": round(record.least_s), "most": max(1, round(record.most_s))},
        "estimated_tokens": record.tokens,
        "price": None if price is None else {"least": price, "most": price},
        "rows": record.lines,
        "answer": record.answer,
        "seconds": round(record.seconds, 1),
    }
    if record.gpu_memory_peak_bytes is not None:
        found["gpu_memory_peak_bytes"] = record.gpu_memory_peak_bytes
    return found


def _pays(data: Path, base: Path | None, wanted: Hyperparameters) -> bool:
    """Whether the training is more work than a few rehearsals, by the bytes of its rows and of the base's weights."""
    longest = wanted.max_length * _BYTES_PER_TOKEN
    with data.open("rb") as stream:
        sizes = [min(len(line), longest) for line in stream]
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors")) if base else 0
    per_byte_s = _PASSES * weights / _BYTES_PER_PARAMETER / _BYTES_PER_TOKEN / _MULTIPLY_ADDS_PER_S
    rehearsal_s = _START_S + per_byte_s * sum(heapq.nlargest(_ROWS, sizes))
    return per_byte_s * sum(sizes) * wanted.n_epochs > _WORTHWHILE * rehearsal_s


def _process(job: Job) -> Job:
    """The job as its rehearsal's process knows it: with the attempt of that."""
    return msgspec.structs.replace(job, attempt=job.rehearsal.get("attempt", 0))
