"""What models' own code said of them, remembered in the home: one file for each model, number format and version of everything.

A worker compares its decoder with it at every start, so a decoder that does something else serves nothing, whoever changed what.
Files that are missing, damaged or of other versions are made anew by a process that ends again (`own_code.py`).
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import safetensors.torch
import torch

import tunewright
from tunewright.deployments.ports import OWN_CODE, WorkerSpec
from tunewright.engines.fast_decoder import Plan
from tunewright.engines.placement import Placement
from tunewright.files_on_disk import sha256_of, write_atomically
from tunewright.models.manifest import MANIFEST

_log = logging.getLogger(__name__)
_MOST_KEPT = 32
_DIGEST_BYTES = hashlib.sha256().digest_size
_FAST_TYPES = ("llama", "mistral", "qwen2", "qwen3", "glm", "glm4")
_ABOUT, _LOGITS, _LARGEST = "about", "logits.", "largest."


class Reference(NamedTuple):
    """`plan` is None for a model that only its own code can run. `logits` are float32, of all tokens of each row or of its last
    two; `largest` says by linear layer how large each feature of its inputs was, where products are to be fitted to that."""

    plan: Plan | None
    kind: str
    rows: list[list[int]]
    logits: list[torch.Tensor]
    largest: dict[str, torch.Tensor]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Which reference is wanted. `files` are hashes that name the model, which were checked."""

    folder: str
    files: dict[str, str]
    placement: Placement
    context_tokens: int
    texts: list[list[int]]
    store: str | None
    """The folder where references are kept; None keeps none."""

    @property
    def path(self) -> Path:
        """The file that this reference has: another one if any of what it depends on is another."""
        versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")]
        engine = {path.name: sha256_of(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
        model = [self.files, list(self.placement), self.context_tokens, self.texts]
        told = msgspec.json.encode([tunewright.__version__, versions, engine, *model], order="sorted")
        return Path(self.store or "") / hashlib.sha256(told).hexdigest()


def order_of(spec: WorkerSpec, placement: Placement, texts: list[list[int]]) -> Order:
    """What a worker that is started with `spec` asks for."""
    own = spec.weights_path is not None
    return Order(
        folder=spec.weights_path or spec.base_path,
        files={MANIFEST: spec.weights_sha256 or ""} if own else spec.base_files,
        placement=placement,
        context_tokens=spec.context_tokens,
        texts=texts,
        store=spec.references_path,
    )


class _About(msgspec.Struct, frozen=True):
    plan: Plan | None
    kind: str
    rows: list[list[int]]


def reference(order: Order, spec: WorkerSpec) -> Reference | None:
    """The remembered one, or a new one; None if the model's own code is to be asked in this process. `spec` led to `order`."""
    if order.store is None or not may_be_fast(Path(order.folder)):
        return None
    found = remembered(order)
    if found is None:
        _log.info("this model's own code is asked what it answers")
        if order.placement.device == "cpu":  # not to be measured once more, with another result perhaps
            spec = msgspec.structs.replace(spec, precision=order.placement.precision)
        command = [sys.executable, "-P", "-m", OWN_CODE]
        subprocess.run(command, input=msgspec.json.encode(spec), stdout=subprocess.DEVNULL, check=False)
        found = remembered(order)
    return found


def may_be_fast(folder: Path) -> bool:
    """Whether a reference is of use for the model in `folder`: else it needs its own code at every start."""
    return json.loads((folder / "config.json").read_text("utf-8")).get("model_type") in _FAST_TYPES


def remembered(order: Order) -> Reference | None:
    """The one that is kept, None if there is none that is whole."""
    try:
        data = order.path.read_bytes()
        digest, data = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            raise ValueError("the hash differs")
        tensors = safetensors.torch.load(data)
        about = msgspec.json.decode(tensors.pop(_ABOUT).numpy().tobytes(), type=_About)
        logits = [tensors.pop(f"{_LOGITS}{i}") for i in range(len(about.rows))]
    except FileNotFoundError:
        return None
    except Exception:  # whatever is wrong with it, it is made anew
        _log.exception("a remembered reference can't be used")
        return None
    os.utime(order.path)
    largest = {name.removeprefix(_LARGEST): tensor for name, tensor in tensors.items()}
    return Reference(about.plan, about.kind, about.rows, logits, largest)


def keep(found: Reference, order: Order) -> None:
    """Remember it for `remembered`, and forget those that were not used for longest. Raises OSError."""
    about = msgspec.json.encode(_About(found.plan, found.kind, found.rows))
    tensors: dict[str, Any] = {_ABOUT: torch.frombuffer(bytearray(about), dtype=torch.uint8)}
    tensors |= {f"{_LOGITS}{i}": logits_TV.contiguous() for i, logits_TV in enumerate(found.logits)}
    tensors |= {f"{_LARGEST}{name}": largest_I.cpu().contiguous() for name, largest_I in found.largest.items()}
    data = safetensors.torch.save(tensors)
    folder = order.path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(order.path, hashlib.sha256(data).digest() + data)
    with suppress(OSError):  # another one tidies up too
        kept = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[_MOST_KEPT:]:
            path.unlink()
