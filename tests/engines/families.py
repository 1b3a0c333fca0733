"""Tiny random models of the families that the fast decoder knows. Norms are random too, so that none can stand in for another."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.engines.adapters import ATTENTION_AND_MLP
from tests.tiny_models import tiny_tokenizer

FAST_KINDS = ("glm", "glm4", "qwen2", "qwen2-window", "qwen3", "mistral", "mistral-window", "llama-bias", "llama3-rope")
GLM_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


def linears_of(kind: str) -> list[str]:
    """Names that adapters of the family target."""
    return GLM_LINEARS if kind.startswith("glm") else ATTENTION_AND_MLP


def family(kind: str, folder: Path, head_dim: int = 8) -> Path:
    """Write a random model of `kind` with the tokenizer of the tiny Llama; returns `folder`. `head_dim` is for GLMs."""
    tiny_tokenizer(folder)
    sizes: dict[str, Any] = {
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _model(kind, sizes, head_dim)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.2)
    generation = (folder / "generation_config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(generation)
    return folder


def _model(kind: str, sizes: dict[str, Any], head_dim: int) -> PreTrainedModel:
    match kind:
        case "glm":
            return GlmForCausalLM(GlmConfig(**sizes, head_dim=head_dim))
        case "glm4":
            return Glm4ForCausalLM(Glm4Config(**sizes, head_dim=head_dim, attention_bias=True))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**sizes))
        case "qwen2-window":
            window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
            return Qwen2ForCausalLM(Qwen2Config(**sizes, **window))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**sizes, head_dim=8, sliding_window=None))
        case "mistral-window":
            return MistralForCausalLM(MistralConfig(**sizes, head_dim=8, sliding_window=6))
        case "llama-bias":
            return LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
        case "llama3-rope":
            rope: dict[str, Any] = {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
            return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=True))
    raise ValueError(kind)
