"""Reading an adapter in PEFT's format without trusting a byte of it.

The JSON only says rank and scale; what the adapter changes is decided by exact tensor names, each of which must belong to
a linear layer of the base. All that is wrong is reported at once.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark

if TYPE_CHECKING:
    from tunewright.engines.stacks import Seat

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 256 * 2**10
MAX_WEIGHTS_BYTES = 4 * 2**30
MAX_RANK = 256
MAX_ALPHA = 65536.0
_MAX_PROBLEMS_SHOWN = 50
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>[\w.]{1,300})\.lora_(?P<side>[AB])\.weight")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_UNSAFE_SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".gguf", ".py", ".so", ".sh", ".joblib"}
)

# Keys of adapter_config.json that may have any value: they say nothing about how the adapter acts.
_FREE_KEYS = frozenset(
    {
        "revision", "task_type", "inference_mode", "peft_version", "lora_dropout",
        "init_lora_weights", "megatron_core", "qalora_group_size", "target_modules", "exclude_modules",
    }
)  # fmt: skip
# Keys that are read.
_READ_KEYS = frozenset({"base_model_name_or_path", "peft_type", "r", "lora_alpha", "use_rslora"})
# Every other key, known or not, must say "off".
_OFF = (None, False, [], {}, "none")


class Pair(NamedTuple):
    """One layer's update: `down` [rank, in], `up` [out, rank], to be added as `scale * up @ (down @ x)`."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass(eq=False)
class Adapter:
    """A loaded adapter, whose factors lie in `seat`. `tensors` counts the file's."""

    adapter_id: str
    tensors: int
    seat: "Seat"
    load_ms: float = 0.0
    used: set[str] | None = None
    """Collects the names of the projections that were changed by it, if somebody wants to know."""


def read_adapter(
    folder: Path, sha256: str, base_code: str, linears: dict[str, tuple[int, int]]
) -> tuple[dict[str, Pair], int]:
    """Read and check a PEFT folder. `linears` maps the base's module names to (in, out) features.

    Returns float32 pairs by module name, and the number of tensors in the file. Raises InvalidRequest `adapter_invalid`
    whose sentence lists everything that is wrong.
    """
    problems: list[str] = []
    config = _read_config(folder, problems)
    problems += [f"unsafe file {quote(name)}" for name in _unsafe_files(folder)]
    tensors = _read_weights(folder, sha256, problems)
    pairs: dict[str, Pair] = {}
    if config is not None:
        if config.get("base_model_name_or_path") != base_code:
            found = quote(config.get("base_model_name_or_path"))
            problems.append(f"{CONFIG_FILE}: the adapter belongs to the base {found}, not to {quote(base_code)}")
        rank, scale = _rank_and_scale(config, problems)
        if tensors is not None:
            pairs = _pair_up(tensors, rank, scale, linears, problems)
    if problems:
        raise adapter_invalid(problems)
    return pairs, len(tensors or {})


def adapter_invalid(problems: list[str]) -> InvalidRequest:
    """The error that lists `problems`."""
    shown = "; ".join(problems[:_MAX_PROBLEMS_SHOWN])
    return InvalidRequest(
        "adapter_invalid",
        mark("The adapter can't be used with this base ({count} problems): {problems}."),
        count=len(problems),
        problems=shown + ("; …" if len(problems) > _MAX_PROBLEMS_SHOWN else ""),
    )


def _unsafe_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _UNSAFE_SUFFIXES or p.is_symlink())


def _read_bytes(path: Path, limit: int, problems: list[str]) -> bytes | None:
    try:
        if path.is_symlink() or not path.is_file():
            problems.append(f"{path.name} is missing")
        elif path.stat().st_size > limit:
            problems.append(f"{path.name} is larger than {limit} bytes")
        else:
            return path.read_bytes()
    except OSError:
        problems.append(f"{path.name} can't be read")
    return None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _no_constant(text: str) -> float:
    raise ValueError(text)


def _read_config(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    data = _read_bytes(folder / CONFIG_FILE, MAX_CONFIG_BYTES, problems)
    if data is None:
        return None
    try:
        config = json.loads(data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        problems.append(f"{CONFIG_FILE} is not a JSON object with distinct keys")
        return None
    for key, value in config.items():
        if key not in _FREE_KEYS and key not in _READ_KEYS and not any(value is off or value == off for off in _OFF):
            problems.append(f"{CONFIG_FILE}: {quote(key)} is not supported")
    if config.get("peft_type") != "LORA":
        problems.append(f"{CONFIG_FILE}: peft_type must be LORA")
    return config


def _rank_and_scale(config: dict[str, Any], problems: list[str]) -> tuple[int | None, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        problems.append(f"{CONFIG_FILE}: r must be a whole number from 1 to {MAX_RANK}")
        rank = None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) <= MAX_ALPHA:
        problems.append(f"{CONFIG_FILE}: lora_alpha must be a number of at most {MAX_ALPHA:.0f}, not 0")
        alpha = 1.0
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        problems.append(f"{CONFIG_FILE}: use_rslora must be true or false")
    return rank, alpha / (math.sqrt(rank or 1) if rslora else (rank or 1))


def _read_weights(folder: Path, sha256: str, problems: list[str]) -> dict[str, torch.Tensor] | None:
    data = _read_bytes(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES, problems)
    if data is None:
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        problems.append(f"{WEIGHTS_FILE} is not the file that was published (sha256 differs)")
        return None
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, OverflowError):
        problems.append(f"{WEIGHTS_FILE} is not a valid safetensors file")
        return None
    if not tensors:
        problems.append(f"{WEIGHTS_FILE} holds no tensors")
    return tensors


def _pair_up(
    tensors: dict[str, torch.Tensor],
    rank: int | None,
    scale: float,
    linears: dict[str, tuple[int, int]],
    problems: list[str],
) -> dict[str, Pair]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        match = _TENSOR_NAME.fullmatch(name)
        module = match["module"] if match else ""
        if match is None or module not in linears:
            problems.append(f"unknown tensor {_shorten(name)}")
            continue
        sides.setdefault(module, {})[match["side"]] = tensor
        into, out = linears[module]
        expected = (rank, into) if match["side"] == "A" else (out, rank)
        if tensor.dtype not in _DTYPES:
            problems.append(f"{name}: dtype {str(tensor.dtype).removeprefix('torch.')} instead of a 16 or 32 bit float")
        elif rank is not None and tuple(tensor.shape) != expected:
            problems.append(f"{name}: shape {list(tensor.shape)} instead of {list(expected)}")
        elif not (math.isfinite(tensor.sum().item()) or torch.isfinite(tensor).all()):  # the sum is quick
            problems.append(f"{name}: not all numbers are finite")
    for module, found in sides.items():
        for side in {"A", "B"} - set(found):
            problems.append(f"missing tensor base_model.model.{module}.lora_{side}.weight")
    if problems:
        return {}
    return {module: Pair(found["A"].float(), found["B"].float(), scale) for module, found in sides.items()}


def _shorten(name: str) -> str:
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:120])
    return shown + ("…" if len(name) > 120 else "")
