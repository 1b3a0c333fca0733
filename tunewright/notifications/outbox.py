"""What must be said is written down in the transaction that makes it true, so that no death in between can lose it."""

from typing import TYPE_CHECKING, Any

from tunewright.clock import wall_s
from tunewright.ids import new_id
from tunewright.jobs.records import Job
from tunewright.notifications.records import APPRISE, TYPE_OF_STATUS, Delivery

if TYPE_CHECKING:
    from tunewright.storage import Transaction


def record_end(tx: "Transaction", job: Job) -> None:
    """Put the end of a job into the outbox of every channel that wants it. Call it where the job's last state is stored.

    A job ends once (its state change is a compare-and-set), so its event is made once, with one id for all channels.
    """
    kind = TYPE_OF_STATUS[job.status]
    event_id, now_s = new_id("event"), wall_s()
    for channel in tx.channels.enabled(job.project_id):
        if kind in channel.events:
            tx.deliveries.insert(
                Delivery(
                    id=new_id("delivery"),
                    project_id=job.project_id,
                    channel_id=channel.id,
                    event_id=event_id,
                    type=kind,
                    job_id=job.id,
                    data=_facts(job),
                    recipients=channel.recipients,
                    metered=channel.kind == APPRISE,
                    next_at=now_s,
                    created_at=now_s,
                )
            )


def _facts(job: Job) -> dict[str, Any]:
    """What a message may say. Texts that fill an error's sentence may come from the data, so only numbers leave."""
    facts: dict[str, Any] = {"model": job.tuned_model_name, "base": job.base_code, "status": job.status}
    if job.error is not None:
        filling = {
            name: value if isinstance(value, int | float) else "\N{HORIZONTAL ELLIPSIS}"
            for name, value in job.error.values.items()
        }
        facts["error"] = {"code": job.error.code, "message": job.error.message, "values": filling}
    return facts
