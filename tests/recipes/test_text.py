"""The recipe in this process: what it computes, saves, tells and refuses."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.recipes.job_folder import (
    ROWS,
    codes,
    losses,
    metrics,
    next_attempt,
    train_here,
    write_job,
    write_rows,
)
from tests.unit.bad_rows import preference
from tunewright.errors import InvalidRequest
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.memory_estimate import MICRO_BATCH_TOKENS
from tunewright.jobs.spec import (
    Checkpoint,
    DataChoice,
    Failed,
    Finished,
    JournalRecord,
    Note,
    RowChoice,
    Started,
    Stopped,
)
from tunewright.recipes import adapters, base_model, checkpoints, divergence, flattened, saving, schedule
from tunewright.recipes.evaluation import Progress
from tunewright.recipes.memory import is_out_of_memory


def finished(found: list[JournalRecord]) -> Finished:
    last = found[-1]
    assert isinstance(last, Finished), last
    return last


def failed(found: list[JournalRecord]) -> Failed:
    last = found[-1]
    assert isinstance(last, Failed), last
    return last


def peft_model(model: Any, folder: Path) -> Any:
    """`model` with the adapter of `folder`, loaded by PEFT."""
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers has deprecated.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return PeftModel.from_pretrained(model, folder).eval()


def test_a_small_set_is_memorised(tmp_path: Path, base: Path) -> None:
    spec = write_job(tmp_path / "job", base, n_epochs=40, batch_size=7, learning_rate=3e-2, lora_rank=16, lora_alpha=16)
    found = train_here(spec)
    steps = metrics(found)
    first, last = steps[0], steps[-1]
    assert first.loss is not None and last.loss is not None and last.accuracy is not None
    assert last.loss < 0.25 * first.loss
    assert last.accuracy > 0.9
    assert [step.step for step in steps] == list(range(1, 41))
    assert last.remaining_s is not None and 0 <= last.remaining_s < 5  # the last checkpoint and the result
    assert last.epoch == 40.0
    assert all(step.remaining_s and step.elapsed_s < after.elapsed_s for step, after in pairwise(steps))
    started = found[0]
    assert isinstance(started, Started)
    assert started.rows == {"used": 7, "skipped": 0, "cut": 0}
    assert started.choices["precision"] == "float32"
    assert last.tokens == started.tokens_per_epoch * 40 == finished(found).trained_tokens
    assert finished(found).final_loss == last.loss


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path, base: Path) -> None:
    first = train_here(write_job(tmp_path / "a", base))
    again = train_here(write_job(tmp_path / "b", base, job_id="job-2"))
    other = train_here(write_job(tmp_path / "c", base, seed=8))
    assert losses(first) == losses(again)
    assert finished(first).adapter_sha256 == finished(again).adapter_sha256
    assert finished(first).adapter_sha256 != finished(other).adapter_sha256


def test_peft_loads_the_result_and_gives_the_same_logits(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    load = base_model.load_model
    monkeypatch.setattr(base_model, "load_model", lambda *given: made.append(load(*given)) or made[-1])
    spec = write_job(tmp_path / "job", base, n_epochs=10)
    last = finished(train_here(spec))
    result = tmp_path / "job" / "result"
    assert sorted(path.name for path in result.iterdir()) == [adapters.CONFIG, adapters.WEIGHTS]
    assert sha256_of(result / adapters.WEIGHTS) == last.adapter_sha256
    assert json.loads((result / adapters.CONFIG).read_text())["base_model_name_or_path"] == "tiny"

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokens = torch.arange(5, 60)[None]
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        loaded = peft_model(plain, result)
        after = loaded(input_ids=tokens).logits
        trained = made[0](input_ids=tokens, use_cache=False).logits
    assert (after - trained).abs().max() <= 1e-5
    assert (after - before).abs().max() > 0.1


def test_stopping_anywhere_and_resuming_changes_no_bit(tmp_path: Path, base: Path) -> None:
    whole = train_here(write_job(tmp_path / "whole", base))
    total = len(losses(whole))
    for stop_at in (1, 3, 4, 5, total - 1):
        spec = write_job(tmp_path / f"stopped-{stop_at}", base)
        first = train_here(spec, stop_at=stop_at)
        assert first[-1] == Stopped(step=stop_at)
        second = train_here(next_attempt(spec))
        assert isinstance(second[0], Started) and second[0].resumed_step == stop_at
        assert losses(first) | losses(second) == losses(whole)
        assert min(losses(second)) == stop_at + 1
        assert metrics(second)[0].elapsed_s > metrics(first)[-1].elapsed_s
        assert finished(second) == finished(whole)


def test_a_death_after_the_result_repeats_nothing(tmp_path: Path, base: Path) -> None:
    spec = write_job(tmp_path / "job", base)
    first = train_here(spec)
    again = train_here(next_attempt(spec))
    assert finished(again) == finished(first)
    assert losses(again) == {}


def test_only_the_newest_three_checkpoints_stay(tmp_path: Path, base: Path) -> None:
    found = train_here(write_job(tmp_path / "job", base, n_epochs=5))
    told = [record.path for record in found if isinstance(record, Checkpoint)]
    assert told == [f"checkpoints/step-{n}" for n in (4, 8, 12, 16, 20)]
    assert sorted(path.name for path in (tmp_path / "job" / "checkpoints").iterdir()) == [
        "step-12",
        "step-16",
        "step-20",
    ]


def test_checkpoints_come_by_the_clock_too(tmp_path: Path, base: Path) -> None:
    found = train_here(write_job(tmp_path / "job", base, n_epochs=1, checkpoint_every_s=1e-6))
    assert [record.step for record in found if isinstance(record, Checkpoint)] == [1, 2, 3, 4]


def test_a_corrupt_checkpoint_is_passed_over(tmp_path: Path, base: Path) -> None:
    whole = train_here(write_job(tmp_path / "whole", base))
    spec = write_job(tmp_path / "job", base, checkpoint_every_s=1e-6)
    train_here(spec, stop_at=6)
    damaged = tmp_path / "job" / "checkpoints" / "step-6" / saving.OPTIMIZER
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    second = train_here(next_attempt(spec))
    assert isinstance(second[0], Started)  # before the note
    assert codes(second) == ["checkpoint_corrupt"]
    assert min(losses(second)) == 6  # resumed from step 5
    assert finished(second) == finished(whole)
    assert (tmp_path / "job" / "checkpoints" / "corrupt-step-6-2").is_dir()


def test_r12_without_a_good_checkpoint_the_job_fails_or_begins_again_as_it_is_told(tmp_path: Path, base: Path) -> None:
    whole = train_here(write_job(tmp_path / "whole", base))
    spec = write_job(tmp_path / "job", base)
    train_here(spec, stop_at=3)
    (tmp_path / "job" / "checkpoints" / "step-3" / "MANIFEST.json").unlink()
    spec = next_attempt(spec)
    second = train_here(spec)
    assert failed(second).code == "checkpoint_unrecoverable" and codes(second) == ["checkpoint_corrupt"]
    assert losses(second) == {} and not (tmp_path / "job" / "result").exists()
    aside = tmp_path / "job" / "checkpoints" / "corrupt-step-3-2"
    assert (aside / saving.OPTIMIZER).is_file(), "kept for whoever wants to know"
    spec = next_attempt(spec)
    third = train_here(spec)
    assert failed(third).code == "checkpoint_unrecoverable", "also when an earlier attempt put it aside"
    fourth = train_here(next_attempt(spec, on_corrupt="restart"))
    assert codes(fourth) == ["restarted_from_zero"]
    assert losses(fourth) == losses(whole)
    assert finished(fourth) == finished(whole)
    assert aside.is_dir()


def test_the_loss_does_not_depend_on_how_a_step_is_cut_up(tmp_path: Path, base: Path) -> None:
    whole = losses(train_here(write_job(tmp_path / "a", base, batch_size=7)))
    pieces = losses(train_here(write_job(tmp_path / "b", base, batch_size=7, micro_batch_tokens=50)))
    assert pieces == pytest.approx(whole, rel=1e-4)


def test_validation_rows_are_measured_at_each_epoch_end(tmp_path: Path, base: Path) -> None:
    rows = write_rows(tmp_path / "valid.jsonl", ROWS[:3])
    spec = write_job(tmp_path / "job", base, validation_data=str(rows), validation_sha256=sha256_of(rows))
    found = train_here(spec)
    measured = {record.step: record.eval_loss for record in metrics(found) if record.eval_loss is not None}
    assert list(measured) == [4, 8, 12]
    assert codes(found) == ["validation_overlap"]
    told = [record.metrics["full_valid_loss"] for record in found if isinstance(record, Checkpoint)]
    assert told == list(measured.values())

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tuned = peft_model(plain, tmp_path / "job" / "result")
    assert measured[12] == pytest.approx(_mean_loss(tuned, rows, base), rel=1e-4)


def _mean_loss(model: Any, path: Path, base: Path) -> float:
    from tests.recipes.test_flattened import plain_loss
    from tests.recipes.test_packing import read

    rows = read(path, base)
    with torch.no_grad():
        return plain_loss(model, rows).item() / rows.n_trained


def test_a_new_job_continues_from_a_tuned_model(tmp_path: Path, base: Path) -> None:
    first = train_here(write_job(tmp_path / "a", base, n_epochs=30, batch_size=7, learning_rate=2e-2))
    start = tmp_path / "a" / "result"
    spec = write_job(
        tmp_path / "b", base, n_epochs=1, learning_rate=1e-6, lora_rank=8, start_adapter_path=str(start), batch_size=7
    )
    second = train_here(spec)
    assert codes(second) == ["rank_of_start_model"]
    assert metrics(second)[0].loss == pytest.approx(metrics(first)[-1].loss, rel=0.3)
    config = json.loads((tmp_path / "b" / "result" / adapters.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, base: Path) -> None:
    train_here(write_job(tmp_path / "a", base, n_epochs=1))
    start = tmp_path / "a" / "result"
    found = train_here(write_job(tmp_path / "b", base, base_code="other", start_adapter_path=str(start)))
    assert failed(found).code == "base_mismatch"
    config = json.loads((start / adapters.CONFIG).read_text())
    (start / adapters.CONFIG).write_text(json.dumps(config | {"r": 5}))
    found = train_here(write_job(tmp_path / "c", base, start_adapter_path=str(start)))
    assert failed(found).code == "adapter_mismatch"
    published = sha256_of(start / adapters.WEIGHTS)
    (start / adapters.WEIGHTS).write_bytes(b"\x80\x04not tensors")
    found = train_here(write_job(tmp_path / "d", base, start_adapter_path=str(start)))
    assert failed(found).code == "invalid_artifact"
    spec = write_job(tmp_path / "e", base, start_adapter_path=str(start), start_adapter_sha256=published)
    assert failed(train_here(spec)).code == "artifact_integrity"


def test_rows_that_are_cut_or_skipped_are_told(tmp_path: Path, base: Path) -> None:
    rows = [("hello", "yes"), ("hello", "one two three " * 40), ("hello " * 90, "no")]
    found = train_here(write_job(tmp_path / "job", base, rows, max_length=60))
    assert codes(found) == ["rows_cut", "rows_skipped"]
    started = next(record for record in found if isinstance(record, Started))
    assert started.rows == {"used": 2, "skipped": 1, "cut": 1}


def test_bad_lines_are_left_out_and_named(tmp_path: Path, base: Path) -> None:
    """Lines that are no rows, one that is a row of another kind, and one without labels that nobody called bad."""
    rows = [*ROWS, ("hello " * 90, "no")]
    spec = write_job(tmp_path / "job", base, rows, max_length=60)
    train, validation = (
        Path(spec.training_data),
        write_rows(tmp_path / "valid.jsonl", [("a", "b"), ("c", "d"), ("e", "f")]),
    )
    lines = train.read_bytes().splitlines()
    lines[1], lines[3], lines[5] = b"-", b"x" * 2**21, preference().strip()
    train.write_bytes(b"\n".join(lines))
    skip = tmp_path / "skip.json"
    choice = RowChoice(
        train=DataChoice(sha256=sha256_of(train), size_bytes=1, rows=5, skip=(2, 4, 6)),
        validation=DataChoice(sha256=sha256_of(validation), size_bytes=1, rows=2, skip=(3,)),
    )
    skip.write_bytes(msgspec.json.encode(choice))
    spec = next_attempt(
        spec,
        training_sha256=choice.train.sha256,
        validation_data=str(validation),
        validation_sha256=sha256_of(validation),
        skip_lines=str(skip),
    )
    found = train_here(spec)
    started = found[0]
    assert isinstance(started, Started)
    assert started.rows == {"used": 4, "skipped": 4, "cut": 0, "validation": 2}
    told = [(note.code, note.values["rows"], note.values["lines"]) for note in found if isinstance(note, Note)]
    assert told == [("bad_rows_skipped", 3, "2, 4, 6"), ("rows_skipped", 1, "8"), ("bad_rows_skipped", 1, "3")]
    assert finished(found).trained_tokens == 3 * started.tokens_per_epoch


def test_nothing_to_train(tmp_path: Path, base: Path) -> None:
    found = train_here(write_job(tmp_path / "job", base, [("hello " * 90, "no")], max_length=20))
    assert failed(found).code == "nothing_to_train"
    assert not (tmp_path / "job" / "result").exists()


def test_changed_data_is_refused(tmp_path: Path, base: Path) -> None:
    spec = write_job(tmp_path / "job", base)
    write_rows(Path(spec.training_data), ROWS[:-1])
    assert failed(train_here(spec)).code == "file_integrity"
    Path(spec.training_data).unlink()
    assert failed(train_here(next_attempt(spec))).code == "file_integrity"


@pytest.mark.parametrize("fault", ["flip", "missing", "unlisted"])
def test_a_changed_base_is_refused(tmp_path: Path, base: Path, fault: str) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    spec = write_job(tmp_path / "job", copy)
    if fault == "flip":
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (copy / "model.safetensors").write_bytes(content)
    elif fault == "missing":
        (copy / "tokenizer.json").unlink()
    else:
        shutil.copy(copy / "model.safetensors", copy / "model-00001-of-00001.safetensors")
    assert failed(train_here(spec)).code == "base_model_integrity"


def test_r15_a_loss_that_is_no_number_ends_the_job_at_once(tmp_path: Path, base: Path) -> None:
    found = train_here(write_job(tmp_path / "job", base, learning_rate=1e30, warmup_ratio=0.0, checkpoint_every_s=1e-6))
    error = failed(found)
    assert error.code == "loss_not_finite"
    assert error.values["step"] <= 10
    assert all(record.loss is not None and math.isfinite(record.loss) for record in metrics(found))
    assert not (tmp_path / "job" / "result").exists()


@pytest.mark.parametrize("fault", [math.nan, math.inf, 200.0])
def test_r15_a_training_that_goes_wrong_keeps_its_last_good_checkpoint(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, fault: float
) -> None:
    """From step 9 on the loss is no number, or far above its start."""
    real, calls = flattened.summed_loss, []

    def broken(*given: Any) -> Any:
        loss, hits = real(*given)
        calls.append(loss)
        return (loss * fault if len(calls) > 8 else loss), hits

    monkeypatch.setattr(flattened, "summed_loss", broken)
    monkeypatch.setattr(flattened, "is_right", lambda *given, **named: True)
    found = train_here(write_job(tmp_path / "job", base, n_epochs=20, checkpoint_every_s=1e-6))
    error = failed(found)
    assert error.code == ("diverged" if fault == 200.0 else "loss_not_finite")
    assert 9 <= error.values["step"] <= 8 + 10
    told = [record.step for record in found if isinstance(record, Checkpoint)]
    assert told == list(range(1, 9)), "none of the steps that went wrong"
    assert checkpoints.newest_step(tmp_path / "job") == 8
    assert not (tmp_path / "job" / "result").exists()


def test_loss_that_is_high_from_the_start_or_only_now_and_then_is_no_divergence() -> None:
    def most_exploded(losses: list[float]) -> int:
        progress, most = Progress(), 0
        for step, loss in enumerate(losses, 1):
            progress = replace(progress, step=step, loss=loss)
            try:
                progress = divergence.watched(progress, uninformed_loss=math.log(49152), multiplier=1.0)
            except InvalidRequest as error:
                assert error.code == "diverged"
                return divergence.MOST_EXPLODED_STEPS
            most = max(most, progress.exploded_steps)
        return most

    assert most_exploded([10.8] * 100) == 0
    assert most_exploded([0.05] * 5 + [4.9] * 100) == 0, "easy rows first, then a language that the base hardly knows"
    assert most_exploded([2.0] * 20 + [30.0, 2.0] * 50) == 1
    assert most_exploded([2.0, 2.0, 40.0, 80.0, 90.0] + [90.0] * 20) == 8, "a start that explodes is no start"
    assert most_exploded([1.5] * 20 + [7.5] * 8) == 8


class Memory:
    """Fails like the CPU allocator, `times` times."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.real = flattened.summed_loss

    def __call__(self, *given: Any) -> Any:
        if torch.is_grad_enabled() and self.times:
            self.times -= 1
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return self.real(*given)


def test_memory_that_runs_out_once_only_halves_the_micro_batch(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_here(write_job(tmp_path / "whole", base))
    monkeypatch.setattr(flattened, "summed_loss", Memory(1))
    found = train_here(write_job(tmp_path / "job", base))
    assert codes(found) == ["micro_batch_halved"]
    assert losses(found) == losses(whole)  # these rows fit the smaller budget as well


def test_memory_that_ran_out_before_is_spared_from_the_first_step_on(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flattened, "summed_loss", Memory(1))
    found = train_here(write_job(tmp_path / "job", base, halve_micro_batch=True))
    assert failed(found).code == "out_of_memory" and codes(found) == [], "a second halving would never end"
    monkeypatch.setattr(flattened, "summed_loss", Memory(0))
    found = train_here(write_job(tmp_path / "again", base, halve_micro_batch=True))
    started = found[0]
    assert isinstance(started, Started) and started.choices["micro_batch_tokens"] == MICRO_BATCH_TOKENS // 2


def test_memory_that_runs_out_twice_fails_with_advice(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flattened, "summed_loss", Memory(2))
    found = train_here(write_job(tmp_path / "job", base))
    assert codes(found) == ["micro_batch_halved"]
    error = failed(found)
    assert error.code == "out_of_memory"
    assert error.values == {"batch_size": 2, "max_length": 128}


def test_an_unknown_method_is_refused(tmp_path: Path, base: Path) -> None:
    found = train_here(write_job(tmp_path / "job", base, method="reinforcement"))
    assert failed(found).code == "unsupported_method"


def test_learning_rate_goes_up_and_then_down_to_a_tenth() -> None:
    rates = [schedule.learning_rate(1.0, step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
    assert schedule.learning_rate(1.0, 0, 1, 0.05) == 1.0


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**48)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError("unable to mmap 540 bytes: Cannot allocate memory (12)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
