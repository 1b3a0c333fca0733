"""Models that have all weights of their own: the pool does not serve them, but that they differ from their base is proven too.

The proof runs in a process of its own (`tunewright.engines.full_proof`) in a folder below `tmp/`, which has
    order.json    FullOrder, written by the server
    answer.json   FullAnswer, written once by the process
    log.txt       what it printed
It ends by itself; one that an earlier server left is killed before the next begins.
"""

import shutil
import threading
import time
from pathlib import Path

import msgspec

from tunewright.clock import mono_s
from tunewright.deployments.ports import Proof, Trouble
from tunewright.errors import InvalidRequest, Unavailable
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.jobs.ports import Runner

_MODULE = "tunewright.engines.full_proof"
_POLL_S = 0.05
_LAST_WAIT_S = 5.0


class FullOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Compare the next-token logits of two model folders on `prompts` (token ids)."""

    base_path: str
    base_files: dict[str, str]
    model_path: str
    manifest_sha256: str
    """Of the model's MANIFEST.json, which has those of its other files."""
    prompts: list[list[int]]
    threads: int


FullAnswer = Proof | Trouble


def prove_full(runner: Runner, folder: Path, order: FullOrder, limit_s: float, stopping: threading.Event) -> Proof:
    """Have the proof made in `folder`, which is removed again. Blocks for at most `limit_s`, less once `stopping` is set.

    Raises InvalidRequest (`model_files_changed`, `no_effect`, ...), Unavailable(`engine_lost`, `engine_not_ready`).
    """
    for pid in runner.find(_MODULE, folder):
        runner.kill(pid)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    write_atomically(folder / "order.json", msgspec.json.encode(order))
    pid = runner.start(_MODULE, folder, folder / "log.txt")
    ticks = runner.start_ticks(pid)
    deadline = mono_s() + limit_s
    try:
        while ticks is not None and runner.alive(pid, ticks):
            if mono_s() >= deadline or stopping.wait(_POLL_S):
                raise Unavailable(
                    "engine_not_ready", mark("The proof of effect was not done in time; it is made again.")
                )
        try:
            answer = msgspec.json.decode((folder / "answer.json").read_bytes(), type=FullAnswer)
        except (OSError, msgspec.MsgspecError):
            raise Unavailable("engine_lost", mark("The engine stopped while it answered; try again.")) from None
    finally:
        runner.kill(pid)
        while not runner.group_empty(pid) and mono_s() < deadline + _LAST_WAIT_S:
            time.sleep(_POLL_S)
        shutil.rmtree(folder, ignore_errors=True)
    if isinstance(answer, Trouble):
        raise InvalidRequest(answer.code, answer.message, **answer.values)
    return answer
