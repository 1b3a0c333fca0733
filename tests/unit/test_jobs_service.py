"""Creating, listing, cancelling, deleting: the decisions, on a real database, with no trainer."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.job_bench import PROJECT, Bench, a_base
from tunewright.accounts.idempotency import IdempotencyKey, from_headers
from tunewright.accounts.records import Project
from tunewright.errors import Conflict, IdempotencyMismatch, NotFound, RateLimited, TunewrightError
from tunewright.jobs.records import FAILED, PAUSED, QUEUED, RUNNING, SUCCEEDED, Job
from tunewright.jobs.service import CreateJob

OTHER = "proj-2"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "home")
    with bench.storage.write() as tx:
        tx.projects.insert(Project(id=OTHER, number="1000000002", name="other", created_at=1))
    yield bench
    bench.storage.close()


def create(bench: Bench, idempotency: IdempotencyKey | None = None, **changes: Any) -> Job:
    fields = {"model": "tiny", "training_file": changes.pop("training_file", None) or bench.upload()} | changes
    return bench.jobs.create(PROJECT, CreateJob(**fields), idempotency)


def refused(bench: Bench, **changes: Any) -> TunewrightError:
    with pytest.raises(TunewrightError) as caught:
        create(bench, **changes)
    with bench.storage.read() as tx:
        assert tx.jobs.list(PROJECT, after=None, limit=1) == [], "a refused request leaves nothing"
    assert caught.value.text("zh") != caught.value.text("en")
    return caught.value


def refused_beside(bench: Bench, **changes: Any) -> TunewrightError:
    """Like `refused`, with other jobs there."""
    with pytest.raises(TunewrightError) as caught:
        create(bench, **changes)
    return caught.value


def move(bench: Bench, job: Job, *statuses: str) -> Job:
    for status in statuses:
        with bench.storage.write() as tx:
            changed = tx.jobs.change(job, status=status, attempt=job.attempt + (status == RUNNING))
        if changed is None:
            raise AssertionError("the job was not where the test thought")
        job = changed
    return job


def key(value: str | None, body: bytes = b"{}", retry: str | None = None) -> IdempotencyKey:
    return from_headers(idempotency_key=value, retry_count=retry, key_id="k", route="POST /x", body=body)


def test_a_new_job(bench: Bench) -> None:
    woken: list[bool] = []
    bench.jobs.on_change = lambda: woken.append(True)
    job = create(
        bench,
        suffix="demo_test",
        seed=7,
        metadata={"a": "b"},
        request_id="r-1",
        hyperparameters={"n_epochs": "2"},
        validation_file=bench.upload(rows=4),
    )
    assert job == bench.job(job.id) and woken == [True]
    assert (job.status, job.seed, job.attempt, job.metadata, job.request_id) == ("validating", 7, 0, {"a": "b"}, "r-1")
    assert job.requested == {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    base, number, suffix, chance = job.tuned_model_name.split(":")
    assert (base, number, suffix, len(chance)) == ("tiny", "1000000001", "demo_test", 8)
    with bench.storage.read() as tx:
        model = tx.models.find(PROJECT, job.tuned_model_name)
    assert model is not None and (model.status, model.id, model.job_id) == ("training", job.tuned_model_id, job.id)
    assert bench.codes(job.id) == ["created"]
    with pytest.raises(NotFound):
        bench.models.resolve(PROJECT, job.tuned_model_name)


def test_a_seed_is_made_where_none_is_given(bench: Bench) -> None:
    assert len({create(bench).seed for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("changes", "kind", "code", "param"),
    [
        ({"model": None}, "invalid_request", "missing_required_parameter", "model"),
        ({"model": ""}, "invalid_request", "missing_required_parameter", "model"),
        ({"model": 5}, "invalid_request", "invalid_value", "model"),
        ({"model": "unknown", "training_file": "unknown"}, "not_found", "base_not_found", "model"),
        ({"model": "x" * 10_000}, "not_found", "base_not_found", "model"),
        ({"model": "../x"}, "not_found", "base_not_found", "model"),
        ({"training_file": "file-unknown"}, "not_found", "file_not_found", "training_file"),
        ({"training_file": 7}, "invalid_request", "invalid_value", "training_file"),
        ({"validation_file": "file-unknown"}, "not_found", "file_not_found", "validation_file"),
        ({"hyperparameters": {"n_epochs": 0}}, "invalid_request", "invalid_value", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"x": 0}}, "invalid_request", "unknown_parameter", "hyperparameters.x"),
        *(
            ({"suffix": suffix}, "invalid_request", "invalid_suffix", "suffix")
            for suffix in ("x" * 41, "a b", "../", "a\n", "😀", "$(id)", "", 5, ["a"])
        ),
        *(
            ({"seed": seed}, "invalid_request", "invalid_value", "seed")
            for seed in (-1, 2**63, 2**31, "x", True, 1.5, float("nan"))
        ),
        *(
            ({"metadata": metadata}, "invalid_request", "invalid_value", "metadata")
            for metadata in (
                {str(n): "" for n in range(17)},
                {"k" * 65: ""},
                {"k": "v" * 513},
                {"k": {"a": "b"}},
                {"k": 1},
                {"": "v"},
                ["k"],
            )
        ),
        ({"method": "reinforcement"}, "invalid_request", "method_not_supported", "method.type"),
        ({"method": "dpo"}, "invalid_request", "kind_not_supported", "training_file"),
        ({"method": ["x"]}, "invalid_request", "method_not_supported", "method.type"),
        ({"training_type": "full"}, "invalid_request", "training_type_not_supported", "training_type"),
        ({"training_type": "dpo"}, "invalid_request", "training_type_not_supported", "training_type"),
        ({"training_type": None}, "invalid_request", "training_type_not_supported", "training_type"),
        *(
            ({"max_bad_rows": rows}, "invalid_request", "invalid_value", "max_bad_rows")
            for rows in (-1, 100_001, 1.5, True, "3", float("nan"), [1])
        ),
        *(
            ({"max_bad_ratio": ratio}, "invalid_request", "invalid_value", "max_bad_ratio")
            for ratio in (-0.1, 0.51, True, "0.1", float("nan"), float("inf"))
        ),
        *(
            ({"validation_split": split}, "invalid_request", "invalid_value", "validation_split")
            for split in (0, -0.1, 0.51, True, "0.1", float("nan"))
        ),
        ({"validation_split": 0.1, "validation_file": "x"}, "invalid_request", "invalid_value", "validation_split"),
        *(
            (
                {"hyperparameters": {name: value}},
                "invalid_request",
                "validation_rows_required",
                f"hyperparameters.{name}",
            )
            for name, value in (("early_stopping", True), ("early_stopping", {"patience": 2}), ("eval_steps", 5))
        ),
        *(
            ({"tensorboard": wish}, "invalid_request", "invalid_value", "tensorboard")
            for wish in ("true", 1, [True], {"on": True})
        ),
        *(({"receipts": wish}, "invalid_request", "invalid_value", "receipts") for wish in ("some", True, ["on"])),
        ({"request_id": "x" * 129}, "invalid_request", "invalid_value", "request_id"),
        ({"request_id": 5}, "invalid_request", "invalid_value", "request_id"),
    ],
)
def test_requests_that_are_refused(bench: Bench, changes: dict[str, Any], kind: str, code: str, param: str) -> None:
    error = refused(bench, **changes)
    assert (error.kind, error.code, error.param) == (kind, code, param)


def test_what_needs_validation_rows_takes_them_of_either_origin(bench: Bench) -> None:
    wanted = {"early_stopping": {"patience": 2}, "eval_steps": 5}
    split = create(bench, hyperparameters=wanted, validation_split=0.2)
    other = create(bench, hyperparameters=wanted, validation_file=bench.upload(rows=4))
    assert split.requested["eval_steps"] == other.requested["eval_steps"] == 5


def test_the_limits_of_metadata_and_suffix_are_inside(bench: Bench) -> None:
    pairs = {f"{n:064d}": "v" * 512 for n in range(16)}
    assert create(bench, metadata=pairs, suffix="x" * 40, seed=2**31 - 1).metadata == pairs


def test_files_that_do_not_fit(bench: Bench) -> None:
    assert refused(bench, training_file=bench.upload(purpose="batch", kind=None)).code == "wrong_purpose"
    assert refused(bench, training_file=bench.upload(kind="preference")).code == "kind_not_supported"
    assert refused(bench, training_file=bench.upload(kind="image_generation")).code == "kind_not_supported"
    file_id = bench.upload()
    assert refused(bench, training_file=file_id, validation_file=file_id).code == "same_file"
    assert refused(bench, training_file=bench.upload(), validation_file=bench.upload()).code == "same_file"


def a_bad_file(bench: Bench, bad: int, rows: int = 100, **changes: Any) -> str:
    """A file that was kept although `bad` of its rows have errors."""
    file_id = bench.upload(rows=rows)
    report = {"kind": "chat", "rows": rows, "errors": bad, "bad_rows": bad, "counts": {"invalid_role": bad}} | changes
    change_file(bench, file_id, status="error", report=report)
    return file_id


def change_file(bench: Bench, file_id: str, **changes: Any) -> None:
    with bench.storage.write() as tx:
        file = tx.files.get(PROJECT, file_id)
        assert file is not None
        tx.files.delete(PROJECT, file_id)
        tx.files.insert(msgspec.structs.replace(file, **changes))


def test_a_file_with_bad_rows_needs_a_tolerance(bench: Bench) -> None:
    file_id = a_bad_file(bench, bad=7)
    none: dict[str, Any]
    given: dict[str, Any]
    for none in ({}, {"max_bad_rows": None, "max_bad_ratio": None}):
        error = refused(bench, training_file=file_id, **none)
        assert (error.kind, error.code, error.param) == ("invalid_request", "file_has_errors", "training_file")
        assert "7 of the 100 rows" in error.text() and f"/api/v1/datasets/{file_id}/repair" in error.text()
    for given, allowed in (
        ({"max_bad_rows": 6}, 6),
        ({"max_bad_rows": 0}, 0),
        ({"max_bad_ratio": 0.069}, 6),
        ({"max_bad_rows": 100, "max_bad_ratio": 0.05}, 5),
        ({"max_bad_rows": 2, "max_bad_ratio": 0.5}, 2),
    ):
        error = refused(bench, training_file=file_id, **given)
        assert (error.code, error.param) == ("too_many_bad_rows", "training_file")
        assert (error.values["found"], error.values["allowed"]) == (7, allowed)
        beside = refused(bench, training_file=bench.upload(rows=5), validation_file=file_id, **given)
        assert (beside.code, beside.param) == ("too_many_bad_rows", "validation_file")
    for given in ({"max_bad_rows": 7}, {"max_bad_ratio": 0.07}, {"max_bad_rows": 7.0, "max_bad_ratio": 0.5}):
        job = create(bench, training_file=file_id, **given)
        assert job.tolerance == given and bench.job(job.id) == job


def test_no_tolerance_covers_what_is_wrong_with_a_whole_file(bench: Bench) -> None:
    problems = [{"code": "too_many_examples", "severity": "error", "message": "x"}]
    file_id = a_bad_file(bench, bad=1, file_errors=1, problems=problems)
    error = refused(bench, training_file=file_id, max_bad_rows=100_000, max_bad_ratio=0.5)
    assert error.code == "file_has_errors" and "too_many_examples" in error.text()


def test_a_file_whose_images_are_on_their_way_is_waited_for(bench: Bench) -> None:
    file_id = bench.upload()
    change_file(bench, file_id, status="processing")
    error = refused(bench, training_file=file_id, max_bad_rows=5)
    assert (error.kind, error.code) == ("conflict", "file_not_ready")


def test_a_validation_split_is_part_of_the_job(bench: Bench) -> None:
    assert create(bench).validation_split is None
    job = create(bench, validation_split=0.5, validation_file="")
    assert job.validation_split == 0.5 and bench.job(job.id) == job
    error = refused_beside(bench, validation_split=0.1, validation_file=bench.upload(rows=2))
    assert (error.code, error.param) == ("invalid_value", "validation_split")


def test_bases_that_do_not_fit(bench: Bench) -> None:
    bench.bases.bases += [
        a_base(bench.home, "closed", methods=()),
        a_base(bench.home, "absent", path=None),
        a_base(bench.home, "rich", methods=("lora", "full", "dpo"), row_kinds=("chat", "preference")),
    ]
    closed = refused(bench, model="closed")
    assert closed.code == "model_not_tunable" and "rich" in closed.text()
    assert refused(bench, model="absent").code == "model_not_pulled"
    assert refused(bench, model="rich", method="dpo").code == "kind_not_supported"
    pairs = bench.upload(kind="preference")
    both = refused(bench, model="rich", method="dpo", training_file=pairs, training_type="full")
    assert both.code == "training_type_not_supported" and both.values["offered"] == "lora"
    assert create(bench, model="rich", training_type="full").training_type == "full"
    assert create(bench, model="rich", method="dpo", training_file=pairs).method == "dpo"


def test_qlora_is_refused_with_what_to_use_instead(bench: Bench) -> None:
    bench.bases.bases.append(a_base(bench.home, "rich", methods=("lora", "full", "dpo")))
    for model in ("tiny", "rich"):
        error = refused(bench, model=model, training_type="qlora")
        assert (error.code, error.param) == ("training_type_not_supported", "training_type")
        assert "GPU" in error.text() and "lora" in error.text("zh")
    assert bench.jobs.trainings(PROJECT, "rich")[1] == (("supervised", "lora"), ("supervised", "full"), ("dpo", "lora"))


def publish(bench: Bench, job: Job, **proof: Any) -> str:
    """The job's model as if it were trained; its name."""
    with bench.storage.write() as tx:
        model = tx.models.get(PROJECT, job.tuned_model_id)
        assert model is not None
        bench.models.publish(
            tx,
            model,
            adapter_path="a",
            adapter_sha256="b",
            renderer_hash="c",
            checkpoint_step=1,
            proof={"x": 1} | proof,
        )
    return model.name


def test_only_adapters_are_continued_and_only_as_adapters(bench: Bench) -> None:
    bench.bases.bases.append(
        a_base(bench.home, "rich", methods=("lora", "full", "dpo"), row_kinds=("chat", "preference"))
    )
    adapter, whole = (publish(bench, create(bench, model="rich"), **proof) for proof in ({}, {"kind": "full"}))
    assert refused_beside(bench, model=whole).code == "model_not_tunable"
    error = refused_beside(bench, model=adapter, training_type="full")
    assert (error.code, error.values["offered"]) == ("training_type_not_supported", "lora")
    assert create(bench, model=adapter).model == adapter
    pairs = bench.upload(kind="preference")
    assert create(bench, model=adapter, method="dpo", training_file=pairs).method == "dpo"


def test_another_projects_file_and_job_do_not_exist(bench: Bench) -> None:
    file_id, job = bench.upload(), create(bench)
    with pytest.raises(NotFound) as caught:
        bench.jobs.create(OTHER, CreateJob(model="tiny", training_file=file_id))
    assert caught.value.code == "file_not_found"
    for call in (bench.jobs.get, bench.jobs.cancel, bench.jobs.pause, bench.jobs.resume, bench.jobs.delete):
        with pytest.raises(NotFound) as caught:
            call(OTHER, job.id)
        assert caught.value.code == "job_not_found"
    for listing in (bench.jobs.events, bench.jobs.checkpoints):
        with pytest.raises(NotFound):
            listing(OTHER, job.id)
    assert bench.jobs.list(OTHER) == ([], False)


def test_the_same_request_id_gives_the_same_job(bench: Bench) -> None:
    first = create(bench, request_id="mine")
    assert create(bench, request_id="mine") == first
    assert create(bench, request_id="other").id != first.id
    assert len(bench.jobs.list(PROJECT)[0]) == 2


def test_idempotency_keys(bench: Bench) -> None:
    first = create(bench, key("k1"))
    assert create(bench, key("k1")) == first
    with pytest.raises(IdempotencyMismatch):
        create(bench, key("k1", body=b"{1}"))
    assert create(bench, key("k2")).id != first.id


def test_a_retry_of_the_same_body_is_the_same_job(bench: Bench) -> None:
    first = create(bench, key(None, b"{2}"))
    assert create(bench, key(None, b"{2}", retry="1")) == first
    assert create(bench, key(None, b"{2}", retry="0")).id != first.id, "the same body sent on purpose is a new job"


def test_a_replay_comes_before_every_check(bench: Bench) -> None:
    first = create(bench, key("k"), request_id="r")
    bench.bases.bases = []
    assert create(bench, key("k")) == first
    assert create(bench, request_id="r") == first


def test_many_at_once_with_one_request_id_make_one_job(bench: Bench) -> None:
    file_id = bench.upload()
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(create(bench, training_file=file_id, request_id="r").id))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8 and len(set(ids)) == 1
    assert len(bench.jobs.list(PROJECT)[0]) == 1


def test_the_queue_has_an_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home", max_queued_jobs=2)
    first = create(bench)
    create(bench)
    with pytest.raises(RateLimited) as caught:
        create(bench)
    assert caught.value.code == "too_many_jobs"
    bench.jobs.cancel(PROJECT, first.id)
    create(bench)
    bench.storage.close()


def test_lists_are_newest_first_in_pages(bench: Bench) -> None:
    jobs = [create(bench, metadata={"n": str(n % 2)}) for n in range(5)]
    page, more = bench.jobs.list(PROJECT, limit=2)
    assert [job.id for job in page] == [jobs[4].id, jobs[3].id] and more
    page, more = bench.jobs.list(PROJECT, after=page[-1].id, limit=3)
    assert [job.id for job in page] == [jobs[2].id, jobs[1].id, jobs[0].id] and not more
    page, more = bench.jobs.list(PROJECT, metadata={"n": "1"})
    assert [job.id for job in page] == [jobs[3].id, jobs[1].id] and not more


def test_cancel(bench: Bench) -> None:
    validating = create(bench)
    cancelled = bench.jobs.cancel(PROJECT, validating.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at is not None
    assert bench.jobs.cancel(PROJECT, validating.id) == cancelled
    queued = move(bench, create(bench), QUEUED)
    assert bench.jobs.cancel(PROJECT, queued.id).status == "cancelled"
    running = move(bench, create(bench), QUEUED, RUNNING)
    cancelling = bench.jobs.cancel(PROJECT, running.id)
    assert cancelling.status == "cancelling" and cancelling.finished_at is None
    assert bench.jobs.cancel(PROJECT, running.id) == cancelling
    for end in (SUCCEEDED, FAILED):
        job = move(bench, create(bench), QUEUED, RUNNING, end)
        with pytest.raises(Conflict) as caught:
            bench.jobs.cancel(PROJECT, job.id)
        assert caught.value.code == "invalid_state" and end in caught.value.text()


def test_pause_and_resume(bench: Bench) -> None:
    job = move(bench, create(bench), QUEUED)
    assert bench.jobs.pause(PROJECT, job.id).status == PAUSED
    assert bench.jobs.pause(PROJECT, job.id).status == PAUSED
    assert bench.jobs.resume(PROJECT, job.id).status == QUEUED
    running = move(bench, create(bench), QUEUED, RUNNING)
    with pytest.raises(Conflict) as caught:
        bench.jobs.resume(PROJECT, running.id)
    assert caught.value.code == "invalid_state"
    assert bench.jobs.pause(PROJECT, running.id).status == PAUSED
    with pytest.raises(Conflict):
        bench.jobs.pause(PROJECT, create(bench).id)


def test_delete(bench: Bench) -> None:
    job = create(bench)
    with pytest.raises(Conflict) as caught:
        bench.jobs.delete(PROJECT, job.id)
    assert caught.value.code == "job_not_finished"
    cancelled = bench.jobs.cancel(PROJECT, job.id)
    deleted = bench.jobs.delete(PROJECT, job.id)
    assert msgspec.structs.replace(deleted, deleted_at=None) == cancelled
    with pytest.raises(NotFound):
        bench.jobs.get(PROJECT, job.id)
    assert bench.jobs.list(PROJECT) == ([], False)


def test_events_in_both_directions(bench: Bench) -> None:
    job = create(bench)
    bench.jobs.cancel(PROJECT, job.id)
    newest, more = bench.jobs.events(PROJECT, job.id, limit=1)
    assert newest[0].code == "cancelled" and more
    older, more = bench.jobs.events(PROJECT, job.id, after=newest[0].id)
    assert [event.code for event in older] == ["created"] and not more
    assert bench.jobs.events_since(PROJECT, job.id, older[0].id) == newest
