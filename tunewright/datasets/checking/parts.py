"""The check of a large file by processes of its own: a stretch of lines each, or the whole check beside a server.

Each process gets its order as one line of JSON on stdin, tells how far it is on stdout, and leaves what it found in a folder.
It ends when stdin does: so it never outlives the process that started it.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import msgspec

from tunewright.datasets.checking.scan import MAX_ROWS, Depth, Limits, Scan, agreed_kind
from tunewright.datasets.checking.statistics import Statistics
from tunewright.datasets.lines import line_starts
from tunewright.datasets.report import Report, Reporter, Tally

PROBLEMS, NUMBERS, FOUND = "problems.jsonl", "numbers", "found.json"
_WAIT_S = 30
_START_BYTES = 16 << 20
"""What this process reads while the others start."""


class CheckLimits(msgspec.Struct, frozen=True):
    """`scan.Limits` as plain values."""

    max_line_bytes: int
    min_training_rows: int


class Order(msgspec.Struct, kw_only=True):
    """What a process has to do. Without `stretch` the whole check, else the scan of these bytes."""

    path: str
    purpose: str
    folder: str
    limits: CheckLimits
    stretch: tuple[int, int] | None = None
    depth: Depth = Depth()
    write_problems: bool = False
    problems_to: str | None = None
    statistics: bool = True
    against: str | None = None
    processes: int = 1


class Found(msgspec.Struct, kw_only=True):
    """What the scan of a stretch found, but for its problems and numbers, which stand in files of their own."""

    tally: Tally
    kind: str | None
    mixed: bool
    overfull: bool
    lines: int
    rows: int
    numbers: int
    huge: dict[int, int]
    statistics: Statistics


def read_in_parts(
    scan: Scan, path: Path, purpose: str, begin: int, end: int, processes: int, progress: Callable[[int], None] | None
) -> bool:
    """Let `processes`, this one among them, scan the bytes from `begin` to `end` and put together in `scan` what they found.

    False, and nothing done, where the parts can't be told apart from the whole: rows of kinds that do not go together, too
    many lines. Raises ChildProcessError if a process died.
    """
    ahead = min(_START_BYTES, (end - begin) // 4)
    with path.open("rb") as stream:
        cuts = [begin, *line_starts(stream, begin + ahead, end, processes)[1:]]
    limits = CheckLimits(scan.limits.max_line_bytes, scan.limits.min_training_rows)
    with tempfile.TemporaryDirectory(prefix="tunewright-check-") as folder:
        folders = []
        orders = []
        for i, (start, stop) in enumerate(pairwise(cuts)):
            own = Path(folder) / str(i)
            own.mkdir()
            folders.append(own)
            orders.append(
                Order(
                    path=str(path),
                    purpose=purpose,
                    folder=str(own),
                    limits=limits,
                    stretch=(start, stop),
                    depth=scan.depth,
                    write_problems=scan.reporter.writes,
                )
            )
        run(orders[1:], progress, orders[0])
        found = [msgspec.json.decode((own / FOUND).read_bytes(), type=Found) for own in folders]
        if not _fit(found):
            return False
        for own, part in zip(folders, found, strict=True):
            _absorb(scan, own, part)
    return True


def _fit(found: list[Found]) -> bool:
    kind: str | None = None
    for part in found:
        if part.mixed or part.overfull:
            return False
        if part.kind is not None:
            kind = agreed_kind(kind, part.kind)
            if kind is None:
                return False
    return sum(part.lines for part in found) <= MAX_ROWS


def _absorb(scan: Scan, folder: Path, part: Found) -> None:
    written = folder / PROBLEMS
    scan.reporter.absorb(part.tally, written if written.exists() else None, scan.lines)
    with (folder / NUMBERS).open("rb") as stream:
        scan.fingerprints.huge |= {scan.lines + i: size for i, size in part.huge.items()}
        scan.fingerprints.read(stream, part.numbers)
    if part.kind is not None:
        scan.kind = agreed_kind(scan.kind, part.kind)
    scan.lines += part.lines
    scan.rows += part.rows
    scan.statistics.absorb(part.statistics)


def run_in_child(
    path: Path,
    purpose: str,
    limits: Limits,
    problems_to: Path | None,
    statistics: bool,
    against: Path | None,
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> Report:
    """The report of `check.check` from a process of its own. Raises ChildProcessError if that died."""
    size = path.stat().st_size
    with tempfile.TemporaryDirectory(prefix="tunewright-check-") as folder:
        order = Order(
            path=str(path.absolute()),
            purpose=purpose,
            folder=folder,
            limits=CheckLimits(limits.max_line_bytes, limits.min_training_rows),
            problems_to=None if problems_to is None else str(problems_to.absolute()),
            statistics=statistics,
            against=None if against is None else str(against.absolute()),
            processes=processes,
        )
        run([order], None if progress is None else lambda done: progress(done, size))
        return msgspec.json.decode((Path(folder) / FOUND).read_bytes(), type=Report)


def scan_stretch(order: Order, tell: Callable[[int], None]) -> None:
    """Scan the stretch of an order, and leave what was found in its folder."""
    begin, end = order.stretch or (0, 0)
    folder = Path(order.folder)
    with Reporter(folder / PROBLEMS if order.write_problems else None) as reporter:
        scan = Scan(reporter, order.purpose, order.limits, order.depth)
        with Path(order.path).open("rb") as stream:
            stream.seek(begin)
            scan.read(stream, end, tell)
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


def run(orders: list[Order], progress: Callable[[int], None] | None, own: Order | None = None) -> None:
    """Run a process for each order, all at once, and wait for them. Raises ChildProcessError if one of them failed.

    `own` is a stretch that this process scans meanwhile. `progress` is told the sum of the bytes that all are done with.
    Whatever ends this call ends the processes.
    """
    from tunewright.settings import worker_environment  # the processes load this file too, and would wait for pydantic

    children: list[subprocess.Popen[bytes]] = []
    news = _News(len(orders) + 1)
    try:
        for i, order in enumerate(orders):
            child = subprocess.Popen(
                [sys.executable, "-m", "tunewright.datasets.checking.check_part"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=worker_environment(),
            )
            children.append(child)
            if child.stdin is None or child.stdout is None:
                raise ChildProcessError("no pipes")
            child.stdin.write(msgspec.json.encode(order) + b"\n")
            child.stdin.flush()
            threading.Thread(target=news.follow, args=(i, child.stdout), daemon=True).start()
        if own is not None:
            scan_stretch(own, lambda done: _pass_on(news.note(len(orders), done), progress))
        news.note(len(orders), None)
        for done in news:
            _pass_on(done, progress)
        for child in children:
            if child.wait(_WAIT_S):
                raise ChildProcessError(f"a process of the check ended with {child.returncode}")
    except BrokenPipeError:
        raise ChildProcessError("a process of the check ended at once") from None
    finally:
        for child in children:
            _end(child)


def _pass_on(done: int, progress: Callable[[int], None] | None) -> None:
    if progress is not None:
        progress(done)


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                pass


class _News:
    """What the processes say on stdout: iterating gives the sum of their bytes, until all of them have ended."""

    def __init__(self, count: int) -> None:
        self._done = [0] * count
        self._left = count
        self._changed = threading.Condition()
        self._fresh = False

    def follow(self, i: int, stream: IO[bytes]) -> None:
        """Read what process `i` says; ends with it."""
        for text in stream:
            self.note(i, int(text))
        self.note(i, None)

    def note(self, i: int, done: int | None) -> int:
        """Process `i` is done with so many bytes, or with all. The answer is the sum of all of them."""
        with self._changed:
            if done is None:
                self._left -= 1
            else:
                self._done[i] = done
                self._fresh = True
            self._changed.notify()
            return sum(self._done)

    def __iter__(self) -> Any:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._fresh or not self._left)
                if not self._fresh:
                    return
                self._fresh = False
                done = sum(self._done)
            yield done
