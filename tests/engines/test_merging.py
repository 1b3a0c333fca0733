"""A LoRA model made whole: equal to base and adapter, or not there."""

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.engines.adapters import BASE_CODE, Reference, load_reference, make_adapter, sha256
from tests.engines.families import family, linears_of
from tests.tiny_glm import tiny_glm
from tunewright.deployments.merging import MergeOrder, merge_lora
from tunewright.engines import merging
from tunewright.engines.merging import merge
from tunewright.errors import InvalidRequest, Misconfigured, Unavailable
from tunewright.files_on_disk import sha256_of
from tunewright.models.whole_models import verify
from tunewright.runners.local import LocalRunner

PROMPTS = [[1, 5, 6, 7], [1, 9, 30, 31, 32]]


def order_of(base: Path, adapter: Path, target: Path) -> MergeOrder:
    return MergeOrder(
        base_code=BASE_CODE,
        base_path=str(base),
        base_files={"model.safetensors": sha256_of(base / "model.safetensors")},
        adapter_path=str(adapter),
        adapter_sha256=sha256(adapter),
        prompts=PROMPTS,
        target=str(target),
        threads=1,
    )


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_merged_model_answers_as_base_and_adapter(
    place: int, tiny_base: Path, adapters: list[Path], reference: Reference, tmp_path: Path
) -> None:
    """Ranks 2, 8 and 16, by alpha / r and by rsLoRA's rule; PEFT says what is right."""
    before = sha256_of(tiny_base / "model.safetensors")
    target = tmp_path / "whole"
    merged = merge(order_of(tiny_base, adapters[place], target), tmp_path)
    verify(target, merged.manifest_sha256)
    whole = load_reference(target)
    with torch.inference_mode():
        for prompt in PROMPTS:
            found = whole(input_ids=torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(found, reference.logits(adapters[place], prompt), rtol=1e-4, atol=1e-4)
    assert merged.layers == (4 if place == 2 else 14)
    assert merged.difference < 1e-4 < 0.01 < merged.effect
    assert merged.size_bytes > (target / "model.safetensors").stat().st_size
    assert (target / "tokenizer.json").is_file()
    assert sha256_of(tiny_base / "model.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("kind", ["glm", "glm4", "glm4_moe", "qwen2", "qwen3", "mistral"])
def test_other_families_merge_too(kind: str, tmp_path: Path) -> None:
    """Among them one matrix for gate and up, and experts beside which only attention has adapters."""
    if kind == "glm4_moe":
        base, targets = tiny_glm(tmp_path / "base", kind), linears_of(kind)[:4]
    else:
        base, targets = family(kind, tmp_path / "base"), linears_of(kind)
    adapter = make_adapter(base, tmp_path / "adapter", seed=3, target_modules=targets)
    target = tmp_path / "whole"
    merged = merge(order_of(base, adapter, target), tmp_path)
    assert merged.layers == 2 * len(targets)
    reference, whole = Reference(base), load_reference(target)
    with torch.inference_mode():
        for prompt in PROMPTS:
            found = whole(input_ids=torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(found, reference.logits(adapter, prompt), rtol=1e-4, atol=2e-4)


def test_a_base_in_16_bits_keeps_small_updates(tiny_base: Path, tmp_path: Path) -> None:
    """An update of a thousandth of the weights would vanish in bfloat16."""
    base = tmp_path / "base"
    load_reference(tiny_base).bfloat16().save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "faint", seed=3, strength=3e-4)
    merged = merge(order_of(base, adapter, tmp_path / "whole"), tmp_path)
    assert merged.difference < merged.effect / 10
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("fault", ["twice", "nothing"])
def test_a_wrong_sum_is_not_published(
    fault: str, tiny_base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(weight: torch.Tensor, pair: Any) -> torch.Tensor:
        return weight + (2 if fault == "twice" else 0) * pair.scale * pair.up @ pair.down

    monkeypatch.setattr(merging, "_sum", wrong)
    with pytest.raises(InvalidRequest) as caught:
        merge(order_of(tiny_base, adapters[1], tmp_path / "whole"), tmp_path)
    assert caught.value.code == "merge_differs"
    assert list(tmp_path.iterdir()) == []


def test_a_faint_adapter_that_was_not_added_is_noticed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its effect is below the tolerance, so closeness alone would not tell."""
    adapter = make_adapter(tiny_base, tmp_path / "faint", seed=3, strength=1e-5)
    monkeypatch.setattr(merging, "_sum", lambda weight, pair: weight + 0)
    with pytest.raises(InvalidRequest) as caught:
        merge(order_of(tiny_base, adapter, tmp_path / "whole"), tmp_path)
    assert caught.value.code == "merge_differs"
    effect = caught.value.values["effect"]
    assert isinstance(effect, float) and 0 < effect < 1e-3


def test_no_room_is_told_before_writing(
    tiny_base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InvalidRequest) as caught:
        merge(order_of(tiny_base, adapters[0], tmp_path / "whole"), tmp_path)
    assert caught.value.code == "insufficient_storage"
    assert list(tmp_path.iterdir()) == []


def test_the_process_publishes_and_leaves_nothing_else(tiny_base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """Also over what an earlier merge left at the same place."""
    target = tmp_path / "whole"
    target.mkdir()
    (target / "old.txt").write_text("old")
    order = order_of(tiny_base, adapters[1], target)
    merged = merge_lora(LocalRunner(), tmp_path / "merge", order, 60.0, threading.Event())
    verify(target, merged.manifest_sha256)
    assert not (target / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_process_says_what_is_wrong(tiny_base: Path, adapters: list[Path], tmp_path: Path) -> None:
    order = msgspec.structs.replace(order_of(tiny_base, adapters[1], tmp_path / "whole"), adapter_sha256="0" * 64)
    with pytest.raises(InvalidRequest) as caught:
        merge_lora(LocalRunner(), tmp_path / "merge", order, 60.0, threading.Event())
    assert caught.value.code == "adapter_invalid"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_base_is_told(tiny_base: Path, adapters: list[Path], tmp_path: Path) -> None:
    order = order_of(tiny_base, adapters[1], tmp_path / "whole")
    with pytest.raises(Misconfigured):
        merge(msgspec.structs.replace(order, base_files={"model.safetensors": "0" * 64}), tmp_path)


def test_a_server_that_stops_does_not_wait(tiny_base: Path, adapters: list[Path], tmp_path: Path) -> None:
    stopping = threading.Event()
    stopping.set()
    order = order_of(tiny_base, adapters[1], tmp_path / "whole")
    with pytest.raises(Unavailable) as caught:
        merge_lora(LocalRunner(), tmp_path / "merge", order, 60.0, stopping)
    assert caught.value.code == "engine_not_ready"
    assert list(tmp_path.iterdir()) == []
