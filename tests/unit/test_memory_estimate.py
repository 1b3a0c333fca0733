"""The memory of a training is told before it begins."""

import subprocess
import sys
from typing import Any

import pytest

from tunewright.jobs.memory_estimate import MICRO_BATCH_TOKENS, MemoryEstimate, choose_plan, estimate, sizes_of

STARTER: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
GLM_4_9B: dict[str, Any] = {
    "model_type": "glm",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 151552,
    "tie_word_embeddings": False,
}
GLM_4_5_AIR: dict[str, Any] = {
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "vocab_size": 151552,
    "tie_word_embeddings": False,
}
USUAL: dict[str, Any] = {"training_type": "lora", "lora_rank": 8, "precision": "float32", "longest_row": 1024}


def of(config: dict[str, Any] = STARTER, **changes: Any) -> MemoryEstimate:
    return estimate(config, **(USUAL | {"micro_batch_tokens": 1024, "activation_checkpointing": False} | changes))


@pytest.mark.parametrize(
    ("config", "millions"), [(STARTER, 134.5), (GLM_4_9B, 9400.0), (GLM_4_5_AIR, 106_850.0)], ids=["135m", "9b", "moe"]
)
def test_parameters_are_counted(config: dict[str, Any], millions: float) -> None:
    assert sizes_of(config).parameters / 1e6 == pytest.approx(millions, rel=0.005)


def test_adapters_are_counted() -> None:
    assert sizes_of(STARTER).adapted * 8 == 2_442_240  # as PEFT counts them with r=8 on all linear layers


def test_what_makes_it_more_and_less() -> None:
    assert of(precision="bfloat16").total < of().total
    assert of(precision="auto") == of(precision="float32")
    assert of(activation_checkpointing=True).activations < of().activations / 2
    assert of(micro_batch_tokens=512, longest_row=300).activations < of(longest_row=300).activations
    assert of(longest_row=300).activations < of().activations  # attention
    assert of(micro_batch_tokens=512) == of()  # the longest row stands alone
    assert of(training_type="full").optimizer == 12 * sizes_of(STARTER).parameters
    assert of(STARTER | {"model_type": "other"}).activations > of().activations
    assert of(lora_rank=16).optimizer == 2 * of().optimizer


def test_the_fastest_way_that_fits_is_taken() -> None:
    def plan(allowed_bytes: int, **changes: Any):
        given: dict[str, Any] = USUAL | {"longest_row": 100} | changes
        return choose_plan(STARTER, allowed_bytes=allowed_bytes, **given)

    fast, lean = of(longest_row=100).total, of(longest_row=100, activation_checkpointing=True).total
    found = plan(fast)
    assert (found.micro_batch_tokens, found.activation_checkpointing, found.fits) == (MICRO_BATCH_TOKENS, False, True)
    found = plan(fast - 1)
    assert (found.micro_batch_tokens, found.activation_checkpointing, found.fits) == (MICRO_BATCH_TOKENS, True, True)
    assert plan(lean - 1).micro_batch_tokens == MICRO_BATCH_TOKENS // 2
    nothing = plan(0)
    assert not nothing.fits and nothing.activation_checkpointing and nothing.micro_batch_tokens == 128
    assert plan(0, activation_checkpointing=False).activation_checkpointing is False
    assert plan(0, micro_batch_tokens=2048).micro_batch_tokens == 2048


def test_the_estimate_of_plain_layers_is_near_what_was_measured() -> None:
    assert of(STARTER | {"model_type": "other"}, longest_row=999).total / 1e9 == pytest.approx(4.41, rel=0.15)


def test_it_needs_no_torch() -> None:
    code = "import sys, tunewright.jobs.memory_estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(KeyError):
        sizes_of({"hidden_size": 8})


@pytest.mark.parametrize(
    ("how", "measured_gb"),
    [
        ({"precision": "float32"}, 2.75),
        ({"precision": "bfloat16"}, 2.20),
        ({"precision": "bfloat16", "activation_checkpointing": True}, 1.48),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_estimate_of_the_starter_is_near_what_was_measured(how: dict[str, Any], measured_gb: float) -> None:
    """Peaks of long-tailed chat, LoRA of rank 8, the longest row of 999 tokens; none was part of a fit."""
    assert of(**how, longest_row=999).total / 1e9 == pytest.approx(measured_gb, rel=0.15)
