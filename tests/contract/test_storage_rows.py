"""What every database must do with every kind of row."""

import msgspec
import pytest

from tests.contract.rows import (
    NOON,
    api_key,
    channel,
    checkpoint,
    dated_id,
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
)
from tunewright.accounts.records import ApiKey, Project
from tunewright.datasets.records import File, PartedUpload, UploadPart
from tunewright.deployments.records import RETIRED, Deployment, DeploymentEvent
from tunewright.errors import InvalidRequest
from tunewright.jobs.records import MOVES, TERMINAL, Job, JobCheckpoint, JobEvent
from tunewright.models.records import TunedModel
from tunewright.notifications.records import Channel, Delivery
from tunewright.storage import Storage, tables


@pytest.mark.parametrize(
    ("table", "record"),
    [
        ("projects", Project),
        ("api_keys", ApiKey),
        ("files", File),
        ("uploads", PartedUpload),
        ("upload_parts", UploadPart),
        ("jobs", Job),
        ("job_events", JobEvent),
        ("job_checkpoints", JobCheckpoint),
        ("tuned_models", TunedModel),
        ("deployments", Deployment),
        ("deployment_events", DeploymentEvent),
        ("channels", Channel),
        ("deliveries", Delivery),
    ],
)
def test_columns_are_the_fields_of_the_record(table: str, record: type[msgspec.Struct]) -> None:
    assert sorted(tables.metadata.tables[table].columns.keys()) == sorted(record.__struct_fields__)


def test_projects(storage: Storage, ours: Project, theirs: Project) -> None:
    late = msgspec.structs.replace(project("3"), created_at=NOON - 1)
    with storage.write() as tx:
        tx.projects.insert(late)
    with storage.read() as tx:
        assert tx.projects.get(ours.id) == ours
        assert tx.projects.get("proj-none") is None
        assert tx.projects.all()[0] == late
        assert len(tx.projects.all()) == 3


def test_keys(storage: Storage, ours: Project, theirs: Project) -> None:
    key, other = api_key(ours.id), api_key(theirs.id, secret_sealed=None)
    with storage.write() as tx:
        tx.keys.insert(key)
        tx.keys.insert(other)
    with storage.write() as tx:
        assert (tx.keys.find(key.id), tx.keys.find(other.id), tx.keys.find("none")) == (key, other, None)
        assert tx.keys.list(ours.id) == [key]
        assert tx.keys.revoke(theirs.id, key.id, NOON) is False
        assert tx.keys.revoke(ours.id, key.id, NOON) is True
        assert tx.keys.revoke(ours.id, key.id, NOON) is False
        assert tx.keys.find(key.id) == msgspec.structs.replace(key, revoked_at=NOON)


def test_files_come_back_as_they_went(storage: Storage, ours: Project) -> None:
    rich, plain = file(ours.id), file(ours.id, kind=None, rows=None, report={})
    with storage.write() as tx:
        tx.files.insert(rich)
        tx.files.insert(plain)
    with storage.write() as tx:
        assert tx.files.get(ours.id, rich.id) == rich
        assert tx.files.get(ours.id, plain.id) == plain
        assert tx.files.delete(ours.id, rich.id) is True
        assert tx.files.delete(ours.id, rich.id) is False
        assert tx.files.get(ours.id, rich.id) is None


def test_uploads_and_their_parts(storage: Storage, ours: Project, theirs: Project) -> None:
    done = parted_upload(ours.id, status="completed")
    open_ = parted_upload(ours.id, status="pending", file_id=None, completed_with=None, expires_at=NOON + 9)
    with storage.write() as tx:
        for each in (done, open_, parted_upload(theirs.id, status="pending", expires_at=NOON + 30)):
            tx.uploads.insert(each)
        parts = [upload_part(open_, id=dated_id("part", second)) for second in range(4)]
        for part in reversed(parts):
            tx.uploads.add_part(part)
        tx.uploads.add_part(upload_part(done, size_bytes=1))
    with storage.write() as tx:
        assert (tx.uploads.get(ours.id, done.id), tx.uploads.get(ours.id, open_.id)) == (done, open_)
        assert tx.uploads.count_pending(ours.id) == 1
        assert tx.uploads.parts(ours.id, open_.id) == parts
        assert tx.uploads.parts(ours.id, open_.id, after=parts[0].id, limit=2) == parts[1:3]
        assert tx.uploads.count_parts(ours.id, open_.id) == 4
        assert tx.uploads.received_bytes(ours.id, open_.id) == 4 * 2**33
        assert [each.id for each in tx.uploads.overdue(NOON + 9)] == [open_.id]
        assert tx.uploads.overdue(NOON + 8) == []
        assert tx.uploads.forget_expired_before(NOON + 60) == 0
        ended = tx.uploads.change(open_, status="expired")
        assert ended == msgspec.structs.replace(open_, status="expired")
        assert tx.uploads.change(open_, status="completed") is None, "it is not pending any more"
        assert tx.uploads.get(ours.id, open_.id) == ended
        assert tx.uploads.drop_parts(ours.id, open_.id) is True
        assert tx.uploads.drop_parts(ours.id, open_.id) is False
        assert tx.uploads.received_bytes(ours.id, open_.id) == 0
        assert tx.uploads.forget_expired_before(NOON + 10) == 1
        assert tx.uploads.get(ours.id, open_.id) is None
        with pytest.raises(ValueError, match="keeps its id"):
            tx.uploads.change(done, id="upload-y")


@pytest.mark.parametrize("ascending", [False, True])
def test_pages_of_files(storage: Storage, ours: Project, ascending: bool) -> None:
    stored = [
        file(
            ours.id,
            id=dated_id("file", second),
            created_at=NOON + second,
            purpose="batch" if second % 3 == 0 else "fine-tune",
        )
        for second in (0, 1, 1, 1, 2, 3, 3, 4)
    ]
    expected = sorted(stored, key=lambda each: (each.created_at, each.id), reverse=not ascending)
    with storage.write() as tx:
        for each in reversed(stored):
            tx.files.insert(each)

    def walk(limit: int, purpose: str | None) -> list[File]:
        found: list[File] = []
        with storage.read() as tx:
            while True:
                after = found[-1].id if found else None
                part = tx.files.list(ours.id, purpose=purpose, after=after, limit=limit, ascending=ascending)
                assert len(part) <= limit
                found += part
                if not part:
                    return found

    for limit in (1, 2, 3, 100):
        assert walk(limit, None) == expected
        assert walk(limit, "batch") == [each for each in expected if each.purpose == "batch"]
    # A page goes on after a row that is gone, before rows and behind them.
    with storage.write() as tx:
        for position in (0, 3, len(expected) - 1):
            gone = expected[position]
            tx.files.delete(ours.id, gone.id)
            after_it = tx.files.list(ours.id, purpose=None, after=gone.id, limit=100, ascending=ascending)
            assert after_it == expected[position + 1 :]
            tx.files.insert(gone)


@pytest.mark.parametrize("after", ["", "x", "file-1", "file-99999999999999000-" + "a" * 20, "'; DROP TABLE files; --"])
def test_a_page_after_no_id(storage: Storage, ours: Project, after: str) -> None:
    with pytest.raises(InvalidRequest) as caught, storage.read() as tx:
        tx.files.list(ours.id, purpose=None, after=after, limit=1)
    assert (caught.value.code, caught.value.param) == ("invalid_cursor", "after")


def test_jobs_come_back_as_they_went(storage: Storage, ours: Project) -> None:
    full = job(ours.id, request_id="request-1")
    bare = Job(
        id=dated_id("ftjob", 1),
        project_id=ours.id,
        base_code="b",
        model="m",
        tuned_model_id="t",
        tuned_model_name="n",
        training_file="f",
        created_at=NOON,
    )
    with storage.write() as tx:
        tx.jobs.insert(full)
        tx.jobs.insert(bare)
    with storage.read() as tx:
        assert tx.jobs.get(ours.id, full.id) == full
        assert tx.jobs.get(ours.id, bare.id) == bare
        assert tx.jobs.find_by_request_id(ours.id, "request-1") == full
        assert tx.jobs.find_by_request_id(ours.id, "request-2") is None


def test_jobs_that_ended_lately(storage: Storage, ours: Project, theirs: Project) -> None:
    """Those that trained, of all projects, deleted ones too: they used the machine."""
    late, deleted = job(ours.id, finished_at=NOON + 9), job(theirs.id, finished_at=NOON + 5, deleted_at=NOON + 8)
    others = [
        job(ours.id, finished_at=NOON),
        job(ours.id, finished_at=NOON + 7, elapsed_s=0.0),
        job(ours.id, finished_at=None),
    ]
    with storage.write() as tx:
        for each in (deleted, late, *others):
            tx.jobs.insert(each)
    with storage.read() as tx:
        assert tx.jobs.ended_since(NOON, 9) == [late, deleted]
        assert tx.jobs.ended_since(NOON, 1) == [late]


def test_pages_of_jobs(storage: Storage, ours: Project) -> None:
    stored = [
        job(
            ours.id,
            id=dated_id("ftjob", second),
            created_at=NOON + second,
            metadata={"team": str(second % 2), "x": "y"},
        )
        for second in range(6)
    ]
    hidden = job(ours.id, id=dated_id("ftjob", 6), created_at=NOON + 6, deleted_at=NOON + 7)
    bare = job(ours.id, id=dated_id("ftjob", 7), created_at=NOON + 7, metadata=None)
    newest_first = [bare, *reversed(stored)]
    with storage.write() as tx:
        for each in (*stored, hidden, bare):
            tx.jobs.insert(each)
    with storage.read() as tx:
        assert tx.jobs.list(ours.id, after=None, limit=100) == newest_first
        assert tx.jobs.list(ours.id, after=None, limit=2) == newest_first[:2]
        assert tx.jobs.list(ours.id, after=newest_first[1].id, limit=2) == newest_first[2:4]
        assert tx.jobs.list(ours.id, after=hidden.id, limit=1) == [stored[-1]]
        odd = [each for each in newest_first if (each.metadata or {}).get("team") == "1"]
        assert tx.jobs.list(ours.id, after=None, limit=100, metadata={"team": "1"}) == odd
        assert tx.jobs.list(ours.id, after=odd[0].id, limit=1, metadata={"team": "1", "x": "y"}) == [odd[1]]
        assert tx.jobs.list(ours.id, after=None, limit=100, metadata={"team": "1", "x": "z"}) == []
        assert tx.jobs.list(ours.id, after=None, limit=100, metadata={}) == newest_first
        for name in (bare.model, bare.base_code):
            assert tx.jobs.list(ours.id, after=None, limit=2, status=bare.status, model=name) == newest_first[:2]
        assert tx.jobs.list(ours.id, after=None, limit=2, status="other") == []
        assert tx.jobs.list(ours.id, after=None, limit=2, model="other") == []
        assert tx.jobs.get(ours.id, hidden.id) is None


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({'quo"te': "a'b"}, True),
        ({"点": "中文"}, True),
        ({"$.team": "red"}, False),
        ({"team": "red' OR '1'='1"}, False),
        ({"te%": "red"}, False),
        ({"": ""}, False),
    ],
)
def test_metadata_is_matched_exactly(storage: Storage, ours: Project, wanted: dict[str, str], found: bool) -> None:
    with storage.write() as tx:
        tx.jobs.insert(job(ours.id))
        assert bool(tx.jobs.list(ours.id, after=None, limit=9, metadata=wanted)) is found


def test_counts_and_users_of_a_file(storage: Storage, ours: Project) -> None:
    with storage.write() as tx:
        for status in MOVES:
            tx.jobs.insert(job(ours.id, status=status, training_file=f"file-{status}", validation_file="file-v"))
        assert tx.jobs.count(ours.id, frozenset({"queued", "running"})) == 2
        assert tx.jobs.count(ours.id, frozenset()) == 0
        for status in MOVES:
            users = tx.jobs.using_file(ours.id, f"file-{status}")
            assert len(users) == (0 if status in TERMINAL else 1)
        assert len(tx.jobs.using_file(ours.id, "file-v")) == len(MOVES) - len(TERMINAL)
        assert tx.jobs.using_file(ours.id, "file-x") == []


def test_unfinished_jobs_are_oldest_first_and_of_all_projects(storage: Storage, ours: Project, theirs: Project) -> None:
    stored = [
        job(ours.id, status="running", created_at=NOON + 3),
        job(theirs.id, status="queued", created_at=NOON + 1),
        job(ours.id, status="failed", created_at=NOON),
        job(ours.id, status="running", created_at=NOON + 2, deleted_at=NOON + 9),
    ]
    with storage.write() as tx:
        for each in stored:
            tx.jobs.insert(each)
        assert tx.jobs.unfinished() == [stored[1], stored[3], stored[0]]


def test_every_move_of_a_job(storage: Storage, ours: Project) -> None:
    with storage.write() as tx:
        for start in MOVES:
            for end in MOVES:
                before = job(ours.id, status=start)
                tx.jobs.insert(before)
                if end == start or end in MOVES[start]:
                    assert tx.jobs.change(before, status=end) == msgspec.structs.replace(before, status=end)
                else:
                    with pytest.raises(ValueError, match="can't move"):
                        tx.jobs.change(before, status=end)
                    assert tx.jobs.get(ours.id, before.id) == before


def test_a_change_needs_the_status_and_attempt_it_saw(storage: Storage, ours: Project) -> None:
    seen = job(ours.id, status="queued", attempt=0, error=None)
    with storage.write() as tx:
        tx.jobs.insert(seen)
        running = tx.jobs.change(seen, status="running", attempt=1)
        assert running is not None and running.attempt == 1
        assert tx.jobs.change(seen, status="cancelled") is None, "status changed meanwhile"
        assert tx.jobs.change(msgspec.structs.replace(running, attempt=0), step=9) is None, "a fenced trainer"
        assert tx.jobs.change(job(ours.id), step=1) is None, "no such row"
        failed = tx.jobs.change(
            running, status="failed", error=job(ours.id).error, result_files=("x",), rows={"used": 1}
        )
        assert failed == tx.jobs.get(ours.id, seen.id)
        assert failed is not None
        assert (failed.error, failed.result_files, failed.rows) == (job(ours.id).error, ("x",), {"used": 1})
        assert tx.jobs.change(failed) == failed
        cleared = tx.jobs.change(failed, error=None, deleted_at=NOON)
        assert cleared is not None and cleared.error is None
        assert tx.jobs.get(ours.id, seen.id) is None


@pytest.mark.parametrize("changes", [{"id": "x"}, {"project_id": "x"}])
def test_a_job_keeps_its_identity(storage: Storage, ours: Project, changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="keeps"), storage.write() as tx:
        tx.jobs.change(job(ours.id), **changes)


def test_a_change_names_fields_only(storage: Storage, ours: Project) -> None:
    with pytest.raises(TypeError), storage.write() as tx:
        tx.jobs.change(job(ours.id), **{"status = 'x', step": 1})


def test_a_request_id_is_free_again_after_deletion(storage: Storage, ours: Project) -> None:
    first, second = job(ours.id, request_id="r"), job(ours.id, request_id="r")
    with storage.write() as tx:
        tx.jobs.insert(first)
        tx.jobs.change(first, deleted_at=NOON)
        assert tx.jobs.find_by_request_id(ours.id, "r") is None
        tx.jobs.insert(second)
        assert tx.jobs.find_by_request_id(ours.id, "r") == second


def test_events_are_numbered_and_metrics_come_once(storage: Storage, ours: Project) -> None:
    first, second = job(ours.id), job(ours.id)
    with storage.write() as tx:
        tx.jobs.insert(first)
        tx.jobs.insert(second)
        tx.jobs.add_events([event(first), metrics(first, 1), event(second), metrics(first, 1), metrics(first, 2)])
    with storage.write() as tx:
        tx.jobs.add_events([])
        tx.jobs.add_events([metrics(first, 2), event(first, step=2), metrics(second, 2), metrics(first, 3)])
    with storage.read() as tx:
        events = tx.jobs.events_since(ours.id, first.id, after_id=None, limit=100)
        assert [(e.sequence, e.type, e.step) for e in events] == [
            (1, "message", None),
            (2, "metrics", 1),
            (3, "metrics", 2),
            (4, "message", 2),
            (5, "metrics", 3),
        ]
        assert [e.sequence for e in tx.jobs.events_since(ours.id, second.id, after_id=None, limit=100)] == [1, 2]


def test_many_repeated_metrics(storage: Storage, ours: Project) -> None:
    of = job(ours.id)
    with storage.write() as tx:
        tx.jobs.insert(of)
        tx.jobs.add_events([metrics(of, step) for step in range(1200)])
        tx.jobs.add_events([metrics(of, step) for step in range(1201)])
        assert tx.jobs.list_events(ours.id, of.id, after=None, limit=1)[0].sequence == 1201


def test_pages_of_events(storage: Storage, ours: Project) -> None:
    of = job(ours.id)
    with storage.write() as tx:
        tx.jobs.insert(of)
        tx.jobs.add_events([event(of) for _ in range(5)])
    with storage.read() as tx:
        newest_first = tx.jobs.list_events(ours.id, of.id, after=None, limit=100)
        assert tx.jobs.has_event(ours.id, of.id, newest_first[0].code)
        assert not tx.jobs.has_event(ours.id, of.id, "none") and not tx.jobs.has_event(
            "other", of.id, newest_first[0].code
        )
        assert [e.sequence for e in newest_first] == [5, 4, 3, 2, 1]
        assert tx.jobs.list_events(ours.id, of.id, after=newest_first[1].id, limit=2) == newest_first[2:4]
        assert tx.jobs.list_events(ours.id, of.id, after=newest_first[4].id, limit=2) == []
        oldest_first = newest_first[::-1]
        assert tx.jobs.events_since(ours.id, of.id, after_id=oldest_first[1].id, limit=2) == oldest_first[2:4]
        assert tx.jobs.events_since(ours.id, of.id, after_id="unknown", limit=9) == oldest_first
    with pytest.raises(InvalidRequest), storage.read() as tx:
        tx.jobs.list_events(ours.id, of.id, after="unknown", limit=1)


def test_checkpoints(storage: Storage, ours: Project) -> None:
    of = job(ours.id)
    stored = [checkpoint(of, step) for step in (2, 4, 6)]
    with storage.write() as tx:
        tx.jobs.insert(of)
        for each in (*stored, checkpoint(of, 4)):
            tx.jobs.add_checkpoint(each)
    with storage.read() as tx:
        newest_first = stored[::-1]
        assert tx.jobs.list_checkpoints(ours.id, of.id, after=None, limit=9) == newest_first
        assert tx.jobs.list_checkpoints(ours.id, of.id, after=newest_first[0].id, limit=1) == newest_first[1:2]
    with pytest.raises(InvalidRequest), storage.read() as tx:
        tx.jobs.list_checkpoints(ours.id, of.id, after="unknown", limit=1)
    with storage.write() as tx:
        tx.jobs.drop_checkpoints(ours.id, of.id, [2, 6])
        tx.jobs.prove_checkpoint(ours.id, of.id, 4, {"tensors": 9})
    with storage.read() as tx:
        assert [each.step for each in tx.jobs.list_checkpoints(ours.id, of.id, after=None, limit=9)] == [4]
        found = tx.jobs.find_checkpoint(ours.id, of.id, 4)
        assert found is not None and (found.id, found.proof) == (stored[1].id, {"tensors": 9})
        assert tx.jobs.find_checkpoint(ours.id, of.id, 6) is None


def test_models(storage: Storage, ours: Project) -> None:
    older, newer = model(ours.id, created_at=NOON), model(ours.id, created_at=NOON + 1)
    reserved = model(ours.id, status="training", proof={}, adapter_path=None)
    with storage.write() as tx:
        for each in (older, newer, reserved):
            tx.models.insert(each)
        assert tx.models.list(ours.id) == [newer, older]
        assert tx.models.find(ours.id, reserved.name) == reserved
        assert tx.models.get(ours.id, reserved.id) == reserved
        ready = tx.models.change(reserved, status="ready", proof={"tensors": 1}, adapter_path="p")
        assert ready == msgspec.structs.replace(reserved, status="ready", proof={"tensors": 1}, adapter_path="p")
        assert tx.models.change(reserved, status="deleted") is None, "status changed meanwhile"
        deleted = tx.models.change(newer, status="deleted", deleted_at=NOON)
        assert tx.models.find(ours.id, newer.name) == deleted
        assert newer.id not in [each.id for each in tx.models.list(ours.id)]
        with pytest.raises(ValueError, match="keeps"):
            tx.models.change(older, name="other")


def test_what_the_sweep_may_remove(storage: Storage, ours: Project, theirs: Project) -> None:
    """Only what was deleted, or will never be made; never what the database does not know."""
    states = ("running", "failed", "cancelled")
    going = [
        job(p.id, status=state, tuned_model_id=f"model-{state}-{p.id}") for p in (ours, theirs) for state in states
    ]
    made = [model(j.project_id, id=j.tuned_model_id, job_id=j.id, status="training", proof={}) for j in going]
    ready = [model(ours.id), model(ours.id, status="deleted", deleted_at=NOON)]
    removed = job(theirs.id, status="succeeded", deleted_at=NOON)
    with storage.write() as tx:
        for each in (*going, removed):
            tx.jobs.insert(each)
        for each in (*made, *ready):
            tx.models.insert(each)
    with storage.read() as tx:
        asked = [each.id for each in (*made, *ready)] + [f"unknown-{n}" for n in range(1000)]
        over = [m.id for m, j in zip(made, going, strict=True) if j.status != "running"]
        assert sorted(tx.models.gone(asked)) == sorted([*over, ready[1].id])
        assert tx.models.gone(asked[:1]) == tx.models.gone([]) == []
        assert tx.jobs.deleted([each.id for each in going] + [removed.id, "unknown"]) == [removed.id]


def test_the_outbox(storage: Storage, ours: Project, theirs: Project) -> None:
    mine, quiet, other = channel(ours.id), channel(ours.id, status="disabled"), channel(theirs.id)
    late = delivery(mine, next_at=NOON + 5)
    early = delivery(mine, next_at=NOON + 1, data={"点": ["中文", None, 1.5]}, metered=False)
    over = delivery(mine, next_at=NOON, status="delivered")
    others = delivery(other, next_at=NOON - 1)
    with storage.write() as tx:
        for each in (mine, quiet, other):
            tx.channels.insert(each)
        for each in (late, early, over, others):
            tx.deliveries.insert(each)
    with storage.read() as tx:
        assert tx.channels.get(ours.id, mine.id) == mine
        assert {each.id for each in tx.channels.list(ours.id)} == {mine.id, quiet.id}
        assert tx.channels.enabled(ours.id) == [mine]
        assert tx.deliveries.due_channels(NOON + 1) == [(theirs.id, other.id), (ours.id, mine.id)]
        assert tx.deliveries.due_channels(NOON) == [(theirs.id, other.id)]
        assert tx.deliveries.next_due(ours.id, mine.id, NOON + 9) == early
        assert tx.deliveries.next_due(ours.id, mine.id, NOON) is None
        assert tx.deliveries.metered_since(ours.id, NOON + 1) == 2 * 2 * 3
        assert tx.deliveries.metered_since(ours.id, NOON + 2) == 0
        assert len(tx.deliveries.list(ours.id, mine.id, after=None, limit=9)) == 3
    with storage.write() as tx:
        claimed = tx.deliveries.change(early, attempts=3, next_at=NOON + 60)
        assert claimed is not None and tx.deliveries.change(early, attempts=3) is None, "whoever is first has it"
        assert tx.deliveries.give_up(ours.id, mine.id, status="given_up", error="x") == 2
        assert tx.deliveries.change(claimed, status="delivered") is None, "it was ended meanwhile"
        assert tx.deliveries.forget_before(NOON) == 0 and tx.deliveries.forget_before(NOON + 1) == 3
        assert tx.deliveries.due_channels(NOON + 99) == [(theirs.id, other.id)]
        assert tx.channels.delete(theirs.id, other.id) and not tx.channels.delete(theirs.id, other.id)
        assert tx.deliveries.due_channels(NOON + 99) == []


def test_idempotency_rows(storage: Storage, ours: Project) -> None:
    with storage.write() as tx:
        tx.idempotency.insert(ours.id, "route", "k", "f1", "r1", NOON)
        assert tx.idempotency.find(ours.id, "route", "k", since=NOON) == ("f1", "r1")
        assert tx.idempotency.find(ours.id, "route", "k", since=NOON + 1) is None
        assert tx.idempotency.find(ours.id, "other", "k", since=0) is None
        tx.idempotency.insert(ours.id, "route", "k", "f2", "r2", NOON + 5)
        assert tx.idempotency.find(ours.id, "route", "k", since=NOON) == ("f2", "r2")
        assert tx.idempotency.forget_before(NOON + 5) == 0
        assert tx.idempotency.forget_before(NOON + 6) == 1
        assert tx.idempotency.find(ours.id, "route", "k", since=0) is None


def test_leases(storage: Storage) -> None:
    with storage.write() as tx:
        leases = tx.leases
        assert leases.take("loop", "a", now_ms=1000, ttl_ms=100) == 1
        assert leases.take("loop", "a", now_ms=1050, ttl_ms=100) == 1
        assert leases.take("loop", "b", now_ms=1149, ttl_ms=100) is None
        assert leases.take("other", "b", now_ms=1100, ttl_ms=100) == 1
        assert leases.take("loop", "b", now_ms=1150, ttl_ms=100) == 2
        assert leases.take("loop", "a", now_ms=1160, ttl_ms=100) is None
        leases.release("loop", "a")
        assert leases.take("loop", "a", now_ms=1160, ttl_ms=100) is None
        leases.release("loop", "b")
        assert leases.take("loop", "a", now_ms=1160, ttl_ms=100) == 3


def test_deployments(storage: Storage, ours: Project, theirs: Project) -> None:
    first = deployment(ours.id, name="mine", model="m", memory_bytes=1, tuned_model_id="model-1")
    second = deployment(ours.id, name="mine", model="m", created_at=NOON + 1, memory_source="estimated")
    other = deployment(theirs.id, name="mine", model="m", tuned_model_id="model-1")
    with storage.write() as tx:
        for each in (first, second, other):
            tx.deployments.insert(each)
    with storage.write() as tx:
        assert tx.deployments.get(ours.id, first.id) == first
        assert tx.deployments.list(ours.id, after=None, limit=9) == [second, first]
        assert tx.deployments.list(ours.id, after=second.id, limit=9) == [first]
        assert tx.deployments.named(ours.id, "mine") == tx.deployments.serving(ours.id, "m") == second
        assert tx.deployments.measured(ours.id, "m", True) == 1 and tx.deployments.measured(ours.id, "m", False) is None
        assert sorted(each.id for each in tx.deployments.live()) == sorted((first.id, other.id, second.id))
        changed = tx.deployments.change(first, replicas=3, replica_records=())
        assert changed is not None and (changed.replicas, changed.replica_records) == (3, ())
        retired = tx.deployments.retire_of_models(ours.id, ["model-1"], NOON + 2)
        assert {each.id for each in retired} == {first.id, second.id}
        assert tx.deployments.change(first, replicas=4) is None, "what is undeployed never changes again"
        assert not tx.deployments.retire(ours.id, first.id, NOON + 3)
        gone = tx.deployments.get(ours.id, first.id)
        assert gone is not None and (gone.phase, gone.status, gone.retired_at) == (RETIRED, "stopped", NOON + 2)
        assert tx.deployments.live() == [other] and tx.deployments.list(ours.id, after=None, limit=9) == []
        assert tx.deployments.serving(ours.id, "m") is None and tx.deployments.named(ours.id, "mine") is not None


def test_events_of_a_deployment_are_the_newest_thousand(storage: Storage, ours: Project) -> None:
    of = deployment(ours.id)
    made = [deployment_event(of) for _ in range(1005)]
    with storage.write() as tx:
        tx.deployments.insert(of)
        for each in made:
            tx.deployments.add_event(each)
    with storage.read() as tx:
        newest = tx.deployments.events(ours.id, of.id, after=None, limit=2)
        assert [(each.id, each.sequence) for each in newest] == [(made[-1].id, 1005), (made[-2].id, 1004)]
        rest = tx.deployments.events(ours.id, of.id, after=newest[-1].id, limit=5000)
        assert [each.id for each in rest] == [each.id for each in reversed(made[5:-2])]
        with pytest.raises(InvalidRequest):
            tx.deployments.events(ours.id, of.id, after="none", limit=2)
