"""A GGUF file made into a Hugging Face folder, once, without torch.

GGUF is llama.cpp's container: quantised tensors, the tokenizer and the chat template in one file. Training and serving read
safetensors, so the weights are dequantised: quantised matrices to 16 bit floats, which rounds away a small part of what their
own few bits did, takes half the disk and is served from 2 bytes where that is faster (`engines/products.py`); the rest to
float32. Only the Llama architecture with a byte-level BPE tokenizer is taken; everything unknown is refused, because a guessed
tensor or pre-tokenizer gives a model that is wrong without looking wrong.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.errors import Misconfigured, StorageFull
from tunewright.i18n import mark

CONVERSION_VERSION = 2
"""Part of every manifest; raise it when the same GGUF would give other files."""

_LOSSLESS = frozenset({"F32", "F64", "BF16"})
"""llama.cpp's names of number formats that 16 bit floats may not hold; all others are 16 bit floats or rounded to fewer bits."""
_SPECIAL = 3
"""llama.cpp's token type of control tokens."""

_LAYER_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write model.safetensors, config, tokenizer and chat template of `gguf_file` into the existing `folder`.

    Holds all weights in memory as float32 (4 bytes per parameter). Raises Misconfigured(`unsupported_gguf`) for anything
    but Llama with a known pre-tokenizer, StorageFull when the disk has no room.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_file)
        tensors = list(reader.tensors)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise _unsupported("not readable as GGUF") from error
    fields = _Fields(reader)
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise _unsupported("architecture or tokenizer")
    config = _config(fields, tied="output.weight" not in {tensor.name for tensor in tensors})
    _write_weights(tensors, config, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {k: config[k] for k in _TOKEN_ID_KEYS})
    _write_tokenizer(fields, config, folder)


_TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


class _Fields:
    """Metadata by key; a missing key is an unsupported file, not a KeyError."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise _unsupported(key)
        return self._fields[key].contents()

    def get(self, key: str, default: Any) -> Any:
        return self._fields[key].contents() if key in self._fields else default


def _unsupported(what: str) -> Misconfigured:
    return Misconfigured("unsupported_gguf", mark("This GGUF file can't be converted: {what}."), what=what)


def _decimal(value: float) -> float:
    """The short decimal number behind a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _config(fields: _Fields, *, tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    eos = fields["tokenizer.ggml.eos_token_id"]
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise _unsupported("llama.rope.scaling.type")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": eos,
        "head_dim": fields.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", eos),
        "rms_norm_eps": _decimal(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {
            "rope_theta": _decimal(fields.get("llama.rope.freq_base", 10000.0)),
            "rope_type": "default",
        },
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _write_weights(tensors: list[Any], config: dict[str, Any], folder: Path) -> None:
    """model.safetensors with exactly the tensors that the config asks for, or an error naming the difference."""
    from safetensors.numpy import save_file

    size_bytes = sum(int(tensor.n_elements) for tensor in tensors) * 4
    if shutil.disk_usage(folder).free < size_bytes + 2**26:
        # Asked first: a full disk in the middle of the write may not come back as a clean error.
        raise StorageFull(
            "insufficient_storage", mark("The disk has no room: {n_bytes} bytes are needed."), n_bytes=size_bytes
        )
    weights = {}
    for tensor in tensors:
        name = _hugging_face_name(tensor.name)
        weights[name] = _dequantised(tensor, config)
    # transformers fills a tensor that is absent with random numbers and only logs it.
    if difference := weights.keys() ^ _expected_names(config):
        raise _unsupported(", ".join(sorted(difference)[:5]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _hugging_face_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    head, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if head != "blk" or not layer.isdigit() or part not in _LAYER_NAMES:
        raise _unsupported(name)
    return f"model.layers.{int(layer)}.{_LAYER_NAMES[part]}"


def _expected_names(config: dict[str, Any]) -> set[str]:
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not config["tie_word_embeddings"]:
        names.add("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{layer}.{part}" for part in _LAYER_NAMES.values()}
    return names


def _dequantised(tensor: Any, config: dict[str, Any]) -> np.ndarray:
    """float32, or float16 if it was quantised; contiguous, in Hugging Face's orientation and row order."""
    from gguf.quants import dequantize

    try:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise _unsupported(f"{tensor.name} ({tensor.tensor_type.name})") from error
    weight = weight.reshape([int(n) for n in reversed(tensor.shape)])
    if tensor.name.endswith("attn_q.weight"):
        weight = _rotary_halves(weight, config["num_attention_heads"])
    elif tensor.name.endswith("attn_k.weight"):
        weight = _rotary_halves(weight, config["num_key_value_heads"])
    if tensor.tensor_type.name not in _LOSSLESS and np.abs(weight).max() <= np.finfo(np.float16).max:
        weight = weight.astype(np.float16)
    return np.ascontiguousarray(weight)


def _rotary_halves(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order.

    llama.cpp rotates neighbouring rows (0,1), (2,3)...; Hugging Face rotates row i with row i + half. Per head, its rows are
    those of Hugging Face interleaved: (half, 2) turned back into (2, half).
    """
    rows, columns = weight.shape
    half = rows // n_heads // 2
    return weight.reshape(n_heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(fields: _Fields, config: dict[str, Any], folder: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    tokenizer = _byte_level_bpe(fields["tokenizer.ggml.pre"], tokens, fields["tokenizer.ggml.merges"], special)
    tokenizer.save(str(folder / "tokenizer.json"))
    unknown = fields.get("tokenizer.ggml.unknown_token_id", None)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[config["pad_token_id"]],
            "unk_token": None if unknown is None else tokens[unknown],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _byte_level_bpe(pre: str, tokens: list[str], merges: list[str], special: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if pre != "smollm":
        raise _unsupported(f"tokenizer.ggml.pre={pre}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
