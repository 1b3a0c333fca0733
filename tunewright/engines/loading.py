"""From a base's folder to a decoder that provably does what the model's own code does."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as functional

from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decode_attention import by_torch, fastest_attention
from tunewright.engines.decoder import Decoder
from tunewright.engines.fast_decoder import EMBEDDING, FastDecoder, Plan
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.measuring import fastest_exact
from tunewright.engines.placement import Placement
from tunewright.engines.products import FLOAT32, INT8, Products
from tunewright.engines.references import Order, Reference
from tunewright.engines.weight_files import WeightFiles
from tunewright.errors import Misconfigured
from tunewright.i18n import mark

_log = logging.getLogger(__name__)
_MEASURED_FROM = 256
"""Hidden size. Below it a whole model fits into a processor's caches."""
MAX_DIVERGENCE = 0.05
"""Nats by which next tokens may be less likely, on average over texts, than with the model's own code in float32."""
MAX_SHARE = 0.25
"""Size of the differences of logits beside that of the logits."""


def load_decoder(
    folder: Path,
    placement: Placement,
    context_tokens: int,
    texts: Sequence[list[int]] = (),
    remembered: Reference | None = None,
) -> Decoder:
    """Load a base and check it. `texts` are prompts to which weights of 8 bits are fitted, and by which they are judged.

    `remembered` is what the model's own code has said of it; without, or if the decoder differs from that, it is asked here.
    Raises Misconfigured: `base_unsupported` if its kind of attention can't be served, `int8_inexact`.
    """
    if remembered is not None and remembered.plan is not None:
        try:
            decoder = _fast(remembered.plan, folder, placement, context_tokens, remembered.largest)
            _judge(decoder, remembered)
            return decoder
        except Exception:
            _log.exception("the decoder differs from what is remembered of the model's own code, which is asked again")
    return _load_by_own_code(folder, placement, context_tokens, texts)


def _load_by_own_code(folder: Path, placement: Placement, context_tokens: int, texts: Sequence[list[int]]) -> Decoder:
    from tunewright.engines.general import GeneralDecoder
    from tunewright.engines.own_code import load_model, reference_of, weights_of

    order = Order(
        folder=str(folder),
        files={},
        placement=placement,
        context_tokens=context_tokens,
        texts=list(texts),
        store=None,
    )
    model = load_model(folder, placement)
    reference = reference_of(model, weights_of(folder, placement), order)
    try:
        if reference.plan is None:
            decoder = GeneralDecoder(model)
        else:
            del model  # its weights are read again
            decoder = _fast(reference.plan, folder, placement, context_tokens, reference.largest)
        _judge(decoder, reference)
    except Misconfigured:
        raise
    except Exception as error:
        raise _unsupported(reference.kind) from error
    return decoder


def _fast(
    plan: Plan, folder: Path, placement: Placement, context_tokens: int, largest: dict[str, torch.Tensor]
) -> Decoder:
    weights = WeightFiles(folder, getattr(torch, placement.dtype), placement.device)
    hidden = weights.shape(EMBEDDING)[1]
    measured = placement.device == "cpu" and hidden >= _MEASURED_FROM
    plain, half = fastest_exact(hidden) if measured and placement.precision == FLOAT32 else (False, False)
    products = Products(placement.precision, largest, plain, half)
    with torch.inference_mode():
        attention = fastest_attention(plan.q_heads, plan.kv_heads, plan.head_size) if measured else by_torch
        return FastDecoder(plan, weights, context_tokens=context_tokens, products=products, attention=attention)


@torch.inference_mode()
def _judge(decoder: Decoder, reference: Reference) -> None:
    """In float32 the last two logits of each row must be those of the model's own code. In other formats the distributions
    must be near and the logits of the same kind: the one says little of models that hardly know anything."""
    rows = reference.rows
    last = _last_two_logits(decoder, rows)
    if decoder.precision == FLOAT32:
        for expected_TV, found_2V in zip(reference.logits, last, strict=True):
            expected_2V, found_2V = expected_TV[-2:], found_2V.cpu()
            tolerance = 1e-3 * max(1.0, float(expected_2V.abs().max()))
            if not float((expected_2V - found_2V).abs().max()) <= tolerance:
                raise _unsupported(reference.kind)
        return
    found_TV = torch.cat([torch.cat([_all_logits(decoder, row), two]) for row, two in zip(rows, last, strict=True)])
    expected_TV = torch.cat([torch.cat([logits_TV, logits_TV[-2:]]) for logits_TV in reference.logits])
    found_TV = found_TV.cpu()
    share = float((found_TV - expected_TV).norm() / (expected_TV - expected_TV.mean(-1, keepdim=True)).norm())
    divergence = functional.kl_div(
        found_TV.log_softmax(-1), expected_TV.log_softmax(-1), log_target=True, reduction="none"
    )
    mean = float(divergence.sum(-1).mean())
    _log.info("%s: mean divergence %.4f nats, %.3f of the logits' size", decoder.precision, mean, share)
    if mean <= MAX_DIVERGENCE and share <= MAX_SHARE:
        return
    if decoder.precision != INT8:
        raise _unsupported(reference.kind)
    raise Misconfigured(
        "int8_inexact",
        mark(
            "With weights of 8 bits this base's answers are too far from its own: {divergence} nats on average, the limit is "
            "{limit}. Serve it with TUNEWRIGHT_ENGINE_WEIGHTS=exact."
        ),
        divergence=round(mean, 4),
        limit=MAX_DIVERGENCE,
    )


def _all_logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """Of every token of a row that goes through in one piece."""
    cache = SlotCache(slots=1, context_tokens=len(tokens))
    cache.reserve(1, len(tokens))
    batch = make_batch([Part(0, 0, tokens, None, True, False)], decoder.device)
    batch.wanted_W = torch.arange(len(tokens), device=decoder.device)
    return decoder.logits(batch, cache)


def _last_two_logits(decoder: Decoder, rows: list[list[int]]) -> list[torch.Tensor]:
    """Rows of different lengths through the slotted cache: prompts in two pieces, then one joint decoding step."""
    cache = SlotCache(slots=len(rows), context_tokens=max(map(len, rows)))
    cache.reserve(len(rows), cache.max_tokens)
    pieces = [[Part(i, 0, row[:2], None, False, False) for i, row in enumerate(rows)]]
    pieces.append([Part(i, 2, row[2:-1], None, True, False) for i, row in enumerate(rows)])
    pieces.append([Part(i, len(row) - 1, row[-1:], None, True, True) for i, row in enumerate(rows)])
    logits = [decoder.logits(make_batch(parts, decoder.device), cache) for parts in pieces if parts]
    return [torch.stack([logits[1][i], logits[2][i]]) for i in range(len(rows))]


def _unsupported(kind: str) -> Misconfigured:
    return Misconfigured(
        "base_unsupported",
        mark(
            "Bases of the kind \"{kind}\" can't be served by this engine: it does not get the answers of the model's code."
        ),
        kind=kind,
    )
