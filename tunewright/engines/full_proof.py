"""Proof of effect of a model with weights of its own: `python -m tunewright.engines.full_proof FOLDER`.

Base and model go through memory one after the other; each reads the stored prompts, and their next-token logits are compared.
Exit code 0 when `answer.json` was written, 1 otherwise.
"""

import gc
import sys
from pathlib import Path

import torch

from tunewright.clock import mono_s
from tunewright.deployments.full_models import FullOrder
from tunewright.deployments.ports import Proof
from tunewright.engines.answering import answer_order
from tunewright.engines.base_files import verify_files
from tunewright.engines.own_code import load_and_tell
from tunewright.engines.placement import detect_placement
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.models.whole_models import verify


def prove(order: FullOrder) -> Proof:
    """The proof. Raises InvalidRequest(`model_files_changed`, `no_effect`), Misconfigured for a damaged base."""
    verify_files(Path(order.base_path), order.base_files)
    model_path = Path(order.model_path)
    verify(model_path, order.manifest_sha256)
    base_logits, _, _ = _logits(Path(order.base_path), order.prompts)
    gc.collect()
    began = mono_s()
    logits, tensors, missing = _logits(model_path, order.prompts)
    load_ms = 1000 * (mono_s() - began)
    shifts = [(one - other).abs() for one, other in zip(logits, base_logits, strict=True)]
    largest = max(float(shift.max()) for shift in shifts)
    finite = all(bool(shift.isfinite().all()) for shift in shifts)
    if missing or not finite or largest == 0:
        raise InvalidRequest(
            "no_effect",
            mark(
                "The trained weights do not change the model's answers as they should: {missing} of {tensors} tensors are "
                "missing and the largest change of a logit is {shift}."
            ),
            missing=missing,
            tensors=tensors,
            shift=str(largest),
        )
    return Proof(
        tensors=tensors,
        tensors_applied=tensors,
        max_logit_shift=largest,
        mean_logit_shift=sum(float(shift.mean()) for shift in shifts) / len(shifts),
        load_ms=load_ms,
    )


@torch.inference_mode()
def _logits(folder: Path, prompts: list[list[int]]) -> tuple[list[torch.Tensor], int, int]:
    """(float32 logits of the token after each prompt, tensors of the model, those that the folder lacks)."""
    placement = detect_placement()
    model, missing = load_and_tell(folder, placement)
    rows = [torch.tensor([prompt], device=placement.device) for prompt in prompts]
    found = [model(input_ids=row, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu() for row in rows]
    return found, sum(1 for _ in model.parameters()), len(missing)


if __name__ == "__main__":
    sys.exit(answer_order(Path(sys.argv[1]), FullOrder, prove))
