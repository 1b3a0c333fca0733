"""The check of a large file by processes of its own: pieces of it, or the whole check beside a server.

Each process gets its order as one line of JSON on stdin, tells how far it is on stdout, and leaves what it found in a folder.
It ends when stdin does: so it never outlives the process that started it. Who is done with a piece of the file takes the next
one from a pipe that all share: so all are busy until the end, however late one starts and whatever else its processor does.
"""

import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from tunewright.datasets.checking.scan import MAX_ROWS, Depth, Limits, Scan, agreed_kind
from tunewright.datasets.checking.statistics import Statistics
from tunewright.datasets.lines import line_starts
from tunewright.datasets.report import MAX_WRITTEN, Report, Reporter, Tally
from tunewright.worker_environment import worker_environment

PROBLEMS, NUMBERS, FOUND = "problems-{}.jsonl", "numbers", "found.json"
PIECE_BYTES = 8 << 20
_MAX_PIECES = 4096
"""Their numbers fit into the pipe."""
_NUMBER = struct.Struct("=I")
_WAIT_S = 30


class CheckLimits(msgspec.Struct, frozen=True):
    """`scan.Limits` as plain values."""

    max_line_bytes: int
    min_training_rows: int


class Order(msgspec.Struct, kw_only=True):
    """What a process has to do. Without `cuts` the whole check, else the scan of pieces of the file, as they come.

    Piece i holds the bytes from `cuts[i]` to `cuts[i + 1]`; its number is read from the pipe `queue`.
    """

    path: str
    purpose: str
    folder: str
    limits: CheckLimits
    cuts: list[int] = []
    queue: int = -1
    depth: Depth = Depth()
    write_problems: bool = False
    problems_to: str | None = None
    statistics: bool = True
    against: str | None = None
    processes: int = 1


class Piece(msgspec.Struct, kw_only=True):
    """What the scan of a piece found, but for its problems and numbers, which stand in files of their own."""

    index: int
    tally: Tally
    kind: str | None
    mixed: bool
    overfull: bool
    lines: int
    rows: int
    numbers: int
    huge: dict[int, int]


class Found(msgspec.Struct, kw_only=True):
    """What a process found: its pieces, in order, and the statistics of all of them."""

    pieces: list[Piece]
    statistics: Statistics


def read_in_parts(
    scan: Scan, path: Path, purpose: str, begin: int, end: int, processes: int, progress: Callable[[int], None] | None
) -> bool:
    """Let `processes`, this one among them, scan the bytes from `begin` to `end` and put together in `scan` what they found.

    False, and nothing done, where the parts can't be told apart from the whole: rows of kinds that do not go together, too
    many lines. Raises ChildProcessError if a process died.
    """
    with path.open("rb") as stream:
        cuts = line_starts(stream, begin, end, min(_MAX_PIECES, max(processes, (end - begin) // PIECE_BYTES)))
    limits = CheckLimits(scan.limits.max_line_bytes, scan.limits.min_training_rows)
    with tempfile.TemporaryDirectory(prefix="tunewright-check-") as folder:
        folders = [Path(folder) / str(i) for i in range(processes)]
        orders: list[Order] = []
        queue = _filled(len(cuts) - 1)
        try:
            for own in folders:
                own.mkdir()
                order = Order(
                    path=str(path),
                    purpose=purpose,
                    folder=str(own),
                    limits=limits,
                    cuts=cuts,
                    queue=queue,
                    depth=scan.depth,
                    write_problems=scan.reporter.writes,
                )
                orders.append(order)
            run(orders[1:], progress, orders[0])
        finally:
            os.close(queue)
        found = [msgspec.json.decode((own / FOUND).read_bytes(), type=Found) for own in folders]
        pieces = sorted(
            ((piece, i) for i, part in enumerate(found) for piece in part.pieces), key=lambda it: it[0].index
        )
        if not _fit([piece for piece, _ in pieces]):
            return False
        numbers = [(own / NUMBERS).open("rb") for own in folders]
        try:
            for piece, i in pieces:
                _absorb(scan, folders[i], numbers[i], piece)
        finally:
            for stream in numbers:
                stream.close()
        for part in found:
            scan.statistics.absorb(part.statistics)
    return True


def _filled(pieces: int) -> int:
    """A pipe to read the numbers of the pieces from, by any process that inherits it."""
    queue, entrance = os.pipe()
    os.write(entrance, b"".join(map(_NUMBER.pack, range(pieces))))
    os.close(entrance)
    return queue


def _taken(queue: int) -> Iterator[int]:
    """The next piece that no other process has taken, until there are none."""
    while number := os.read(queue, _NUMBER.size):
        yield _NUMBER.unpack(number)[0]


def _fit(pieces: list[Piece]) -> bool:
    kind: str | None = None
    for piece in pieces:
        if piece.mixed or piece.overfull:
            return False
        if piece.kind is not None:
            kind = agreed_kind(kind, piece.kind)
            if kind is None:
                return False
    return sum(piece.lines for piece in pieces) <= MAX_ROWS


def _absorb(scan: Scan, folder: Path, numbers: IO[bytes], piece: Piece) -> None:
    """Add a piece; `numbers` stand where those of the piece begin."""
    written = folder / PROBLEMS.format(piece.index)
    scan.reporter.absorb(piece.tally, written if written.exists() else None, scan.lines)
    scan.fingerprints.huge |= {scan.lines + i: size for i, size in piece.huge.items()}
    scan.fingerprints.read(numbers, piece.numbers)  # type: ignore[arg-type]
    if piece.kind is not None:
        scan.kind = agreed_kind(scan.kind, piece.kind)
    scan.lines += piece.lines
    scan.rows += piece.rows


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


def scan_pieces(order: Order, tell: Callable[[int], None]) -> None:
    """Scan pieces of the file until all are taken, and leave what was found in the folder of the order.

    `tell` hears how many bytes are done.
    """
    folder = Path(order.folder)
    statistics = Statistics()
    pieces: list[Piece] = []
    done = written = 0
    with Path(order.path).open("rb") as stream, (folder / NUMBERS).open("wb") as numbers:
        for index in _taken(order.queue):
            begin, end = order.cuts[index], order.cuts[index + 1]
            writes = order.write_problems and written < MAX_WRITTEN  # more would not be among the first of the file
            with Reporter(folder / PROBLEMS.format(index) if writes else None) as reporter:
                scan = Scan(reporter, order.purpose, order.limits, order.depth, statistics)
                stream.seek(begin)
                scan.read(stream, end)
            tally = reporter.tally
            tally.truncated |= order.write_problems and tally.written < tally.errors + tally.warnings
            written += tally.written
            scan.fingerprints.write(numbers)
            pieces.append(_piece(index, tally, scan))
            done += end - begin
            tell(done)
    statistics.settle()
    (folder / FOUND).write_bytes(msgspec.json.encode(Found(pieces=pieces, statistics=statistics)))


def _piece(index: int, tally: Tally, scan: Scan) -> Piece:
    return Piece(
        index=index,
        tally=tally,
        kind=scan.kind,
        mixed=scan.mixed,
        overfull=scan.overfull,
        lines=scan.lines,
        rows=scan.rows,
        numbers=len(scan.fingerprints.rows),
        huge=scan.fingerprints.huge,
    )


def run(orders: list[Order], progress: Callable[[int], None] | None, own: Order | None = None) -> None:
    """Run a process for each order, all at once, and wait for them. Raises ChildProcessError if one of them failed.

    `own` are pieces that this process scans meanwhile. `progress` is told the sum of the bytes that all are done with.
    Whatever ends this call ends the processes.
    """
    children: list[subprocess.Popen[bytes]] = []
    news = _News(len(orders) + 1)
    try:
        for i, order in enumerate(orders):
            child = subprocess.Popen(
                [sys.executable, "-m", "tunewright.datasets.checking.check_part"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=worker_environment(),
                pass_fds=[order.queue] if order.cuts else [],
            )
            children.append(child)
            if child.stdin is None or child.stdout is None:
                raise ChildProcessError("no pipes")
            child.stdin.write(msgspec.json.encode(order) + b"\n")
            child.stdin.flush()
            threading.Thread(target=news.follow, args=(i, child.stdout), daemon=True).start()
        if own is not None:
            scan_pieces(own, lambda done: _pass_on(news.note(len(orders), done), progress))
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
            end_child(child)


def _pass_on(done: int, progress: Callable[[int], None] | None) -> None:
    if progress is not None:
        progress(done)


def end_child(child: "subprocess.Popen[bytes]") -> None:
    """Kill a process that was spoken to through pipes, if it lives, and close them."""
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
