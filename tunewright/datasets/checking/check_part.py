"""`python -m tunewright.datasets.checking.check_part`: a process of the check; `parts.py` starts it and gives it work."""

import gc
import os
import sys
import threading
from pathlib import Path

import msgspec

from tunewright.datasets.checking.parts import FOUND, Order, scan_pieces


def main() -> None:
    """Do what the first line of stdin says; end at once when stdin ends."""
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what is loaded by now stays
    if order.cuts:
        scan_pieces(order, _tell)
    else:
        _check(order)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not the buffered stream: its lock would abort the end of this process
        pass
    os._exit(1)


def _tell(done: int) -> None:
    sys.stdout.write(f"{done}\n")
    sys.stdout.flush()


def _check(order: Order) -> None:
    from tunewright.datasets.checking.check import check  # those who scan pieces need not wait for it

    report = check(
        Path(order.path),
        order.purpose,
        order.limits,
        problems_to=None if order.problems_to is None else Path(order.problems_to),
        statistics=order.statistics,
        against=None if order.against is None else Path(order.against),
        processes=order.processes,
        progress=lambda done, total: _tell(done),
    )
    (Path(order.folder) / FOUND).write_bytes(msgspec.json.encode(report))


if __name__ == "__main__":
    main()
