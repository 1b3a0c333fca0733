"""A Llama in Hugging Face layout, and adapters of it in PEFT's, as GGUF files for the peers that read those.

For measuring: tokens and merges go along, but what splits a text into words is the starter's. Peers are sent token ids.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import load_file

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_SPECIAL_TOKEN, _NORMAL_TOKEN = 3, 1


def write_base(model: Path, target: Path, weights: str) -> Path:
    """Write `model` with matrices as `weights` (Q8_0, F16 or F32) and norms in float32; returns `target`."""
    config = json.loads((model / "config.json").read_text())
    kind = GGMLQuantizationType[weights]
    writer = GGUFWriter(target, "llama")
    _describe(writer, config, weights)
    _add_tokens(writer, model, config)
    for name, weight in load_file(model / "model.safetensors").items():
        rows = _neighbours(name, weight.astype(np.float32), config)
        of = kind if rows.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{_gguf_name(name.removesuffix('.weight'))}.weight", quantize(rows, of), raw_dtype=of)
    return _close(writer, target)


def write_adapter(model: Path, adapter: Path, target: Path) -> Path:
    """Write a LoRA adapter of `model`, in float32; returns `target`."""
    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"])
    for name, factor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        rows = _neighbours(module, factor, config) if side == "B" else factor
        writer.add_tensor(f"{_gguf_name(module)}.weight.lora_{side.lower()}", rows)
    return _close(writer, target)


def _describe(writer: GGUFWriter, config: dict[str, Any], weights: str) -> None:
    heads = config["num_attention_heads"]
    writer.add_file_type({"Q8_0": 7, "F16": 1, "F32": 0}[weights])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])


def _add_tokens(writer: GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([_SPECIAL_TOKEN if token in special else _NORMAL_TOKEN for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(json.loads((model / "tokenizer_config.json").read_text())["chat_template"])


def _gguf_name(module: str) -> str:
    if module in _TOP:
        return _TOP[module]
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{_LAYER[inner]}"


def _neighbours(name: str, rows: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head's queries and keys, Hugging Face row i with row i + half."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    projection = next((key for key in heads if key in name), None)
    if projection is None:
        return rows
    split = rows.reshape(config[heads[projection]], 2, -1, rows.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def _close(writer: GGUFWriter, target: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
