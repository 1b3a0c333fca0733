"""No project reaches another's rows: seen in every statement that is sent, and in what comes back."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import exc

from tests.contract.rows import (
    NOON,
    api_key,
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
    upload_part,
    usage,
)
from tunewright.accounts.records import Project
from tunewright.errors import InvalidRequest
from tunewright.storage import Storage, Transaction, tables

DATASETS = ("fine-tune",)
IMAGE = "0" * 64
TENANT_TABLES = sorted(name for name, table in tables.metadata.tables.items() if "project_id" in table.columns)

# Methods that serve the operator, the authentication gate or control loops; everything else is a tenant's.
NOT_OF_A_TENANT = {
    ("projects", "insert"),
    ("projects", "get"),
    ("projects", "all"),
    ("keys", "find"),
    ("images", "processing"),
    ("jobs", "unfinished"),
    ("jobs", "ended_since"),
    ("jobs", "deleted"),
    ("models", "gone"),
    ("models", "deleted"),
    ("deployments", "live"),
    ("uploads", "overdue"),
    ("uploads", "forget_expired_before"),
    ("idempotency", "forget_before"),
    ("deliveries", "due_channels"),
    ("deliveries", "forget_before"),
    ("batches", "unfinished"),
    ("batches", "with_input_to_delete"),
    ("async_tasks", "unfinished"),
    ("async_tasks", "forget_before"),
    ("usage", "interrupt"),
    ("usage", "forget_before"),
    ("leases", "take"),
    ("leases", "release"),
}


class Rows:
    """One of everything in one project."""

    def __init__(self, project_id: str) -> None:
        self.project_id = project_id
        self.key = api_key(project_id)
        self.file = file(project_id, parent_id="file-parent")
        self.upload = parted_upload(project_id)
        self.part = upload_part(self.upload)
        self.job = job(project_id, status="queued", request_id="request", training_file=self.file.id)
        self.events = [event(self.job), metrics(self.job, 1)]
        self.checkpoint = checkpoint(self.job, 1)
        self.model = model(project_id)
        self.deployment = deployment(project_id)
        self.deployment_event = deployment_event(self.deployment)
        self.channel = channel(project_id)
        self.delivery = delivery(self.channel)
        self.usage = usage(project_id)
        self.batch = batch(project_id, input_file_id=self.file.id)
        self.task = async_task(project_id)

    def store(self, storage: Storage) -> "Rows":
        with storage.write() as tx:
            tx.keys.insert(self.key)
            tx.files.insert(self.file)
            tx.images.add(self.project_id, self.file.id, IMAGE)
            tx.uploads.insert(self.upload)
            tx.uploads.add_part(self.part)
            tx.jobs.insert(self.job)
            tx.jobs.add_events(self.events)
            tx.jobs.add_checkpoint(self.checkpoint)
            tx.models.insert(self.model)
            tx.deployments.insert(self.deployment)
            tx.deployments.add_event(self.deployment_event)
            tx.channels.insert(self.channel)
            tx.deliveries.insert(self.delivery)
            tx.usage.insert([self.usage])
            tx.batches.insert(self.batch)
            tx.async_tasks.insert(self.task)
            tx.idempotency.insert(self.project_id, "route", "key", "fingerprint", self.job.id, NOON)
        return self


def reads(project_id: str, rows: Rows) -> dict[tuple[str, str], list[Callable[[Transaction], Any]]]:
    """Every reading method, asked by `project_id` for `rows`."""
    p, j, u, c = project_id, rows.job.id, rows.upload.id, rows.channel.id
    d = rows.deployment
    return {
        ("keys", "list"): [lambda tx: tx.keys.list(p)],
        ("files", "get"): [lambda tx: tx.files.get(p, rows.file.id)],
        ("files", "list"): [
            lambda tx: tx.files.list(p, purpose=None, after=None, limit=9),
            lambda tx: tx.files.list(p, purpose=rows.file.purpose, after=None, limit=9),
            lambda tx: tx.files.list(p, purpose=None, after=rows.model.id, limit=9, ascending=True),
        ],
        ("uploads", "get"): [lambda tx: tx.uploads.get(p, u)],
        ("uploads", "count_pending"): [lambda tx: tx.uploads.count_pending(p)],
        ("uploads", "parts"): [
            lambda tx: tx.uploads.parts(p, u),
            lambda tx: tx.uploads.parts(p, u, after="part-", limit=9),
        ],
        ("uploads", "count_parts"): [lambda tx: tx.uploads.count_parts(p, u)],
        ("uploads", "received_bytes"): [lambda tx: tx.uploads.received_bytes(p, u)],
        ("files", "list_datasets"): [
            lambda tx: tx.files.list_datasets(p, purposes=DATASETS, kind=None, status=None, after=None, limit=9),
            lambda tx: tx.files.list_datasets(
                p, purposes=DATASETS, kind="chat", status="processed", after=None, limit=9
            ),
        ],
        ("files", "children"): [lambda tx: tx.files.children(p, "file-parent", limit=9)],
        ("images", "used"): [lambda tx: tx.images.used(p, IMAGE)],
        ("jobs", "get"): [lambda tx: tx.jobs.get(p, j)],
        ("jobs", "list"): [
            lambda tx: tx.jobs.list(p, after=None, limit=9),
            lambda tx: tx.jobs.list(p, after=None, limit=9, metadata={"team": "red"}),
            lambda tx: tx.jobs.list(p, after=None, limit=9, status="queued", model=rows.job.model),
        ],
        ("jobs", "find_by_request_id"): [lambda tx: tx.jobs.find_by_request_id(p, "request")],
        ("jobs", "count"): [lambda tx: tx.jobs.count(p, frozenset({"queued"}))],
        ("jobs", "using_file"): [lambda tx: tx.jobs.using_file(p, rows.file.id)],
        ("jobs", "list_events"): [lambda tx: tx.jobs.list_events(p, j, after=None, limit=9)],
        ("jobs", "has_event"): [lambda tx: tx.jobs.has_event(p, j, rows.events[0].code)],
        ("jobs", "events_since"): [lambda tx: tx.jobs.events_since(p, j, after_id=rows.events[0].id, limit=9)],
        ("jobs", "list_checkpoints"): [lambda tx: tx.jobs.list_checkpoints(p, j, after=None, limit=9)],
        ("jobs", "find_checkpoint"): [lambda tx: tx.jobs.find_checkpoint(p, j, 1)],
        ("jobs", "models_in_use"): [lambda tx: tx.jobs.models_in_use(p)],
        ("models", "find"): [lambda tx: tx.models.find(p, rows.model.name)],
        ("models", "get"): [lambda tx: tx.models.get(p, rows.model.id)],
        ("models", "list"): [lambda tx: tx.models.list(p)],
        ("deployments", "get"): [lambda tx: tx.deployments.get(p, d.id)],
        ("deployments", "list"): [lambda tx: tx.deployments.list(p, after=None, limit=9)],
        ("deployments", "named"): [lambda tx: tx.deployments.named(p, d.name)],
        ("deployments", "serving"): [lambda tx: tx.deployments.serving(p, d.model)],
        ("deployments", "measured"): [lambda tx: tx.deployments.measured(p, d.model, d.merge)],
        ("deployments", "events"): [lambda tx: tx.deployments.events(p, d.id, after=None, limit=9)],
        ("channels", "get"): [lambda tx: tx.channels.get(p, c)],
        ("channels", "list"): [lambda tx: tx.channels.list(p)],
        ("channels", "enabled"): [lambda tx: tx.channels.enabled(p)],
        ("deliveries", "list"): [lambda tx: tx.deliveries.list(p, c, after=None, limit=9)],
        ("deliveries", "next_due"): [lambda tx: tx.deliveries.next_due(p, c, NOON + 9)],
        ("deliveries", "metered_since"): [lambda tx: tx.deliveries.metered_since(p, NOON)],
        ("batches", "get"): [lambda tx: tx.batches.get(p, rows.batch.id)],
        ("batches", "list"): [lambda tx: tx.batches.list(p, after=None, limit=9)],
        ("batches", "count_unfinished"): [lambda tx: tx.batches.count_unfinished(p)],
        ("batches", "using_file"): [lambda tx: tx.batches.using_file(p, rows.file.id)],
        ("async_tasks", "get"): [lambda tx: tx.async_tasks.get(p, rows.task.id)],
        ("async_tasks", "find_by_request_id"): [lambda tx: tx.async_tasks.find_by_request_id(p, "req-1")],
        ("async_tasks", "count_unfinished"): [lambda tx: tx.async_tasks.count_unfinished(p)],
        ("usage", "list"): [
            lambda tx: tx.usage.list(p, status=None, model=None, after=None, limit=9),
            lambda tx: tx.usage.list(p, status="running", model=rows.usage.model, after=None, limit=9),
        ],
        ("usage", "sums"): [
            lambda tx: tx.usage.sums(p, since=NOON, until=NOON + 1, by=frozenset(), skip=0, limit=9),
            lambda tx: tx.usage.sums(p, since=NOON, until=NOON + 1, by=frozenset({"day", "model"}), skip=0, limit=9),
        ],
        ("idempotency", "find"): [lambda tx: tx.idempotency.find(p, "route", "key", since=0)],
    }


def writes(project_id: str, rows: Rows) -> dict[tuple[str, str], list[Callable[[Transaction], Any]]]:
    """Every changing method, as `project_id` would try it on `rows`."""
    p = project_id
    as_ours = {"project_id": p}
    return {
        ("keys", "insert"): [lambda tx: tx.keys.insert(api_key(p))],
        ("keys", "revoke"): [lambda tx: tx.keys.revoke(p, rows.key.id, NOON)],
        ("files", "insert"): [lambda tx: tx.files.insert(file(p))],
        ("images", "add"): [lambda tx: tx.images.add(p, rows.file.id, "1" * 64)],
        ("images", "change"): [lambda tx: tx.images.change(changed(rows.file, **as_ours), rows=9)],
        ("images", "remove"): [lambda tx: tx.images.remove(p, rows.file.id)],
        ("files", "delete"): [lambda tx: tx.files.delete(p, rows.file.id)],
        ("uploads", "insert"): [lambda tx: tx.uploads.insert(parted_upload(p))],
        ("uploads", "change"): [lambda tx: tx.uploads.change(changed(rows.upload, **as_ours), status="expired")],
        ("uploads", "add_part"): [lambda tx: tx.uploads.add_part(upload_part(rows.upload))],
        ("uploads", "drop_parts"): [lambda tx: tx.uploads.drop_parts(p, rows.upload.id)],
        ("jobs", "insert"): [lambda tx: tx.jobs.insert(job(p))],
        ("jobs", "change"): [lambda tx: tx.jobs.change(changed(rows.job, **as_ours), step=99)],
        ("jobs", "add_events"): [lambda tx: tx.jobs.add_events([metrics(rows.job, 7), event(rows.job)])],
        ("jobs", "add_checkpoint"): [lambda tx: tx.jobs.add_checkpoint(checkpoint(rows.job, 9))],
        ("jobs", "prove_checkpoint"): [lambda tx: tx.jobs.prove_checkpoint(p, rows.job.id, 1, {"tensors": 1})],
        ("jobs", "drop_checkpoints"): [lambda tx: tx.jobs.drop_checkpoints(p, rows.job.id, [1])],
        ("models", "insert"): [lambda tx: tx.models.insert(model(p))],
        ("models", "change"): [lambda tx: tx.models.change(changed(rows.model, **as_ours), status="deleted")],
        ("deployments", "insert"): [lambda tx: tx.deployments.insert(deployment(p))],
        ("deployments", "change"): [lambda tx: tx.deployments.change(changed(rows.deployment, **as_ours), replicas=9)],
        ("deployments", "add_event"): [lambda tx: tx.deployments.add_event(deployment_event(rows.deployment))],
        ("deployments", "retire"): [lambda tx: tx.deployments.retire(p, rows.deployment.id, NOON)],
        ("deployments", "retire_of_models"): [
            lambda tx: tx.deployments.retire_of_models(p, [rows.deployment.tuned_model_id or ""], NOON)
        ],
        ("channels", "insert"): [lambda tx: tx.channels.insert(channel(p))],
        ("channels", "change"): [lambda tx: tx.channels.change(changed(rows.channel, **as_ours), name="x")],
        ("deliveries", "insert"): [lambda tx: tx.deliveries.insert(delivery(rows.channel))],
        ("deliveries", "change"): [lambda tx: tx.deliveries.change(changed(rows.delivery, **as_ours), error="x")],
        ("deliveries", "give_up"): [lambda tx: tx.deliveries.give_up(p, rows.channel.id, status="given_up", error="x")],
        ("channels", "delete"): [lambda tx: tx.channels.delete(p, rows.channel.id)],
        ("batches", "insert"): [lambda tx: tx.batches.insert(batch(p))],
        ("batches", "change"): [lambda tx: tx.batches.change(changed(rows.batch, **as_ours), status="failed")],
        ("async_tasks", "insert"): [lambda tx: tx.async_tasks.insert(async_task(p, request_id="other"))],
        ("async_tasks", "end"): [lambda tx: tx.async_tasks.end(changed(rows.task, **as_ours), status="FAIL")],
        ("usage", "insert"): [lambda tx: tx.usage.insert([usage(p)])],
        ("usage", "change"): [lambda tx: tx.usage.change([changed(rows.usage, **as_ours, status="ok")])],
        ("usage", "remove"): [lambda tx: tx.usage.remove([changed(rows.usage, **as_ours)])],
        ("idempotency", "insert"): [lambda tx: tx.idempotency.insert(p, "route", "new", "f", "r", NOON)],
    }


def changed(record: Any, **values: Any) -> Any:
    return msgspec.structs.replace(record, **values)


def public_methods() -> set[tuple[str, str]]:
    """(attribute of a transaction, method) of all queries."""
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection:
        parts = vars(Transaction(connection))
    engine.dispose()
    return {
        (part, name)
        for part, queries in parts.items()
        for name, _ in inspect.getmembers(queries, inspect.ismethod)
        if not name.startswith("_")
    }


def test_no_method_is_left_out() -> None:
    rows = Rows("proj-1")
    assert set(reads("proj-1", rows)) | set(writes("proj-1", rows)) | NOT_OF_A_TENANT == public_methods()


@contextmanager
def statements() -> Iterator[list[str]]:
    """All SQL that any connection sends meanwhile."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(" ".join(statement.split()))

    sqlalchemy_event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sqlalchemy_event.remove(sa.Engine, "before_cursor_execute", note)


def unscoped(statement: str) -> bool:
    """Whether a statement touches a tenant table without naming the project where it counts."""
    if not any(re.search(rf"\b{table}\b", statement) for table in TENANT_TABLES):
        return False
    if statement.startswith("INSERT"):
        return "project_id" not in statement.partition(" VALUES")[0]
    return not re.search(r"\bWHERE\b.*\bproject_id = ", statement)


@pytest.mark.parametrize(
    ("statement", "wrong"),
    [
        ("SELECT files.project_id, files.id FROM files WHERE files.id = ?", True),
        ("DELETE FROM files", True),
        ("UPDATE jobs SET project_id = ? WHERE jobs.id = ?", True),
        ("INSERT INTO files (id) VALUES (?)", True),
        ("SELECT files.id FROM files WHERE files.project_id = ? AND files.id = ?", False),
        ("INSERT INTO files (project_id, id) VALUES (?, ?)", False),
        ("BEGIN IMMEDIATE", False),
    ],
)
def test_the_check_can_fail(statement: str, wrong: bool) -> None:
    assert unscoped(statement) is wrong


def test_every_statement_names_the_project(storage: Storage, ours: Project) -> None:
    rows = Rows(ours.id).store(storage)
    asked = 0
    with statements() as seen:
        for calls in (*reads(ours.id, rows).values(), *writes(ours.id, rows).values()):
            for call in calls:
                before = len(seen)
                with storage.write() as tx:
                    call(tx)
                touching = [each for each in seen[before:] if any(table in each for table in TENANT_TABLES)]
                assert touching, "a method that asks nothing proves nothing"
                asked += len(touching)
    assert asked > 30
    assert [each for each in seen if unscoped(each)] == []


def test_nobody_reads_what_others_have(storage: Storage, ours: Project, theirs: Project) -> None:
    rows = Rows(theirs.id).store(storage)
    for method, calls in reads(theirs.id, rows).items():
        for call in calls:
            with storage.read() as tx:
                assert call(tx), f"{method} finds the owner's rows, or the next check means nothing"
    for method, calls in reads(ours.id, rows).items():
        for call in calls:
            with storage.read() as tx:
                assert not call(tx), method


def test_nobody_changes_what_others_have(storage: Storage, ours: Project, theirs: Project) -> None:
    rows = Rows(theirs.id).store(storage)
    mine = Rows(ours.id).store(storage)
    before = {method: [ask(storage, call) for call in calls] for method, calls in reads(theirs.id, rows).items()}
    strangers = [
        ("keys", "revoke"),
        ("files", "delete"),
        ("images", "add"),
        ("images", "change"),
        ("images", "remove"),
        ("uploads", "change"),
        ("uploads", "drop_parts"),
        ("jobs", "change"),
        ("models", "change"),
        ("deployments", "change"),
        ("deployments", "retire"),
        ("channels", "change"),
        ("channels", "delete"),
        ("deliveries", "change"),
        ("deliveries", "give_up"),
        ("batches", "change"),
        ("async_tasks", "end"),
        ("usage", "change"),
        ("usage", "remove"),
    ]
    for method in strangers:
        for call in writes(ours.id, rows)[method]:
            with storage.write() as tx:
                assert not call(tx), method
    with storage.write() as tx:
        tx.jobs.add_events([metrics(mine.job, 5)])
        tx.idempotency.insert(ours.id, "route", "key", "other", "other", NOON + 9)
    after = {method: [ask(storage, call) for call in calls] for method, calls in reads(theirs.id, rows).items()}
    assert after == before
    with storage.read() as tx:
        key = tx.keys.find(rows.key.id)
        assert key is not None and key.revoked_at is None


def ask(storage: Storage, call: Callable[[Transaction], Any]) -> Any:
    with storage.read() as tx:
        return call(tx)


def test_events_checkpoints_and_parts_can_not_join_what_is_anothers(
    storage: Storage, ours: Project, theirs: Project
) -> None:
    rows = Rows(theirs.id).store(storage)
    for act in (
        lambda tx: tx.jobs.add_events([changed(event(rows.job), project_id=ours.id)]),
        lambda tx: tx.jobs.add_checkpoint(changed(checkpoint(rows.job, 3), project_id=ours.id)),
        lambda tx: tx.uploads.add_part(changed(upload_part(rows.upload), project_id=ours.id)),
        lambda tx: tx.deliveries.insert(changed(delivery(rows.channel), project_id=ours.id)),
        lambda tx: tx.deployments.add_event(changed(deployment_event(rows.deployment), project_id=ours.id)),
    ):
        with pytest.raises(exc.IntegrityError), storage.write() as tx:
            act(tx)


def test_the_cursor_of_another_project_is_an_unknown_one(storage: Storage, ours: Project, theirs: Project) -> None:
    rows, mine = Rows(theirs.id).store(storage), Rows(ours.id).store(storage)
    with storage.read() as tx:
        assert tx.files.list(ours.id, purpose=None, after=rows.file.id, limit=9) in ([], [mine.file])
        for page in (
            lambda: tx.jobs.list_events(ours.id, mine.job.id, after=rows.events[0].id, limit=9),
            lambda: tx.jobs.list_checkpoints(ours.id, mine.job.id, after=rows.checkpoint.id, limit=9),
        ):
            with pytest.raises(InvalidRequest):
                page()
