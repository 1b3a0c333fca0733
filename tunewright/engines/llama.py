"""The same decoder for Llama models with no library code in the loop: merged projections, weights packed for the processor.

Shape legend: T tokens of the step, E model size, F feed-forward size, Q query heads, H key/value heads, D head size,
W tokens whose logits are wanted, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from tunewright.engines.adapter_files import Factors, Pair
from tunewright.engines.batch import Batch, Segment
from tunewright.engines.kv_cache import SlotCache

_ROPE_OF_FIXED_TABLE = ("default", "linear", "llama3", "yarn")
_MERGED = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}

Product = Callable[[torch.Tensor], torch.Tensor]


class _Layer(NamedTuple):
    name: str
    attention_norm_E: torch.Tensor
    mlp_norm_E: torch.Tensor
    qkv: Product
    o: Product
    gate_up: Product
    down: Product


def is_plain_llama(model: PreTrainedModel) -> bool:
    """Whether `LlamaDecoder` does just what this model's own code does."""
    config: Any = model.config
    return (
        type(model) is LlamaForCausalLM
        and config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and config.rope_parameters["rope_type"] in _ROPE_OF_FIXED_TABLE
    )


def linear_product(weight_OI: torch.Tensor) -> Product:
    """A function x -> x @ weight.T. On processors the weight is packed once for oneDNN, twice as fast for small batches."""
    if weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
        pointwise = torch.ops.mkldnn._linear_pointwise
        return lambda x: pointwise(x, packed, None, "none", [], "")
    return lambda x: functional.linear(x, weight_OI)


class LlamaDecoder:
    """Takes a model apart (its weights move out, the object is of no use afterwards) and runs it on flattened batches."""

    def __init__(self, model: PreTrainedModel, *, context_tokens: int) -> None:
        config: Any = model.config
        inner: Any = model.get_decoder()
        self.device = str(model.device)
        self.dtype = model.dtype
        self._head_size: int = config.head_dim
        self._n_q: int = config.num_attention_heads
        self._n_kv: int = config.num_key_value_heads
        self._eps: float = config.rms_norm_eps
        self._scale = self._head_size**-0.5
        self._embedding_VE: torch.Tensor = inner.embed_tokens.weight.detach()
        self.n_embeddings = self._embedding_VE.shape[0]
        self._norm_E: torch.Tensor = inner.norm.weight.detach()
        self._cos_CD, self._sin_CD = self._rotation_table(inner.rotary_emb, context_tokens)
        self.linears: dict[str, tuple[int, int]] = {}
        self._layers = [self._take_layer(f"model.layers.{i}", layer) for i, layer in enumerate(inner.layers)]
        head: Any = model.get_output_embeddings()
        self._head = linear_product(head.weight.detach())

    def _rotation_table(self, rotary: nn.Module, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            like = torch.zeros(1, dtype=self.dtype, device=self.device)
            cos_1CD, sin_1CD = rotary(like, torch.arange(tokens, device=self.device)[None])
        half = self._head_size // 2
        sin_CD = sin_1CD[0].clone()
        sin_CD[:, :half].neg_()  # so that a rotation is x * cos + swap_halves(x) * sin
        return cos_1CD[0].clone(), sin_CD

    def _take_layer(self, name: str, layer: nn.Module) -> _Layer:
        products: dict[str, Product] = {}
        for merged, parts in _MERGED.items():
            linears = [layer.get_submodule(part) for part in parts]
            weights = [linear.weight.detach() for linear in linears if isinstance(linear, nn.Linear)]
            for part, weight_OI in zip(parts, weights, strict=True):
                self.linears[f"{name}.{part}"] = (weight_OI.shape[1], weight_OI.shape[0])
            products[merged] = linear_product(torch.cat(weights) if len(weights) > 1 else weights[0])
            for linear in linears:
                linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        attention_norm, mlp_norm = (
            layer.get_submodule("input_layernorm"),
            layer.get_submodule("post_attention_layernorm"),
        )
        return _Layer(
            name,
            attention_norm.weight.detach(),  # type: ignore[operator, union-attr]
            mlp_norm.weight.detach(),  # type: ignore[operator, union-attr]
            *products.values(),
        )

    def prepare(self, pairs: dict[str, Pair]) -> dict[str, Factors]:
        """Factors of the merged projections: downs side by side, ups on a block diagonal."""
        merged_factors: dict[str, Factors] = {}
        for layer in self._layers:
            for merged, parts in _MERGED.items():
                names = [f"{layer.name}.{part}" for part in parts]
                present = [pairs[name] for name in names if name in pairs]
                if not present:
                    continue
                width = sum(self.linears[name][1] for name in names)
                up_RO = torch.zeros(sum(pair.down.shape[0] for pair in present), width)
                row = column = 0
                for name in names:
                    out = self.linears[name][1]
                    if name in pairs:
                        pair = pairs[name]
                        rank = pair.down.shape[0]
                        up_RO[row : row + rank, column : column + out] = (pair.up * pair.scale).t()
                        row += rank
                    column += out
                down_IR = torch.cat([pair.down for pair in present]).t().contiguous()
                merged_factors[f"{layer.name}.{merged}"] = Factors(
                    down_IR.to(self.device, self.dtype), up_RO.to(self.device, self.dtype), tensors=2 * len(present)
                )
        return merged_factors

    def logits(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        """Run one step; returns float32 logits [W, vocabulary] of the wanted tokens."""
        size_E = self._norm_E.shape
        x_TE = functional.embedding(batch.input_ids_T, self._embedding_VE)
        cos_T1D = self._cos_CD[batch.positions_T][:, None]
        sin_T1D = self._sin_CD[batch.positions_T][:, None]
        for index, layer in enumerate(self._layers):
            h_TE = functional.rms_norm(x_TE, size_E, layer.attention_norm_E, self._eps)
            attended_TE = self._attention(index, layer, h_TE, cos_T1D, sin_T1D, batch, cache)
            x_TE = x_TE + _project(layer.o, attended_TE, f"{layer.name}.self_attn.o", batch.segments)
            h_TE = functional.rms_norm(x_TE, size_E, layer.mlp_norm_E, self._eps)
            gate_up_T2F = _project(layer.gate_up, h_TE, f"{layer.name}.mlp.gate_up", batch.segments)
            gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
            h_TF = functional.silu(gate_TF).mul_(up_TF)
            x_TE = x_TE.add_(_project(layer.down, h_TF, f"{layer.name}.mlp.down", batch.segments))
        x_WE = functional.rms_norm(x_TE[batch.wanted_W], size_E, self._norm_E, self._eps)
        return self._head(x_WE).float()

    def _attention(
        self,
        index: int,
        layer: _Layer,
        h_TE: torch.Tensor,
        cos_T1D: torch.Tensor,
        sin_T1D: torch.Tensor,
        batch: Batch,
        cache: SlotCache,
    ) -> torch.Tensor:
        qkv = _project(layer.qkv, h_TE, f"{layer.name}.self_attn.qkv", batch.segments)
        heads_TAD = qkv.view(h_TE.shape[0], self._n_q + 2 * self._n_kv, self._head_size)
        turned_TAD = heads_TAD[:, : self._n_q + self._n_kv]  # queries and keys turn together
        turned_TAD = turned_TAD * cos_T1D + turned_TAD.roll(self._head_size // 2, -1) * sin_T1D
        cache.write(index, turned_TAD[:, self._n_q :], heads_TAD[:, self._n_q + self._n_kv :], batch)
        return cache.attend(index, turned_TAD[:, : self._n_q], batch, self._scale).flatten(1)


def _project(product: Product, x_TI: torch.Tensor, name: str, segments: list[Segment]) -> torch.Tensor:
    """x @ weight.T plus each segment's adapter, for layer `name`."""
    y_TO = product(x_TI)
    for start, end, adapter in segments:
        factors = adapter.factors.get(name)
        if factors is not None:
            y_TO[start:end].addmm_(x_TI[start:end] @ factors.down_IR, factors.up_RO)
    return y_TO
