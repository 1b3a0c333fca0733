"""`python -m tunewright.datasets.checking.check_part`: a process of the check; `parts.py` starts it and gives it work."""

import gc
import os
import sys
import threading
from pathlib import Path

import msgspec

from tunewright.datasets.checking.check import check
from tunewright.datasets.checking.parts import FOUND, NUMBERS, PROBLEMS, Found, Order
from tunewright.datasets.checking.scan import Scan
from tunewright.datasets.report import Reporter


def main() -> None:
    """Do what the first line of stdin says; end at once when stdin ends."""
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what is loaded by now stays
    if order.stretch is None:
        _check(order)
    else:
        _scan(order, *order.stretch)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not the buffered stream: its lock would abort the end of this process
        pass
    os._exit(1)


def _tell(done: int) -> None:
    sys.stdout.write(f"{done}\n")
    sys.stdout.flush()


def _check(order: Order) -> None:
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


def _scan(order: Order, begin: int, end: int) -> None:
    folder = Path(order.folder)
    with Reporter(folder / PROBLEMS if order.write_problems else None) as reporter:
        scan = Scan(reporter, order.purpose, order.limits, order.depth)
        with Path(order.path).open("rb") as stream:
            stream.seek(begin)
            scan.read(stream, end, _tell)
    scan.statistics.settle()
    with (folder / NUMBERS).open("wb") as stream:
        scan.fingerprints.write(stream)
    found = Found(
        tally=reporter.tally,
        kind=scan.kind,
        mixed=scan.mixed,
        overfull=scan.overfull,
        lines=scan.lines,
        rows=scan.rows,
        numbers=len(scan.fingerprints.rows),
        huge=scan.fingerprints.huge,
        statistics=scan.statistics,
    )
    (folder / FOUND).write_bytes(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
