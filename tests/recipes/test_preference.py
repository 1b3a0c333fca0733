"""DPO: the numbers of a plain padded implementation, and all that a trainer must survive."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.recipes.job_folder import ROWS, codes, losses, metrics, next_attempt, train_here, write_job
from tests.recipes.test_text import failed, finished, peft_model
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import Checkpoint, JournalRecord, Started, Stopped, TrainingSpec
from tunewright.recipes import adapters, flattened, packing, preference, schedule
from tunewright.rendering.renderer import renderer_of

PAIRS = [(question, answer, answer + " or not") for question, answer in ROWS]
WANTED: dict[str, Any] = {"method": "dpo", "beta": 0.1, "n_epochs": 2, "batch_size": 3, "learning_rate": 5e-3}


def write_pairs(path: Path, pairs: list[tuple[str, str, str]] = PAIRS) -> Path:
    lines = [
        json.dumps(
            {
                "input": {"messages": [{"role": "user", "content": question}]},
                "preferred_output": [{"role": "assistant", "content": preferred}],
                "non_preferred_output": [{"role": "assistant", "content": other}],
            }
        )
        for question, preferred, other in pairs
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def dpo_job(
    folder: Path, base: Path, pairs: list[tuple[str, str, str]] = PAIRS, validate: bool = False, **changes: Any
) -> TrainingSpec:
    spec = write_job(folder, base, **(WANTED | changes))
    data = write_pairs(Path(spec.training_data), pairs)
    fields: dict[str, Any] = {"training_sha256": sha256_of(data)}
    if validate:
        held_out = write_pairs(folder / "data" / "validation.jsonl", [("Are you there?", "yes", "no"), *pairs[:1]])
        fields |= {"validation_data": str(held_out), "validation_sha256": sha256_of(held_out)}
    return next_attempt(spec, **fields)


def pairs_of(spec: TrainingSpec) -> packing.Rows:
    return packing.read_rows(
        Path(spec.training_data),
        renderer_of(Path(spec.base_path)),
        max_length=128,
        max_line_bytes=2**20,
        between_rows=lambda: None,
        param="training_file",
        sides=2,
    )


def padded_log_probabilities(model: Any, rows: packing.Rows, chosen: list[int]) -> torch.Tensor:
    """log p(answer) of each row: padded on the right, logits of every place, as textbooks have it."""
    longest = max(rows.length(row) for row in chosen)
    tokens, mask = (torch.zeros(len(chosen), longest, dtype=torch.long) for _ in range(2))
    trained = torch.zeros(len(chosen), longest, dtype=torch.bool)
    for place, row in enumerate(chosen):
        length = rows.length(row)
        tokens[place, :length] = torch.tensor(np.array(rows.tokens_of(row)))
        trained[place, :length] = torch.tensor(rows.trained_of(row))
        mask[place, :length] = 1
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1].double()
    of_tokens = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (of_tokens * trained[:, 1:]).sum(-1)


def plain_dpo(spec: TrainingSpec, base: Path) -> tuple[list[tuple[float, float, float]], Any]:
    """((loss, accuracy, margin) of each step, the trained model): one padded batch a step and a frozen second model."""
    wanted, rows = spec.hyperparameters, pairs_of(spec)
    model, reference = (
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32).eval()
        for _ in range(2)
    )
    targets = adapters.linear_names(model)
    adapters.add_lora(model, rank=wanted.lora_rank, alpha=wanted.lora_alpha, targets=targets, seed=spec.seed)
    trained = list(adapters.adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    steps_per_epoch = math.ceil(rows.n_examples / wanted.batch_size)
    total, found = steps_per_epoch * wanted.n_epochs, []
    for step in range(total):
        epoch, place = divmod(step, steps_per_epoch)
        order = packing.epoch_order(rows.n_examples, spec.seed, epoch)
        chosen = order[place * wanted.batch_size : (place + 1) * wanted.batch_size]
        preferred, other = [2 * int(pair) for pair in chosen], [2 * int(pair) + 1 for pair in chosen]
        with torch.no_grad():
            before_w = padded_log_probabilities(reference, rows, preferred)
            before_l = padded_log_probabilities(reference, rows, other)
        gain_w = padded_log_probabilities(model, rows, preferred) - before_w
        gain_l = padded_log_probabilities(model, rows, other) - before_l
        margins = (wanted.beta or 0) * (gain_w - gain_l)
        loss = -functional.logsigmoid(margins).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(wanted.learning_rate, step, total, wanted.warmup_ratio)
        optimizer.step()
        right = (margins > 0).double().mean()
        found.append((loss.item(), right.item(), margins.mean().item()))
    return found, model


def told(found: list[JournalRecord]) -> list[tuple[float | None, ...]]:
    return [(step.loss, step.accuracy, step.reward_margin) for step in metrics(found)]


def test_every_step_is_that_of_a_plain_padded_implementation(tmp_path: Path, base: Path) -> None:
    spec = dpo_job(tmp_path / "job", base)
    ours = told(train_here(spec))
    theirs, model = plain_dpo(spec, base)
    assert len(ours) == len(theirs) == 6
    assert ours[0][0] == pytest.approx(math.log(2), abs=1e-5)
    for one, other in zip(ours[1:], theirs[1:], strict=True):  # at first every margin is zero but for rounding
        assert one == pytest.approx(other, abs=1e-5)
    assert abs(ours[-1][2] or 0) > 0.01
    tokens = torch.arange(5, 60)[None]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        loaded = peft_model(plain, tmp_path / "job" / "result")(input_ids=tokens).logits
        torch.testing.assert_close(loaded, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


def test_preferences_are_learned(tmp_path: Path, base: Path) -> None:
    found = train_here(dpo_job(tmp_path / "job", base, validate=True, n_epochs=12, learning_rate=1e-2))
    last = metrics(found)[-1]
    assert last.loss is not None and last.loss < 0.3
    assert last.accuracy == 1.0
    assert last.reward_margin is not None and last.reward_margin > 1.0
    assert last.eval_loss is not None and last.eval_accuracy is not None and last.eval_reward_margin is not None
    started = found[0]
    assert isinstance(started, Started)
    assert started.rows == {"used": 7, "skipped": 0, "cut": 0, "validation": 2}
    assert (started.choices["method"], started.choices["beta"], started.choices["reference"]) == ("dpo", 0.1, "base")
    assert codes(found) == ["validation_overlap"]
    kept = [record.metrics for record in found if isinstance(record, Checkpoint)][-1]
    assert kept["train_reward_margin"] == last.reward_margin
    assert kept["full_valid_reward_accuracy"] == last.eval_accuracy
    assert finished(found).trained_tokens == last.tokens == 12 * started.tokens_per_epoch


def test_beta_is_obeyed(tmp_path: Path, base: Path) -> None:
    mild = told(train_here(dpo_job(tmp_path / "a", base)))
    spec = dpo_job(tmp_path / "b", base, beta=0.7)
    strict = told(train_here(spec))
    assert strict[1:] != mild[1:]
    assert strict[1:] == [pytest.approx(step, abs=1e-4) for step in plain_dpo(spec, base)[0][1:]]


def test_stopping_anywhere_and_resuming_changes_no_bit(tmp_path: Path, base: Path) -> None:
    whole = train_here(dpo_job(tmp_path / "whole", base, validate=True))
    for stop_at in (1, 3, 5):
        spec = dpo_job(tmp_path / f"stopped-{stop_at}", base, validate=True)
        first = train_here(spec, stop_at=stop_at)
        assert first[-1] == Stopped(step=stop_at)
        second = train_here(next_attempt(spec))
        assert isinstance(second[0], Started) and second[0].resumed_step == stop_at
        assert told(first) + told(second) == told(whole)
        assert finished(second) == finished(whole)


def test_a_step_cut_into_pieces_is_the_same_step(tmp_path: Path, base: Path) -> None:
    whole = losses(train_here(dpo_job(tmp_path / "a", base, batch_size=7)))
    # 40 are less than any pair: each goes alone, and none is torn apart
    pieces = losses(train_here(dpo_job(tmp_path / "b", base, batch_size=7, micro_batch_tokens=40)))
    assert pieces == pytest.approx(whole, abs=1e-5)


def test_the_model_to_continue_from_is_the_reference(tmp_path: Path, base: Path) -> None:
    train_here(write_job(tmp_path / "a", base, n_epochs=5, lora_rank=4))
    start = tmp_path / "a" / "result"
    found = train_here(dpo_job(tmp_path / "b", base, start_adapter_path=str(start)))
    assert metrics(found)[0].loss == pytest.approx(math.log(2), abs=1e-5)
    started = next(record for record in found if isinstance(record, Started))
    assert started.choices["reference"] == "model to continue from"


def test_pairs_are_used_whole_or_not_at_all(tmp_path: Path, base: Path) -> None:
    long = "one two three " * 40
    pairs = [
        ("hello", "yes", "no"),
        ("hello", long, "no"),  # cut
        ("hello " * 90, "yes", "no"),  # no label left on either side
        ("hello", long + "four", long + "five"),  # the same once they are cut
    ]
    found = train_here(dpo_job(tmp_path / "job", base, pairs, max_length=60))
    started = next(record for record in found if isinstance(record, Started))
    assert started.rows == {"used": 2, "skipped": 2, "cut": 1}
    assert codes(found) == ["rows_cut", "rows_skipped"]
    skipped = next(record for record in found if getattr(record, "code", "") == "rows_skipped")
    assert getattr(skipped, "values", {})["lines"] == "3, 4"


def test_rows_of_another_kind_are_refused(tmp_path: Path, base: Path) -> None:
    error = failed(train_here(write_job(tmp_path / "chat", base, **WANTED)))
    assert (error.code, error.values["line"]) == ("wrong_format", 1)
    spec = dpo_job(tmp_path / "mixed", base)
    data = Path(spec.training_data)
    lines = data.read_text().splitlines()
    lines.insert(2, json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    data.write_text("\n".join(lines))
    error = failed(train_here(next_attempt(spec, training_sha256=sha256_of(data))))
    assert (error.code, error.values["line"]) == ("wrong_format", 3)


def test_memory_that_runs_out_before_the_first_step_halves_the_micro_batch(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = told(train_here(dpo_job(tmp_path / "whole", base)))
    real, times = flattened.label_losses, [1]

    def failing(*given: Any) -> Any:
        # The proofs come first, with three stretches at most; this is the reference's.
        if not torch.is_grad_enabled() and len(given[1].lengths) > 3 and times:
            times.pop()
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(*given)

    monkeypatch.setattr(flattened, "label_losses", failing)
    found = train_here(dpo_job(tmp_path / "job", base))
    assert codes(found) == ["micro_batch_halved"]
    assert told(found)[1:] == [pytest.approx(step, abs=1e-5) for step in whole[1:]]


def test_a_stop_while_the_reference_is_asked_loses_nothing(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_here(dpo_job(tmp_path / "whole", base))
    spec = dpo_job(tmp_path / "job", base)
    ask = preference.PreferenceTraining._ask_reference

    def stopped(training: Any, rows: packing.Rows) -> torch.Tensor:
        training.attempt.stop.set()
        return ask(training, rows)

    monkeypatch.setattr(preference.PreferenceTraining, "_ask_reference", stopped)
    assert train_here(spec)[-1] == Stopped(step=0)
    monkeypatch.setattr(preference.PreferenceTraining, "_ask_reference", ask)
    again = train_here(next_attempt(spec))
    assert told(again) == told(whole)
    assert finished(again) == finished(whole)
