"""Lists read their page and stop: SQLite's own plan shows an index search and no sorting."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.rows import (
    async_task,
    batch,
    channel,
    checkpoint,
    delivery,
    deployment,
    deployment_event,
    event,
    file,
    job,
    metrics,
    model,
    parted_upload,
    project,
    upload_part,
    usage,
)
from tests.contract.test_storage_tenants import statements
from tunewright.storage import Storage, Transaction

Ask = Callable[[Transaction, str, dict[str, str]], Any]

LISTS: dict[str, Ask] = {
    "keys": lambda tx, p, ids: tx.keys.list(p),
    "files": lambda tx, p, ids: tx.files.list(p, purpose=None, after=None, limit=2),
    "files after": lambda tx, p, ids: tx.files.list(p, purpose=None, after=ids["file"], limit=2),
    "files ascending": lambda tx, p, ids: tx.files.list(p, purpose=None, after=ids["file"], limit=2, ascending=True),
    "files of a purpose": lambda tx, p, ids: tx.files.list(p, purpose="fine-tune", after=ids["file"], limit=2),
    "files that are datasets": lambda tx, p, ids: tx.files.list_datasets(
        p, purposes=("fine-tune", "x"), kind="chat", status="processed", after=ids["file"], limit=2
    ),
    "children of a file": lambda tx, p, ids: tx.files.children(p, ids["file"], limit=2),
    "jobs": lambda tx, p, ids: tx.jobs.list(p, after=None, limit=2),
    "jobs after": lambda tx, p, ids: tx.jobs.list(p, after=ids["job"], limit=2),
    "jobs with metadata": lambda tx, p, ids: tx.jobs.list(p, after=ids["job"], limit=2, metadata={"team": "red"}),
    "jobs of a state and model": lambda tx, p, ids: tx.jobs.list(
        p, after=ids["job"], limit=2, status="queued", model="m"
    ),
    "events": lambda tx, p, ids: tx.jobs.list_events(p, ids["job"], after=None, limit=2),
    "events after": lambda tx, p, ids: tx.jobs.list_events(p, ids["job"], after=ids["event"], limit=2),
    "an event of a code": lambda tx, p, ids: tx.jobs.has_event(p, ids["job"], "none"),
    "events since": lambda tx, p, ids: tx.jobs.events_since(p, ids["job"], after_id=ids["event"], limit=2),
    "checkpoints": lambda tx, p, ids: tx.jobs.list_checkpoints(p, ids["job"], after=ids["checkpoint"], limit=2),
    "one checkpoint": lambda tx, p, ids: tx.jobs.find_checkpoint(p, ids["job"], 1),
    "models in use": lambda tx, p, ids: tx.jobs.models_in_use(p),
    "models": lambda tx, p, ids: tx.models.list(p),
    "one file": lambda tx, p, ids: tx.files.get(p, ids["file"]),
    "one job": lambda tx, p, ids: tx.jobs.get(p, ids["job"]),
    "one job by request": lambda tx, p, ids: tx.jobs.find_by_request_id(p, "r"),
    "one model by name": lambda tx, p, ids: tx.models.find(p, "name"),
    "count of jobs": lambda tx, p, ids: tx.jobs.count(p, frozenset({"queued", "running"})),
    "users of a file": lambda tx, p, ids: tx.jobs.using_file(p, ids["file"]),
    "one upload": lambda tx, p, ids: tx.uploads.get(p, ids["upload"]),
    "open uploads": lambda tx, p, ids: tx.uploads.count_pending(p),
    "parts": lambda tx, p, ids: tx.uploads.parts(p, ids["upload"], after="part-", limit=2),
    "count of parts": lambda tx, p, ids: tx.uploads.count_parts(p, ids["upload"]),
    "bytes of parts": lambda tx, p, ids: tx.uploads.received_bytes(p, ids["upload"]),
    "overdue uploads": lambda tx, p, ids: tx.uploads.overdue(9),
    "channels": lambda tx, p, ids: tx.channels.list(p),
    "enabled channels": lambda tx, p, ids: tx.channels.enabled(p),
    "deliveries": lambda tx, p, ids: tx.deliveries.list(p, ids["channel"], after=ids["delivery"], limit=2),
    "due channels": lambda tx, p, ids: tx.deliveries.due_channels(9),
    "next due": lambda tx, p, ids: tx.deliveries.next_due(p, ids["channel"], 9),
    "metered messages": lambda tx, p, ids: tx.deliveries.metered_since(p, 9),
    "jobs ended since": lambda tx, p, ids: tx.jobs.ended_since(9, 2),
    "unfinished jobs": lambda tx, p, ids: tx.jobs.unfinished(),
    "batches": lambda tx, p, ids: tx.batches.list(p, after=ids["batch"], limit=2),
    "one batch": lambda tx, p, ids: tx.batches.get(p, ids["batch"]),
    "open batches": lambda tx, p, ids: tx.batches.count_unfinished(p),
    "unfinished batches": lambda tx, p, ids: tx.batches.unfinished(),
    "batches with an input to delete": lambda tx, p, ids: tx.batches.with_input_to_delete(),
    "batches of a file": lambda tx, p, ids: tx.batches.using_file(p, ids["file"]),
    "one task": lambda tx, p, ids: tx.async_tasks.get(p, ids["task"]),
    "one task by request": lambda tx, p, ids: tx.async_tasks.find_by_request_id(p, "r"),
    "open tasks": lambda tx, p, ids: tx.async_tasks.count_unfinished(p),
    "unfinished tasks": lambda tx, p, ids: tx.async_tasks.unfinished(9),
    "usage": lambda tx, p, ids: tx.usage.list(p, status="ok", model="m", after=ids["usage"], limit=2),
    "sums of usage": lambda tx, p, ids: tx.usage.sums(
        p, since=0, until=9, by=frozenset({"day", "model"}), skip=0, limit=2
    ),
    "deployments": lambda tx, p, ids: tx.deployments.list(p, after=ids["deployment"], limit=2),
    "deployments of a name": lambda tx, p, ids: tx.deployments.named(p, "name"),
    "deployment of a model": lambda tx, p, ids: tx.deployments.serving(p, "model"),
    "memory of a model": lambda tx, p, ids: tx.deployments.measured(p, "model", False),
    "live deployments": lambda tx, p, ids: tx.deployments.live(),
    "events of a deployment": lambda tx, p, ids: tx.deployments.events(
        p, ids["deployment"], after=ids["deployment_event"], limit=2
    ),
    "idempotency": lambda tx, p, ids: tx.idempotency.find(p, "route", "key", since=0),
}
STARTED_INSIDE = {name for name in LISTS if name.startswith(("files ", "jobs "))} - {"jobs ended since"}
SORTED_AFTERWARDS = {"unfinished jobs", "children of a file", "enabled channels", "due channels", "sums of usage"}
SORTED_AFTERWARDS |= {"unfinished batches"}
"""A handful of rows of several states, never paged; groups."""


@pytest.mark.parametrize("name", LISTS)
def test_plan(sqlite_url: str, name: str) -> None:
    storage = Storage(sqlite_url)
    storage.migrate()
    ours = project("1")
    of = job(ours.id)
    rows = {"file": file(ours.id), "job": of, "event": event(of), "checkpoint": checkpoint(of, 1)}
    rows["upload"] = parted_upload(ours.id)
    rows["channel"] = channel(ours.id)
    rows["usage"] = usage(ours.id)
    rows["batch"], rows["task"] = batch(ours.id), async_task(ours.id)
    rows["delivery"] = delivery(rows["channel"])
    rows["deployment"] = deployment(ours.id)
    rows["deployment_event"] = deployment_event(rows["deployment"])
    with storage.write() as tx:
        tx.projects.insert(ours)
        tx.files.insert(rows["file"])
        tx.uploads.insert(rows["upload"])
        tx.uploads.add_part(upload_part(rows["upload"]))
        tx.jobs.insert(of)
        tx.jobs.add_events([rows["event"], metrics(of, 1)])
        tx.jobs.add_checkpoint(rows["checkpoint"])
        tx.models.insert(model(ours.id))
        tx.deployments.insert(rows["deployment"])
        tx.deployments.add_event(rows["deployment_event"])
        tx.channels.insert(rows["channel"])
        tx.deliveries.insert(rows["delivery"])
        tx.usage.insert([rows["usage"]])
        tx.batches.insert(rows["batch"])
        tx.async_tasks.insert(rows["task"])
    with storage.read() as tx, statements() as seen:
        LISTS[name](tx, ours.id, {kind: row.id for kind, row in rows.items()})
        connection = tx.projects._connection
        plan: list[str] = []
        asked = [each for each in seen if each.startswith("SELECT")]
        assert asked
        for statement in asked:
            plan = [
                str(step[3])
                for step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", ("x",) * statement.count("?"))
            ]
            tables = [step for step in plan if "VIRTUAL TABLE" not in step]
            assert any(step.startswith("SEARCH") and "USING" in step for step in tables), plan
            assert not any(step.startswith("SCAN") for step in tables), plan
            if name not in SORTED_AFTERWARDS:
                assert not any("TEMP B-TREE" in step for step in plan), plan
        if name in STARTED_INSIDE:
            assert any("(created_at,id)" in step for step in plan), f"the page must start inside the index: {plan}"
    storage.close()
