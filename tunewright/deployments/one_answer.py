"""Work for a process that answers once and ends: a proof of effect, a merge.

It happens in a folder of its own below `tmp/`, which has
    order.json    what is wanted, written by the server
    answer.json   written once by the process: what was found, or a Trouble
    log.txt       what it printed
One that an earlier server left is killed before the next begins.
"""

import shutil
import threading
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from tunewright.clock import mono_s
from tunewright.deployments.ports import Trouble
from tunewright.errors import InvalidRequest, Unavailable
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.jobs.ports import Runner

ORDER = "order.json"
ANSWER = "answer.json"
_POLL_S = 0.05
_LAST_WAIT_S = 5.0
_Answer = TypeVar("_Answer", bound=msgspec.Struct)


def one_answer(
    runner: Runner,
    module: str,
    folder: Path,
    order: msgspec.Struct,
    kind: type[_Answer],
    limit_s: float,
    stopping: threading.Event,
) -> _Answer:
    """Have `module` answer `order` in `folder`, which is removed again with all that the process left there.

    Blocks for at most `limit_s`, less once `stopping` is set. Raises InvalidRequest for a Trouble, Unavailable(`engine_lost`,
    `engine_not_ready`).
    """
    for pid in runner.find(module, folder):
        runner.kill(pid)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    write_atomically(folder / ORDER, msgspec.json.encode(order))
    pid = runner.start(module, folder, folder / "log.txt")
    ticks = runner.start_ticks(pid)
    deadline = mono_s() + limit_s
    try:
        while ticks is not None and runner.alive(pid, ticks):
            if mono_s() >= deadline or stopping.wait(_POLL_S):
                raise Unavailable(
                    "engine_not_ready", mark("The proof of effect or the merge was not done in time; it is made again.")
                )
        try:
            answer = msgspec.json.decode((folder / ANSWER).read_bytes(), type=kind | Trouble)
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
