"""One whole model from a base and an adapter: `python -m tunewright.engines.merging FOLDER` (see `deployments/merging.py`).

Always in float32 on the processor, whatever will serve the result: a sum that is rounded to the base's 16 bits loses what is
small against the weights, and that is most of an adapter. What was written is loaded again and must give the logits that the
engine gives for base and adapter side by side; else nothing is published.
"""

import gc
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from tunewright.deployments.merging import Merged, MergeOrder
from tunewright.engines.adapter_files import Adapter, Pair, read_adapter
from tunewright.engines.answering import answer_order
from tunewright.engines.base_files import verify_files
from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decoder import Decoder
from tunewright.engines.general import adaptable_linears
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.loading import load_decoder
from tunewright.engines.own_code import load_model
from tunewright.engines.placement import choose_placement
from tunewright.errors import InvalidRequest
from tunewright.files_on_disk import publish_folder
from tunewright.i18n import mark
from tunewright.models.whole_models import LARGEST_PART, seal

TOLERANCE = 1e-3
"""Of the largest logit: what adding up in another order changes stays far below it, in models of a hundred layers too."""
_PLACEMENT = choose_placement(cuda=False, cuda_bfloat16=False)


@torch.inference_mode()
def merge(order: MergeOrder, folder: Path) -> Merged:
    """Merge, prepare the result in `folder`, check it and publish it.

    Raises InvalidRequest(`adapter_invalid`, `merge_differs`, `insufficient_storage`), Misconfigured for a base that is damaged
    or can't be served.
    """
    base = Path(order.base_path)
    verify_files(base, order.base_files)
    context_tokens = max(map(len, order.prompts))
    decoder = load_decoder(base, _PLACEMENT, context_tokens)
    pairs, tensors = read_adapter(Path(order.adapter_path), order.adapter_sha256, order.base_code, decoder.linears)
    adapter = Adapter("merged", tensors, decoder.prepare(pairs))
    base_PV = _logits(decoder, None, order.prompts)
    wanted_PV = _logits(decoder, adapter, order.prompts)
    del decoder, adapter
    gc.collect()
    prepared = folder / "merged"
    shutil.rmtree(prepared, ignore_errors=True)
    try:
        _write_sum(base, pairs, prepared)
        manifest_sha256 = seal(prepared, base, order.base_code)
        gc.collect()
        found_PV = _logits(load_decoder(prepared, _PLACEMENT, context_tokens), None, order.prompts)
        merged = Merged(
            manifest_sha256=manifest_sha256,
            layers=len(pairs),
            size_bytes=sum(path.stat().st_size for path in prepared.iterdir()),
            difference=float((found_PV - wanted_PV).abs().max()),
            tolerance=TOLERANCE * max(1.0, float(wanted_PV.abs().max())),
            effect=float((base_PV - wanted_PV).abs().max()),
        )
        _require_equal(merged)
        target = Path(order.target)
        shutil.rmtree(target, ignore_errors=True)
        publish_folder(prepared, target)
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
    return merged


def _logits(decoder: Decoder, adapter: Adapter | None, prompts: list[list[int]]) -> torch.Tensor:
    """Next-token logits [prompts, vocabulary]."""
    found = []
    for prompt in prompts:
        cache = SlotCache(slots=1, context_tokens=len(prompt))
        cache.reserve(1, len(prompt))
        found.append(decoder.logits(make_batch([Part(0, 0, prompt, adapter, True, False)], decoder.device), cache)[0])
    return torch.stack(found)


def _write_sum(base: Path, pairs: dict[str, Pair], prepared: Path) -> None:
    model = load_model(base, _PLACEMENT)
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(prepared.parent).free
    if free < needed:
        raise InvalidRequest(
            "insufficient_storage",
            mark("The merged model needs {needed} GB of free disk; there are {free} GB."),
            needed=round(needed / 1e9, 1),
            free=round(free / 1e9, 1),
        )
    linears = adaptable_linears(model)
    for name, pair in pairs.items():
        linears[name].weight = nn.Parameter(_sum(linears[name].weight, pair), requires_grad=False)
    model.save_pretrained(prepared, max_shard_size=LARGEST_PART)


def _sum(weight_OI: torch.Tensor, pair: Pair) -> torch.Tensor:
    return torch.addmm(weight_OI, pair.up, pair.down, alpha=pair.scale)


def _require_equal(merged: Merged) -> None:
    """Close to base with adapter, and closer to that than to the base alone: a merge that does nothing is not a merge."""
    if not merged.difference <= merged.tolerance or not merged.difference < merged.effect / 2:
        raise InvalidRequest(
            "merge_differs",
            mark(
                "The merged model does not answer as the base with the adapter does: a logit differs by {difference}, "
                "the adapter changes one by {effect}."
            ),
            difference=merged.difference,
            effect=merged.effect,
        )


if __name__ == "__main__":
    sys.exit(answer_order(Path(sys.argv[1]), MergeOrder, lambda order: merge(order, Path(sys.argv[1]))))
