"""A decoder over transformers' own modelling code: any causal language model whose layers all have plain attention.

The library sees one long sequence [1, T] with positions of our choice; our cache and our attention function (registered
under `ATTENTION`) give every token the row that it belongs to. So nothing is padded, and prompts and decoding rows share
the same matrix products.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from tunewright.engines.adapter_files import Pair
from tunewright.engines.batch import Batch
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.stacks import Joint, Seat, Stacks, add_changes, draw_together, joints_of

ATTENTION = "tunewright"


class Step(NamedTuple):
    """Reaches our attention function through the model's keyword arguments."""

    batch: Batch
    cache: SlotCache


class UnsupportedAttention(Exception):
    """The model asks for a kind of attention that the slotted cache does not do."""


def _attention(
    module: nn.Module,
    query_1QTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tunewright_step: Step | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    wanted = {"softcap", "s_aux", "position_bias", "head_mask", "indices"}
    if tunewright_step is None or attention_mask is not None or any(rest.get(key) is not None for key in wanted):
        raise UnsupportedAttention
    out_TQD = tunewright_step.cache.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query_1QTD[0].transpose(0, 1),
        tunewright_step.batch,
        scaling,
        sliding_window,
    )
    return out_TQD[None], None


class _Layer(CacheLayerMixin):
    """What transformers asks about a layer's cache; the answers are only for the sake of masks, and we use none."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedAttention

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _StepCache(Cache):
    """Hands new keys and values to the slotted cache."""

    def __init__(self, step: Step, n_layers: int) -> None:
        super().__init__(layers=[_Layer() for _ in range(n_layers)])
        self._step = step

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, cache = self._step
        cache.write(layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), batch)
        return key_states, value_states


class LoraLinear(nn.Module):
    """A linear layer of the base plus the update of each segment's adapter. Rows outside segments are not touched."""

    def __init__(self, name: str, linear: nn.Linear, active: list[Joint]) -> None:
        super().__init__()
        self.name = name
        self.linear = linear
        self._active = active
        """Shared by all layers; the decoder fills it before each pass."""

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self._active:
            add_changes(self.name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]), self._active)
        return y


def adaptable_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer but the head, by its name in the model."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


class GeneralDecoder:
    """Runs a transformers causal model on flattened batches."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._joints: list[Joint] = []
        self.device = str(model.device)
        self.dtype = model.dtype
        self.precision = str(model.dtype).removeprefix("torch.")
        # Releases of transformers before 5.24 call it past_key_values, as some models of later ones do.
        named = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"
        config = model.config.get_text_config()
        self._n_layers: int = config.num_hidden_layers
        self.n_embeddings: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        AttentionInterface.register(ATTENTION, _attention)
        model.set_attn_implementation(ATTENTION)
        self.linears = self._wrap_linears()
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        self._stacks = Stacks({name: (name,) for name in self.linears}, self.linears, like)

    def _wrap_linears(self) -> dict[str, tuple[int, int]]:
        """Wrap every layer that an adapter may change; returns module name -> (in, out) features."""
        found = adaptable_linears(self._model)
        for name, linear in found.items():
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, LoraLinear(name, linear, self._joints))
        return {name: (linear.in_features, linear.out_features) for name, linear in found.items()}

    def prepare(self, pairs: dict[str, Pair]) -> Seat:
        """Put an adapter where `logits` finds it."""
        return self._stacks.seat(pairs)

    def logits(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        """Run one step; returns float32 logits [W, vocabulary] of the wanted tokens."""
        return self._run(self._model, batch, cache, logits_to_keep=batch.wanted_W).logits[0].float()

    def states(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        """Run one step; returns float32 states [T, E] of all tokens."""
        return self._run(self._model.get_decoder(), batch, cache).last_hidden_state[0].float()

    def _run(self, model: Any, batch: Batch, cache: SlotCache, **options: Any) -> Any:
        step = Step(batch, cache)
        draw_together(batch.segments)
        self._joints[:] = joints_of(batch.segments, self.device)
        try:
            return model(
                input_ids=batch.input_ids_T[None],
                position_ids=batch.positions_T[None],
                **{self._cache_name: _StepCache(step, self._n_layers)},
                use_cache=True,
                tunewright_step=step,
                **options,
            )
        finally:
            self._joints.clear()
