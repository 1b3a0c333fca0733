"""What is remembered of a model's own code: used only while everything is as it was, and never in place of the comparison."""

import logging
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.adapters import Reference as Own
from tests.engines.engine_calls import CPU
from tests.engines.engine_worker import WorkerRun, generate, worker_spec
from tests.engines.families import family
from tests.tiny_glm import tiny_glm
from tests.tiny_models import tiny_llama
from tunewright.engines import fast_decoder, general, loading, own_code, references
from tunewright.engines.fast_decoder import FastDecoder
from tunewright.engines.loading import load_decoder
from tunewright.engines.own_code import load_model, reference_of, weights_of
from tunewright.engines.products import Products
from tunewright.engines.references import Order, Reference, keep, reference, remembered
from tunewright.engines.shared_head import head_and_rows
from tunewright.engines.weight_files import WeightFiles
from tunewright.errors import Misconfigured
from tunewright.files_on_disk import sha256_of
from tunewright.rendering.renderer import Renderer

_RNG = random.Random(0)
TEXTS = [[_RNG.randrange(600) for _ in range(30)] for _ in range(3)]
ASKED = "own code is asked"


def order_for(base: Path, store: Path | None, precision: str = "float32", **changes: Any) -> Order:
    values: dict[str, Any] = {
        "folder": str(base),
        "files": {path.name: sha256_of(path) for path in base.iterdir()},
        "placement": CPU._replace(precision=precision),
        "context_tokens": 256,
        "texts": TEXTS,
        "store": store and str(store),
    }
    return Order(**(values | changes))


def asked(order: Order) -> Reference:
    """A new one, made here."""
    folder = Path(order.folder)
    return reference_of(load_model(folder, order.placement), weights_of(folder, order.placement), order)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own code is not there to be asked."""

    def refuse(*_: object) -> None:
        raise AssertionError("the model's own code was asked")

    monkeypatch.setattr(own_code, "load_model", refuse)
    monkeypatch.setattr(general, "GeneralDecoder", refuse)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_what_is_kept_comes_back_and_is_enough_to_load(
    precision: str, tiny_base: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "MAX_SHARE", 0.5)  # old processors add products of 8 bits up in too few bits
    order = order_for(tiny_base, tmp_path / "kept", precision)
    made = asked(order)
    keep(made, order)
    found = remembered(order)
    assert found is not None and found[:3] == made[:3]
    for name in made.largest:
        torch.testing.assert_close(found.largest[name], made.largest[name], rtol=0, atol=0)
    assert len(found.logits) == len(made.rows) and set(found.largest) == set(made.largest)
    assert order.path.stat().st_mode & 0o077 == 0
    request.getfixturevalue("forgetful")
    decoder = load_decoder(tiny_base, order.placement, 256, TEXTS, found)
    assert isinstance(decoder, FastDecoder) and decoder.precision == precision


def test_a_change_of_anything_it_depends_on_makes_it_another(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_for(tiny_base, tmp_path)
    keep(asked(order), order)
    files = order.files | {"model.safetensors": "0" * 64}
    others = [
        order_for(tiny_base, tmp_path, files=files),
        order_for(tiny_base, tmp_path, precision="int8"),
        order_for(tiny_base, tmp_path, texts=TEXTS[:1]),
        order_for(tiny_base, tmp_path, context_tokens=4),
    ]
    assert len({each.path for each in [order, *others]}) == 5
    assert [remembered(each) for each in others] == [None] * 4
    with monkeypatch.context() as patch:
        patch.setattr(references.importlib.metadata, "version", lambda name: f"another {name}")
        assert remembered(order) is None
    with monkeypatch.context() as patch:
        patch.setattr(references.tunewright, "__version__", "another")
        assert remembered(order) is None
    with monkeypatch.context() as patch:
        decoder = Path(fast_decoder.__file__).name
        patch.setattr(references, "sha256_of", lambda path: "0" * 64 if path.name == decoder else sha256_of(path))
        assert remembered(order) is None
    assert remembered(order) is not None


@pytest.mark.parametrize("fault", ["flip", "cut", "empty", "rubbish", "nothing told"])
def test_a_damaged_one_is_as_none(fault: str, tiny_base: Path, tmp_path: Path) -> None:
    order = order_for(tiny_base, tmp_path)
    keep(asked(order), order)
    data = bytearray(order.path.read_bytes())
    if fault == "flip":
        data[-1] ^= 1
    elif fault == "nothing told":
        content = bytes(data[32:]).replace(b"about", b"other")
        data = bytearray(references.hashlib.sha256(content).digest() + content)
    order.path.write_bytes({"cut": bytes(data[:-9]), "empty": b"", "rubbish": b"x" * 999}.get(fault, bytes(data)))
    assert remembered(order) is None


def test_one_that_says_something_else_is_asked_again(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole file with another model's answers, or another model's plan: neither is served by."""
    order = order_for(tiny_base, tmp_path)
    made = asked(order)
    assert made.plan is not None
    own = load_decoder(tiny_base, CPU, 64)
    turned = made.plan.turns[::-1]
    wrong = [
        made._replace(logits=[logits_TV.flip(-1) for logits_TV in made.logits]),
        made._replace(logits=[logits_TV * torch.nan for logits_TV in made.logits]),
        made._replace(plan=references.msgspec.structs.replace(made.plan, eps=0.5)),
        made._replace(plan=references.msgspec.structs.replace(made.plan, turns=turned)),
        made._replace(plan=references.msgspec.structs.replace(made.plan, windows=(1,))),
    ]
    for each in wrong:
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            decoder = load_decoder(tiny_base, CPU, 64, (), each)
        assert "differs" in caplog.text
        assert isinstance(decoder, FastDecoder) and decoder._plan == made.plan
        assert decoder.linears == own.linears


def test_a_decoder_that_does_something_else_is_refused_with_one_too(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Products.of

    def wrong(self: Products, name: str, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> object:
        return of(self, name, weight_OI.flip(0) if name.endswith("1.mlp.gate_proj") else weight_OI, bias_O)

    made = asked(order_for(tiny_base, tmp_path))
    monkeypatch.setattr(Products, "of", wrong)
    with pytest.raises(Misconfigured) as caught:
        load_decoder(tiny_base, CPU, 64, (), made)
    assert caught.value.code == "base_unsupported"


def test_bases_that_only_their_own_code_runs_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    moe = tiny_glm(tmp_path / "moe", "glm4_moe")
    spec = worker_spec(tiny_base)
    assert reference(order_for(moe, tmp_path / "kept"), spec) is None
    assert reference(order_for(tiny_base, None), spec) is None


def test_the_least_used_are_forgotten(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_MOST_KEPT", 2)
    made = asked(order_for(tiny_base, tmp_path))
    orders = [order_for(tiny_base, tmp_path / "kept", context_tokens=n) for n in (10, 11, 12)]
    for age, order in enumerate(orders[:2]):
        keep(made, order)
        references.os.utime(order.path, (1000 + age, 1000 + age))
    assert remembered(orders[0]) is not None, "used again, so the other one goes"
    keep(made, orders[2])
    assert [order.path.exists() for order in orders] == [True, False, True]


async def test_a_worker_asks_once_and_then_starts_without_transformers(tiny_base: Path, tmp_path: Path) -> None:
    """Both answer as transformers does. Only the first start has the model's own code asked, by a process that ends."""
    expected = Renderer(tiny_base).decode(Own(tiny_base).greedy(None, [5, 6, 7], 12, frozenset()))
    for turn, said in ((1, True), (2, False)):
        spec = worker_spec(tiny_base, references_path=str(tmp_path / "kept"))
        run = WorkerRun(tmp_path / f"worker-{turn}", spec).start(180)
        try:
            text, _ = await generate(run.port, prompt_ids=[5, 6, 7], max_tokens=12)
            assert run.process is not None
            maps = Path(f"/proc/{run.process.pid}/maps").read_text()
        finally:
            run.kill()
        assert text == expected
        assert (ASKED in run.log()) == said, run.log()
        assert "regex" not in maps, "a library that transformers imports"
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.parametrize("kind", ["glm", "llama3-rope", "qwen2"])
def test_turns_are_those_of_the_own_code_at_every_place(kind: str, tmp_path: Path) -> None:
    base = family(kind, tmp_path)
    model: Any = load_model(base, CPU)
    decoder: Any = load_decoder(base, CPU, 512)
    cos_CD, sin_CD = (table_1CD[0] for table_1CD in model.model.rotary_emb(torch.zeros(1), torch.arange(512)[None]))
    half = cos_CD.shape[1] // 2
    if kind == "glm":
        assert torch.equal(decoder._cos_CD[:, : 2 * half : 2], cos_CD[:, :half])
        assert torch.equal(decoder._sin_CD[:, 1 : 2 * half : 2], sin_CD[:, :half])
    else:
        assert torch.equal(decoder._cos_CD, cos_CD)
        assert torch.equal(decoder._sin_CD, torch.cat([-sin_CD[:, :half], sin_CD[:, half:]], dim=1))


@torch.inference_mode()
@pytest.mark.parametrize("sizes", [(600, 32), (640, 48), (1000, 100), (63, 24)])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_head_that_is_the_table_too_gives_the_same_rows(
    sizes: tuple[int, int], precision: str, tmp_path: Path
) -> None:
    table_VE = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    save_file({"table": table_VE}, tmp_path / "model.safetensors")
    weights = WeightFiles(tmp_path, torch.float32, "cpu")
    head, rows = head_and_rows(weights, "table", "table", Products(precision))
    ids_T = torch.randint(sizes[0], (50,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(rows(ids_T), table_VE[ids_T])
    if precision == "float32":
        x_TE = torch.randn(3, sizes[1])
        torch.testing.assert_close(head(x_TE), x_TE @ table_VE.t(), rtol=1e-4, atol=1e-4)


def test_weights_in_parts_are_found_and_none_outside_the_folder(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    parts = WeightFiles(tmp_path, torch.float32, "cpu")
    whole = load_file(tiny_base / "model.safetensors")
    assert index.exists() and parts.names == set(whole)
    assert all(torch.equal(parts(name), whole[name]) for name in whole)
    index.write_text(index.read_text().replace("model-0", "../model-0"))
    with pytest.raises(OSError, match="outside"):
        WeightFiles(tmp_path, torch.float32, "cpu")


def test_another_base_is_not_taken_for_this_one(tiny_base: Path, tmp_path: Path) -> None:
    """Same shapes, other weights: what is remembered of the one does not let the other be served unasked."""
    other = tiny_llama(tmp_path / "other", seed=5)
    made = asked(order_for(tiny_base, tmp_path))
    decoder: Any = load_decoder(other, CPU, 64, (), made)
    assert torch.equal(decoder._norm_E, load_file(other / "model.safetensors")["model.norm.weight"])
    assert order_for(other, tmp_path).path != order_for(tiny_base, tmp_path).path
