"""The long part of making a new version: a whole file is read and written again.

A large file gets a process of its own, `python -m tunewright.datasets.version_work`, because a thread would slow down every
other thread of the server. It takes its order as one line of JSON on stdin, answers with one on stdout, and ends with stdin.
"""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from tunewright.datasets.checking.parts import CheckLimits, end_child
from tunewright.datasets.mending.repair import Choice, repair
from tunewright.datasets.splitting import split
from tunewright.datasets.uploads import Watch
from tunewright.errors import InvalidRequest, StorageFull, Unavailable
from tunewright.i18n import mark
from tunewright.worker_environment import worker_environment

CHILD_FROM_BYTES = 4 << 20
_LOOK_EVERY_S = 0.5
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Order(msgspec.Struct, kw_only=True):
    """What to make of `source`: with `choice` a repair (one target), else a split (training and validation)."""

    source: str
    targets: list[str]
    purpose: str
    limits: CheckLimits
    choice: Choice | None = None
    ratio: float = 0.0
    seed: int = 0


class Answer(msgspec.Struct, kw_only=True):
    """`counts` as the repair or the split gives them, or the error that it raised."""

    counts: list[int] = []
    full: bool = False
    code: str = ""
    message: str = ""
    values: dict[str, Any] = {}


def run(order: Order, watch: Watch | None) -> list[int]:
    """Write the targets; the counts of `Repaired` or `Split`. What `watch` raises ends the work.

    Raises InvalidRequest (what `split` raises), StorageFull(`insufficient_storage`), Unavailable(`version_failed`).
    """
    size = os.stat(order.source).st_size
    answer = _answer(order) if size < CHILD_FROM_BYTES else _from_child(order, size, watch)
    if answer.full:
        raise StorageFull("insufficient_storage", mark("The disk of this server has no room for the file."))
    if answer.code:
        raise InvalidRequest(answer.code, answer.message, **answer.values)
    return answer.counts


def main() -> None:
    """Do what the first line of stdin says."""
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.buffer.write(msgspec.json.encode(_answer(order)))
    sys.stdout.buffer.flush()


def _end_with_parent() -> NoReturn:
    while os.read(sys.stdin.fileno(), 4096):  # not the buffered stream: its lock would abort the end of this process
        pass
    os._exit(1)


def _answer(order: Order) -> Answer:
    source, targets = Path(order.source), [Path(target) for target in order.targets]
    try:
        if order.choice is not None:
            return Answer(counts=list(repair(source, targets[0], order.purpose, order.limits, order.choice)))
        made = split(source, *targets, ratio=order.ratio, seed=order.seed, max_line_bytes=order.limits.max_line_bytes)
        return Answer(counts=list(made))
    except InvalidRequest as error:
        return Answer(code=error.code, message=error.message, values=error.values)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return Answer(full=True)


def _from_child(order: Order, size: int, watch: Watch | None) -> Answer:
    child = subprocess.Popen(
        [sys.executable, "-m", "tunewright.datasets.version_work"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=worker_environment(),
    )
    try:
        if child.stdin is None or child.stdout is None:
            raise _failed()
        child.stdin.write(msgspec.json.encode(order) + b"\n")
        child.stdin.flush()
        while not _ended(child):
            if watch is not None:
                watch(0, size)
        if child.returncode:
            raise _failed()
        return msgspec.json.decode(child.stdout.read(), type=Answer)
    except BrokenPipeError:
        raise _failed() from None
    finally:
        end_child(child)


def _ended(child: "subprocess.Popen[bytes]") -> bool:
    try:
        child.wait(_LOOK_EVERY_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _failed() -> Unavailable:
    return Unavailable("version_failed", mark("The new version could not be made now; try again."))


if __name__ == "__main__":
    main()
