"""The proof of effect of whole models: what passes, what does not, and the process that makes it."""

import json
import shutil
import threading
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_llama
from tunewright.deployments.full_models import FullOrder, prove_full
from tunewright.engines.full_proof import prove
from tunewright.errors import InvalidRequest, Misconfigured, Unavailable
from tunewright.files_on_disk import sha256_of
from tunewright.runners.local import LocalRunner

PROMPTS = [[1, 5, 6, 7], [1, 9, 30, 31, 32]]


def seal(model: Path) -> str:
    """Write the manifest of a result; returns its sha256."""
    files = {path.name: sha256_of(path) for path in model.iterdir() if path.name != "MANIFEST.json"}
    (model / "MANIFEST.json").write_text(json.dumps({"files": files}))
    return sha256_of(model / "MANIFEST.json")


@pytest.fixture
def order(tiny_base: Path, tmp_path: Path) -> FullOrder:
    model = tiny_llama(tmp_path / "model", seed=5)
    return FullOrder(
        base_path=str(tiny_base),
        base_files={"model.safetensors": sha256_of(tiny_base / "model.safetensors")},
        model_path=str(model),
        manifest_sha256=seal(model),
        prompts=PROMPTS,
        threads=1,
    )


def test_the_shift_is_that_of_the_logits(order: FullOrder) -> None:
    found = prove(order)
    shifts = []
    with torch.no_grad():
        for prompt in PROMPTS:
            one, other = (
                AutoModelForCausalLM.from_pretrained(path)(input_ids=torch.tensor([prompt])).logits[0, -1]
                for path in (order.base_path, order.model_path)
            )
            shifts.append((one - other).abs())
    assert found.max_logit_shift == pytest.approx(max(float(shift.max()) for shift in shifts), rel=1e-4)
    assert found.mean_logit_shift == pytest.approx(float(torch.stack(shifts).mean()), rel=1e-4)
    assert found.tensors == found.tensors_applied == 20


def test_a_copy_of_the_base_has_no_effect(order: FullOrder, tmp_path: Path) -> None:
    copy = shutil.copytree(order.base_path, tmp_path / "copy")
    same = msgspec.structs.replace(order, model_path=str(copy), manifest_sha256=seal(copy))
    with pytest.raises(InvalidRequest) as caught:
        prove(same)
    assert (caught.value.code, caught.value.values["missing"]) == ("no_effect", 0)


@pytest.mark.parametrize("fault", ["flip", "missing", "more", "manifest"])
def test_changed_files_are_refused(order: FullOrder, fault: str) -> None:
    model = Path(order.model_path)
    weights = model / "model.safetensors"
    if fault == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif fault == "missing":
        (model / "tokenizer.json").unlink()
    elif fault == "more":
        shutil.copy(weights, model / "more.safetensors")
    else:
        seal(shutil.copytree(model, model.parent / "other"))
        (model / "MANIFEST.json").write_text("{}")
    with pytest.raises(InvalidRequest) as caught:
        prove(order)
    assert caught.value.code == "model_files_changed"


def test_a_damaged_base_is_told(order: FullOrder) -> None:
    with pytest.raises(Misconfigured):
        prove(msgspec.structs.replace(order, base_files={"model.safetensors": "0" * 64}))


def test_the_process_says_what_is_wrong_and_leaves_nothing(order: FullOrder, tmp_path: Path) -> None:
    (Path(order.model_path) / "MANIFEST.json").write_text("{}")
    with pytest.raises(InvalidRequest) as caught:
        prove_full(LocalRunner(), tmp_path / "prove", order, 60.0, threading.Event())
    assert (caught.value.code, caught.value.values) == ("model_files_changed", {"name": "MANIFEST.json"})
    assert not (tmp_path / "prove").exists()


def test_a_server_that_stops_does_not_wait(order: FullOrder, tmp_path: Path) -> None:
    stopping = threading.Event()
    stopping.set()
    runner = LocalRunner()
    with pytest.raises(Unavailable) as caught:
        prove_full(runner, tmp_path / "prove", order, 60.0, stopping)
    assert caught.value.code == "engine_not_ready"
    assert not (tmp_path / "prove").exists()
