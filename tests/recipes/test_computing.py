"""How a training is computed is measured, chosen, told, kept for the job's life, and can be asked for."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.recipes.job_folder import codes, losses, next_attempt, train_here, write_job
from tests.recipes.test_text import finished
from tests.tiny_glm import tiny_glm
from tunewright.jobs.spec import Started, TrainingSpec
from tunewright.recipes import computing, flattened, flex_attention, packing, products
from tunewright.recipes.computing import FLASH, FLEX, PER_CONVERSATION, Capabilities, choose_attention, choose_precision

CPU = Capabilities()
GPU = Capabilities(cuda=True, cuda_bfloat16=True, flash=True, flex=True)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 600,
}
SLOW_BF16 = {"float32": 150.0, "bfloat16": 80.0}
FAST_BF16 = {"float32": 95.0, "bfloat16": 210.0}


@pytest.fixture
def spec(tmp_path: Path, base: Path) -> TrainingSpec:
    return write_job(tmp_path / "job", base, precision="auto")


def precision(spec: TrainingSpec, machine: Capabilities = CPU, speeds: Any = None, **config: Any) -> str:
    return choose_precision(spec, LLAMA | config, machine, lambda hidden, width: speeds)[0]


def test_precision_on_a_processor_is_the_faster_one(spec: TrainingSpec, tmp_path: Path, base: Path) -> None:
    assert precision(spec, speeds=SLOW_BF16) == "float32"
    assert precision(spec, speeds=FAST_BF16) == "bfloat16"
    assert precision(spec, speeds=FAST_BF16, model_type="glm4") == "float32"  # no layers by hand
    full = write_job(tmp_path / "full", base, precision="auto", training_type="full")
    assert precision(full, speeds=FAST_BF16) == "bfloat16"
    told = choose_precision(spec, LLAMA, CPU, lambda hidden, width: FAST_BF16)[1]
    assert told == {"float32_gflop_per_s": 95.0, "bfloat16_gflop_per_s": 210.0}


def test_speeds_are_those_of_a_machine_that_nobody_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.mm

    def interrupted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.bfloat16:
            time.sleep(0.05)
        return product(left, right)

    monkeypatch.setattr(torch, "mm", interrupted)
    speeds = computing.matmul_speeds(64, 128)
    by_the_wall = 2e-9 * 512 * 64 * 128 / 0.05
    assert set(speeds) == {"float32", "bfloat16"} and min(speeds.values()) > by_the_wall


def test_precision_that_is_asked_for(tmp_path: Path, base: Path) -> None:
    for wanted in ("float32", "bfloat16"):
        spec = write_job(tmp_path / wanted, base, precision=wanted)
        assert {precision(spec, machine) for machine in (CPU, GPU)} == {wanted}
    full = write_job(tmp_path / "full", base, precision="bfloat16", training_type="full")
    assert precision(full) == "bfloat16"
    assert precision(full, model_type="glm4") == precision(full, GPU) == "float32"  # no layers by hand there


def test_what_a_gpu_is_given(spec: TrainingSpec) -> None:
    assert precision(spec, GPU) == "bfloat16"
    assert precision(spec, Capabilities(cuda=True)) == "float32"
    assert choose_attention(GPU, "bfloat16") == FLASH
    assert choose_attention(GPU, "float32") == FLEX
    assert choose_attention(Capabilities(cuda=True, cuda_bfloat16=True, flex=True), "bfloat16") == FLEX
    assert choose_attention(Capabilities(cuda=True), "float32") == PER_CONVERSATION
    assert choose_attention(CPU, "bfloat16") == PER_CONVERSATION
    assert computing.capabilities() == CPU or torch.cuda.is_available()


def test_flash_attention_is_told_where_conversations_end() -> None:
    class Model:
        class config:
            _attn_implementation = "flash_attention_2"

    flat = packing.lay(
        [np.arange(length) for length in (3, 5, 2)], [np.arange(length) > 0 for length in (3, 5, 2)], False
    )
    told = flattened._ends_of_conversations(Model, flat, torch.device("cpu"))
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 3, 8, 10]
    assert told["cu_seq_lens_q"].dtype == torch.int32 and told["max_length_q"] == told["max_length_k"] == 5


@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_stays_inside_conversations(window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 21, 16) for heads in (4, 2, 2))
    lengths = [9, 5, 7]
    module = torch.nn.Module()
    expected, _ = flattened.attend_per_conversation(module, q, k, v, None, lengths=lengths, sliding_window=window)
    with warnings.catch_warnings(action="ignore"):  # that it is not compiled here
        found, _ = flex_attention.attend_flex(module, q, k, v, None, lengths=lengths, sliding_window=window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_choices_are_told_and_kept_by_later_attempts(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "matmul_speeds", lambda hidden, width: FAST_BF16)
    first = train_here(spec, stop_at=2)
    started = first[0]
    assert isinstance(started, Started)
    assert started.choices["precision"] == "bfloat16" and started.choices["layers"] == "by hand"
    assert started.choices["micro_batch_tokens"] == 1024 and started.choices["activation_checkpointing"] is False
    measured = started.choices["measured"]
    assert measured["bfloat16_gflop_per_s"] == 210.0
    assert 0 < measured["memory_estimate_gb"] < measured["memory_allowed_gb"]

    monkeypatch.setattr(computing, "matmul_speeds", lambda hidden, width: SLOW_BF16)  # another mood of the machine
    second = train_here(next_attempt(spec, memory_limit_bytes=1))
    assert isinstance(second[0], Started) and second[0].choices == started.choices | {"tokens": "made"}
    whole = train_here(write_job(Path(spec.work_folder).with_name("whole"), Path(spec.base_path), precision="bfloat16"))
    assert losses(first) | losses(second) == losses(whole)
    assert finished(second) == finished(whole)


def test_products_are_told_and_kept_by_later_attempts(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"numpy_products_gflop_per_s": 80.0}
    monkeypatch.setattr(products, "faster", lambda hidden, width: (products.NUMPY, measured))
    first = train_here(spec := write_job(tmp_path / "job", base), stop_at=2)
    started = first[0]
    assert isinstance(started, Started) and started.choices["products"] == products.NUMPY
    assert started.choices["measured"].items() >= measured.items()

    monkeypatch.setattr(products, "faster", lambda hidden, width: (products.TORCH, {}))  # another mood of the machine
    second = train_here(next_attempt(spec))
    whole = train_here(write_job(tmp_path / "whole", base, products=products.NUMPY))
    assert losses(first) | losses(second) == losses(whole)
    assert finished(second) == finished(whole)
    torchs = train_here(write_job(tmp_path / "torchs", base))
    assert list(losses(torchs).values()) == pytest.approx(list(losses(whole).values()), rel=1e-5)

    two = train_here(write_job(tmp_path / "two", base, products=products.NUMPY, threads=2, n_epochs=1))[0]
    assert isinstance(two, Started) and two.choices["products"] == products.TORCH  # numpy's would run on one
    torch.set_num_threads(1)


def test_products_that_numpy_does_not_make(spec: TrainingSpec) -> None:
    def unasked(hidden: int, width: int) -> tuple[str, dict[str, float]]:
        raise AssertionError

    for config, precision, machine in (
        (LLAMA, "bfloat16", CPU),
        (LLAMA, "float32", GPU),
        (LLAMA | {"model_type": "glm4"}, "float32", CPU),
        ({}, "float32", CPU),
    ):
        assert computing.choose_products(spec, config, precision, machine, unasked) == (products.TORCH, {})


@pytest.mark.parametrize("kind", ["llama", "glm4_moe"])
def test_little_memory_is_met_by_checkpointing(tmp_path: Path, base: Path, kind: str) -> None:
    base = base if kind == "llama" else tiny_glm(tmp_path / "base", kind)
    whole = train_here(write_job(tmp_path / "whole", base))
    found = train_here(write_job(tmp_path / "little", base, memory_limit_bytes=1))
    started = found[0]
    assert isinstance(started, Started) and codes(found) == ["memory_may_not_be_enough"]
    assert started.choices["activation_checkpointing"] is True and started.choices["micro_batch_tokens"] == 128
    assert losses(found) == pytest.approx(losses(whole), rel=1e-4)
    off = write_job(tmp_path / "off", base, memory_limit_bytes=1, activation_checkpointing="off", micro_batch_tokens=64)
    started = train_here(off)[0]
    assert isinstance(started, Started)
    assert started.choices["activation_checkpointing"] is False and started.choices["micro_batch_tokens"] == 64


def test_an_unreadable_choice_is_made_again(spec: TrainingSpec) -> None:
    path = Path(spec.work_folder) / computing.COMPUTING
    path.write_text("{")
    found = computing.choose(spec, 100, CPU)
    assert json.loads(path.read_text())["precision"] == found.precision
    elsewhere = next_attempt(spec, memory_limit_bytes=2**40)
    assert computing.choose(elsewhere, 100, GPU).device == "cuda"  # moved to another kind of machine
