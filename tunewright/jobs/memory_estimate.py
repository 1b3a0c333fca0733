"""How much memory a training will take, from the base's config.json alone. Pure, without torch.

The figures are those of a trainer process at its peak (resident set), on a CPU; a test holds them to measured ones.

    weights       the base, and for LoRA the adapters in float32
    optimizer     gradients and AdamW's two moments, float32, of what is trained
    activations   what the backward pass needs of the tokens of one micro-batch, and what is made of it on the way
    logits        of the labels that are looked at together
    overhead      interpreter, libraries, their working memory
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MICRO_BATCH_TOKENS = 1024
"""Tokens of one forward pass where nothing else is asked for and memory allows it."""
LEAST_MICRO_BATCH_TOKENS = 128
LABELS_AT_ONCE = 256
"""Logits are made for so many labels at a time: enough to keep a matrix product busy, 50 MB at a vocabulary of 49,152."""
FAST_MODEL_TYPES = ("llama",)
"""Architectures whose layers are computed by hand (recipes/fast_layers.py) and keep little for the backward pass."""

_OVERHEAD_BYTES = 880 * 2**20
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Sizes:
    """What of a model decides its memory. `parameters` count all weights, `adapted` the sum of inputs and outputs of the
    linear layers that get an adapter: times the rank, the adapter's parameters."""

    parameters: int
    adapted: int
    vocabulary: int
    hidden: int
    layers: int
    heads_width: int
    kv_width: int
    mlp_width: int
    heads: int
    fast: bool


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training."""

    weights: int
    optimizer: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.optimizer + self.activations + self.logits + self.overhead


@dataclass(frozen=True)
class MemoryPlan:
    """How a training is cut to the memory that it may take; `fits` is False if even the leanest way needs more."""

    micro_batch_tokens: int
    activation_checkpointing: bool
    estimate: MemoryEstimate
    fits: bool


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """What a config.json says. Raises KeyError, TypeError or ValueError if it is none of a decoder of text."""
    config = config.get("text_config") or config
    hidden, layers, vocabulary = (int(config[name]) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // heads)
    heads_width, kv_width = heads * head, int(config.get("num_key_value_heads") or heads) * head
    attention = 2 * hidden * heads_width + 2 * hidden * kv_width
    attention_sides = 4 * hidden + 2 * heads_width + 2 * kv_width
    width = int(config["intermediate_size"])
    experts = int(config.get("n_routed_experts") or config.get("num_local_experts") or 0)
    mlp, mlp_sides, mlp_width = 3 * hidden * width, 3 * (hidden + width), width
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings", False) else 2)
    if not experts:
        parameters = layers * (attention + mlp)
    else:
        dense = min(layers, int(config.get("first_k_dense_replace") or 0))
        expert_width = int(config.get("moe_intermediate_size") or width)
        shared = int(config.get("n_shared_experts") or 0)
        routed = 3 * hidden * expert_width * (experts + shared) + hidden * experts
        parameters = layers * attention + dense * mlp + (layers - dense) * routed
        mlp_sides = 0  # adapters of a mixture of experts are those of attention
        mlp_width = max(width if dense else 0, expert_width * (int(config.get("num_experts_per_tok") or 1) + shared))
    return Sizes(
        parameters=parameters + embeddings + (2 * layers + 1) * hidden,
        adapted=layers * (attention_sides + mlp_sides),
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        heads_width=heads_width,
        kv_width=kv_width,
        mlp_width=mlp_width,
        heads=heads,
        fast=config.get("model_type") in FAST_MODEL_TYPES,
    )


def estimate(
    config: Mapping[str, Any],
    *,
    training_type: str,
    lora_rank: int,
    precision: str,
    micro_batch_tokens: int,
    longest_row: int,
    activation_checkpointing: bool,
) -> MemoryEstimate:
    """The peak of a training of type `lora` or `full`.

    `precision` is that of the base: `float32`, `bfloat16`, or `auto`, which counts as the larger. `longest_row` is in tokens
    as trained, of preference data both answers together. Raises what `sizes_of` raises.
    """
    sizes = sizes_of(config)
    full = training_type == "full"
    computed = _BYTES.get(precision, 4)
    number = 4 if full else computed
    tokens = max(micro_batch_tokens, longest_row)
    trained = sizes.parameters if full else sizes.adapted * lora_rank
    kept, transient = _layer_bytes(sizes, computed if sizes.fast else number)
    if sizes.fast:  # half of the probabilities of attention: keys come before their queries
        kept += computed * sizes.heads * longest_row // 2
    if activation_checkpointing:
        activations = tokens * (sizes.layers * sizes.hidden * number + kept + transient)
    else:
        activations = tokens * (sizes.layers * kept + transient)
    return MemoryEstimate(
        weights=sizes.parameters * (number + (computed if computed < number else 0)) + (0 if full else trained * 4),
        optimizer=trained * 4 * 3,
        activations=activations,
        logits=min(tokens, LABELS_AT_ONCE) * sizes.vocabulary * (4 + number + 4),
        overhead=_OVERHEAD_BYTES,
    )


def choose_plan(
    config: Mapping[str, Any],
    *,
    training_type: str,
    lora_rank: int,
    precision: str,
    longest_row: int,
    allowed_bytes: int,
    micro_batch_tokens: int | None = None,
    activation_checkpointing: bool | None = None,
) -> MemoryPlan:
    """The fastest way that `allowed_bytes` are enough for; None leaves a choice open. Raises what `sizes_of` raises.

    Checkpointing costs a quarter of the speed and small micro-batches cost more, so it comes first.
    """
    sizes_in_tokens = [micro_batch_tokens] if micro_batch_tokens else [MICRO_BATCH_TOKENS]
    while micro_batch_tokens is None and sizes_in_tokens[-1] > LEAST_MICRO_BATCH_TOKENS:
        sizes_in_tokens.append(sizes_in_tokens[-1] // 2)
    ways = (False, True) if activation_checkpointing is None else (activation_checkpointing,)
    plans = []
    for tokens in sizes_in_tokens:
        for checkpointing in ways:
            found = estimate(
                config,
                training_type=training_type,
                lora_rank=lora_rank,
                precision=precision,
                micro_batch_tokens=tokens,
                longest_row=longest_row,
                activation_checkpointing=checkpointing,
            )
            plans.append(MemoryPlan(tokens, checkpointing, found, found.total <= allowed_bytes))
            if plans[-1].fits:
                return plans[-1]
    return min(plans, key=lambda plan: plan.estimate.total)


def _layer_bytes(sizes: Sizes, number: int) -> tuple[int, int]:
    """(kept for the backward pass, made on the way) of one token in one layer; `number` bytes each."""
    hidden, attention, kv, mlp = sizes.hidden, sizes.heads_width, sizes.kv_width, sizes.mlp_width
    if sizes.fast:
        return number * (2 * hidden + 2 * attention + 2 * kv + 2 * mlp), number * (8 * hidden + 4 * attention + 8 * mlp)
    return number * (12 * hidden + 8 * attention + 6 * mlp), number * (4 * hidden + 4 * attention + 4 * mlp)
