from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from tests.recipes.job_folder import ROWS, write_rows
from tests.recipes.test_packing import read
from tunewright.errors import InvalidRequest
from tunewright.recipes import adapters, base_model, flattened, packing
from tunewright.recipes.base_model import load_model
from tunewright.recipes.computing import PER_CONVERSATION, Computing

CPU = torch.device("cpu")


@pytest.fixture
def rows(tmp_path: Path, base: Path) -> packing.Rows:
    torch.set_num_threads(1)
    return read(write_rows(tmp_path / "rows.jsonl", ROWS), base)


def plain_loss(model: Any, rows: packing.Rows) -> torch.Tensor:
    """Each row alone through transformers' own forward and loss, with -100 where a label is not trained."""
    total = torch.zeros(())
    for row in range(len(rows)):
        tokens = torch.tensor(rows.tokens_of(row), dtype=torch.long)[None]
        trained = torch.tensor(rows.trained_of(row))[None]
        labels = tokens.masked_fill(~trained, -100)
        total = total + model(input_ids=tokens, labels=labels, use_cache=False).loss * trained.sum()
    return total


def with_adapter(model: Any) -> Any:
    adapters.add_lora(model, rank=4, alpha=8, targets=adapters.linear_names(model), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # a fresh B is zero, and then A has no gradient to compare
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_loss_and_gradients_equal_plain_transformers(base: Path, rows: packing.Rows) -> None:
    ours = with_adapter(load_model(base, torch.float32))
    theirs = with_adapter(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32))
    flat = packing.flatten(rows, list(range(len(rows))))
    loss, _ = flattened.summed_loss(ours, flat, CPU)
    expected = plain_loss(theirs, rows)
    assert abs(loss.item() - expected.item()) / rows.n_trained < 1e-5
    (loss / rows.n_trained).backward()
    (expected / rows.n_trained).backward()
    wanted = adapters.adapter_parameters(theirs)
    for name, parameter in adapters.adapter_parameters(ours).items():
        assert parameter.grad is not None and wanted[name].grad is not None
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)


def test_tokens_of_one_row_do_not_reach_another(base: Path, rows: packing.Rows) -> None:
    model = load_model(base, torch.float32)
    alone, _ = flattened.summed_loss(model, packing.flatten(rows, [1]), CPU)
    both, _ = flattened.summed_loss(model, packing.flatten(rows, [0, 1]), CPU)
    first, _ = flattened.summed_loss(model, packing.flatten(rows, [0]), CPU)
    assert abs(both.item() - alone.item() - first.item()) < 1e-4


def test_hits_count_the_likeliest_tokens(base: Path, rows: packing.Rows) -> None:
    model = load_model(base, torch.float32)
    flat = packing.flatten(rows, [0])
    tokens = torch.from_numpy(flat.tokens)[None]
    likeliest = model(input_ids=tokens).logits[0].argmax(-1)[torch.from_numpy(flat.predicts)]
    told = packing.Flat(flat.tokens, flat.positions, flat.predicts, likeliest.numpy(), flat.lengths)
    assert int(flattened.summed_loss(model, told, CPU)[1]) == len(flat.labels)
    told.labels[0] = (told.labels[0] + 1) % 600
    assert int(flattened.summed_loss(model, told, CPU)[1]) == len(flat.labels) - 1


def test_a_sliding_window_is_kept() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    out, _ = flattened.attend_per_conversation(torch.nn.Identity(), q, k, v, None, sliding_window=3, lengths=[10, 2])
    place = torch.arange(10)
    distance = place[:, None] - place[None, :]
    expected = functional.scaled_dot_product_attention(
        q[:, :, :10],
        k[:, :, :10].repeat_interleave(2, 1),
        v[:, :, :10].repeat_interleave(2, 1),
        attn_mask=(distance >= 0) & (distance < 3),
    )
    torch.testing.assert_close(out[:, :10], expected.transpose(1, 2))


def test_a_model_that_would_train_on_nonsense_is_refused(base: Path, rows: packing.Rows) -> None:
    computing = Computing("cpu", "float32", PER_CONVERSATION, False, 1024, True, {})
    base_model.prove_flattening(load_model(base, torch.float32), rows, computing)
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=4.0,
        initializer_range=0.3,
    )
    scaled = GraniteForCausalLM(config).eval()
    scaled.set_attn_implementation(flattened.ATTENTION)
    with pytest.raises(InvalidRequest) as caught:
        base_model.prove_flattening(scaled, rows, computing)
    assert caught.value.code == "base_model_unsupported"


def test_linear_layers_are_found_by_kind_not_by_name(base: Path) -> None:
    model = load_model(base, torch.float32)
    assert adapters.linear_names(model) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert adapters.linear_names(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))) == []
