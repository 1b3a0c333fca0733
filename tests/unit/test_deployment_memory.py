"""What a replica is thought to need, and that jobs and deployments leave each other's memory alone."""

import json
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from tests.contract.rows import job
from tunewright.deployments.memory import estimated_bytes
from tunewright.jobs.line import Line
from tunewright.settings import Settings

MIB = 2**20
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "tie_word_embeddings": True,
}


class SmallMachine:
    def memory_bytes(self) -> int:
        return 1000 * MIB

    def cores(self) -> int:
        return 2

    def gpus(self) -> int:
        return 0


def test_the_estimate_counts_weights_cache_and_overhead(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    parameters = 1000 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 5 * 64
    cache = 2 * 2 * 32 * 4 * 8 * 1000 // 4
    wanted = 350 * MIB + 4 * parameters + cache
    assert estimated_bytes(tmp_path, None, slots=8, context_tokens=1000) == wanted
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": numpy.ones(100, numpy.float32)}, adapter / "adapter_model.safetensors")
    more = estimated_bytes(tmp_path, adapter, slots=8, context_tokens=1000) - wanted
    assert 400 <= more <= 1000


def test_a_config_that_says_too_little_leaves_the_size_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": numpy.ones(1000, numpy.float32)}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert estimated_bytes(tmp_path, None, slots=8, context_tokens=1000) == 350 * MIB + 2 * size


def test_jobs_and_deployments_leave_each_others_memory_alone(tmp_path: Path) -> None:
    line = Line(Settings(home=tmp_path, reserved_memory_bytes=100 * MIB), SmallMachine())
    assert line.room().memory_bytes == 900 * MIB
    line.engines_bytes = 50 * MIB
    line.instances_bytes = lambda: 600 * MIB
    assert line.room().memory_bytes == 250 * MIB, "promised to deployments, whether they run yet or not"
    line.instances_bytes = lambda: 2000 * MIB
    assert line.room().memory_bytes == 0
    jobs = [job("p", status=status, resources={"memory_bytes": 300 * MIB}) for status in ("running", "queued")]
    assert line.left_bytes(jobs, 50 * MIB) == 550 * MIB, "a job that waits holds nothing"
