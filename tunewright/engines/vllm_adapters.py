"""Adapters as vLLM takes them: checked as for our own engine, and with fused projections apart.

vLLM has one matrix for gate and up inside, but wants an adapter's parts for it one by one; an adapter of GLM's `gate_up_proj`
becomes two with the same A, each with its half of B. What the two add is what the one added.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tunewright.engines.adapter_files import CONFIG_FILE, WEIGHTS_FILE, Pair, read_adapter
from tunewright.engines.general import adaptable_linears
from tunewright.files_on_disk import publish_folder

RANKS = (8, 16, 32, 64, 128, 256)
"""Largest ranks that vLLM can be told to make room for."""
_FUSED = "gate_up_proj"
_PARTS = ("gate_proj", "up_proj")


def linears_of(base: Path) -> dict[str, tuple[int, int]]:
    """Module name -> (in, out) features of every layer that an adapter may change; reads no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    return {name: (linear.in_features, linear.out_features) for name, linear in adaptable_linears(model).items()}


def unfused(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """The same change with an adapter for each part of a fused projection."""
    apart: dict[str, Pair] = {}
    for name, pair in pairs.items():
        parent, _, leaf = name.rpartition(".")
        if leaf == _FUSED:
            for part, up in zip(_PARTS, pair.up.chunk(2), strict=True):
                apart[f"{parent}.{part}"] = pair._replace(up=up)
        else:
            apart[name] = pair
    return apart


def exported(
    source: Path, sha256: str, base_code: str, linears: dict[str, tuple[int, int]], folder: Path
) -> tuple[Path, int, int]:
    """(a folder that vLLM can load, rank, tensors of the file): `source` itself where nothing is fused, else made in `folder`.

    Raises InvalidRequest(`adapter_invalid`).
    """
    pairs, tensors = read_adapter(source, sha256, base_code, linears)
    rank = max(pair.down.shape[0] for pair in pairs.values())
    if not any(name.endswith(f".{_FUSED}") for name in pairs):
        return source, rank, tensors
    target = folder / sha256
    if not target.is_dir():
        write_adapter(folder / f".{sha256}", unfused(pairs), base_code)
        publish_folder(folder / f".{sha256}", target)
    return target, rank, tensors


def write_adapter(folder: Path, pairs: dict[str, Pair], base_code: str) -> None:
    """Write an adapter in PEFT's format; all pairs have the same rank and scale."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.down.clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.up.clone()
    save_file(tensors, folder / WEIGHTS_FILE)
    some = next(iter(pairs.values()))
    rank = some.down.shape[0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_code,
        "r": rank,
        "lora_alpha": some.scale * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "bias": "none",
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
