"""Layers computed by hand give the loss and every gradient of the plain modules."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.job_folder import ROWS, write_rows
from tests.recipes.test_flattened import CPU, with_adapter
from tests.recipes.test_packing import read
from tests.tiny_glm import tiny_glm
from tunewright.recipes import (
    adapters,
    fast_attention,
    fast_layers,
    fast_linears,
    flattened,
    full_weights,
    packing,
    products,
)
from tunewright.recipes.base_model import load_model


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


def test_nothing_lies_in_the_mapped_file_of_the_base_any_more(tmp_path: Path, base: Path) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    model = with_adapter(load_model(own, torch.float32))
    assert fast_layers.speed_up(model, torch.float32, checkpointing=False)
    assert str(own) not in Path("/proc/self/maps").read_text("ascii", "replace")


@pytest.mark.parametrize("whose", [products.TORCH, products.NUMPY])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training_type", ["lora", "full"])
def test_loss_and_every_gradient_are_those_of_the_plain_modules(
    base: Path, flat: packing.Flat, training_type: str, checkpointing: bool, whose: str
) -> None:
    model = trained(load_model(base, torch.float32), training_type)
    loss, expected = gradients(model, flat)
    assert fast_layers.speed_up(model, torch.float32, checkpointing=checkpointing)
    products.use(whose)
    fast_loss, found = gradients(model, flat)
    products.use(products.TORCH)
    assert abs(fast_loss - loss) < 1e-5
    assert found.keys() == expected.keys() and len(found) == (28 if training_type == "lora" else 20)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: name + m)


def test_a_young_adapter_is_not_lost_in_the_rounding_of_bfloat16(base: Path) -> None:
    torch.manual_seed(0)
    model = load_model(base, torch.bfloat16)
    adapters.add_lora(model, rank=4, alpha=8, targets=adapters.linear_names(model), seed=1)
    query = model.base_model.layers[0].self_attn.q_proj
    with torch.no_grad():
        query.lora_B[adapters.ADAPTER_NAME].weight.fill_(2e-4)
    linears = fast_linears.Linears([query], torch.bfloat16)
    inputs = torch.randn(4096, 32).bfloat16()
    exact = inputs.float() @ linears.weight.float().t()
    now = linears.now()
    assert now.down is not None and now.up is not None
    change = (inputs.float() @ now.down.float().t()) @ now.up[0].float().t()
    found = now.forward(inputs)[0].float() - exact
    kept = (found * change).sum() / change.square().sum()
    assert change.abs().mean() < 2**-9 * exact.abs().mean() and kept.item() == pytest.approx(1, abs=0.25)


def test_bfloat16_is_near_float32(base: Path, flat: packing.Flat) -> None:
    loss, expected = gradients(with_adapter(load_model(base, torch.float32)), flat)
    model = with_adapter(load_model(base, torch.bfloat16))
    assert fast_layers.speed_up(model, torch.bfloat16, checkpointing=False)
    assert fast_layers.computed_in(model) == torch.bfloat16
    fast_loss, found = gradients(model, flat)
    assert fast_loss == pytest.approx(loss, rel=0.02)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > 0.98, name


def test_what_is_not_understood_is_left_as_it_is(tmp_path: Path, base: Path) -> None:
    assert not fast_layers.speed_up(
        load_model(tiny_glm(tmp_path / "glm", "glm4"), torch.float32), torch.float32, checkpointing=False
    )
    partly = load_model(base, torch.float32)
    adapters.add_lora(partly, rank=2, alpha=4, targets=["q_proj", "v_proj"], seed=1)
    assert not fast_layers.speed_up(partly, torch.float32, checkpointing=False)
    assert fast_layers.computed_in(partly) == torch.float32
