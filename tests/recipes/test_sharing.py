"""Beginnings that rows share are computed once, and nothing else changes: not a loss, not a gradient, not a receipt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.recipes.job_folder import losses, metrics, next_attempt, train_here, write_job, write_rows
from tests.recipes.test_fast_layers import trained
from tests.recipes.test_flattened import CPU, with_adapter
from tests.recipes.test_packing import read
from tests.recipes.test_preference import dpo_job, told
from tests.tiny_glm import KINDS, tiny_glm
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import RECEIPTS, JournalRecord, Started
from tunewright.recipes import base_model, fast_attention, fast_layers, flattened, flex_attention, packing
from tunewright.recipes.base_model import load_model
from tunewright.recipes.computing import PER_CONVERSATION, Computing
from tunewright.recipes.sharing import LEAST, Layout, Together

FLOAT32 = Computing("cpu", "float32", PER_CONVERSATION, False, 1024, True, {})
QUESTIONS = [
    (f"You are asked about the weather in a town far away, so tell it: {n}?", f"it rains {n}") for n in range(7)
]


def layout_of(rows: list[np.ndarray], share: bool = True) -> Layout:
    together = Together(share)
    for row in rows:
        together.add(row)
    return together.layout()


def rows_that_begin_alike(seed: int) -> list[np.ndarray]:
    """Two beginnings, one of which some rows follow further; one row twice, one that others begin with, and a stranger."""
    chance = np.random.default_rng(seed)

    def some(length: int) -> np.ndarray:
        return chance.integers(3, 500, length).astype(np.int32)

    first, second = some(40), some(30)
    followed = np.concatenate([first, some(50)])
    rows = [np.concatenate([first, some(20)]), np.concatenate([second, some(9)]), followed, first, some(25)]
    return [*rows, np.concatenate([second, some(33)]), np.concatenate([followed[:60], some(12)]), followed.copy()]


# --- what is computed -----------------------------------------------------------------------------------------------


def test_every_row_finds_its_own_tokens_at_its_own_positions() -> None:
    chance = np.random.default_rng(0)
    for _ in range(300):
        rows: list[np.ndarray] = []
        for _ in range(chance.integers(1, 9)):
            before = rows[chance.integers(len(rows))] if rows and chance.random() < 0.8 else np.empty(0, np.int32)
            own = chance.integers(0, 4, chance.integers(0 if len(before) else 1, 40)).astype(np.int32)
            rows.append(np.concatenate([before[: chance.integers(1, 60)], own]))
        labels = [np.arange(len(row)) > 0 for row in rows]
        for share in (False, True):
            layout, flat = layout_of(rows, share), packing.lay(rows, labels, share)
            assert len(flat.tokens) == sum(flat.lengths) == layout.tokens <= sum(map(len, rows))
            assert all(stretch.after < place for place, stretch in enumerate(layout.stretches))
            for row, places in zip(rows, layout.places(), strict=True):
                assert np.array_equal(flat.tokens[places], row)
                assert np.array_equal(flat.positions[places], np.arange(len(row)))
            assert np.array_equal(flat.labels, np.concatenate([row[1:] for row in rows]))
            before_labels = np.concatenate([places[:-1] for places in layout.places()])
            assert np.array_equal(flat.predicts, before_labels)


def test_only_what_differs_is_computed_for_each_row() -> None:
    rows = rows_that_begin_alike(0)
    assert layout_of(rows, share=False).tokens == sum(map(len, rows)) == 60 + 39 + 90 + 40 + 25 + 63 + 72 + 90
    assert layout_of(rows).tokens == (40 + 20) + (30 + 9 + 33) + (20 + 30 + 12) + 25
    short = [np.arange(LEAST + 5), np.arange(LEAST + 5)]
    short[1][LEAST:] = 99
    assert layout_of(short).tokens == LEAST + 10
    short[1][LEAST - 1] = 99
    assert layout_of(short).tokens == 2 * LEAST + 10, "less than is worth it"


def rows_of(tokens: list[np.ndarray], sides: int = 1) -> packing.Rows:
    """All but their first tokens are labels."""
    lengths = np.array([len(row) for row in tokens])
    ends, places = lengths.cumsum(), np.arange(len(tokens))
    return packing.Rows(
        tokens=np.concatenate(tokens),
        lines=places // sides + 1,
        starts=ends - lengths,
        lengths=lengths,
        n_labels=lengths - 1,
        spans=np.array([(1, length) for length in lengths]),
        first_span=places,
        end_span=places + 1,
        cut=packing.Tally(),
        skipped=packing.Tally(),
        sides=sides,
    )


def test_micro_batches_are_filled_with_what_is_computed() -> None:
    """Rows of two system messages in turn: those of one come together, and more of them fit."""
    stems = [np.full(50, 1, np.int32), np.full(50, 2, np.int32)]
    rows = rows_of([np.concatenate([stems[row % 2], np.full(10, 10 + row, np.int32)]) for row in range(16)])
    order = np.arange(16)[::-1]
    apart = list(packing.micro_batches(rows, order, 130))
    assert [row for group in apart for row in group] == order.tolist() and len(apart) == 8
    together = list(packing.micro_batches(rows, order, 130, share=True))
    assert together == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    assert [packing.layout(rows, group, True).tokens for group in together] == [130, 130]
    assert together == list(packing.micro_batches(rows, np.arange(16), 130, share=True)), "whatever the order was"


def test_both_sides_of_a_pair_stay_together() -> None:
    chance = np.random.default_rng(1)
    tokens = [chance.integers(0, 9, 30).astype(np.int32) for _ in range(12)]
    for pair in range(6):
        tokens[2 * pair + 1][:20] = tokens[2 * pair][:20]
    rows = rows_of(tokens, sides=2)
    groups = list(packing.micro_batches(rows, np.array([5, 0, 3, 1, 2, 4]), 90, share=True))
    assert [len(group) for group in groups] == [4, 4, 4]  # 40 tokens of each pair's 60 are computed
    assert all(
        one % 2 == 0 and other == one + 1
        for group in groups
        for one, other in zip(group[::2], group[1::2], strict=True)
    )
    assert sorted(row for group in groups for row in group) == list(range(12))


# --- the same losses and gradients ----------------------------------------------------------------------------------


def of_each(model: Any, flat: packing.Flat) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    found, _ = flattened.label_losses(model, flat, CPU)
    weights = torch.linspace(0.5, 1.5, len(found))  # or labels that two rows share could be taken for each other
    (found * weights).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found.detach(), gradients


def assert_sharing_changes_nothing(model: Any) -> None:
    rows = rows_that_begin_alike(3)
    labels = [np.arange(len(row)) >= 20 for row in rows]  # of the beginnings too
    expected, gradients = of_each(model, packing.lay(rows, labels, share=False))
    found, shared = of_each(model, packing.lay(rows, labels, share=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert shared.keys() == gradients.keys() and len(shared) > 8
    for name, gradient in shared.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training_type", ["lora", "full"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_of_a_llama(
    base: Path, monkeypatch: pytest.MonkeyPatch, training_type: str, checkpointing: bool, by_hand: bool
) -> None:
    monkeypatch.setattr(fast_attention, "_QUERIES_AT_ONCE", 17)
    model = trained(load_model(base, torch.float32), training_type)
    if by_hand:
        assert fast_layers.speed_up(model, torch.float32, checkpointing=checkpointing)
    elif checkpointing:
        flattened.checkpoint_layers(model)
    assert_sharing_changes_nothing(model)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_glm(tmp_path: Path, kind: str) -> None:
    assert_sharing_changes_nothing(with_adapter(load_model(tiny_glm(tmp_path / kind, kind), torch.float32)))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_of_stretches_is_that_of_whole_rows(window: int | None) -> None:
    """Both ways to compute it, with and without a sliding window: a tree of 12, 5 and 6 after it, 4 after the 6, and 9."""
    torch.manual_seed(0)
    lengths, after = [12, 5, 6, 4, 9], [-1, 0, 0, 2, -1]
    q, k, v = (torch.randn(1, heads, 36, 16) for heads in (4, 2, 2))
    paths = [[*range(12), *range(12, 17)], [*range(12), *range(17, 23), *range(23, 27)], [*range(27, 36)]]
    for attend in (flattened.attend_per_conversation, flex_attention.attend_flex):
        given: dict[str, Any] = {"sliding_window": window}
        found, _ = attend(torch.nn.Identity(), q, k, v, None, lengths=lengths, after=after, **given)
        for path in paths:
            alone, _ = flattened.attend_per_conversation(
                torch.nn.Identity(), q[:, :, path], k[:, :, path], v[:, :, path], None, **given
            )
            torch.testing.assert_close(found[:, path], alone)


def test_attention_keeps_no_more_than_whole_rows_would() -> None:
    """Short ends of a long beginning see far more than tokens of rows for themselves do; what is not kept is made again."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, 200, 8) for heads in (4, 2, 2))
    lengths, after = [100, *[5] * 20], [-1, *[0] * 20]
    found = []
    for most in (1, 64, 10**6):  # room for the probabilities of one, some, all of the continuations
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast_attention, "_QUERIES_AT_ONCE", 200)
            blocks = fast_attention.blocks_of(lengths, after)
            patch.setattr(fast_attention, "_QUERIES_AT_ONCE", most)
            out, kept = fast_attention.attend(query, key, value, blocks)
        numbers = sum(one[0].numel() for one in kept if one is not None) / 2  # two heads share one of keys
        assert numbers <= 200 * (105 + most) / 2
        found.append([out, *fast_attention.attend_backward(torch.ones_like(out), query, key, value, blocks, kept)])
        assert [one is None for one in kept].count(True) == {1: 19, 64: 7, 10**6: 0}[most]
    for some in found[1:]:
        for one, other in zip(some, found[0], strict=True):
            assert torch.equal(one, other)


# --- who may share --------------------------------------------------------------------------------------------------


def one_key_less(mask: torch.Tensor | None) -> torch.Tensor | None:
    return mask if mask is None else functional.pad(mask[:, 1:], (0, 1))


@pytest.mark.parametrize("fault", [None, "mask", "positions", "keys", "dropout"])
def test_a_model_for_which_it_is_wrong_is_trained_without(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    """Each fault leaves rows that are only laid end to end as they are."""
    torch.set_num_threads(1)
    rows = read(write_rows(tmp_path / "rows.jsonl", QUESTIONS), base)
    model = load_model(base, torch.float32)
    if fault == "mask":  # every query of a continuation sees one key too few
        mask = flattened._mask
        monkeypatch.setattr(flattened, "_mask", lambda *given: one_key_less(mask(*given)))
    elif fault == "positions":  # as if nobody had told any: inside a row that lies in one piece distances are right
        forward = model.base_model.forward
        model.base_model.forward = lambda **given: forward(
            **given | {"position_ids": torch.arange(given["input_ids"].shape[1])[None]}
        )
    elif fault == "keys":  # continuations see only themselves
        ends = flattened._ends_of_conversations
        monkeypatch.setattr(flattened, "_ends_of_conversations", lambda *given: ends(*given) | {"after": None})
    elif fault == "dropout":
        model.base_model.layers[0].dropout = torch.nn.Dropout(0.1).train()
    with_adapter(model)
    base_model.prove_flattening(model, rows, FLOAT32)
    assert base_model.can_share(model, rows, FLOAT32) == (fault is None)


# --- whole trainings ------------------------------------------------------------------------------------------------


def spared(found: list[JournalRecord]) -> float:
    return next(record.choices["tokens_spared"] for record in found if isinstance(record, Started))


def without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "can_share", lambda *given: False)


def test_a_training_learns_the_same_and_counts_the_same_tokens(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, Any] = {"rows": QUESTIONS, "batch_size": 4, "receipts": "on"}
    shared = train_here(write_job(tmp_path / "shared", base, **wanted))
    without_sharing(monkeypatch)
    apart = train_here(write_job(tmp_path / "apart", base, **wanted))
    assert spared(shared) > 0.4 and spared(apart) == 0
    assert losses(shared) == pytest.approx(losses(apart), abs=1e-5)
    assert [step.tokens for step in metrics(shared)] == [step.tokens for step in metrics(apart)]
    receipts = [
        [json.loads(line) for line in (tmp_path / name / RECEIPTS).read_text().splitlines()]
        for name in ("shared", "apart")
    ]
    assert len(receipts[0]) == len(QUESTIONS)
    for one, other in zip(*receipts, strict=True):
        assert one["line"] == other["line"] and one["tokens"] == other["tokens"]
        assert one["loss_before"] == pytest.approx(other["loss_before"], abs=1e-4)
        assert one["loss_after"] == pytest.approx(other["loss_after"], abs=1e-4)


def test_a_stopped_training_goes_on_to_the_same_bit(tmp_path: Path, base: Path) -> None:
    wanted: dict[str, Any] = {"rows": QUESTIONS, "batch_size": 3, "micro_batch_tokens": 100}
    whole = train_here(write_job(tmp_path / "whole", base, **wanted))
    spec = write_job(tmp_path / "stopped", base, **wanted)
    first = train_here(spec, stop_at=4)
    assert losses(first) | losses(train_here(next_attempt(spec))) == losses(whole)


def test_preference_pairs_compute_their_question_once(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(question, answer, f"{answer} or snows") for question, answer in QUESTIONS]
    wanted: dict[str, Any] = {"validate": True, "receipts": "on", "pairs": pairs}
    shared = train_here(dpo_job(tmp_path / "shared", base, **wanted))
    without_sharing(monkeypatch)
    apart = train_here(dpo_job(tmp_path / "apart", base, **wanted))
    assert spared(shared) > 0.5 and spared(apart) == 0
    assert told(shared)[1:] == [pytest.approx(step, abs=1e-5) for step in told(apart)[1:]]
    assert [step.tokens for step in metrics(shared)] == [step.tokens for step in metrics(apart)]
    before, after = ((tmp_path / name / RECEIPTS).read_text().splitlines() for name in ("shared", "apart"))
    assert [json.loads(line)["line"] for line in before] == [json.loads(line)["line"] for line in after]


def test_validation_rows_are_looked_at_as_before(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "validation.jsonl", QUESTIONS[::-1])
    found = []
    for share in (True, False):
        if not share:
            without_sharing(monkeypatch)
        validation = {"validation_data": str(data), "validation_sha256": sha256_of(data)}
        spec = write_job(tmp_path / str(share), base, rows=QUESTIONS, n_epochs=1, **validation)
        found.append(metrics(train_here(spec))[-1])
    assert found[0].eval_loss == pytest.approx(found[1].eval_loss, abs=1e-5)
    assert found[0].eval_accuracy == found[1].eval_accuracy
