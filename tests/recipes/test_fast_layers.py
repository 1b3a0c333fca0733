"""Layers computed by hand give the loss and every gradient of the plain modules."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.job_folder import ROWS, write_rows
from tests.recipes.test_flattened import CPU, with_adapter
from tests.recipes.test_packing import read
from tunewright.recipes import fast_attention, fast_layers, flattened, full_weights, packing
from tunewright.recipes.text import load_model


@pytest.fixture
def flat(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> packing.Flat:
    """Rows of several blocks of queries."""
    torch.set_num_threads(1)
    monkeypatch.setattr(fast_attention, "_QUERIES_AT_ONCE", 7)
    rows = read(write_rows(tmp_path / "rows.jsonl", ROWS), base)
    return packing.flatten(rows, list(range(len(rows))))


def gradients(model: Any, flat: packing.Flat) -> tuple[float, dict[str, torch.Tensor]]:
    loss, _ = flattened.summed_loss(model, flat, CPU)
    (loss / len(flat.labels)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item() / len(flat.labels), found


def trained(model: Any, training_type: str) -> Any:
    if training_type == "lora":
        return with_adapter(model)
    full_weights.train_all(model)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training_type", ["lora", "full"])
def test_loss_and_every_gradient_are_those_of_the_plain_modules(
    base: Path, flat: packing.Flat, training_type: str, checkpointing: bool
) -> None:
    model = trained(load_model(base, torch.float32), training_type)
    loss, expected = gradients(model, flat)
    assert fast_layers.speed_up(model, torch.float32, checkpointing=checkpointing)
    fast_loss, found = gradients(model, flat)
    assert abs(fast_loss - loss) < 1e-5
    assert found.keys() == expected.keys() and len(found) == (28 if training_type == "lora" else 20)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: name + m)
