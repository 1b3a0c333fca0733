"""From a base's folder to a decoder that provably does what the model's own code does."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decoder import Decoder
from tunewright.engines.fast_decoder import FastDecoder, is_fast
from tunewright.engines.general import GeneralDecoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.measuring import plain_is_faster
from tunewright.engines.placement import Placement
from tunewright.engines.products import FLOAT32, INT8, Products
from tunewright.errors import Misconfigured
from tunewright.i18n import mark

_log = logging.getLogger(__name__)
_MEASURED_FROM = 256
"""Hidden size. Below it a whole model fits into a processor's caches."""
MAX_DIVERGENCE = 0.05
"""Nats by which next tokens may be less likely, on average over texts, than with the model's own code in float32."""
MAX_SHARE = 0.25
"""Size of the differences of logits beside that of the logits."""


def load_model(folder: Path, placement: Placement) -> PreTrainedModel:
    """The base as transformers knows it: local safetensors only, and never code from the folder."""
    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say here concerns training or their next versions
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, placement.dtype),
        )
    return model.to(placement.device).eval().requires_grad_(False)


def load_decoder(folder: Path, placement: Placement, context_tokens: int, texts: Sequence[list[int]] = ()) -> Decoder:
    """Load a base and check it. `texts` are prompts to which weights of 8 bits are fitted, and by which they are judged.

    Raises Misconfigured: `base_unsupported` if its kind of attention can't be served, `int8_inexact`.
    """
    model = load_model(folder, placement)
    exact = placement.precision == FLOAT32
    with torch.inference_mode():
        rows = _rows_for_check(model.get_input_embeddings().weight.shape[0], context_tokens)  # type: ignore[union-attr]
        rows += [] if exact else [torch.tensor([text[:context_tokens]]) for text in texts]
        with _largest_inputs(model, placement.precision) as largest:
            expected = [model(input_ids=row_1T.to(placement.device)).logits[0].float() for row_1T in rows]
        fast = is_fast(model)
        try:
            decoder = _fast(model, context_tokens, placement, largest) if fast else GeneralDecoder(model)
            found = _last_two_logits(decoder, rows)
            if decoder.precision != FLOAT32:
                found = [torch.cat([_all_logits(decoder, row), last]) for row, last in zip(rows, found, strict=True)]
                expected = [torch.cat([expected_TV, expected_TV[-2:]]) for expected_TV in expected]
        except Exception as error:
            raise _unsupported(model) from error
    _judge(model, decoder, expected, found)
    return decoder


def _fast(
    model: PreTrainedModel, context_tokens: int, placement: Placement, largest: dict[str, torch.Tensor]
) -> Decoder:
    hidden: int = model.config.hidden_size  # type: ignore[union-attr]
    plain = placement.device == "cpu" and placement.precision == FLOAT32 and hidden >= _MEASURED_FROM
    products = Products(placement.precision, largest, plain=plain and plain_is_faster(hidden))
    return FastDecoder(model, context_tokens=context_tokens, products=products)


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


def _judge(model: PreTrainedModel, decoder: Decoder, expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """In float32 the last two logits of each row must be those of the model's own code. In other formats the distributions
    must be near and the logits of the same kind: the one says little of models that hardly know anything."""
    if decoder.precision == FLOAT32:
        for expected_TV, found_2V in zip(expected, found, strict=True):
            tolerance = 1e-3 * max(1.0, float(expected_TV[-2:].abs().max()))
            if not float((expected_TV[-2:] - found_2V).abs().max()) <= tolerance:
                raise _unsupported(model)
        return
    expected_TV, found_TV = torch.cat(expected), torch.cat(found)
    share = float((found_TV - expected_TV).norm() / (expected_TV - expected_TV.mean(-1, keepdim=True)).norm())
    divergence = functional.kl_div(
        found_TV.log_softmax(-1), expected_TV.log_softmax(-1), log_target=True, reduction="none"
    )
    mean = float(divergence.sum(-1).mean())
    _log.info("%s: mean divergence %.4f nats, %.3f of the logits' size", decoder.precision, mean, share)
    if mean <= MAX_DIVERGENCE and share <= MAX_SHARE:
        return
    if decoder.precision != INT8:
        raise _unsupported(model)
    raise Misconfigured(
        "int8_inexact",
        mark(
            "With weights of 8 bits this base's answers are too far from its own: {divergence} nats on average, the limit is "
            "{limit}. Serve it with TUNEWRIGHT_ENGINE_WEIGHTS=exact."
        ),
        divergence=round(mean, 4),
        limit=MAX_DIVERGENCE,
    )


def _all_logits(decoder: Decoder, row_1T: torch.Tensor) -> torch.Tensor:
    """Of every token of a row that goes through in one piece."""
    tokens: list[int] = row_1T[0].tolist()
    cache = SlotCache(slots=1, context_tokens=len(tokens))
    cache.reserve(1, len(tokens))
    batch = make_batch([Part(0, 0, tokens, None, True, False)], decoder.device)
    batch.wanted_W = torch.arange(len(tokens), device=decoder.device)
    return decoder.logits(batch, cache)


def _rows_for_check(vocabulary: int, context_tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (min(9, context_tokens), min(5, context_tokens))
    return [torch.randint(vocabulary, (1, length), generator=generator) for length in lengths]


def _last_two_logits(decoder: Decoder, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Two rows of different lengths through the slotted cache: prompts in two pieces, then one joint decoding step."""
    cache = SlotCache(slots=len(rows), context_tokens=max(row.shape[1] for row in rows))
    cache.reserve(len(rows), cache.max_tokens)
    ids: list[list[int]] = [row[0].tolist() for row in rows]
    pieces = [[Part(i, 0, row[:2], None, False, False) for i, row in enumerate(ids)]]
    pieces.append([Part(i, 2, row[2:-1], None, True, False) for i, row in enumerate(ids)])
    pieces.append([Part(i, len(row) - 1, row[-1:], None, True, True) for i, row in enumerate(ids)])
    logits = [decoder.logits(make_batch(parts, decoder.device), cache) for parts in pieces if parts]
    return [torch.stack([logits[1][i], logits[2][i]]) for i in range(len(rows))]


def _unsupported(model: Any) -> Misconfigured:
    return Misconfigured(
        "base_unsupported",
        mark(
            "Bases of the kind \"{kind}\" can't be served by this engine: it does not get the answers of the model's code."
        ),
        kind=type(model).__name__,
    )
