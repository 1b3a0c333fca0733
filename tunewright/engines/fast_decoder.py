"""The same decoder for Llama-shaped and GLM-shaped models with no library code in the loop: merged projections, packed weights.

What a family does in its own way is read off its layers: biases, one matrix for gate and up, norms of queries and keys, norms
behind attention and feed-forward, sliding windows, and which numbers of a head turn together.

Shape legend: T tokens of the step, E model size, F feed-forward size, Q query heads, H key/value heads, D head size,
W tokens whose logits are wanted, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import (
    Glm4ForCausalLM,
    GlmForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from tunewright.engines.adapter_files import Pair
from tunewright.engines.batch import Batch
from tunewright.engines.decode_graphs import DecodeGraphs, record_on_cuda
from tunewright.engines.gpu_attention import attention_of
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.placement import FLASH
from tunewright.engines.products import HEAD, Product, Products
from tunewright.engines.stacks import Joint, Seat, Stacks, add_changes, draw_together, joints_of

_FAMILIES = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    GlmForCausalLM,
    Glm4ForCausalLM,
)
_TURNS_IN_PAIRS = (GlmForCausalLM, Glm4ForCausalLM)
"""Number 2i of a head turns with number 2i + 1, in the others number i with that half a head on."""
_ROPE_OF_FIXED_TABLE = ("default", "linear", "llama3", "yarn")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MERGED = {
    "self_attn.qkv": _QKV,
    "self_attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
_MERGED_OF_GLM = _MERGED | {"mlp.gate_up": ("mlp.gate_up_proj",)}
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_PERHAPS = (
    ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"),
)
"""Norms of which a layer has both or none."""

_FLOAT32 = Products()


class _Layer(NamedTuple):
    name: str
    attention_norm_E: torch.Tensor
    mlp_norm_E: torch.Tensor
    turned_norm_AD: torch.Tensor | None
    after_attention_norm_E: torch.Tensor | None
    after_mlp_norm_E: torch.Tensor | None
    window: int | None
    qkv: Product
    o: Product
    gate_up: Product
    down: Product


def is_fast(model: PreTrainedModel) -> bool:
    """Whether `FastDecoder` does just what this model's own code does. False for all that it does not know for certain."""
    config: Any = model.config
    return (
        type(model) in _FAMILIES
        and config.hidden_act == "silu"
        and config.rope_parameters.get("rope_type") in _ROPE_OF_FIXED_TABLE
        and (type(model) in _TURNS_IN_PAIRS or config.rope_parameters.get("partial_rotary_factor", 1.0) == 1.0)
        and all(_has_known_parts(layer) for layer in model.get_decoder().layers)  # type: ignore[union-attr]
    )


def _has_known_parts(layer: nn.Module) -> bool:
    names = {name for name, _ in layer.named_parameters()}
    linears = [part for parts in _merged_of(layer).values() for part in parts]
    known = {f"{part}.weight" for part in linears} | set(_NORMS)
    known |= {norm for norms in _PERHAPS if names.issuperset(norms) for norm in norms}
    return known <= names <= known | {f"{part}.bias" for part in linears}


def _merged_of(layer: nn.Module) -> dict[str, tuple[str, ...]]:
    return _MERGED_OF_GLM if hasattr(layer.get_submodule("mlp"), "gate_up_proj") else _MERGED


class FastDecoder:
    """Takes a model apart (its weights move out, the object is of no use afterwards) and runs it on flattened batches."""

    def __init__(self, model: PreTrainedModel, *, context_tokens: int, products: Products = _FLOAT32) -> None:
        config: Any = model.config
        inner: Any = model.get_decoder()
        self.device = str(model.device)
        self.dtype = model.dtype
        self.precision = products.precision if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.")
        self._products = products
        attention: Any = inner.layers[0].self_attn
        self._head_size: int = attention.head_dim
        self._n_q: int = config.num_attention_heads
        self._n_kv: int = config.num_key_value_heads
        self._eps: float = config.rms_norm_eps
        self._scale: float = attention.scaling
        self._in_pairs = type(model) in _TURNS_IN_PAIRS
        self._merged = _merged_of(inner.layers[0])
        # Qwen's layers say it each for itself, Mistral's configuration for all of them.
        self._window: int | None = config.sliding_window if type(model) is MistralForCausalLM else None
        records = attention_of(model.device, self.dtype, self._head_size) == FLASH
        self._graphs = DecodeGraphs(self._step, record_on_cuda) if records else None
        # Copies, so that nothing of the file stays mapped.
        self._embedding_VE: torch.Tensor = inner.embed_tokens.weight.detach().clone()
        self.n_embeddings = self._embedding_VE.shape[0]
        self._norm_E: torch.Tensor = inner.norm.weight.detach().clone()
        self._cos_CD, self._sin_CD = self._rotation_table(inner.rotary_emb, context_tokens)
        self.linears: dict[str, tuple[int, int]] = {}
        self._layers = [self._take_layer(f"model.layers.{i}", layer) for i, layer in enumerate(inner.layers)]
        merged = {
            f"{layer.name}.{name}": tuple(f"{layer.name}.{part}" for part in parts)
            for layer in self._layers
            for name, parts in self._merged.items()
        }
        self._stacks = Stacks(merged, self.linears, torch.empty(0, dtype=self.dtype, device=self.device))
        head: Any = model.get_output_embeddings()
        self._head = products.of(HEAD, head.weight.detach())

    def _rotation_table(self, rotary: nn.Module, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            like = torch.zeros(1, dtype=self.dtype, device=self.device)
            cos_1CD, sin_1CD = rotary(like, torch.arange(tokens, device=self.device)[None])
        cos_CD, sin_CD = cos_1CD[0].clone(), sin_1CD[0].clone()  # a rotation is x * cos + x of the partners * sin
        half = cos_CD.shape[1] // 2
        if not self._in_pairs:
            sin_CD[:, :half].neg_()
            return cos_CD, sin_CD
        cos_CD, sin_CD = (table_CD[:, :half].repeat_interleave(2, dim=1) for table_CD in (cos_CD, sin_CD))
        sin_CD[:, ::2].neg_()
        still = self._head_size - 2 * half  # numbers at the end of each head that do not turn
        return functional.pad(cos_CD, (0, still), value=1.0), functional.pad(sin_CD, (0, still))

    def _take_layer(self, name: str, layer: nn.Module) -> _Layer:
        weights = {key: parameter.detach() for key, parameter in layer.named_parameters()}
        products: dict[str, Product] = {}
        for merged, parts in self._merged.items():
            for part in parts:
                out, into = weights[f"{part}.weight"].shape
                self.linears[f"{name}.{part}"] = (into, out)
                layer.get_submodule(part).weight = nn.Parameter(torch.empty(0), requires_grad=False)
            products[merged] = self._products.of(f"{name}.{parts[0]}", *_joined(weights, parts))
            for part in parts:
                del weights[f"{part}.weight"]
        q_norm_D, k_norm_D = weights.get("self_attn.q_norm.weight"), weights.get("self_attn.k_norm.weight")
        turned_norm_AD = None
        if q_norm_D is not None and k_norm_D is not None:
            turned_norm_AD = torch.stack([q_norm_D] * self._n_q + [k_norm_D] * self._n_kv)
        return _Layer(
            name,
            weights["input_layernorm.weight"].clone(),
            weights["post_attention_layernorm.weight"].clone(),
            turned_norm_AD,
            _cloned(weights.get("post_self_attn_layernorm.weight")),
            _cloned(weights.get("post_mlp_layernorm.weight")),
            getattr(layer.get_submodule("self_attn"), "sliding_window", self._window),
            *products.values(),
        )

    def prepare(self, pairs: dict[str, Pair]) -> Seat:
        """Put an adapter where `logits` finds it."""
        return self._stacks.seat(pairs)

    def logits(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        """Run one step; returns float32 logits [W, vocabulary] of the wanted tokens."""
        return self._step(batch, cache) if self._graphs is None else self._graphs.logits(batch, cache)

    def _step(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        return self._head(self._last_normed(self._run(batch, cache, wanted=True))).float()

    def states(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        """Run one step; returns float32 states [T, E] of all tokens."""
        return self._last_normed(self._run(batch, cache, wanted=False)).float()

    def _last_normed(self, x_TE: torch.Tensor) -> torch.Tensor:
        return _rms_norm(x_TE, self._norm_E, self._eps)

    def _run(self, batch: Batch, cache: SlotCache, *, wanted: bool) -> torch.Tensor:
        """Through all layers; returns [T, E], or [W, E] of the wanted tokens: the last layer's feed-forward is for them alone."""
        x_TE = functional.embedding(batch.input_ids_T, self._embedding_VE)
        cos_T1D = self._cos_CD[batch.positions_T][:, None]
        sin_T1D = self._sin_CD[batch.positions_T][:, None]
        draw_together(batch.segments)
        joints = joints_of(batch.segments, self.device)
        for index, layer in enumerate(self._layers):
            h_TE = _rms_norm(x_TE, layer.attention_norm_E, self._eps)
            attended_TE = self._attention(index, layer, h_TE, cos_T1D, sin_T1D, joints, batch, cache)
            if wanted and layer is self._layers[-1] and len(batch.wanted_W) < len(x_TE):
                attended_TE, x_TE = attended_TE[batch.wanted_W], x_TE[batch.wanted_W]
                joints = joints_of(batch.wanted_segments, self.device)
            out_TE = _project(layer.o, attended_TE, f"{layer.name}.self_attn.o", joints)
            x_TE = x_TE + self._normed(out_TE, layer.after_attention_norm_E)
            h_TE = _rms_norm(x_TE, layer.mlp_norm_E, self._eps)
            gate_up_T2F = _project(layer.gate_up, h_TE, f"{layer.name}.mlp.gate_up", joints)
            gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
            h_TF = functional.silu(gate_TF).mul_(up_TF)
            out_TE = _project(layer.down, h_TF, f"{layer.name}.mlp.down", joints)
            x_TE = x_TE.add_(self._normed(out_TE, layer.after_mlp_norm_E))
        return x_TE

    def _attention(
        self,
        index: int,
        layer: _Layer,
        h_TE: torch.Tensor,
        cos_T1D: torch.Tensor,
        sin_T1D: torch.Tensor,
        joints: list[Joint],
        batch: Batch,
        cache: SlotCache,
    ) -> torch.Tensor:
        qkv = _project(layer.qkv, h_TE, f"{layer.name}.self_attn.qkv", joints)
        heads_TAD = qkv.view(h_TE.shape[0], self._n_q + 2 * self._n_kv, self._head_size)
        turned_TAD = heads_TAD[:, : self._n_q + self._n_kv]  # queries and keys turn together
        if layer.turned_norm_AD is not None:
            turned_TAD = functional.rms_norm(turned_TAD, (self._head_size,), None, self._eps) * layer.turned_norm_AD
        turned_TAD = self._turned(turned_TAD, cos_T1D, sin_T1D)
        cache.write(index, turned_TAD[:, self._n_q :], heads_TAD[:, self._n_q + self._n_kv :], batch)
        return cache.attend(index, turned_TAD[:, : self._n_q], batch, self._scale, layer.window).flatten(1)

    def _turned(self, heads_TAD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
        """Each number turned with its partner."""
        turned_TAD = heads_TAD * cos_T1D
        if self._in_pairs:
            return turned_TAD.addcmul_(heads_TAD.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), sin_T1D)
        half = self._head_size // 2
        turned_TAD[..., :half].addcmul_(heads_TAD[..., half:], sin_T1D[..., :half])
        turned_TAD[..., half:].addcmul_(heads_TAD[..., :half], sin_T1D[..., half:])
        return turned_TAD

    def _normed(self, x_TE: torch.Tensor, norm_E: torch.Tensor | None) -> torch.Tensor:
        return x_TE if norm_E is None else _rms_norm(x_TE, norm_E, self._eps)


def _rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """torch has one kernel for it on GPUs; on processors it goes over the numbers five times, which three times do."""
    if x_TE.device.type != "cpu" or x_TE.dtype != torch.float32:
        return functional.rms_norm(x_TE, weight_E.shape, weight_E, eps)
    size_T1 = torch.linalg.vector_norm(x_TE, dim=-1, keepdim=True)
    return (x_TE * size_T1.square_().mul_(1 / len(weight_E)).add_(eps).rsqrt_()).mul_(weight_E)


def _cloned(weight_E: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight_E is None else weight_E.clone()


def _joined(weights: dict[str, torch.Tensor], parts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The parts as one matrix, and as one bias if any of them has one."""
    matrices = [weights[f"{part}.weight"] for part in parts]
    biases = [weights.get(f"{part}.bias") for part in parts]
    weight_OI = torch.cat(matrices) if len(parts) > 1 else matrices[0]
    if not any(bias is not None for bias in biases):
        return weight_OI, None
    each = [m.new_zeros(len(m)) if bias is None else bias for m, bias in zip(matrices, biases, strict=True)]
    return weight_OI, torch.cat(each)


def _project(product: Product, x_TI: torch.Tensor, name: str, joints: list[Joint]) -> torch.Tensor:
    """x @ weight.T plus what the adapters add, for projection `name`."""
    y_TO = product(x_TI)
    add_changes(name, x_TI, y_TO, joints)
    return y_TO
