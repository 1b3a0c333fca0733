"""Tiny random models of the GLM families, in folders like those of tiny_models.py."""

from pathlib import Path
from typing import Any

from tests.tiny_models import tiny_tokenizer

KINDS = ("glm", "glm4", "glm4_moe")


def tiny_glm(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """Write a random model of `kind` with the tokenizer of the tiny Llama; returns `folder`.

    `glm` and `glm4` have one matrix for gate and up, and turn half of each head in pairs; `glm4_moe` has a dense layer and
    then four experts beside a shared one, of which a token takes two.
    """
    import torch
    from transformers import (
        Glm4Config,
        Glm4ForCausalLM,
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        GlmConfig,
        GlmForCausalLM,
    )

    tiny_tokenizer(folder)
    sizes: dict[str, Any] = {
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 0,
        "dtype": "float32",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "glm":
            model: Any = GlmForCausalLM(GlmConfig(**sizes))
        elif kind == "glm4":
            model = Glm4ForCausalLM(Glm4Config(**sizes))
        else:
            experts: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
            sizes |= experts | {"use_qk_norm": True, "attention_bias": True}
            model = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes))
        for name, parameter in model.named_parameters():
            # Wider than the usual 0.02, else all logits are nearly equal; biases too, which begin as zeros.
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    generation = (folder / "generation_config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(generation)
    return folder
