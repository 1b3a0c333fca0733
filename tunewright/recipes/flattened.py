"""A language model over conversations laid end to end: attention per conversation, logits only where labels are.

Both save more than half of the time of padded batches with full logits (see benchmarks/train_speed.py), and neither changes
the loss: a test compares with transformers' own forward, row by row.

Shapes: T tokens of the micro-batch, N labels, H heads, K key-value heads, D head size, C channels, V vocabulary.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import AttentionInterface

from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.jobs.memory_estimate import LABELS_AT_ONCE
from tunewright.recipes import fast_layers
from tunewright.recipes.computing import FLASH, FLEX, PER_CONVERSATION
from tunewright.recipes.flex_attention import attend_flex
from tunewright.recipes.packing import Flat

ATTENTION = "tunewright_per_conversation"
IMPLEMENTATIONS = {PER_CONVERSATION: ATTENTION, FLEX: "tunewright_flex", FLASH: "flash_attention_2"}
"""transformers' name of each way to compute attention."""


def attend_per_conversation(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each of the conversations of `lengths`; one conversation if `lengths` is None.

    Shapes: query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D).
    """
    lengths = [query.shape[2]] if lengths is None else lengths
    groups = query.shape[1] // key.shape[1]
    outputs = []
    # split() and not slices: the gradient of a slice is a whole tensor of zeros, once per conversation.
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        if groups > 1:
            # enable_gqa leaves the fast CPU kernel in the backward pass (3x slower, measured).
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mask = _window_mask(q, sliding_window)
        out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1), None


def _window_mask(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    place = torch.arange(length, device=query.device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < sliding_window)


AttentionInterface.register(ATTENTION, attend_per_conversation)
AttentionInterface.register(IMPLEMENTATIONS[FLEX], attend_flex)


def checkpoint_layers(model: Any) -> None:
    """Keep only the inputs of each layer for the backward pass, and compute the layer again there."""
    for layer in model.base_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


class _CrossEntropies(torch.autograd.Function):
    """-log p(label) of each label, and whether it was the likeliest token, for a head that is not trained.

    The gradient is made in the forward pass, so the logits of all labels never exist together.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> Any:
        gradient = torch.empty_like(hidden, dtype=head.dtype) if hidden.requires_grad else None
        losses = torch.empty(len(labels), device=hidden.device)
        right = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
        for start in range(0, len(labels), LABELS_AT_ONCE):
            part = slice(start, start + LABELS_AT_ONCE)
            wanted = labels[part, None]
            losses[part], right[part], error = _score(hidden[part].to(head.dtype) @ head.t(), wanted)
            if gradient is not None:
                error.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=error.dtype))
                torch.mm(error.to(head.dtype), head, out=gradient[part])
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient.to(ctx.dtype) * gradients[0][:, None].to(ctx.dtype), None, None


class _TrainedCrossEntropies(torch.autograd.Function):
    """The same for a head that is trained, float32, with logits computed in `dtype`. They are made again in the backward
    pass, so they never exist together either."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> Any:
        compute = head.to(dtype)
        parts = zip(hidden.split(LABELS_AT_ONCE), labels[:, None].split(LABELS_AT_ONCE), strict=True)
        found = [_score(states.to(dtype) @ compute.t(), wanted)[:2] for states, wanted in parts]
        ctx.save_for_backward(hidden, head, labels)
        ctx.dtype = dtype
        right = torch.cat([right for _, right in found])
        ctx.mark_non_differentiable(right)
        return torch.cat([losses for losses, _ in found]), right

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden, head, labels = ctx.saved_tensors
        compute, of_hidden, of_head = head.to(ctx.dtype), torch.empty_like(hidden), torch.zeros_like(head)
        for start in range(0, len(labels), LABELS_AT_ONCE):
            part = slice(start, start + LABELS_AT_ONCE)
            states, wanted = hidden[part].to(ctx.dtype), labels[part, None]
            _, _, error = _score(states @ compute.t(), wanted)
            error.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=error.dtype))
            error = error.mul_(gradients[0][part, None]).to(ctx.dtype)
            of_hidden[part] = error @ compute
            if ctx.dtype == torch.float32:
                of_head.addmm_(error.t(), states)
            else:
                of_head += error.t() @ states
        return of_hidden, of_head, None, None


def _score(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cross-entropies, whether the label was the likeliest, probabilities float32 (N, V)) of `wanted`, (N, 1)."""
    logits = logits.float()
    largest, likeliest = logits.max(-1, keepdim=True)
    losses = largest - logits.gather(-1, wanted)
    probabilities = logits.sub_(largest).exp_()
    total = probabilities.sum(-1, keepdim=True)
    return (losses + total.log())[:, 0], (likeliest == wanted)[:, 0], probabilities.div_(total)


def summed_loss(model: Any, flat: Flat, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed cross-entropy, float64; labels that the model would have chosen itself), both scalars on `device`."""
    losses, right = label_losses(model, flat, device)
    return losses.sum(dtype=torch.float64), right.sum()


def label_losses(model: Any, flat: Flat, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy of each label, float32 (N,); whether it was the likeliest token, bool (N,)) on `device`."""
    hidden_1TC = model.base_model(
        input_ids=torch.from_numpy(flat.tokens)[None].to(device),
        position_ids=torch.from_numpy(flat.positions)[None].to(device),
        use_cache=False,
        **_ends_of_conversations(model, flat.lengths, device),
    ).last_hidden_state
    hidden_NC = hidden_1TC[0].index_select(0, torch.from_numpy(flat.predicts).to(device))
    head, labels = model.get_output_embeddings().weight, torch.from_numpy(flat.labels).to(device)
    if head.requires_grad and torch.is_grad_enabled():
        return _TrainedCrossEntropies.apply(hidden_NC, head, labels, fast_layers.computed_in(model))
    return _CrossEntropies.apply(hidden_NC, head, labels)


def _ends_of_conversations(model: Any, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """The arguments by which the model's way to compute attention knows where a conversation ends."""
    if model.config._attn_implementation != IMPLEMENTATIONS[FLASH]:
        return {"lengths": lengths}
    ends = functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


@torch.no_grad()
def next_token(model: Any, tokens: np.ndarray, device: torch.device) -> int:
    """The likeliest token after `tokens` (T,), by the same forward pass as in training."""
    hidden_1TC = model.base_model(
        input_ids=torch.from_numpy(tokens.astype(np.int64))[None].to(device),
        position_ids=torch.arange(len(tokens), device=device)[None],
        use_cache=False,
        **_ends_of_conversations(model, [len(tokens)], device),
    ).last_hidden_state
    head_VC = model.get_output_embeddings().weight
    return int((head_VC @ hidden_1TC[0, -1].to(head_VC.dtype)).argmax())


@torch.no_grad()
def prove_flattening(model: Any, rows: list[Flat], together: Flat, device: torch.device, tolerance: float) -> None:
    """Compare the flattened loss of a few short rows with transformers' own, row by row.

    An architecture that mixes neighbours (convolutions, states) or scales its logits would train on nonsense without a word.
    Raises InvalidRequest(`base_model_unsupported`).
    """
    flattened, _ = summed_loss(model, together, device)
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    expected = torch.zeros_like(flattened)
    for row in rows:
        logits_1TV = model(input_ids=torch.from_numpy(row.tokens)[None].to(device), use_cache=False).logits
        chosen = logits_1TV[0, torch.from_numpy(row.predicts).to(device)].float()
        labels = torch.from_numpy(row.labels).to(device)
        expected += functional.cross_entropy(chosen, labels, reduction="sum")
    model.set_attn_implementation(ours)
    if not torch.allclose(flattened, expected, rtol=tolerance, atol=tolerance):
        raise unsupported(model)


def unsupported(model: Any) -> InvalidRequest:
    """The error for a base model whose architecture this loop can't train."""
    return InvalidRequest(
        "base_model_unsupported",
        mark("The architecture {architecture} of the base model can't be trained by this release."),
        param="model",
        architecture=type(model).__name__,
    )
