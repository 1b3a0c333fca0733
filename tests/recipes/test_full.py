"""All parameters are trained: the numbers of plain transformers, whole models as results, resumed to the bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.recipes.job_folder import ROWS, losses, metrics, next_attempt, train_here, write_job, write_rows
from tests.recipes.test_flattened import CPU, plain_loss
from tests.recipes.test_packing import read
from tests.recipes.test_text import failed, finished
from tests.tiny_glm import KINDS, tiny_glm
from tests.tiny_models import tiny_llama
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import Started, Stopped
from tunewright.models.artifact import inspect_model_folder
from tunewright.recipes import flattened, full_weights, packing
from tunewright.recipes.base_model import load_model

FULL: dict[str, Any] = {"training_type": "full", "learning_rate": 2e-3}


def test_every_gradient_is_that_of_plain_transformers(tmp_path: Path) -> None:
    for tied in (True, False):
        base = tiny_llama(tmp_path / f"tied-{tied}", tied=tied)
        rows = read(write_rows(tmp_path / "rows.jsonl", ROWS), base)
        ours = load_model(base, torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
        parameters = full_weights.train_all(ours)
        assert ("lm_head.weight" in parameters) == (not tied)
        loss, _ = flattened.summed_loss(ours, packing.flatten(rows, list(range(len(rows)))), CPU)
        expected = plain_loss(theirs, rows)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (loss / rows.n_trained).backward()
        (expected / rows.n_trained).backward()
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_the_result_is_a_whole_model(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base") if kind == "llama" else tiny_glm(tmp_path / "base", kind)
    monkeypatch.setattr(full_weights, "LARGEST_PART", "60KB")
    made: list[Any] = []
    write = full_weights.write_result
    monkeypatch.setattr(full_weights, "write_result", lambda *given: made.append(given[1]) or write(*given))
    found = train_here(write_job(tmp_path / "job", base, n_epochs=8, **FULL))
    steps = metrics(found)
    assert steps[0].loss is not None and steps[-1].loss is not None and steps[-1].loss < 0.8 * steps[0].loss
    started = found[0]
    assert isinstance(started, Started) and started.choices["lora"] is None

    result = tmp_path / "job" / "result"
    manifest = json.loads((result / "MANIFEST.json").read_text())
    assert finished(found).adapter_sha256 == sha256_of(result / "MANIFEST.json")
    assert manifest["files"] == {p.name: sha256_of(p) for p in result.iterdir() if p.name != "MANIFEST.json"}
    assert manifest["base"] == "tiny"
    assert len(list(result.glob("*.safetensors"))) > 1  # in parts
    assert inspect_model_folder(result)["architectures"] == [type(made[0]).__name__]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (result / name).read_bytes() == (base / name).read_bytes()

    tokens = torch.arange(5, 60)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=tokens).logits
            for folder in (base, result)
        )
        trained = made[0](input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(after, trained, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "glm4_moe"])
def test_stopping_anywhere_and_resuming_changes_no_bit(tmp_path: Path, kind: str) -> None:
    base = tiny_llama(tmp_path / "base") if kind == "llama" else tiny_glm(tmp_path / "base", kind)
    whole = train_here(write_job(tmp_path / "whole", base, n_epochs=2, **FULL))
    for stop_at in (1, 5):
        spec = write_job(tmp_path / f"stopped-{stop_at}", base, n_epochs=2, **FULL)
        first = train_here(spec, stop_at=stop_at)
        assert first[-1] == Stopped(step=stop_at)
        kept = {path.name for path in (tmp_path / f"stopped-{stop_at}" / "checkpoints" / f"step-{stop_at}").iterdir()}
        assert kept == {"model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"}
        second = train_here(next_attempt(spec))
        assert losses(first) | losses(second) == losses(whole)
        assert finished(second) == finished(whole)


def test_without_room_it_does_not_begin(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_job(tmp_path / "job", base, **FULL)
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    needed = numbers * 52
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    error = failed(train_here(spec))
    assert (error.code, error.param) == ("insufficient_storage", "training_type")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    finished(train_here(next_attempt(spec)))
