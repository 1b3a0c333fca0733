"""From a base's folder to a decoder that provably does what the model's own code does."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decoder import Decoder
from tunewright.engines.fast_decoder import FastDecoder, is_fast
from tunewright.engines.general import GeneralDecoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.placement import Placement
from tunewright.errors import Misconfigured
from tunewright.i18n import mark


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


def load_decoder(folder: Path, placement: Placement, context_tokens: int) -> Decoder:
    """Load a base and check it. Raises Misconfigured `base_unsupported` if its kind of attention can't be served."""
    model = load_model(folder, placement)
    with torch.inference_mode():
        rows = _rows_for_check(model.get_input_embeddings().weight.shape[0], context_tokens)  # type: ignore[union-attr]
        expected = [model(input_ids=row_1T.to(placement.device)).logits[0, -2:].float() for row_1T in rows]
        fast = is_fast(model)
        try:
            decoder: Decoder = FastDecoder(model, context_tokens=context_tokens) if fast else GeneralDecoder(model)
            found = _last_two_logits(decoder, rows)
        except Exception as error:
            raise _unsupported(model) from error
    for expected_2V, found_2V in zip(expected, found, strict=True):
        tolerance = (1e-3 if placement.dtype == "float32" else 0.1) * max(1.0, float(expected_2V.abs().max()))
        if not float((expected_2V - found_2V).abs().max()) <= tolerance:
            raise _unsupported(model)
    return decoder


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
