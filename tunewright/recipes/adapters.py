"""LoRA adapters through PEFT: put into a model, read from and written to PEFT's folder format.

A folder holds `adapter_model.safetensors` (keys `base_model.model.{module}.lora_A.weight`) and `adapter_config.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tunewright.errors import InvalidRequest
from tunewright.files_on_disk import sha256_of
from tunewright.i18n import mark

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ADAPTER_NAME = "default"
"""PEFT's name of the one adapter in a model."""
_MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Lora:
    """Shape of an adapter."""

    rank: int
    alpha: int
    targets: list[str]


def linear_names(model: Any) -> list[str]:
    """The last name parts of the linear layers that get an adapter ('q_proj', ...), sorted: all but the output head.

    Of a mixture of experts only those of attention. Its routed experts are stacked in one tensor, each sees few tokens of a
    small set, and an adapter for each of a hundred would outweigh the rest; and what else is called as they once were
    (`gate_proj` of a shared expert or of a dense layer) PEFT takes for them when it loads the adapter.
    """
    head = model.get_output_embeddings()
    found = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
    if has_stacked_experts(model):
        found = {name for name in found if "attn" in name or "attention" in name}
    return sorted({name.rpartition(".")[2] for name in found})


def has_stacked_experts(model: Any) -> bool:
    """Whether the model keeps the weights of many experts as one tensor [experts, out, in]."""
    return any(parameter.ndim == 3 and ".experts." in name for name, parameter in model.named_parameters())


def add_lora(model: Any, *, rank: int, alpha: int, targets: list[str], seed: int) -> None:
    """Put a fresh adapter into `model` in place and freeze everything else.

    A is random from `seed`, B is zero. Adapter weights are float32 whatever the model is.
    """
    from peft import LoraConfig, inject_adapter_in_model  # 0.3 s that training all weights does without

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=targets)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_A." in name or ".lora_B." in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()


def adapter_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's key -> the trained parameter, in the order of the model's modules."""
    return {
        "base_model.model." + name.replace(f".{ADAPTER_NAME}.weight", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_adapter(parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
    """Copy `tensors` into the parameters of the same names.

    Raises InvalidRequest(`adapter_mismatch`) unless names and shapes are exactly those of the model.
    """
    different = sorted(parameters.keys() ^ tensors.keys())
    different += [name for name in parameters.keys() & tensors.keys() if parameters[name].shape != tensors[name].shape]
    if different:
        raise InvalidRequest(
            "adapter_mismatch",
            mark("The adapter does not fit the base model: {name} is missing, unknown or of another shape."),
            param="model",
            name=different[0],
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def read_adapter(
    folder: Path, base_code: str, sha256: str | None
) -> tuple[int, int, list[str], dict[str, torch.Tensor]]:
    """(rank, alpha, targets, tensors) of an adapter folder; `sha256` is that of the published weights.

    Raises InvalidRequest: `invalid_artifact` if it can't be read, `artifact_integrity` if its weights are others,
    `base_mismatch` if it belongs to another base.
    """
    try:
        if sha256 is not None and sha256_of(folder / WEIGHTS) != sha256:
            message = mark("The adapter to continue from is not the one that was published: its sha256 differs.")
            raise InvalidRequest("artifact_integrity", message, param="model")
        with (folder / CONFIG).open("rb") as stream:
            config = json.loads(stream.read(_MAX_CONFIG_BYTES))
        rank, alpha = int(config["r"]), int(config["lora_alpha"])
        targets = [str(name) for name in config["target_modules"]]
        base = config["base_model_name_or_path"]
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        message = mark("The adapter to continue from can't be read.")
        raise InvalidRequest("invalid_artifact", message, param="model") from error
    if base != base_code:
        raise InvalidRequest(
            "base_mismatch",
            mark("The adapter to continue from belongs to the base model {found}, not to {expected}."),
            param="model",
            found=str(base)[:64],
            expected=base_code,
        )
    return rank, alpha, targets, tensors


def write_adapter(
    folder: Path,
    parameters: dict[str, torch.nn.Parameter],
    *,
    rank: int,
    alpha: int,
    targets: list[str],
    base_code: str,
) -> None:
    """Write both files into an existing folder. The same weights give the same bytes."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_code,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": targets,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
