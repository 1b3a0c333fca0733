"""Models that have all weights of their own: the pool does not serve them, but that they differ from their base is proven too."""

import threading
from pathlib import Path

import msgspec

from tunewright.deployments.one_answer import one_answer
from tunewright.deployments.ports import Proof
from tunewright.jobs.ports import Runner

_MODULE = "tunewright.engines.full_proof"


class FullOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Compare the next-token logits of two model folders on `prompts` (token ids)."""

    base_path: str
    base_files: dict[str, str]
    model_path: str
    manifest_sha256: str
    """Of the model's MANIFEST.json, which has those of its other files."""
    prompts: list[list[int]]
    threads: int


def prove_full(runner: Runner, folder: Path, order: FullOrder, limit_s: float, stopping: threading.Event) -> Proof:
    """Have the proof made in `folder`, which is removed again. Blocks for at most `limit_s`, less once `stopping` is set.

    Raises InvalidRequest (`model_files_changed`, `no_effect`, ...), Unavailable(`engine_lost`, `engine_not_ready`).
    """
    return one_answer(runner, _MODULE, folder, order, Proof, limit_s, stopping)
