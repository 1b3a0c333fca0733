"""What must be said is written down in the transaction that makes it true, so that no death in between can lose it."""

from collections.abc import Mapping
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
    _record(tx, job.project_id, TYPE_OF_STATUS[job.status], job.id, _facts(job))


def record_deployment(tx: "Transaction", project_id: str, kind: str, deployment_id: str, facts: dict[str, Any]) -> None:
    """The same for a deployment that has become ready or has failed (`kind`). Call it where that state is stored."""
    _record(tx, project_id, kind, deployment_id, facts)


def _record(tx: "Transaction", project_id: str, kind: str, subject_id: str, facts: dict[str, Any]) -> None:
    event_id, now_s = new_id("event"), wall_s()
    for channel in tx.channels.enabled(project_id):
        if kind in channel.events:
            tx.deliveries.insert(
                Delivery(
                    id=new_id("delivery"),
                    project_id=project_id,
                    channel_id=channel.id,
                    event_id=event_id,
                    type=kind,
                    subject_id=subject_id,
                    data=facts,
                    recipients=channel.recipients,
                    metered=channel.kind == APPRISE,
                    next_at=now_s,
                    created_at=now_s,
                )
            )


def _facts(job: Job) -> dict[str, Any]:
    facts: dict[str, Any] = {"model": job.tuned_model_name, "base": job.base_code, "status": job.status}
    if job.error is not None:
        facts["error"] = said_safely(job.error.code, job.error.message, job.error.values)
    return facts


def said_safely(code: str, message: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a message may say of an error. Texts that fill its sentence may come from the data, so only numbers leave."""
    ellipsis = "\N{HORIZONTAL ELLIPSIS}"
    filling = {name: value if isinstance(value, int | float) else ellipsis for name, value in values.items()}
    return {"code": code, "message": message, "values": filling}
