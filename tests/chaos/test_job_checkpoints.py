"""Checkpoints as models: which there are, what they stand for, how long they last."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.job_bench import PROJECT, Bench
from tunewright.errors import Conflict, InvalidRequest, NotFound
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.records import CANCELLED, FAILED, SUCCEEDED, Job
from tunewright.jobs.service import CreateJob
from tunewright.models.records import FULL

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    bench = Bench(tmp_path / "home")
    yield bench
    bench.close()


def steps(bench: Bench, job: Job) -> list[int]:
    return [row.step for row in bench.jobs.checkpoints(PROJECT, job.id).checkpoints]


def folders(bench: Bench, job: Job) -> list[str]:
    return sorted(path.name for path in (bench.home.adapters / "checkpoints" / job.tuned_model_id).glob("*"))


def name_of(job: Job, step: int) -> str:
    return f"{job.tuned_model_name}:ckpt-step-{step}"


def test_the_list_shows_what_is_there_and_names_the_best_and_the_last(bench: Bench) -> None:
    job = bench.until_over(bench.create(steps=10, checkpoint_every=1, adapters=True).id)
    page = bench.jobs.checkpoints(PROJECT, job.id, limit=2)
    assert ([row.step for row in page.checkpoints], page.has_more) == ([10, 9], True)
    assert (page.best_step, page.last_step) == (2, 10)
    assert steps(bench, job) == [10, 9, 2]
    assert folders(bench, job) == ["step-10", "step-2", "step-9"]
    for step in (10, 9, 2):
        tuned = bench.models.resolve(PROJECT, name_of(job, step)).tuned
        assert tuned is not None and tuned.adapter_path is not None
        folder = bench.home.adapters / tuned.adapter_path
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        assert (folder / "adapter_model.safetensors").read_text() == f"weights of step {step}"
        assert manifest["files"]["adapter_model.safetensors"] == tuned.adapter_sha256
        assert manifest["files"]["adapter_config.json"] == sha256_of(folder / "adapter_config.json")
        card = bench.models.card(PROJECT, name_of(job, step))
        assert (card.id, card.parent) == (name_of(job, step), "tiny")
    for gone in (1, 5, 11):
        with pytest.raises(NotFound):
            bench.models.resolve(PROJECT, name_of(job, gone))
    for wrong in (":ckpt-step-2", f"{name_of(job, 2)}0", f"{job.tuned_model_name}:ckpt-step-02", "tiny:ckpt-step-2"):
        with pytest.raises(NotFound):
            bench.models.resolve(PROJECT, wrong)
    with pytest.raises(NotFound):
        bench.models.resolve("proj-2", name_of(job, 10))


def test_a_checkpoint_can_be_called_while_its_job_runs(bench: Bench) -> None:
    job = bench.create(steps=4, checkpoint_every=1, adapters=True, holds=[3])
    bench.until(lambda: 2 in steps(bench, job))
    assert bench.models.resolve(PROJECT, name_of(job, 2)).tuned is not None
    with pytest.raises(Conflict) as running:
        bench.models.delete(PROJECT, name_of(job, 2))
    assert running.value.code == "job_not_finished"
    (bench.home.jobs / job.id / "go").touch()
    bench.until_over(job.id)


@pytest.mark.parametrize("end", [CANCELLED, FAILED])
def test_a_job_that_ended_early_leaves_its_checkpoints_until_it_is_deleted(bench: Bench, end: str) -> None:
    if end == CANCELLED:
        job = bench.create(steps=9, checkpoint_every=4, adapters=True, holds=[5])
        bench.until_step(job.id, 5)
        bench.jobs.cancel(PROJECT, job.id)
    else:
        job = bench.create(steps=9, checkpoint_every=4, adapters=True, crash_at=5, crashes=99)
    job = bench.until_over(job.id)
    assert job.status == end
    last = 5 if end == CANCELLED else 4  # who asks in time gets the step where it stopped
    assert steps(bench, job)[0] == last
    bench.models.sweep()
    assert bench.models.resolve(PROJECT, name_of(job, last)).tuned is not None
    with pytest.raises(NotFound):
        bench.models.resolve(PROJECT, job.tuned_model_name)
    bench.jobs.delete(PROJECT, job.id)
    assert folders(bench, job) == []
    with pytest.raises(NotFound):
        bench.models.resolve(PROJECT, name_of(job, last))


def test_checkpoints_outlive_the_job_and_go_with_the_model(bench: Bench) -> None:
    job = bench.until_over(bench.create(steps=4, checkpoint_every=2, adapters=True).id)
    assert job.status == SUCCEEDED and job.checkpoint_step == 4
    bench.jobs.delete(PROJECT, job.id)
    assert not (bench.home.jobs / job.id).exists()
    tuned = bench.models.resolve(PROJECT, name_of(job, 4)).tuned
    assert tuned is not None and (bench.home.adapters / (tuned.adapter_path or "")).is_dir()
    told: list[str] = []
    bench.models.on_delete = lambda model: told.append(model.id)
    bench.models.delete(PROJECT, job.tuned_model_name)
    assert told == [job.tuned_model_id, f"{job.tuned_model_id}-step-4", f"{job.tuned_model_id}-step-2"]
    assert folders(bench, job) == []
    with pytest.raises(NotFound):
        bench.models.resolve(PROJECT, name_of(job, 4))


def test_one_checkpoint_can_be_deleted(bench: Bench) -> None:
    job = bench.until_over(bench.create(steps=4, checkpoint_every=2, adapters=True).id)
    bench.models.delete(PROJECT, name_of(job, 2))
    assert steps(bench, job) == [4]
    assert folders(bench, job) == ["step-4"]
    with pytest.raises(NotFound):
        bench.models.delete(PROJECT, name_of(job, 2))
    assert bench.models.resolve(PROJECT, job.tuned_model_name).tuned is not None


def test_a_folder_that_a_crash_left_is_swept(bench: Bench) -> None:
    job = bench.until_over(bench.create(steps=2, checkpoint_every=2, adapters=True).id)
    bench.models.delete(PROJECT, job.tuned_model_name)
    for owner in (job.tuned_model_id, "model-of-another-database"):
        (bench.home.adapters / "checkpoints" / owner / "step-2").mkdir(parents=True)
    bench.models.sweep()
    assert [path.name for path in (bench.home.adapters / "checkpoints").iterdir()] == ["model-of-another-database"]


def test_a_job_starts_from_a_checkpoint_which_stays_as_long(bench: Bench) -> None:
    """The first job goes on meanwhile, and would have dropped that checkpoint."""
    first = bench.create(steps=8, checkpoint_every=1, adapters=True, holds=[4])
    bench.until(lambda: 3 in steps(bench, first))
    request = CreateJob(model=name_of(first, 3), training_file=bench.upload(steps=2), seed=5)
    second = bench.jobs.create(PROJECT, request)
    (bench.home.jobs / first.id / "go").touch()
    bench.until_over(first.id)
    assert steps(bench, first) == [8, 7, 3, 2]
    done = bench.until_over(second.id)
    assert done.status == SUCCEEDED and done.tuned_model_name.startswith("tiny:")
    spec = json.loads((bench.home.jobs / second.id / "spec.json").read_text())
    assert Path(spec["start_adapter_path"], "adapter_model.safetensors").read_text() == "weights of step 3"
    assert spec["start_adapter_sha256"] == sha256_of(Path(spec["start_adapter_path"], "adapter_model.safetensors"))


def test_checkpoints_of_whole_models_are_listed_and_refused_like_these(bench: Bench) -> None:
    job = bench.until_over(bench.create(steps=4, checkpoint_every=2).id)
    tuned = bench.models.resolve(PROJECT, name_of(job, 4)).tuned
    assert tuned is not None and tuned.kind == FULL  # which completions refuse
    with pytest.raises(InvalidRequest) as refused:
        bench.jobs.create(PROJECT, CreateJob(model=name_of(job, 4), training_file=bench.upload()))
    assert refused.value.code == "model_not_tunable"
    bench.jobs.delete(PROJECT, job.id)  # and with it the folder that holds them
    with pytest.raises(NotFound):
        bench.models.resolve(PROJECT, name_of(job, 4))
