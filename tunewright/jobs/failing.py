"""How a job fails: what happened is explained, stored and told, and what it would have published is withdrawn."""

from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from tunewright.clock import wall_s_after
from tunewright.errors import Misconfigured, StorageFull, TunewrightError
from tunewright.i18n import mark
from tunewright.jobs import diagnosis, events
from tunewright.jobs.ports import OnEnd
from tunewright.jobs.preparation import Preparation
from tunewright.jobs.publication import Publication
from tunewright.jobs.records import FAILED, Job
from tunewright.jobs.signatures import Signature

if TYPE_CHECKING:
    from tunewright.storage import Storage

log = structlog.get_logger()


class Failing:
    """The move from any state to `failed`."""

    def __init__(self, storage: "Storage", preparation: Preparation, publication: Publication, on_end: OnEnd) -> None:
        self._storage = storage
        self._preparation = preparation
        self._publication = publication
        self._on_end = on_end

    def fail(
        self,
        job: Job,
        code: str,
        message: str,
        param: str | None,
        values: dict[str, Any],
        *,
        signature: Signature | None = None,
        evidence: str = "",
        rehearsal: dict[str, Any] | None = None,
    ) -> None:
        """`signature` is what a trainer died of, `rehearsal` how that stands if it is what failed."""
        base = self._preparation.known_base(job)
        error = diagnosis.explain(job, base, code, message, param, values, signature=signature, evidence=evidence)
        event = events.message(job, "failed", message, level="error")
        with self._storage.write() as tx:
            changed = tx.jobs.change(
                job,
                status=FAILED,
                finished_at=wall_s_after(job.created_at, job.running_at),
                estimated_finish=None,
                error=error,
                **({} if rehearsal is None else {"rehearsal": rehearsal}),
            )
            if changed is not None:
                if rehearsal is not None:
                    text = mark("The dress rehearsal failed, so the job does not go into the queue")
                    tx.jobs.add_events([events.message(changed, "rehearsal_failed", text, level="error")])
                tx.jobs.add_events([msgspec.structs.replace(event, code=code, values=error.values)])
                self._on_end(tx, changed)
        if changed is not None:
            log.warning("job_failed", job=job.id, code=code)
            self._publication.withdraw(job)

    def fail_unless_temporary(self, job: Job, error: TunewrightError) -> None:
        """Raises `error` again if waiting may help."""
        if error.retryable or isinstance(error, StorageFull | Misconfigured):
            raise error
        self.fail(job, error.code, error.message, error.param, error.values)
