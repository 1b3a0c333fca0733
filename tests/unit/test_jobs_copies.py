"""Trying a job again, and copying it with changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.job_bench import PROJECT, Bench, a_base
from tunewright.accounts.idempotency import IdempotencyKey, from_headers
from tunewright.errors import Conflict, IdempotencyMismatch, InvalidRequest, NotFound
from tunewright.jobs.records import CANCELLED, FAILED, QUEUED, Job, JobError, Suggestion
from tunewright.jobs.service import CreateJob

OF_A_COPY = {"id", "tuned_model_id", "tuned_model_name", "created_at", "status", "finished_at", "error"}
"""What may differ between a job and its like, beside the lineage."""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "home")
    bench.bases.bases.append(a_base(bench.home, "rich", methods=("lora", "full", "dpo")))
    yield bench
    bench.storage.close()


def rich_job(bench: Bench, **changes: Any) -> Job:
    wanted: dict[str, Any] = {
        "model": "tiny",
        "training_file": bench.upload(),
        "validation_split": 0.25,
        "suffix": "mine",
        "hyperparameters": {"n_epochs": 4, "lora_rank": 8},
        "metadata": {"a": "b"},
        "max_bad_rows": 3,
        "request_id": "r-1",
        "priority": "high",
        "rehearsal": "always",
        "receipts": "off",
        "tensorboard": True,
    }
    return bench.jobs.create(PROJECT, CreateJob(**(wanted | changes)))


def ended(bench: Bench, job: Job, status: str = FAILED, error: JobError | None = None) -> Job:
    with bench.storage.write() as tx:
        changed = tx.jobs.change(job, status=status, error=error, finished_at=job.created_at + 1)
    assert changed is not None
    return changed


def key(name: str, path: str) -> IdempotencyKey:
    return from_headers(idempotency_key=name, retry_count=None, key_id="k", route=f"POST {path}", body=b"")


def differences(one: Job, other: Job) -> set[str]:
    return {name for name in Job.__struct_fields__ if getattr(one, name) != getattr(other, name)}


@pytest.mark.parametrize("status", [FAILED, CANCELLED])
def test_a_retry_has_the_same_settings_and_its_own_identity(bench: Bench, status: str) -> None:
    job = ended(bench, rich_job(bench), status, JobError(code="crashed", message="x"))
    again = bench.jobs.retry(PROJECT, job.id)
    assert again.status == "validating" and again.retry_of == job.id and again.cloned_from is None
    assert differences(job, again) <= OF_A_COPY | {"retry_of", "request_id"}
    assert again.request_id is None and again.seed == job.seed
    assert again.tuned_model_name.split(":")[:3] == job.tuned_model_name.split(":")[:3]
    assert again.tuned_model_name != job.tuned_model_name
    first = bench.events(again.id)[0]
    assert first.values == {"job": again.id, "source": job.id}
    second = bench.jobs.retry(PROJECT, ended(bench, again).id)
    assert second.retry_of == again.id, "a retry can be tried again itself"


def test_a_job_under_way_is_not_tried_again_but_can_be_copied(bench: Bench) -> None:
    job = rich_job(bench)
    with pytest.raises(Conflict) as caught:
        bench.jobs.retry(PROJECT, job.id)
    assert caught.value.code == "job_not_finished" and caught.value.text("zh") != caught.value.text()
    copy = bench.jobs.clone(PROJECT, job.id, {})
    assert copy.cloned_from == job.id and copy.retry_of is None
    assert differences(job, copy) <= OF_A_COPY | {"cloned_from", "request_id"}


def test_what_is_written_beside_the_model_stays_in_a_retry_and_a_copy(bench: Bench) -> None:
    wanted = {"receipts": "off", "tensorboard": True}
    job = ended(bench, rich_job(bench))
    for again in (bench.jobs.retry(PROJECT, job.id), bench.jobs.clone(PROJECT, job.id, {})):
        assert again.options == wanted and again.rehearsal == {"wanted": "always"}
    changes = {"receipts": "on", "tensorboard": None, "rehearsal": None}
    other = bench.jobs.clone(PROJECT, job.id, changes)
    assert other.options == {"receipts": "on", "tensorboard": False} and other.rehearsal == {}


def test_the_suggestion_of_a_failure_is_applied_on_wish_only(bench: Bench) -> None:
    changes = {"hyperparameters": {"batch_size": 1, "lora_rank": None}, "max_bad_rows": 7}
    error = JobError(code="out_of_memory", message="x", suggestion=Suggestion(message="y", changes=changes))
    job = ended(bench, rich_job(bench), error=error)
    assert bench.job(job.id).error == error
    assert bench.jobs.retry(PROJECT, job.id).requested == job.requested
    changed = bench.jobs.retry(PROJECT, job.id, apply_suggestion=True)
    assert changed.requested == {"n_epochs": 4, "batch_size": 1, "learning_rate_multiplier": "auto"}
    assert changed.tolerance == {"max_bad_rows": 7} and changed.retry_of == job.id
    silent = ended(bench, rich_job(bench, request_id=None))
    with pytest.raises(InvalidRequest) as caught:
        bench.jobs.retry(PROJECT, silent.id, apply_suggestion=True)
    assert (caught.value.code, caught.value.param) == ("no_suggestion", "apply_suggestion")


def test_a_copy_changes_what_is_named_and_nothing_else(bench: Bench) -> None:
    job = rich_job(bench)
    copy = bench.jobs.clone(PROJECT, job.id, {"hyperparameters": {"n_epochs": 2, "batch_size": "5"}, "suffix": None})
    assert copy.requested == {"n_epochs": 2, "batch_size": 5, "learning_rate_multiplier": "auto", "lora_rank": 8}
    assert copy.suffix is None and copy.training_file == job.training_file and copy.seed == job.seed
    plain = bench.jobs.clone(PROJECT, job.id, {"hyperparameters": None, "validation_split": None, "seed": 3})
    assert set(plain.requested.values()) == {"auto"} and plain.validation_split is None and plain.seed == 3
    with pytest.raises(InvalidRequest) as caught:
        bench.jobs.clone(PROJECT, job.id, {"hyperparameters": {"n_epochs": 0}})
    assert caught.value.param == "hyperparameters.n_epochs"
    with pytest.raises(InvalidRequest):
        bench.jobs.clone(PROJECT, job.id, {"hyperparameters": [1]})


def test_a_copy_may_have_another_method(bench: Bench) -> None:
    pairs = bench.upload(kind="preference")
    job = rich_job(bench, model="rich", method="dpo", training_file=pairs, hyperparameters={"beta": 0.5})
    copy = bench.jobs.clone(PROJECT, job.id, {"method": "supervised", "training_file": bench.upload(rows=4)})
    assert copy.method == "supervised" and "beta" not in copy.requested
    assert bench.jobs.clone(PROJECT, job.id, {}).requested["beta"] == 0.5


def test_copies_are_made_once(bench: Bench) -> None:
    job = ended(bench, rich_job(bench))
    once = key("k1", "/api/v1/jobs/a/retry")
    first = bench.jobs.retry(PROJECT, job.id, idempotency=once)
    named = bench.jobs.clone(PROJECT, job.id, {"request_id": "mine"})
    bench.jobs.delete(PROJECT, job.id)
    assert bench.jobs.retry(PROJECT, job.id, idempotency=once) == first, "a repeat meets no check"
    assert bench.jobs.clone(PROJECT, job.id, {"request_id": "mine"}) == named
    with pytest.raises(IdempotencyMismatch):
        bench.jobs.clone(PROJECT, first.id, {}, key("k1", "/api/v1/jobs/b/clone"))


def test_what_is_gone_is_named(bench: Bench) -> None:
    job = ended(bench, rich_job(bench))
    for project, job_id in (("proj-2", job.id), (PROJECT, "ftjob-none")):
        for call in (lambda p, j: bench.jobs.retry(p, j), lambda p, j: bench.jobs.clone(p, j, {})):
            with pytest.raises(NotFound) as caught:
                call(project, job_id)
            assert caught.value.code == "job_not_found"
    with bench.storage.write() as tx:
        tx.files.delete(PROJECT, job.training_file)
    with pytest.raises(NotFound) as caught:
        bench.jobs.retry(PROJECT, job.id)
    assert (caught.value.code, caught.value.param) == ("file_not_found", "training_file")
    assert bench.jobs.clone(PROJECT, job.id, {"training_file": bench.upload(rows=9)}).cloned_from == job.id
    bench.bases.bases = []
    with pytest.raises(NotFound) as caught:
        bench.jobs.retry(PROJECT, job.id)
    assert caught.value.code == "base_not_found"


def test_metadata_can_be_changed_at_any_time(bench: Bench) -> None:
    job = rich_job(bench)
    assert bench.jobs.update(PROJECT, job.id, {}) == job
    assert bench.jobs.update(PROJECT, job.id, {"metadata": {"x": "y"}}).metadata == {"x": "y"}
    assert bench.jobs.update(PROJECT, ended(bench, bench.job(job.id)).id, {"metadata": None}).metadata is None
    with pytest.raises(InvalidRequest):
        bench.jobs.update(PROJECT, job.id, {"metadata": {"x": 1}})
    with pytest.raises(NotFound):
        bench.jobs.update("proj-2", job.id, {"metadata": None})


def test_a_queued_copy_does_not_share_state(bench: Bench) -> None:
    job = rich_job(bench)
    with bench.storage.write() as tx:
        done = tx.jobs.change(job, status=QUEUED, rows={"used": 3}, choices={"threads": 1}, step=9, attempt=2)
    assert done is not None
    copy = bench.jobs.clone(PROJECT, job.id, {})
    assert (copy.rows, copy.choices, copy.step, copy.attempt) == ({}, {}, 0, 0)
