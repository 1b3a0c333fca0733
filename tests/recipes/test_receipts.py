"""What training did to each row, and what is said of the rows that it did nothing to."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.recipes.job_folder import ROWS, codes, losses, next_attempt, train_here, write_job
from tests.recipes.test_flattened import plain_loss
from tests.recipes.test_packing import read
from tests.recipes.test_preference import dpo_job
from tests.recipes.test_text import finished, peft_model
from tunewright.jobs import receipts
from tunewright.jobs.receipts import RowReceipt
from tunewright.jobs.spec import ReceiptCounts, TrainingSpec
from tunewright.recipes.receipts import choose


def written(spec: TrainingSpec) -> list[RowReceipt]:
    path = Path(spec.work_folder) / "receipts.jsonl"
    return [msgspec.json.decode(line, type=RowReceipt) for line in path.read_bytes().splitlines()]


def test_losses_are_those_of_the_start_and_of_the_published_weights(tmp_path: Path, base: Path) -> None:
    spec = write_job(tmp_path / "job", base, receipts="on", n_epochs=6, learning_rate=2e-2)
    found = train_here(spec)
    assert finished(found).receipts == ReceiptCounts(rows=7, of=7, never_learned=0, contradicting=0)
    rows = read(Path(spec.training_data), base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for receipt, n_tokens, n_labels in zip(written(spec), rows.lengths, rows.n_labels, strict=True):
        assert (receipt.tokens, receipt.trained_tokens) == (n_tokens, n_labels)
    assert [receipt.line for receipt in written(spec)] == list(range(1, 8))
    with torch.no_grad():
        before = plain_loss(plain, rows).item()
        after = plain_loss(peft_model(plain, tmp_path / "job" / "result"), rows).item()
    for name, expected in (("loss_before", before), ("loss_after", after)):
        total = sum(getattr(receipt, name) * receipt.trained_tokens for receipt in written(spec))
        assert total == pytest.approx(expected, rel=1e-4)


def test_receipts_change_no_step_and_outlive_a_stop(tmp_path: Path, base: Path) -> None:
    without = train_here(write_job(tmp_path / "without", base))
    whole = write_job(tmp_path / "whole", base, receipts="on")
    found = train_here(whole)
    assert losses(found) == losses(without)
    assert finished(found).adapter_sha256 == finished(without).adapter_sha256
    assert finished(without).receipts is None and not (tmp_path / "without" / "receipts.jsonl").exists()
    spec = write_job(tmp_path / "stopped", base, receipts="on")
    train_here(spec, stop_at=5)
    train_here(next_attempt(spec))
    assert written(spec) == written(whole)


def test_rows_that_contradict_and_rows_that_are_not_learned_are_flagged(tmp_path: Path, base: Path) -> None:
    """Row 8 asks what row 1 asks and answers something else."""
    rows = [*ROWS, (ROWS[0][0], "no")]
    spec = write_job(tmp_path / "job", base, rows, receipts="on", n_epochs=2)
    counts = finished(train_here(spec)).receipts
    found = written(spec)
    assert counts is not None and counts.contradicting == 2
    assert {each.line: each.contradicts for each in found if each.contradicts} == {1: 8, 8: 1}
    assert found[0].flags[-1] == found[7].flags[-1] == "contradicts"

    before = np.array([3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 0.1, np.nan])
    after = np.array([1.0, 1.2, 1.1, 1.0, 2.95, 3.4, 0.09, 3.0])
    assert receipts.flags_of(before, after).tolist() == [False] * 4 + [True, True, False, True]


def test_pairs_have_receipts_too(tmp_path: Path, base: Path) -> None:
    spec = dpo_job(tmp_path / "job", base, receipts="on")
    counts = finished(train_here(spec)).receipts
    found = written(spec)
    assert counts is not None and counts.rows == counts.of == len(found)
    assert all(each.loss_before == pytest.approx(np.log(2), abs=1e-5) for each in found)
    assert any(each.loss_after is not None and each.loss_after < 0.69 for each in found)


@pytest.mark.parametrize(
    ("mode", "n_epochs", "share"), [("off", 9, 0), ("on", 1, 1), ("auto", 9, 1), ("auto", 2, 0.326)]
)
def test_auto_takes_as_many_rows_as_cost_little(
    tmp_path: Path, base: Path, mode: str, n_epochs: int, share: float
) -> None:
    spec = write_job(tmp_path / "job", base, ROWS * 30, receipts=mode, n_epochs=n_epochs)
    rows = read(Path(spec.training_data), base)
    chosen = choose(rows, spec)
    assert choose(rows, spec).tolist() == chosen.tolist() == sorted(set(chosen.tolist()))
    assert int(rows.lengths[chosen].sum()) / rows.n_tokens == pytest.approx(share, abs=0.02)


def test_a_sample_is_said_to_be_one(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewright.recipes.receipts.LEAST_ROWS", 1)
    changes: dict[str, Any] = {"receipts": "auto", "n_epochs": 1}
    found = train_here(write_job(tmp_path / "job", base, ROWS * 3, **changes))
    assert codes(found)[-1] == "receipts_of_a_sample"
    counts = finished(found).receipts
    assert counts is not None and 0 < counts.rows < counts.of == 21


def test_the_table_has_a_row_for_each_receipt() -> None:
    line = RowReceipt(
        line=3, tokens=9, trained_tokens=4, loss_before=2.5, loss_after=None, flags=["never_learned"], contradicts=1
    )
    pieces = receipts.table(receipts.lines_of([msgspec.json.encode(line)[:20], msgspec.json.encode(line)[20:] + b"\n"]))
    assert b"".join(pieces).decode().splitlines() == [
        "line,tokens,trained_tokens,loss_before,loss_after,never_learned,contradicts",
        "3,9,4,2.5,,1,1",
    ]
