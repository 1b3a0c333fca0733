"""The same decoder for Llama-shaped and GLM-shaped models with no library code in the loop: merged projections, packed weights.

What a family does in its own way is read off its layers: biases, one matrix for gate and up, norms of queries and keys, norms
behind attention and feed-forward, sliding windows, and which numbers of a head turn together.

Shape legend: T tokens of the step, E model size, F feed-forward size, Q query heads, H key/value heads, D head size,
W tokens whose logits are wanted, V vocabulary.
"""

from functools import cache
from typing import NamedTuple

import msgspec
import torch
import torch.nn.functional as functional

from tunewright.engines.adapter_files import Pair
from tunewright.engines.batch import Batch
from tunewright.engines.decode_attention import Attention, by_torch
from tunewright.engines.decode_graphs import DecodeGraphs, record_on_cuda
from tunewright.engines.gpu_attention import attention_of
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.placement import FLASH
from tunewright.engines.products import Product, Products
from tunewright.engines.shared_head import head_and_rows
from tunewright.engines.stacks import Joint, Seat, Stacks, add_changes, draw_together, joints_of
from tunewright.engines.weight_files import WeightFiles

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"

_FLOAT32 = Products()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that this decoder has to know of a model beside its tensors. `own_code.plan_of` reads it off the model's own code."""

    kind: str
    """The name of the model's class."""
    q_heads: int
    kv_heads: int
    head_size: int
    eps: float
    scale: float
    """Of attention."""
    in_pairs: bool
    """Number 2i of a head turns with number 2i + 1; else number i with that half a head on."""
    gate_and_up_in_one: bool
    windows: tuple[int | None, ...]
    """How many tokens back each layer sees."""
    turns: tuple[float, ...]
    """Radians for each token by which the pairs of a head turn."""
    turned_scale: float
    head: str
    """The name of the output head's tensor."""

    @property
    def merged(self) -> dict[str, tuple[str, ...]]:
        """Each product of a layer with the linear layers that it joins."""
        gate_up = ("mlp.gate_up_proj",) if self.gate_and_up_in_one else ("mlp.gate_proj", "mlp.up_proj")
        return {
            "self_attn.qkv": QKV,
            "self_attn.o": ("self_attn.o_proj",),
            "mlp.gate_up": gate_up,
            "mlp.down": ("mlp.down_proj",),
        }


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


class FastDecoder:
    """Runs the model that `plan` describes on flattened batches. Nothing of `weights` is kept as it is in the file."""

    def __init__(
        self,
        plan: Plan,
        weights: WeightFiles,
        *,
        context_tokens: int,
        products: Products = _FLOAT32,
        attention: Attention = by_torch,
    ) -> None:
        self.device, self.dtype = weights.device, weights.dtype
        self.precision = products.precision if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.")
        self._plan = plan
        self._products = products
        self._decode_attention = attention
        records = attention_of(torch.device(self.device), self.dtype, plan.head_size) == FLASH
        self._graphs = DecodeGraphs(self._step, record_on_cuda) if records else None
        self._norm_E: torch.Tensor = weights(NORM).clone()
        self._cos_CD, self._sin_CD = self._rotation_table(context_tokens)
        self.linears: dict[str, tuple[int, int]] = {}
        self._layers = [self._take_layer(f"model.layers.{i}", weights, window) for i, window in enumerate(plan.windows)]
        merged = {
            f"{layer.name}.{name}": tuple(f"{layer.name}.{part}" for part in parts)
            for layer in self._layers
            for name, parts in plan.merged.items()
        }
        self._stacks = Stacks(merged, self.linears, torch.empty(0, dtype=self.dtype, device=self.device))
        self.n_embeddings = weights.shape(EMBEDDING)[0]
        self._head, self._embedded = head_and_rows(weights, plan.head, EMBEDDING, products)

    def _rotation_table(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A rotation is x * cos + x of the partners * sin."""
        turns_D = torch.tensor(2 * self._plan.turns, dtype=torch.float32, device=self.device)
        angles_CD = torch.arange(tokens, device=self.device)[:, None].float() * turns_D
        cos_CD, sin_CD = (
            (table_CD * self._plan.turned_scale).to(self.dtype) for table_CD in (angles_CD.cos(), angles_CD.sin())
        )
        half = len(self._plan.turns)
        if not self._plan.in_pairs:
            sin_CD[:, :half].neg_()
            return cos_CD, sin_CD
        cos_CD, sin_CD = (table_CD[:, :half].repeat_interleave(2, dim=1) for table_CD in (cos_CD, sin_CD))
        sin_CD[:, ::2].neg_()
        still = self._plan.head_size - 2 * half  # numbers at the end of each head that do not turn
        return functional.pad(cos_CD, (0, still), value=1.0), functional.pad(sin_CD, (0, still))

    def _take_layer(self, name: str, weights: WeightFiles, window: int | None) -> _Layer:
        products = [self._take_product(name, parts, weights) for parts in self._plan.merged.values()]

        def norm(of: str) -> torch.Tensor | None:
            weight = weights.get(f"{name}.{of}.weight")
            return None if weight is None else weight.clone()

        q_norm_D, k_norm_D = norm("self_attn.q_norm"), norm("self_attn.k_norm")
        turned_norm_AD = None
        if q_norm_D is not None and k_norm_D is not None:
            turned_norm_AD = torch.stack([q_norm_D] * self._plan.q_heads + [k_norm_D] * self._plan.kv_heads)
        return _Layer(
            name,
            weights(f"{name}.input_layernorm.weight").clone(),
            weights(f"{name}.post_attention_layernorm.weight").clone(),
            turned_norm_AD,
            norm("post_self_attn_layernorm"),
            norm("post_mlp_layernorm"),
            window,
            *products,
        )

    def _take_product(self, layer: str, parts: tuple[str, ...], weights: WeightFiles) -> Product:
        names = [f"{layer}.{part}" for part in parts]
        matrices = [weights(f"{name}.weight") for name in names]
        self.linears |= {name: (m.shape[1], m.shape[0]) for name, m in zip(names, matrices, strict=True)}
        return self._products.of(names[0], *_joined(matrices, [weights.get(f"{name}.bias") for name in names]))

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
        return _rms_norm(x_TE, self._norm_E, self._plan.eps)

    def _run(self, batch: Batch, cache: SlotCache, *, wanted: bool) -> torch.Tensor:
        """Through all layers; returns [T, E], or [W, E] of the wanted tokens: the last layer's feed-forward is for them alone."""
        x_TE = self._embedded(batch.input_ids_T)
        cos_T1D = self._cos_CD[batch.positions_T][:, None]
        sin_T1D = self._sin_CD[batch.positions_T][:, None]
        draw_together(batch.segments)
        joints = joints_of(batch.segments, self.device)
        for index, layer in enumerate(self._layers):
            h_TE = _rms_norm(x_TE, layer.attention_norm_E, self._plan.eps)
            attended_TE = self._attention(index, layer, h_TE, cos_T1D, sin_T1D, joints, batch, cache)
            if wanted and layer is self._layers[-1] and len(batch.wanted_W) < len(x_TE):
                attended_TE, x_TE = attended_TE[batch.wanted_W], x_TE[batch.wanted_W]
                joints = joints_of(batch.wanted_segments, self.device)
            out_TE = _project(layer.o, attended_TE, f"{layer.name}.self_attn.o", joints)
            x_TE = x_TE + self._normed(out_TE, layer.after_attention_norm_E)
            h_TE = _rms_norm(x_TE, layer.mlp_norm_E, self._plan.eps)
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
        n_q, n_kv = self._plan.q_heads, self._plan.kv_heads
        qkv = _project(layer.qkv, h_TE, f"{layer.name}.self_attn.qkv", joints)
        heads_TAD = qkv.view(h_TE.shape[0], n_q + 2 * n_kv, self._plan.head_size)
        turned_TAD = heads_TAD[:, : n_q + n_kv]  # queries and keys turn together
        if layer.turned_norm_AD is not None:
            turned_TAD = (
                functional.rms_norm(turned_TAD, (self._plan.head_size,), None, self._plan.eps) * layer.turned_norm_AD
            )
        turned_TAD = self._turned(turned_TAD, cos_T1D, sin_T1D)
        cache.write(index, turned_TAD[:, n_q:], heads_TAD[:, n_q + n_kv :], batch)
        scale, window = self._plan.scale, layer.window
        return cache.attend(index, turned_TAD[:, :n_q], batch, scale, window, self._decode_attention).flatten(1)

    def _turned(self, heads_TAD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
        """Each number turned with its partner."""
        turned_TAD = heads_TAD * cos_T1D
        if self._plan.in_pairs:
            return turned_TAD.addcmul_(heads_TAD.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), sin_T1D)
        (first, second), (low, high), (sin_low, sin_high) = (
            each.chunk(2, dim=-1) for each in (turned_TAD, heads_TAD, sin_T1D)
        )
        first.addcmul_(high, sin_low)
        second.addcmul_(low, sin_high)
        return turned_TAD

    def _normed(self, x_TE: torch.Tensor, norm_E: torch.Tensor | None) -> torch.Tensor:
        return x_TE if norm_E is None else _rms_norm(x_TE, norm_E, self._plan.eps)


def _rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """torch has one kernel for it on GPUs; on processors it goes over the numbers five times, which three times do."""
    if x_TE.device.type != "cpu" or x_TE.dtype != torch.float32:
        return functional.rms_norm(x_TE, weight_E.shape, weight_E, eps)
    size_T1 = torch.linalg.vector_norm(x_TE, 2, -1, True)
    mean_T1 = torch.addcmul(_alone(eps), size_T1, size_T1, value=1 / len(weight_E))
    return (x_TE * mean_T1.rsqrt_()).mul_(weight_E)


@cache
def _alone(value: float) -> torch.Tensor:
    """A number as a tensor: to make one takes as long as to compute with it."""
    return torch.tensor([value])


def _joined(
    matrices: list[torch.Tensor], biases: list[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The parts as one matrix, and as one bias if any of them has one."""
    weight_OI = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
    if not any(bias is not None for bias in biases):
        return weight_OI, None
    each = [m.new_zeros(len(m)) if bias is None else bias for m, bias in zip(matrices, biases, strict=True)]
    return weight_OI, torch.cat(each)


def _project(product: Product, x_TI: torch.Tensor, name: str, joints: list[Joint]) -> torch.Tensor:
    """x @ weight.T plus what the adapters add, for projection `name`."""
    y_TO = product(x_TI)
    add_changes(name, x_TI, y_TO, joints)
    return y_TO
