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
from tunewright.recipes.products import product

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
    after: list[int] | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each of the conversations of `lengths`; one conversation if `lengths` is None. With `after`
    they are stretches, of which each goes on where the one of that number ends (-1: none) and sees all that it continues.

    Shapes: query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D).
    """
    lengths = [query.shape[2]] if lengths is None else lengths
    after = [-1] * len(lengths) if after is None else after
    groups = query.shape[1] // key.shape[1]
    outputs: list[torch.Tensor] = []
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    # split() and not slices: the gradient of a slice is a whole tensor of zeros, once per conversation.
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), after, strict=True)
    for q, k, v, earlier in parts:
        keys, values = ([], []) if earlier < 0 else seen[earlier]
        seen.append(([*keys, k], [*values, v]))
        if keys:  # joined again in the backward pass, or each continuation would keep all of what it shares
            out = checkpoint(_attend, q, *seen[-1], groups, scaling, sliding_window, use_reentrant=False)
        else:
            out = _attend(q, [k], [v], groups, scaling, sliding_window)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1), None


def _attend(
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    groups: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Of one stretch: (1, H, queries, D). The last keys are those of the queries themselves."""
    key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (keys, values))
    if groups > 1:
        # enable_gqa leaves the fast CPU kernel in the backward pass (3x slower, measured).
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = _mask(query, key, sliding_window)
    return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)


def _mask(query: torch.Tensor, key: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """Which keys each query sees, the last ones being those of the queries themselves; None where plain causality says it."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    if n_queries == n_keys and (sliding_window is None or n_keys <= sliding_window):
        return None
    place = torch.arange(n_keys, device=query.device)
    distance = place[-n_queries:, None] - place[None, :]
    return (distance >= 0) & (distance < (sliding_window or n_keys))


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
            losses[part], right[part], error = _score(product(hidden[part].to(head.dtype), head.t()), wanted)
            if gradient is not None:
                error.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=error.dtype))
                product(error.to(head.dtype), head, out=gradient[part])
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
        found = [_score(product(states.to(dtype), compute.t()), wanted)[:2] for states, wanted in parts]
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
            _, _, error = _score(product(states, compute.t()), wanted)
            error.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=error.dtype))
            error = error.mul_(gradients[0][part, None]).to(ctx.dtype)
            of_hidden[part] = product(error, compute)
            if ctx.dtype == torch.float32:
                of_head.addmm_(error.t(), states)
            else:
                of_head += product(error.t(), states)
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
    hidden_NC = _last_hidden(model, flat, device)
    head, labels = model.get_output_embeddings().weight, torch.from_numpy(flat.labels).to(device)
    if head.requires_grad and torch.is_grad_enabled():
        return _TrainedCrossEntropies.apply(hidden_NC, head, labels, fast_layers.computed_in(model))
    return _CrossEntropies.apply(hidden_NC, head, labels)


def _last_hidden(model: Any, flat: Flat, device: torch.device) -> torch.Tensor:
    """(N, C) where labels are predicted: only there the last layer by hand computes more than keys and values."""
    places, named = torch.from_numpy(flat.predicts), {}
    if fast_layers.is_by_hand(model):
        wanted, places = places.unique(return_inverse=True)  # rows may share a place
        named = {"wanted": wanted.to(device)}
    hidden_1TC = model.base_model(
        input_ids=torch.from_numpy(flat.tokens)[None].to(device),
        position_ids=torch.from_numpy(flat.positions)[None].to(device),
        use_cache=False,
        **_ends_of_conversations(model, flat, device),
        **named,
    ).last_hidden_state
    return hidden_1TC[0].index_select(0, places.to(device))


def can_share(model: Any) -> bool:
    """Whether the model's way to compute attention can let conversations go on where a beginning that they share ends, and
    nothing in it is random."""
    dropouts = (module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    is_random = any(module.training and module.p > 0 for module in dropouts)
    return model.config._attn_implementation != IMPLEMENTATIONS[FLASH] and not is_random


def _ends_of_conversations(model: Any, flat: Flat, device: torch.device) -> dict[str, Any]:
    """The arguments by which the model's way to compute attention knows where a conversation ends."""
    if model.config._attn_implementation != IMPLEMENTATIONS[FLASH]:
        return {"lengths": flat.lengths, "after": flat.after}
    ends = functional.pad(torch.tensor(flat.lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    longest = max(flat.lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


@torch.no_grad()
def next_token(model: Any, tokens: np.ndarray, device: torch.device) -> int:
    """The likeliest token after `tokens` (T,), by the same forward pass as in training."""
    n_tokens = len(tokens)
    flat = Flat(tokens.astype(np.int64), np.arange(n_tokens), np.array([n_tokens - 1]), np.empty(0), [n_tokens])
    head_VC = model.get_output_embeddings().weight
    return int((head_VC @ _last_hidden(model, flat, device)[0].to(head_VC.dtype)).argmax())


@torch.no_grad()
def is_right(model: Any, rows: list[Flat], together: Flat, device: torch.device, tolerance: float) -> bool:
    """Whether the labels of a few short rows laid together have the losses that transformers' own forward gives them, row by
    row: the mean of their differences is no more than `tolerance` of one and the mean loss.

    An architecture that mixes neighbours (convolutions, states) or scales its logits would train on nonsense without a word.
    """
    found, _ = label_losses(model, together, device)
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    expected = []
    for row in rows:
        logits_1TV = model(input_ids=torch.from_numpy(row.tokens)[None].to(device), use_cache=False).logits
        chosen = logits_1TV[0, torch.from_numpy(row.predicts).to(device)].float()
        labels = torch.from_numpy(row.labels).to(device)
        expected.append(functional.cross_entropy(chosen, labels, reduction="none"))
    model.set_attn_implementation(ours)
    wanted = torch.cat(expected)
    return bool((found - wanted).abs().mean() <= tolerance * (1 + wanted.mean()))


def unsupported(model: Any) -> InvalidRequest:
    """The error for a base model whose architecture this loop can't train."""
    return InvalidRequest(
        "base_model_unsupported",
        mark("The architecture {architecture} of the base model can't be trained by this release."),
        param="model",
        architecture=type(model).__name__,
    )
