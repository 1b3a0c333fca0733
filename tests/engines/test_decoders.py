"""Both decoders against transformers and PEFT: every row of every mixed step has its solo logits."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.engines.adapters import BASE_CODE, Reference, make_adapter, request_values
from tests.engines.families import FAST_KINDS, family, linears_of
from tunewright.engines.adapter_files import Adapter, read_adapter
from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decode_attention import by_numpy, by_torch
from tunewright.engines.decoder import Decoder
from tunewright.engines.fast_decoder import FastDecoder
from tunewright.engines.general import GeneralDecoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.loading import load_decoder
from tunewright.engines.own_code import load_model, plan_of, weights_of
from tunewright.engines.placement import choose_placement, detect_placement
from tunewright.engines.products import Products, packed_product, plain_product
from tunewright.errors import Misconfigured

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
CPU = choose_placement(cuda=False, cuda_bfloat16=False)


@pytest.fixture(params=["general", "fast", "plain", "numpy"])
def decoder(request: pytest.FixtureRequest, tiny_base: Path) -> Decoder:
    model = load_model(tiny_base, CPU)
    if request.param == "general":
        return GeneralDecoder(model)
    weights = weights_of(tiny_base, CPU)
    plan = plan_of(model, weights)
    assert plan is not None
    products = Products(plain=request.param == "plain")
    attention = by_numpy if request.param == "numpy" else by_torch
    return FastDecoder(plan, weights, context_tokens=256, products=products, attention=attention)


def load(decoder: Decoder, folder: Path) -> Adapter:
    values = request_values(folder)
    pairs, tensors = read_adapter(folder, values["adapter_sha256"], BASE_CODE, decoder.linears)
    return Adapter(folder.name, tensors, decoder.prepare(pairs))


def test_mixed_steps_equal_solo_runs(decoder: Decoder, adapters: list[Path], reference: Reference) -> None:
    compare_mixed_steps(decoder, adapters, reference)


@torch.inference_mode()
def test_plain_and_packed_products_are_those_of_torch() -> None:
    weight_OI, bias_O, x_TI = torch.randn(24, 16), torch.randn(24), torch.randn(3, 16)
    for make in (plain_product, packed_product):
        for bias in (None, bias_O):
            expected_TO = torch.nn.functional.linear(x_TI, weight_OI, bias)
            torch.testing.assert_close(make(weight_OI, bias)(x_TI), expected_TO)


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_families_equal_transformers_by_both_paths(kind: str, tmp_path: Path) -> None:
    """The fast path, and the general one beside it, against transformers and PEFT, also with adapters on fused projections."""
    base = family(kind, tmp_path / "base")
    linears = linears_of(kind)
    adapters = [
        make_adapter(base, tmp_path / "all", seed=1, rank=4, target_modules=linears),
        make_adapter(base, tmp_path / "some", seed=2, rank=8, target_modules=[linears[0], linears[2], linears[4]]),
        make_adapter(base, tmp_path / "down", seed=3, rank=2, target_modules=linears[-1:], use_rslora=True),
    ]
    reference = Reference(base)
    fast = load_decoder(base, CPU, 64)
    assert isinstance(fast, FastDecoder)
    for decoder in (fast, GeneralDecoder(load_model(base, CPU))):
        compare_mixed_steps(decoder, adapters, reference)


@torch.inference_mode()
def compare_mixed_steps(decoder: Decoder, adapters: list[Path], reference: Reference) -> None:
    rng = random.Random(0)
    paths: list[Path | None] = [None, adapters[0], adapters[1], None, adapters[2], adapters[0]]
    loaded = {path: load(decoder, path) for path in adapters}
    rows = [[rng.randrange(600) for _ in range(n)] for n in (7, 12, 3, 40, 9, 21)]
    cache = SlotCache(slots=6, context_tokens=64)
    cache.reserve(2, 16)
    cache.reserve(6, 64)

    def step(parts: list[tuple[int, int, int, bool]]) -> None:
        """(row, from, to, decoding) for each part; compares all logits that the step gives."""
        batch = make_batch(
            [
                Part(row, start, rows[row][start:end], loaded[path] if (path := paths[row]) else None, True, decoding)
                for row, start, end, decoding in parts
            ],
            "cpu",
        )
        found = decoder.logits(batch, cache)
        for place, index in enumerate(batch.wanted_order):
            row, _, end, _ = parts[index]
            expected = reference.logits(paths[row], rows[row][:end])[-1]
            torch.testing.assert_close(found[place], expected, rtol=1e-4, atol=2e-4)

    step([(row, 0, min(5, len(ids) - 2), False) for row, ids in enumerate(rows)])
    step([(row, min(5, len(ids) - 2), len(ids) - 2, False) for row, ids in enumerate(rows) if len(ids) > 7])
    step([(row, len(ids) - 2, len(ids) - 1, True) for row, ids in enumerate(rows)])
    step([(0, 6, 7, True), (1, 11, 12, True), (4, 7, 9, False), (5, 19, 20, False)])


@torch.inference_mode()
def test_rows_of_the_base_do_not_feel_adapters(decoder: Decoder, adapters: list[Path]) -> None:
    """Bitwise: the same step with and without adapters on the other rows."""
    adapter = load(decoder, adapters[1])
    found = []
    for other in (None, adapter):
        cache = SlotCache(slots=3, context_tokens=32)
        cache.reserve(3, 32)
        parts = [Part(i, 0, [5 + i, 6, 7], other if i == 2 else None, True, False) for i in range(3)]
        found.append(decoder.logits(make_batch(parts, "cpu"), cache))
    assert torch.equal(found[0][:2], found[1][:2])
    assert not torch.equal(found[0][2], found[1][2])


@torch.inference_mode()
def test_rows_survive_moves_growth_and_poisoned_neighbours(decoder: Decoder, reference: Reference) -> None:
    cache = SlotCache(slots=4, context_tokens=600)
    cache.reserve(3, 8)
    rows = [[9, 8, 7, 6], [1, 2, 3], [11, 12, 13, 14, 15]]
    parts = [Part(i, 0, row[:-1], None, False, False) for i, row in enumerate(rows)]
    decoder.logits(make_batch(parts, "cpu"), cache)
    for memory in (*cache._keys.values(), *cache._values.values()):
        memory[1].fill_(torch.nan)
    cache.clear(1)
    cache.move(2, 1, 4)
    cache.reserve(4, 600)
    parts = [Part(0, 3, rows[0][-1:], None, True, True), Part(1, 4, rows[2][-1:], None, True, True)]
    found = decoder.logits(make_batch(parts, "cpu"), cache)
    torch.testing.assert_close(found[0], reference.logits(None, rows[0])[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], reference.logits(None, rows[2])[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["activation", "rope", "subclass", "norm", "tensor"])
def test_what_the_fast_path_does_not_know_goes_the_general_way(change: str, tmp_path: Path) -> None:
    model: Any = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=2))
    model.save_pretrained(tmp_path)
    weights = weights_of(tmp_path, CPU)
    assert plan_of(model, weights) is not None
    layer = model.model.layers[1]
    if change == "activation":
        model.config.hidden_act = "gelu"
    elif change == "rope":
        model.config.rope_parameters["rope_type"] = "dynamic"
    elif change == "subclass":
        model.__class__ = type("Other", (Qwen3ForCausalLM,), {})
    elif change == "norm":
        del layer.self_attn.k_norm
    else:
        layer.self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    assert plan_of(model, weights) is None


def small(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gemma3":
            return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_hidden_layers=3, sliding_window=4))
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64))


@pytest.mark.parametrize("kind", ["gemma3", "gpt2"])
def test_other_families_pass_the_check_of_loading(kind: str, tmp_path: Path) -> None:
    """Loading compares the slotted decoder with the model's own code; sliding windows are shorter than its prompts."""
    small(kind).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, CPU, 64)
    assert isinstance(decoder, GeneralDecoder)
    assert decoder.n_embeddings == 300


def test_what_cannot_be_served_right_is_refused(tmp_path: Path) -> None:
    """A model with soft-capped attention, which the slotted cache does not do."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(Misconfigured) as caught:
        load_decoder(tmp_path, CPU, 64)
    assert caught.value.code == "base_unsupported"


def test_weights_that_need_pickle_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    torch.save(AutoModelForCausalLM.from_pretrained(tiny_base).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(tmp_path, CPU)


def test_placement() -> None:
    assert choose_placement(cuda=False, cuda_bfloat16=False)[:2] == ("cpu", "float32")
    assert choose_placement(cuda=True, cuda_bfloat16=True)[:2] == ("cuda", "bfloat16")
    assert choose_placement(cuda=True, cuda_bfloat16=False)[:2] == ("cuda", "float16")
    assert detect_placement().device in {"cpu", "cuda"}
