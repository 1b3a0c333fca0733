"""The layers of a Llama computed by hand: every forward and backward step written out, and little kept between them.

What PEFT and transformers compute in some hundred operations of autograd is here one `torch.autograd.Function` per layer:
projections of one input in one product, their adapters in one more, what is cheap made again instead of kept, and no
gradient of anything frozen. Tests hold loss and every gradient to those of the plain modules, which stay the reference,
the way of all other architectures, and the way of every call that doesn't say how long the conversations are.

The residual stream, norms, softmax and everything trained are float32 whatever the layers compute in.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from tunewright.recipes.fast_attention import Block, Probabilities, attend, attend_backward, blocks_of, rotate
from tunewright.recipes.fast_linears import Linears


def speed_up(model: Any, dtype: torch.dtype, *, checkpointing: bool) -> bool:
    """Let `model` compute its layers by hand, in `dtype`, wherever it is given `lengths`; False if it can't.

    Given `wanted` (places, each once), its last hidden states are those of these places alone.

    Adapters must be there already. With `checkpointing` only a layer's input is kept, and the rest made again.
    """
    if not _understood(model):
        return False
    _leave_the_file(model)
    for layer in model.base_model.layers:
        layer.forward = partial(_forward, layer.forward, FastLayer(layer, model.config, dtype, checkpointing))
    model.base_model.layers[-1].forward.args[1].is_last = True
    return True


def _leave_the_file(model: Any) -> None:
    """Copy what is not merged, and so copied, anyway: one weight that lies in the base's mapped file keeps all of it mapped."""
    merged = {
        id(getattr(linear, "base_layer", linear).weight)
        for layer in model.base_model.layers
        for linear in _linears(layer)
    }
    for parameter in model.parameters():
        if id(parameter) not in merged:
            parameter.data = parameter.data.clone()


def is_by_hand(model: Any) -> bool:
    """Whether `speed_up` has changed it."""
    forward = model.base_model.layers[-1].forward if _is_llama(model) else None
    return isinstance(forward, partial) and forward.func is _forward


def computed_in(model: Any) -> torch.dtype:
    """The type that matrix products of `model` are computed in."""
    return model.base_model.layers[-1].forward.args[1].dtype if is_by_hand(model) else model.dtype


def _understood(model: Any) -> bool:
    config = model.config
    linears = [module for layer in model.base_model.layers for module in _linears(layer)] if _is_llama(model) else []
    bases = [getattr(module, "base_layer", module) for module in linears]
    adapted = {base is not module for base, module in zip(bases, linears, strict=True)}
    plain = all(type(base) is torch.nn.Linear and base.bias is None for base in bases)
    return bool(linears) and plain and len(adapted) == 1 and config.hidden_act == "silu"


def _is_llama(model: Any) -> bool:
    return type(model) is LlamaForCausalLM


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


def _forward(
    plain: Any,
    fast: "FastLayer",
    hidden_1TC: torch.Tensor,
    *arguments: Any,
    position_embeddings: Any = None,
    lengths: list[int] | None = None,
    after: list[int] | None = None,
    wanted: torch.Tensor | None = None,
    **named: Any,
) -> torch.Tensor:
    """A decoder layer's forward."""
    if lengths is None:
        return plain(hidden_1TC, *arguments, position_embeddings=position_embeddings, **named)
    cos_1TD, sin_1TD = position_embeddings
    turn = (cos_1TD[0].to(fast.dtype), sin_1TD[0].to(fast.dtype))
    given = _Given(turn, blocks_of(lengths, after), wanted if fast.is_last else None)
    return _Layer.apply(hidden_1TC[0].float(), fast, given, torch.is_grad_enabled(), *fast.parameters)[None]


@dataclass(frozen=True)
class _Given:
    """What a layer is told of its inputs: cosine and sine of their positions, how they attend to each other, and of which
    places outputs are wanted (None: of all)."""

    turn: tuple[torch.Tensor, torch.Tensor]
    blocks: list[Block]
    wanted: torch.Tensor | None


@dataclass
class _Kept:
    """What the backward pass of a layer needs. (T, ...) each."""

    inputs: torch.Tensor
    first_scale: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    probabilities: Probabilities
    attended: torch.Tensor
    middle: torch.Tensor
    second_scale: torch.Tensor
    gate_up: torch.Tensor
    inner: list[torch.Tensor | None]
    """Of the four groups of linear layers."""


def _chosen(rows: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    return rows if places is None else rows.index_select(0, places)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, fast: "FastLayer", given: _Given, grad: bool, *_: Any):
        outputs, kept = fast.forward(inputs, given)
        if grad:
            ctx.fast, ctx.given = fast, given
            ctx.inputs, ctx.kept = inputs, None if fast.checkpointing else kept
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        kept = ctx.kept or ctx.fast.forward(ctx.inputs, ctx.given, to_the_end=False)[1]
        ctx.kept = ctx.inputs = None
        made, of_parameters = ctx.fast.backward(kept, ctx.given, gradients[0], ctx.needs_input_grad[0])
        return made, None, None, None, *of_parameters


class FastLayer:
    """One decoder layer."""

    def __init__(self, layer: Any, config: Any, dtype: torch.dtype, checkpointing: bool) -> None:
        self.dtype, self.checkpointing, self.is_last = dtype, checkpointing, False
        query, key, value, output, gate, up, down = _linears(layer)
        groups = ([query, key, value], [output], [gate, up], [down])
        self.qkv, self.output, self.gate_up, self.down = (Linears(group, dtype) for group in groups)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.trains_norms = layer.input_layernorm.weight.requires_grad
        self.norm_weights = [norm.weight.detach().float() for norm in norms]  # the same tensors where they are float32
        self.epsilon = config.rms_norm_eps
        self.n_heads, self.n_kv = config.num_attention_heads, config.num_key_value_heads
        self.scaling = layer.self_attn.scaling
        self.parameters = [
            parameter
            for linears in (self.qkv, self.output, self.gate_up, self.down)
            for parameter in linears.parameters
        ]
        if self.trains_norms:
            self.parameters += [norm.weight for norm in norms]

    def forward(self, inputs: torch.Tensor, given: _Given, to_the_end: bool = True) -> tuple[torch.Tensor, _Kept]:
        """(outputs, float32 (T, C), of no meaning unless `to_the_end`; what `backward` needs)."""
        cos, sin = given.turn
        normed, first_scale = self._norm(inputs, 0)
        qkv, inner_qkv = self.qkv.now().forward(normed)
        heads = qkv.view(len(qkv), -1, cos.shape[-1]).transpose(0, 1)
        query = rotate(heads[: self.n_heads], cos * self.scaling, sin * self.scaling)
        key = rotate(heads[self.n_heads : -self.n_kv], cos, sin)
        value = heads[-self.n_kv :].contiguous()
        del qkv, heads, normed
        attended, probabilities = attend(query, key, value, given.blocks)
        attended, residual = _chosen(attended, given.wanted), _chosen(inputs, given.wanted)
        middle, inner_output = self.output.now().forward(attended)
        middle = residual + middle
        normed, second_scale = self._norm(middle, 1)
        gate_up, inner_gate_up = self.gate_up.now().forward(normed)
        del normed
        outputs, inner_down = middle, None
        if to_the_end:
            gate, up = gate_up.chunk(2, 1)
            change, inner_down = self.down.now().forward(functional.silu(gate).mul_(up))
            outputs = middle + change
        inner = [inner_qkv, inner_output, inner_gate_up, inner_down]
        kept = _Kept(
            *(inputs, first_scale, query, key, value, probabilities, attended, middle, second_scale, gate_up, inner)
        )
        return outputs, kept

    def backward(
        self, kept: _Kept, given: _Given, gradient: torch.Tensor, of_inputs: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(gradient of the inputs, None unless `of_inputs`; gradients of `parameters`)."""
        made, of_mlp, of_norm = self._mlp_backward(kept, gradient)
        middle_gradient = gradient + made
        of_output, of_qkv, made = self._attention_backward(kept, given, middle_gradient, of_inputs)
        norms = []
        if made is not None:
            normed = kept.inputs * kept.first_scale
            if self.trains_norms:
                norms = [(made * normed).sum(0), of_norm]
            made = self._norm_backward(made, normed, kept.first_scale, 0)
            made = (
                made.add_(middle_gradient)
                if given.wanted is None
                else made.index_add_(0, given.wanted, middle_gradient)
            )
        return made, [*of_qkv, *of_output, *of_mlp, *norms]

    def _mlp_backward(self, kept: _Kept, gradient: torch.Tensor) -> Any:
        """(gradient of the middle, gradients of the two groups, gradient of the norm's weight)."""
        gate, up = kept.gate_up.chunk(2, 1)
        sigmoid = torch.sigmoid(gate)
        activated = gate * sigmoid
        product = activated * up
        product_gradient, of_down = self.down.now().backward(product, kept.inner[3], gradient.to(self.dtype))
        del product
        gate_up_gradient = torch.empty_like(kept.gate_up)
        gate_gradient, up_gradient = gate_up_gradient.chunk(2, 1)
        torch.mul(product_gradient, activated, out=up_gradient)
        product_gradient *= up
        # silu'(g) = s + g s (1 - s) = s + a - a s
        slope = activated.addcmul_(activated, sigmoid, value=-1).add_(sigmoid)
        torch.mul(product_gradient, slope, out=gate_gradient)
        del slope, sigmoid, activated, product_gradient
        xhat = kept.middle * kept.second_scale
        normed = (xhat * self.norm_weights[1]).to(self.dtype)
        made, of_gate_up = self.gate_up.now().backward(normed, kept.inner[2], gate_up_gradient)
        made = made.float()
        of_norm = (made * xhat).sum(0) if self.trains_norms else None
        return self._norm_backward(made, xhat, kept.second_scale, 1), [*of_gate_up, *of_down], of_norm

    def _attention_backward(self, kept: _Kept, given: _Given, gradient: torch.Tensor, of_inputs: bool) -> Any:
        """(gradients of the output's parameters, of those of queries, keys and values; gradient of the normed inputs)."""
        cos, sin = given.turn
        made, of_output = self.output.now().backward(kept.attended, kept.inner[1], gradient.to(self.dtype))
        if given.wanted is not None:
            made = made.new_zeros(len(kept.inputs), made.shape[1]).index_copy_(0, given.wanted, made)
        query, key, value = attend_backward(made, kept.query, kept.key, kept.value, given.blocks, kept.probabilities)
        kept.probabilities = []
        size = cos.shape[-1]
        qkv_gradient = torch.empty(len(made), self.n_heads + 2 * self.n_kv, size, dtype=self.dtype, device=made.device)
        heads = qkv_gradient.transpose(0, 1)
        heads[: self.n_heads] = rotate(query, cos * self.scaling, sin * -self.scaling)
        heads[self.n_heads : -self.n_kv] = rotate(key, cos, -sin)
        heads[-self.n_kv :] = value
        normed = (kept.inputs * kept.first_scale * self.norm_weights[0]).to(self.dtype)
        if not of_inputs:
            return of_output, self.qkv.now().of_parameters(normed, kept.inner[0], qkv_gradient.flatten(1)), None
        made, of_qkv = self.qkv.now().backward(normed, kept.inner[0], qkv_gradient.flatten(1))
        return of_output, of_qkv, made.float()

    def _norm(self, inputs: torch.Tensor, which: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed inputs in the layer's type, what they were multiplied by (T, 1))."""
        scale = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
        scale.square_().div_(inputs.shape[-1]).add_(self.epsilon).rsqrt_()
        return (inputs * scale).mul_(self.norm_weights[which]).to(self.dtype), scale

    def _norm_backward(
        self, gradient: torch.Tensor, normed: torch.Tensor, scale: torch.Tensor, which: int
    ) -> torch.Tensor:
        """The gradient of a norm's inputs; `normed` is before its weight. Uses up `gradient`."""
        gradient = gradient.mul_(self.norm_weights[which])
        mean = torch.linalg.vecdot(gradient, normed).div_(normed.shape[-1])[:, None]
        return gradient.addcmul_(normed, mean, value=-1).mul_(scale)
