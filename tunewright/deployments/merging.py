"""A LoRA model made whole for an instance of its own: base and adapter become one set of weights."""

import threading
from pathlib import Path

import msgspec

from tunewright.deployments.one_answer import one_answer
from tunewright.jobs.ports import Runner

_MODULE = "tunewright.engines.merging"


class MergeOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Add the adapter to the base's weights and publish the sum as `target`; what lies there already is replaced."""

    base_code: str
    base_path: str
    base_files: dict[str, str]
    adapter_path: str
    adapter_sha256: str
    prompts: list[list[int]]
    """Token ids: on these, the whole model must answer as the base with the adapter does."""
    target: str
    """On the file system of the order's folder."""
    threads: int


class Merged(msgspec.Struct, frozen=True, kw_only=True, tag="merged"):
    """What `target` now holds. Differences are the largest of any next-token logit on any prompt: between the merged model and
    base with adapter (at most `tolerance`), and between the base alone and base with adapter."""

    manifest_sha256: str
    """What a WorkerSpec needs as `weights_sha256`."""
    layers: int
    """So many of the base's were changed."""
    size_bytes: int
    difference: float
    tolerance: float
    effect: float


def merge_lora(runner: Runner, folder: Path, order: MergeOrder, limit_s: float, stopping: threading.Event) -> Merged:
    """Have the merge made in `folder`, which is removed again. Blocks for at most `limit_s`, less once `stopping` is set.

    `target` is there, whole and verified, or not there. Raises InvalidRequest (`adapter_invalid`, `base_changed`,
    `base_unsupported`, `merge_differs`, `insufficient_storage`), Unavailable(`engine_lost`, `engine_not_ready`).
    """
    return one_answer(runner, _MODULE, folder, order, Merged, limit_s, stopping)
