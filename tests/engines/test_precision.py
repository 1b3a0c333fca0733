"""Products in other formats than float32: near the exact ones, alone and in company, and refused where they are not."""

import gc
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.adapters import BASE_CODE, Reference, request_values
from tunewright.engines import loading, measuring, products
from tunewright.engines.adapter_files import Adapter, read_adapter
from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decoder import Decoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.loading import load_decoder
from tunewright.engines.measuring import better, choose_precision, choose_threads, product_speeds
from tunewright.engines.placement import choose_placement, placement_of, use_threads
from tunewright.engines.products import Products, half_product, half_scale, has_half
from tunewright.errors import Misconfigured

CPU = choose_placement(cuda=False, cuda_bfloat16=False)
NEAR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 0.05, "int8": 0.1}
"""Largest difference of a logit from the exact one, beside the largest logit."""


@pytest.fixture(scope="module", params=list(NEAR))
def decoder(request: pytest.FixtureRequest, tiny_base: Path) -> Decoder:
    rng = random.Random(0)
    texts = [[rng.randrange(600) for _ in range(30)] for _ in range(3)]
    found = load_decoder(tiny_base, CPU._replace(precision=request.param), 256, texts)
    assert found.precision == request.param
    return found


@torch.inference_mode()
def test_rows_alone_and_in_company_are_near_the_exact_ones(
    decoder: Decoder, adapters: list[Path], reference: Reference
) -> None:
    rng = random.Random(1)
    worn: list[Path | None] = [None, adapters[0], adapters[1], adapters[0], None]
    values = {path: request_values(path) for path in adapters}
    loaded = {
        path: Adapter(path.name, n, decoder.prepare(pairs))
        for path in adapters
        for pairs, n in [read_adapter(path, values[path]["adapter_sha256"], BASE_CODE, decoder.linears)]
    }
    rows = [[rng.randrange(600) for _ in range(n)] for n in (9, 30, 4, 17, 12)]
    prompts = [
        Part(i, 0, row[:-1], loaded[path] if path else None, True, False)
        for i, (row, path) in enumerate(zip(rows, worn, strict=True))
    ]
    last = [
        part._replace(offset=len(row) - 1, tokens=row[-1:], decoding=True)
        for part, row in zip(prompts, rows, strict=True)
    ]
    cache = SlotCache(slots=5, context_tokens=64)
    cache.reserve(5, 64)
    for some, cut in ((prompts, -1), (last, None)):
        batch = make_batch(some, "cpu")
        together = decoder.logits(batch, cache)
        for place, index in enumerate(batch.wanted_order):
            exact_V = reference.logits(worn[index], rows[index][:cut])[-1]
            limit = NEAR[decoder.precision] * float(exact_V.abs().max())
            assert float((together[place] - exact_V).abs().max()) <= limit
            alone = SlotCache(slots=1, context_tokens=64)
            alone.reserve(1, 64)
            part = Part(0, 0, rows[index][:cut], some[index].adapter, True, False)
            assert float((decoder.logits(make_batch([part], "cpu"), alone)[0] - exact_V).abs().max()) <= limit


def test_products_of_8_bits_take_large_features_apart() -> None:
    """A feature that is a thousand times as large as the others would leave them no steps."""
    generator = torch.Generator().manual_seed(0)
    x_TI, weight_OI = torch.randn(40, 64, generator=generator), torch.randn(48, 64, generator=generator)
    x_TI[:, 3] *= 1000
    x_TI[:, 9] *= 20
    bias_O = torch.randn(48, generator=generator)
    exact_TO = x_TI @ weight_OI.t() + bias_O
    kept_TI = x_TI.clone()

    def error(products: Products) -> float:
        found_TO = products.of("a", weight_OI, bias_O)(x_TI)
        return float((found_TO - exact_TO).pow(2).mean().sqrt() / (x_TI[:, :3] @ weight_OI[:, :3].t()).std())

    assert error(Products("float32")) < 1e-3
    assert error(Products("int8", {"a": x_TI.abs().amax(dim=0)})) < 0.1
    assert error(Products("int8")) > 1
    assert torch.equal(x_TI, kept_TI)
    assert torch.isfinite(Products("int8").of("a", torch.zeros(8, 16))(torch.zeros(2, 16))).all()


needs_half = pytest.mark.skipif(not has_half(), reason="torch has no FBGEMM on this processor")


def test_weights_go_into_2_bytes_only_where_nothing_is_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(300, 40, generator=generator)
    trained_OI = weight_OI.bfloat16().float()
    assert half_scale(trained_OI) == half_scale(weight_OI.half().float()) == 1
    assert half_scale(weight_OI) is None
    late_OI = trained_OI.clone()
    late_OI[299, 39] = 1 + 2**-20
    assert half_scale(late_OI) is None
    small_OI = trained_OI * 2**-12  # too small for 16 bits as it is
    scale = half_scale(small_OI)
    assert scale is not None and scale > 1 and torch.equal((small_OI * scale).half().float() / scale, small_OI)
    for value in (0.0, torch.inf, torch.nan):
        assert half_scale(torch.full((2, 2), value)) is None


@needs_half
@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_a_row_has_the_same_bits_alone_and_in_any_company(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x_TI, bias_O = torch.randn(260, 700, generator=generator), torch.randn(70, generator=generator)
    weight_OI = torch.randn(70, 700, generator=generator).bfloat16().float() / scale
    product = half_product(weight_OI, bias_O, scale)
    all_TO = product(x_TI)
    assert float((all_TO - (x_TI @ weight_OI.t() + bias_O)).abs().max()) < 1e-3 / scale**0.5
    for rows in range(261):
        assert torch.equal(product(x_TI[:rows]), all_TO[:rows])
        assert torch.equal(product(x_TI[rows - 1 : rows]), all_TO[rows - 1 : rows] if rows else all_TO[:0])


@needs_half
def test_a_base_of_2_bytes_is_served_from_as_many(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same rule as ever: the logits are those of the model's own code in float32."""
    made: list[torch.Tensor] = []

    def counted(weight_OI: torch.Tensor, *more: object) -> object:
        made.append(weight_OI)
        return half_product(weight_OI, *more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(products, "half_product", counted)
    monkeypatch.setattr(loading, "_MEASURED_FROM", 0)
    monkeypatch.setattr(loading, "fastest_exact", lambda _: (False, True))
    assert load_decoder(tiny_base, CPU, 64).precision == "float32" and not made
    shutil.copytree(tiny_base, tmp_path / "small")
    tensors = load_file(tiny_base / "model.safetensors")
    small = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(small, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    assert load_decoder(tmp_path / "small", CPU, 64).precision == "float32"
    layers = json.loads((tiny_base / "config.json").read_text())["num_hidden_layers"]
    assert len(made) == 4 * layers + 1


@pytest.mark.parametrize("precision", list(NEAR))
def test_nothing_of_the_file_stays_in_memory(precision: str, tiny_base: Path, tmp_path: Path) -> None:
    """All of it would, for one tensor that is still held."""
    shutil.copytree(tiny_base, tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", CPU._replace(precision=precision), 64, [list(range(30))])
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert decoder.precision == precision


def test_what_is_fastest_for_exact_weights_is_measured() -> None:
    plain, half = measuring.fastest_exact(64)
    assert {plain, half} <= {True, False} and not (half and not has_half())


def test_a_base_that_8_bits_change_too_much_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MAX_DIVERGENCE", 1e-9)
    with pytest.raises(Misconfigured) as caught:
        load_decoder(tiny_base, CPU._replace(precision="int8"), 64, [[1, 2, 3]])
    assert caught.value.code == "int8_inexact"
    assert caught.value.values["limit"] == 1e-9


def test_a_decoder_that_does_something_else_is_refused_in_every_format(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of one projection exchanged: the divergence of a model that knows little is small, its logits are others."""
    of = Products.of

    def wrong(self: Products, name: str, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> object:
        return of(self, name, weight_OI.flip(0) if name.endswith("1.mlp.gate_proj") else weight_OI, bias_O)

    monkeypatch.setattr(Products, "of", wrong)
    for precision in NEAR:
        with pytest.raises(Misconfigured):
            load_decoder(tiny_base, CPU._replace(precision=precision), 64)


def test_the_faster_format_is_chosen(monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    speeds = product_speeds(64, 96)
    assert set(speeds) == {"float32", "bfloat16"} and min(speeds.values()) > 0
    for bfloat16, chosen in ((1.2, "float32"), (1.4, "bfloat16")):
        monkeypatch.setattr(measuring, "product_speeds", lambda *_, b=bfloat16: {"float32": 100.0, "bfloat16": 100 * b})
        assert choose_precision(64, 96)[0] == chosen
        assert placement_of(tiny_base, "fastest", "exact").precision == chosen
    for wanted, precision in (("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        assert placement_of(tiny_base, wanted, "exact").precision == precision
        for weights in ("float16", "int8"):
            assert placement_of(tiny_base, wanted, weights).precision == weights


def test_threads_are_as_asked_or_measured() -> None:
    before = torch.get_num_threads()
    try:
        assert choose_threads(3) == 3
        assert choose_threads(0) >= 1
        assert (better(1.0, 0.6, 2), better(1.0, 0.9, 2), better(1.0, 10.0, 2)) == (2, 1, 1)
        assert use_threads(1) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
