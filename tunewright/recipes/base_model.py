"""The base model of a training: loaded, given an adapter, and computed over conversations that lie end to end."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.recipes import adapters, fast_layers, flattened, packing, sharing
from tunewright.recipes.adapters import Lora
from tunewright.recipes.attempt import Attempt
from tunewright.recipes.computing import PER_CONVERSATION, Computing

_PROOF_TOKENS = 64
"""Of each part of the conversations that try whether beginnings may be shared."""


def load_model(folder: Path, dtype: torch.dtype, attention: str = PER_CONVERSATION) -> Any:
    """The base model, dropout off, from local safetensors and transformers' own code only.

    Raises InvalidRequest(`base_model_unsupported`).
    """
    set_verbosity_error()
    disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation=flattened.IMPLEMENTATIONS[attention],
        )
    except (ValueError, KeyError) as error:
        message = mark("The base model in this folder is of an architecture that can't be trained by this release.")
        raise InvalidRequest("base_model_unsupported", message, param="model") from error
    return model.eval()


def add_adapter(attempt: Attempt, model: Any) -> Lora:
    """Put a fresh adapter into `model`, or the one to continue from with the rank and alpha that it has.

    Raises InvalidRequest (`base_model_unsupported`, and what `adapters.read_adapter` and `load_adapter` raise).
    """
    spec, wanted = attempt.spec, attempt.spec.hyperparameters
    lora = Lora(wanted.lora_rank, wanted.lora_alpha, adapters.linear_names(model))
    tensors = None
    if spec.start_adapter_path is not None:
        found = adapters.read_adapter(Path(spec.start_adapter_path), spec.base_code, spec.start_adapter_sha256)
        lora, tensors = Lora(*found[:3]), found[3]
        if (lora.rank, lora.alpha) != (wanted.lora_rank, wanted.lora_alpha):
            attempt.note(
                "rank_of_start_model",
                mark("The model to continue from has rank {rank} and alpha {alpha}; they stay."),
                level="info",
                rank=lora.rank,
                alpha=lora.alpha,
            )
    if not lora.targets:
        raise flattened.unsupported(model)
    adapters.add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=spec.seed)
    if tensors is not None:
        adapters.load_adapter(adapters.adapter_parameters(model), tensors)
    return lora


def speed_up(model: Any, computing: Computing) -> bool:
    """Compute as was chosen from now on; whether the layers are computed by hand."""
    checkpointing = computing.activation_checkpointing
    if computing.device == "cpu" and fast_layers.speed_up(model, computing.dtype, checkpointing=checkpointing):
        return True
    if checkpointing:
        flattened.checkpoint_layers(model)
    return False


def prove_flattening(model: Any, rows: packing.Rows, computing: Computing) -> None:
    """Two of the shortest conversations laid end to end give what each gives by itself.

    Raises InvalidRequest(`base_model_unsupported`).
    """
    pair = _shortest_pair(rows)
    alone = [packing.flatten(rows, [row]) for row in pair]
    if not _is_right(model, alone, packing.flatten(rows, pair), computing):
        raise flattened.unsupported(model)


def can_share(model: Any, rows: packing.Rows, computing: Computing) -> bool:
    """Whether conversations may be computed together up to where they differ: tried with two that begin like a short one of
    `rows`, and end in different ways. An architecture for which that is wrong is trained without."""
    if not flattened.can_share(model):
        return False
    stem, end = (rows.tokens_of(row)[:_PROOF_TOKENS] for row in _shortest_pair(rows))
    stem = np.resize(stem, max(len(stem), sharing.LEAST))
    tokens = [np.concatenate([stem, end]), np.concatenate([stem, end[::-1]])]
    trained = [np.arange(len(row)) >= len(stem) for row in tokens]
    alone = [packing.lay([row], [labels], share=False) for row, labels in zip(tokens, trained, strict=True)]
    return _is_right(model, alone, packing.lay(tokens, trained, share=True), computing)


def _shortest_pair(rows: packing.Rows) -> list[int]:
    shortest = [int(row) for row in np.argsort(rows.lengths, kind="stable")[:2]]
    return [shortest[0], shortest[-1]]  # a single row is laid beside itself


def _is_right(model: Any, alone: list[packing.Flat], together: packing.Flat, computing: Computing) -> bool:
    tolerance = 1e-3 if computing.precision == "float32" else 5e-2
    return flattened.is_right(model, alone, together, torch.device(computing.device), tolerance)
