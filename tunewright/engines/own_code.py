"""What a model's own code, in transformers, says of it: how it is built, and what it answers to some rows.

`python -m tunewright.engines.own_code` keeps that for workers (`references.py`), so that these need not import transformers,
which takes longer than all else that they do to start.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Glm4ForCausalLM,
    GlmForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from tunewright.deployments.ports import WorkerSpec
from tunewright.engines.fast_decoder import EMBEDDING, Plan
from tunewright.engines.placement import Placement, placement_of, use_threads
from tunewright.engines.products import FLOAT32, INT8
from tunewright.engines.references import Order, Reference, keep, may_be_fast, order_of
from tunewright.engines.weight_files import WeightFiles
from tunewright.rendering.canary import canaries
from tunewright.rendering.renderer import Renderer

_FAMILIES = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    GlmForCausalLM,
    Glm4ForCausalLM,
)
_TURNS_IN_PAIRS = (GlmForCausalLM, Glm4ForCausalLM)
_ROPE_OF_FIXED_TABLE = ("default", "linear", "llama3", "yarn")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_PERHAPS = (
    ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"),
)
"""Norms of which a layer has both or none."""
_LENGTHS = (9, 5)


def load_model(folder: Path, placement: Placement) -> PreTrainedModel:
    """The base as transformers knows it: local safetensors only, and never code from the folder."""
    return load_and_tell(folder, placement)[0]


def load_and_tell(folder: Path, placement: Placement) -> tuple[PreTrainedModel, list[str]]:
    """(`load_model`; the names of tensors that its files lack)."""
    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say here concerns training or their next versions
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, placement.dtype),
            output_loading_info=True,
        )
    model, told = loaded
    return model.to(placement.device).eval().requires_grad_(False), sorted(told["missing_keys"])


def plan_of(model: PreTrainedModel, weights: WeightFiles) -> Plan | None:
    """How `FastDecoder` does just what this model's own code does. None for all that it does not know for certain."""
    config: Any = model.config
    if (
        type(model) not in _FAMILIES
        or config.hidden_act != "silu"
        or config.rope_parameters.get("rope_type") not in _ROPE_OF_FIXED_TABLE
        or (type(model) not in _TURNS_IN_PAIRS and config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0)
    ):
        return None
    inner: Any = model.get_decoder()
    attention: Any = inner.layers[0].self_attn
    # Qwen's layers say it each for itself, Mistral's configuration for all of them.
    window: int | None = config.sliding_window if type(model) is MistralForCausalLM else None
    head: Any = model.get_output_embeddings()
    plan = Plan(
        kind=type(model).__name__,
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=attention.head_dim,
        eps=config.rms_norm_eps,
        scale=attention.scaling,
        in_pairs=type(model) in _TURNS_IN_PAIRS,
        gate_and_up_in_one=hasattr(inner.layers[0].mlp, "gate_up_proj"),
        windows=tuple(getattr(layer.self_attn, "sliding_window", window) for layer in inner.layers),
        turns=tuple(inner.rotary_emb.inv_freq.float().tolist()),
        turned_scale=float(inner.rotary_emb.attention_scaling),
        head=EMBEDDING if head.weight is inner.embed_tokens.weight else "lm_head.weight",
    )
    known = all(_has_known_parts(layer, plan) for layer in inner.layers)
    return plan if known and head.bias is None and _are_in(weights, model) else None


def _has_known_parts(layer: nn.Module, plan: Plan) -> bool:
    names = {name for name, _ in layer.named_parameters()}
    linears = [part for parts in plan.merged.values() for part in parts]
    known = {f"{part}.weight" for part in linears} | set(_NORMS)
    known |= {norm for norms in _PERHAPS if names.issuperset(norms) for norm in norms}
    return known <= names <= known | {f"{part}.bias" for part in linears}


def _are_in(weights: WeightFiles, model: PreTrainedModel) -> bool:
    """Whether the files have the model's parameters under the names that the model has for them."""
    return all(
        name in weights.names and weights.shape(name) == list(parameter.shape)
        for name, parameter in model.named_parameters()
    )


@torch.inference_mode()
def reference_of(model: PreTrainedModel, weights: WeightFiles, order: Order) -> Reference:
    """What the model says of the rows by which decoders are judged (`loading.py`), which are random ones and, unless products
    are exact, the order's texts. The last two logits of each row are enough for exact ones."""
    exact = order.placement.precision == FLOAT32
    rows = _random_rows(model.get_input_embeddings().weight.shape[0], order.context_tokens)  # type: ignore[union-attr]
    rows += [] if exact else [text[: order.context_tokens] for text in order.texts]
    with _largest_inputs(model, order.placement.precision) as largest:
        found = [model(input_ids=torch.tensor([row], device=model.device)).logits[0].float().cpu() for row in rows]
    logits = [found_TV[-2:].clone() for found_TV in found] if exact else found
    return Reference(plan_of(model, weights), type(model).__name__, rows, logits, largest)


def _random_rows(vocabulary: int, context_tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, context_tokens) for length in _LENGTHS]
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def _largest_inputs(model: PreTrainedModel, precision: str) -> Iterator[dict[str, torch.Tensor]]:
    """While it is open: how large each feature was that a linear layer was given, by the layer's name. Only for int8."""
    largest: dict[str, torch.Tensor] = {}
    linears = model.named_modules() if precision == INT8 else ()

    def note(name: str, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        found_I = inputs[0].detach().abs().flatten(0, -2).amax(dim=0)
        largest[name] = torch.maximum(largest[name], found_I) if name in largest else found_I

    hooks = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in linears
        if isinstance(module, nn.Linear)
    ]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def weights_of(folder: Path, placement: Placement) -> WeightFiles:
    """The files of a folder in the format of a placement."""
    return WeightFiles(folder, getattr(torch, placement.dtype), placement.device)


def main() -> None:
    """Keep the reference of the worker whose spec comes by standard input."""
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerSpec)
    folder = Path(spec.weights_path or spec.base_path)
    if spec.references_path is None or not may_be_fast(folder):
        return
    use_threads(spec.threads)
    placement = placement_of(folder, spec.precision, spec.weights)
    order = order_of(spec, placement, canaries(Renderer(Path(spec.base_path))))
    keep(reference_of(load_model(folder, placement), weights_of(folder, placement), order), order)


if __name__ == "__main__":
    main()
